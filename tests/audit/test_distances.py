"""Known answers of distances, and what is left out by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffkit.audit.distances import DISTANCES, Ruler
from diffkit.models.latent_diffusion import LatentDiffusion
from tests.audit.pictures import pixels


@pytest.fixture(scope="module")
def ruler(tiny_sd: Path) -> Ruler:
    return Ruler(LatentDiffusion.load(tiny_sd))


def test_equal_pictures_are_exactly_no_distance_apart(ruler: Ruler) -> None:
    """1 - a.b of a rounded unit vector with itself was -9e-8, and its ratio to noise nonsense."""
    both = torch.stack([pixels(0), pixels(1)])
    found = ruler.distances(ruler.see(both), ruler.see(both.clone()))
    assert found.pop("psnr").tolist() == [100, 100]
    assert found.keys() <= DISTANCES.keys()
    assert all(value.tolist() == [0, 0] for value in found.values()), found


def test_cosine_distances_are_one_minus_the_cosine(ruler: Ruler) -> None:
    a, b = (ruler.see(pixels(i)[None]) for i in range(2))
    found = ruler.distances(a, b)
    for name, mine, other in (
        ("feature_distance", a.features, b.features),
        ("image_distance", a.embeddings, b.embeddings),
    ):
        expected = 1 - torch.cosine_similarity(mine, other, dim=1)
        assert torch.allclose(found[name], expected, atol=1e-6)


def test_the_latent_distance_is_the_root_mean_square_of_the_difference(ruler: Ruler) -> None:
    a, b = (ruler.see(pixels(i)[None]) for i in range(2))
    expected = (a.latents - b.latents).square().mean().sqrt()
    assert float(ruler.distances(a, b)["latent_l2"]) == pytest.approx(float(expected))


def test_psnr_is_that_of_floats(ruler: Ruler) -> None:
    """10 levels everywhere: 20 log10(255 / 10) dB; on uint8 the difference 0 - 10 would wrap."""
    low = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    for other in (low + 10, low - 10):
        value = ruler.distances(ruler.see(low), ruler.see(other))["psnr"]
        assert float(value) == pytest.approx(28.13, abs=0.01)


def test_a_batch_is_measured_row_by_row(ruler: Ruler) -> None:
    a, b = (torch.stack([pixels(i), pixels(i + 1)]) for i in (0, 2))
    both = ruler.distances(ruler.see(a), ruler.see(b))
    for row in range(2):
        one = ruler.distances(ruler.see(a[row : row + 1]), ruler.see(b[row : row + 1]))
        for name, value in both.items():
            assert float(value[row]) == pytest.approx(float(one[name]), rel=1e-4, abs=1e-5)


def test_networks_are_named_truthfully(ruler: Ruler) -> None:
    labels = [ruler.label(name) for name in DISTANCES if name not in ruler.skipped]
    assert "1 − image cosine (diffkit text-image scorer)" in labels
    assert "feature distance (diffkit feature network)" in labels
    assert not any("CLIP" in label for label in labels)


def test_text_alignment_is_a_cosine(ruler: Ruler) -> None:
    seen = ruler.see(torch.stack([pixels(0), pixels(1)]))
    text = ruler.tools.scorer.embed_texts(["a red apple"])[0]
    expected = torch.cosine_similarity(seen.embeddings, text[None].float().cpu(), dim=1)
    assert torch.allclose(ruler.alignment(seen, "a red apple"), expected, atol=1e-6)


def test_large_pictures_have_ms_ssim_and_small_ones_do_not(ruler: Ruler) -> None:
    small, large = ruler.names(64, 500), ruler.names(176, 500)
    assert set(large) - set(small) == {"ms_ssim"}
