import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffkit.errors import UserError
from diffkit.protection.transforms import TRANSFORMS, parse_transforms
from diffkit.randomness import integers, normal, uniform


def pictures(n: int = 2, height: int = 24, width: int = 40) -> torch.Tensor:
    levels = integers(0, 256, (n, 3, height // 4, width // 4), 3).float()
    return torch.nn.functional.interpolate(levels, (height, width), mode="bilinear") / 127.5 - 1


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_row_depends_on_its_own_address_and_has_a_gradient(name: str) -> None:
    transform = TRANSFORMS[name]
    x = pictures().requires_grad_()
    y = transform(x, [5, 6], 2, 1)
    assert y.shape == x.shape and y.dtype == torch.float32
    y.sin().sum().backward()
    assert x.grad is not None and (x.grad != 0).all()
    alone = transform(x[1:].detach(), [6], 2, 1)
    assert torch.equal(alone, y[1:].detach())
    if name != "identity":
        others = [transform(x[1:], [6], step, draw) for step, draw in ((2, 2), (3, 1))]
        assert not any(torch.equal(other, alone) for other in others)
    with pytest.raises(ValueError, match="1 seeds for 2"):
        transform(x, [5], 0)


def test_jpeg_is_the_file_with_the_gradient_of_the_identity() -> None:
    x = pictures(1).requires_grad_()
    y = TRANSFORMS["jpeg"](x, [9], 4)
    (gradient,) = torch.autograd.grad((2 * y).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2.0))
    levels = ((x.detach()[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    quality = int(integers(60, 96, (), 9, 4, 0, "jpeg"))
    Image.fromarray(levels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    read = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    torch.testing.assert_close((y.detach()[0] + 1) * 127.5, read.float(), atol=1e-3, rtol=0)


def test_constants_survive_and_noise_has_its_size() -> None:
    flat = torch.full((1, 3, 16, 32), 0.5)
    for name in ("resize", "blur"):
        torch.testing.assert_close(TRANSFORMS[name](flat, [1], 0), flat)
    noise = TRANSFORMS["noise"](flat, [1], 0) - flat
    sigma = 0.1 * uniform((), 1, 0, 0, "noise", "sigma")
    torch.testing.assert_close(noise, sigma * normal((1, 3, 16, 32), 1, 0, 0, "noise"))


def test_blur_is_the_gaussian_of_its_sigma() -> None:
    dot = torch.zeros((1, 3, 31, 31))
    dot[..., 15, 15] = 1
    y = TRANSFORMS["blur"](dot, [2], 7)
    sigma = 0.3 + 1.2 * float(uniform((), 2, 7, 0, "blur"))
    expected = float(torch.exp(torch.tensor(-1 / (2 * sigma**2))))
    assert float(y[0, 0, 15, 16] / y[0, 0, 15, 15]) == pytest.approx(expected, rel=1e-4)
    assert float(y[0, 1, 14, 15] / y[0, 1, 15, 15]) == pytest.approx(expected, rel=1e-4)
    assert float(y[0, 2].sum()) == pytest.approx(1, rel=1e-5)


def test_parse() -> None:
    assert parse_transforms("jpeg, resize") == ("jpeg", "resize")
    assert parse_transforms("") == ()
    with pytest.raises(UserError, match="unknown"):
        parse_transforms("jpeg,webp")
    with pytest.raises(UserError, match="twice"):
        parse_transforms("blur,blur")
