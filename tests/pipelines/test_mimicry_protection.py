"""The pipeline is `protect` in another dress: same bytes, for models of every kind of loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffkit.pipelines import mimicry_protection
from diffkit.pipelines.mimicry_protection import MimicryProtectionPipeline
from diffusers import DiffusionPipeline
from PIL import Image

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.inputs import image_seed
from diffkit.protection.joint import protect_set
from diffkit.protection.protect import protect
from diffkit.protection.settings import Settings
from tests.protection.gallery import noise

ROOT = Path(__file__).parents[2]
PICTURE = Image.fromarray(noise(0, 32, wide=True))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def planes(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def expected(folder: Path, settings: Settings) -> torch.Tensor:
    """What `protect` makes of the picture."""
    pixels = planes(PICTURE).contiguous()
    seed = image_seed(settings.seed, pixels.numpy().tobytes())
    model = LatentDiffusion.load(folder)
    return protect(pixels[None], model, settings, seeds=[seed])[0].pixels


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("loading", ["from_pretrained", "from_pipe"])
def test_equals_protect(tiny_folder: Callable[[str], Path], name: str, loading: str) -> None:
    folder = tiny_folder(name)
    source = folder
    if loading == "from_pipe":
        source = DiffusionPipeline.from_pretrained(folder)
    pipeline = quiet(getattr(MimicryProtectionPipeline, loading)(source))
    result = pipeline(PICTURE, "sdst-", "low", steps=2, prompt="a cat", seed=3)
    settings = Settings("sdst-", levels=4, steps=2, prompt="a cat", seed=3)
    assert torch.equal(planes(result.images[0]), expected(folder, settings))
    assert result.stats[0]["steps"] == 2 and 0 < result.stats[0]["max_change"] <= 4


def test_loads_as_custom_pipeline(tiny_sd: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(
        tiny_sd,
        custom_pipeline=str(ROOT / "pipelines" / "mimicry_protection.py"),
        trust_remote_code=True,
    )
    assert type(pipeline).__name__ == "MimicryProtectionPipeline"
    (image,) = quiet(pipeline)(PICTURE, steps=1).images
    assert torch.equal(planes(image), expected(tiny_sd, Settings("texture", steps=1)))


@pytest.fixture(scope="module")
def pipeline(tiny_sd: Path) -> Any:
    return quiet(MimicryProtectionPipeline.from_pretrained(tiny_sd))


def test_every_kind_of_input_and_output(pipeline: Any) -> None:
    pixels = planes(PICTURE)
    array = np.asarray(PICTURE)
    wanted = pipeline(PICTURE, steps=1, output_type="uint8").images[0]
    for image in (array, array / 255.0, pixels, pixels.float() / 255, pixels[None], [PICTURE]):
        assert torch.equal(pipeline(image, steps=1, output_type="uint8").images[0], wanted)
    for kind in ("np", "pt"):
        (image,) = pipeline(PICTURE, steps=1, output_type=kind).images
        shown = torch.as_tensor(image)
        shown = shown.permute(2, 0, 1) if kind == "np" else shown
        assert torch.equal((shown * 255).round().to(torch.uint8), wanted)
    images, stats = pipeline([PICTURE, PICTURE], steps=1, return_dict=False)
    assert len(images) == len(stats) == 2 and images[0].tobytes() == images[1].tobytes()


def test_alpha_grey_and_masks(pipeline: Any) -> None:
    clear = Image.fromarray(noise(2, 32, 4))
    grey = Image.fromarray(noise(4, 24, 1)[..., 0])
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:16] = 255
    one, two = pipeline([clear, grey], steps=1).images
    assert (one.mode, one.size, two.mode, two.size) == ("RGBA", (32, 32), "L", (24, 24))
    assert (np.asarray(one)[..., 3] == np.asarray(clear)[..., 3]).all()
    square = Image.fromarray(noise(5, 32))
    (kept,) = pipeline(square, steps=1, mask=Image.fromarray(mask)).images
    change = np.asarray(kept).astype(int) - np.asarray(square)
    assert not change[16:].any() and change[:16].any()


def test_seeds(pipeline: Any) -> None:
    """The random start is the seed's; a generator gives another one at every call."""

    def made(**options: Any) -> torch.Tensor:
        found: torch.Tensor = pipeline(PICTURE, steps=0, output_type="uint8", **options).images[0]
        return found

    assert torch.equal(made(seed=1), made(seed=1))
    assert not torch.equal(made(seed=1), made(seed=2))
    generator = torch.Generator().manual_seed(0)
    first, second = made(generator=generator), made(generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, made(generator=torch.Generator().manual_seed(0)))


def test_sets_are_protected_together(pipeline: Any, tiny_sd: Path) -> None:
    pictures = [Image.fromarray(noise(i, 32)) for i in range(2)]
    options: dict[str, Any] = {"steps": 2, "rounds": 2, "train_steps": 1}
    result = pipeline(pictures, "ace", output_type="uint8", **options)
    pixels = [planes(picture).contiguous() for picture in pictures]
    seeds = [image_seed(0, one.numpy().tobytes()) for one in pixels]
    model = LatentDiffusion.load(tiny_sd)
    direct = protect_set(pixels, model, Settings("ace", **options), seeds=seeds)
    for image, one in zip(result.images, direct, strict=True):
        assert torch.equal(image, one.pixels)


def test_further_models_clean_pictures_and_memory(
    tiny_folder: Callable[[str], Path], pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of that could be said to the pipeline, and it ended where memory ran out."""
    other = DiffusionPipeline.from_pretrained(tiny_folder("sdxl"))
    alone = pipeline(PICTURE, steps=1, output_type="uint8").images[0]
    both = pipeline(PICTURE, steps=1, output_type="uint8", ensemble=[other]).images[0]
    assert not torch.equal(alone, both)
    options: dict[str, Any] = {"steps": 1, "train_steps": 1, "output_type": "uint8"}
    own = pipeline(PICTURE, "fsmg", **options).images[0]
    others = pipeline(PICTURE, "fsmg", clean=[Image.fromarray(noise(3, 24))], **options).images[0]
    assert not torch.equal(own, others)

    tried = []

    def short_of_memory(pixels: torch.Tensor, *rest: Any, **options: Any) -> Any:
        tried.append((len(pixels), options["lean"]))
        if not options["lean"] or len(pixels) > 1:
            raise MemoryError
        return protect(pixels, *rest, **options)

    monkeypatch.setattr(mimicry_protection, "protect", short_of_memory)
    pair = pipeline([PICTURE, PICTURE], steps=1, batch_size=2, output_type="uint8").images
    assert tried == [(2, False), (2, True), (1, True), (1, True)]
    assert (pair[0] == alone).float().mean() > 0.99 and torch.equal(*pair)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"clean": PICTURE}, "clean: does nothing for the method texture"),
        ({"method": "advdm", "ensemble": ["x"]}, "ensemble: does nothing"),
        ({"method": "ace", "ensemble": ["x"]}, "ensemble: does nothing for the method ace"),
        ({"method": "advdm", "clean": PICTURE}, "clean: does nothing"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"output_type": "jpeg"}, "output_type 'jpeg'"),
        ({"strength": "huge"}, "strength 'huge'"),
        ({"strength": 33}, "33"),
        ({"method": "magic"}, "magic"),
        ({"mask": [PICTURE, PICTURE]}, "2 for 1 pictures"),
        ({"image": torch.zeros(4, 8, 8)}, "4 channels"),
        ({"image": np.full((8, 8, 3), 2.0)}, "floats must be in"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.int64)}, "int64"),
    ],
)
def test_wrong_arguments_are_named(pipeline: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        pipeline(**{"image": PICTURE, "steps": 1, **options})
