import pytest
import torch

from diffkit.protection.contrast import contrast_weight


def test_known_answers() -> None:
    flat = torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)
    assert torch.equal(contrast_weight(flat), torch.full((1, 1, 16, 16), 0.25))
    # Columns of 100 and 112: among 7 columns 4 of one and 3 of the other, s = 12 sqrt(12)/7.
    stripes = torch.full((1, 1, 16, 16), 100, dtype=torch.uint8)
    stripes[..., 1::2] = 112
    weight = contrast_weight(stripes)
    assert weight[0, 0, 8, 8].item() == pytest.approx(12**0.5 / 7, rel=1e-5)
    strong = torch.zeros((1, 1, 16, 16), dtype=torch.uint8)
    strong[..., ::2] = 255
    assert torch.equal(contrast_weight(strong), torch.ones((1, 1, 16, 16)))


def test_luma_of_grey_is_grey_and_edges_are_mirrored() -> None:
    grey = torch.randint(0, 40, (2, 1, 9, 11), dtype=torch.uint8)
    weight = contrast_weight(grey)
    assert weight.shape == (2, 1, 9, 11) and weight.dtype == torch.float32
    assert weight.min() >= 0.25 and weight.max() <= 1
    torch.testing.assert_close(contrast_weight(grey.expand(2, 3, 9, 11)), weight)
    padded = torch.nn.functional.pad(grey.float(), (3, 3, 3, 3), mode="reflect")
    s = padded[0, 0, :7, :7].std(correction=0)
    torch.testing.assert_close(weight[0, 0, 0, 0], (s / 12).clamp(0.25, 1))


def test_small_pictures_and_wrong_channels() -> None:
    assert contrast_weight(torch.zeros((1, 3, 2, 5), dtype=torch.uint8)).shape == (1, 1, 2, 5)
    with pytest.raises(ValueError, match="luma"):
        contrast_weight(torch.zeros((1, 4, 8, 8), dtype=torch.uint8))
