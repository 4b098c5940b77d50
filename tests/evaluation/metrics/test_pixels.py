"""Distances between two pictures: known answers, and the packages' own numbers."""

from __future__ import annotations

import lpips
import pytest
import torch
import torch.nn.functional as F
import torchvision

from diffkit.errors import UserError
from diffkit.evaluation.metrics.base import SampleBatch
from diffkit.evaluation.metrics.registry import METRICS
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.evaluation.pictures import to_float
from diffkit.perceptual.latent_lpips_io import load_latent_lpips
from diffkit.randomness import integers

PIXELS = integers(0, 256, (3, 3, 32, 32), 0, "pictures").to(torch.uint8)


def values(name: str, images, other, tools=None) -> torch.Tensor:
    found = METRICS[name].run(SampleBatch(images, other=other), tools or Toolbox())
    assert found.shape == (len(images),) and found.dtype == torch.float32
    return found


def test_psnr_of_one_level():
    """Off by e levels everywhere: 20 log10(255 / e) dB, 48.13 for one level."""
    low = PIXELS.clamp(max=200)
    for levels, expected in ((1, 48.1308), (10, 28.1308)):
        found = values("psnr", to_float(low + levels), to_float(low))
        torch.testing.assert_close(found, torch.full((3,), expected), atol=1e-3, rtol=0)


def test_psnr_of_equal_pictures_is_the_ceiling():
    assert values("psnr", to_float(PIXELS), to_float(PIXELS)).tolist() == [100.0] * 3


def test_ssim_of_equal_and_of_plain_pictures():
    """Plain pictures of grey a and b in [0, 1]: (2 a b + C1) / (a^2 + b^2 + C1), C1 = 0.01^2."""
    images = to_float(PIXELS)
    torch.testing.assert_close(values("ssim", images, images), torch.ones(3), atol=1e-6, rtol=0)
    a, b = 51 / 255, 153 / 255
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    found = values("ssim", torch.full((1, 3, 32, 32), 2 * a - 1), torch.full_like(images[:1], 0.2))
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_ssim_falls_with_noise():
    images = to_float(PIXELS // 4 + 96)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    scores = [values("ssim", images + s * noise, images).mean() for s in (0.01, 0.05, 0.2)]
    assert scores[0] > scores[1] > scores[2]


def test_high_frequencies_fall_with_blur():
    sharp = to_float(PIXELS)
    blurred = torchvision.transforms.functional.gaussian_blur(sharp, 5)
    assert (values("high_frequency", sharp, None) > 0.5).all()
    assert (values("high_frequency", blurred, None) < 0.1).all()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file of random weights of torchvision's alexnet, since the true ones need a download."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    features = torchvision.models.AlexNet().features
    torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, file)
    return file


def test_lpips_is_the_packages(backbone):
    """The given backbone under the package's own linear layers."""
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(backbone, weights_only=True)
    for key, value in theirs.net.state_dict().items():
        value.copy_(state["features." + key.split(".", 1)[1]])
    tools = Toolbox(lpips=f"alex:{backbone}")
    images, other = to_float(PIXELS), to_float(255 - PIXELS)
    found = values("lpips", images, other, tools)
    with torch.no_grad():
        torch.testing.assert_close(found, theirs(images, other).flatten())
    assert (found > 0).all()
    assert values("lpips", images, images, tools).tolist() == [0, 0, 0]
    assert METRICS["lpips"].title(None, tools).endswith("(lpips 0.1, alexnet)")


def test_lpips_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"not on this machine.*alex:PATH"):
        Toolbox().lpips  # noqa: B018
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="are not weights of torchvision's alexnet"):
        Toolbox(lpips=f"alex:{tmp_path / 'w.pth'}").lpips  # noqa: B018
    with pytest.raises(UserError, match="lpips 'squeeze': unknown"):
        Toolbox(lpips="squeeze").lpips  # noqa: B018


def test_latent_lpips_needs_no_download():
    """Of the latents that the embedded autoencoder encodes; odd sides are continued."""
    tools = Toolbox()
    images, other = to_float(PIXELS), to_float(255 - PIXELS)
    found = values("latent_lpips", images, other, tools)
    network, codec = load_latent_lpips(), tools.latent_lpips.codec
    with torch.no_grad():
        expected = network.distance(codec.encode(images), codec.encode(other))
        continued = F.pad(images[..., :30, :29], (0, 3, 0, 2), "replicate")
        odd = tools.latent_lpips(images[..., :30, :29], continued[..., :30, :29])
    torch.testing.assert_close(found, expected)
    assert torch.equal(odd, torch.zeros(3))
    assert (found > 0).all()
    assert values("latent_lpips", images, images, tools).tolist() == [0, 0, 0]
    assert METRICS["latent_lpips"].title(None, tools).endswith("(diffkit embedded latents)")
