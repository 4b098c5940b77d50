"""CLIP, HPS v2.1 and the aesthetic predictors, on a tiny model of open_clip's own class."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.transforms import InterpolationMode, v2

from diffkit.errors import UserError
from diffkit.models import clip
from diffkit.models.clip import CLIP_RULE, prepare
from diffkit.randomness import normal, uniform
from diffkit.rewards.aesthetic import _published, head_of_weights
from diffkit.rewards.clip import hps
from diffkit.rewards.places import find_weights
from diffkit.rewards.spec import load_reward

NAME = "tiny-reward-clip"
PROMPTS = ["a dog", "a cat on a mat"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(file of random weights, the model) of a CLIP with 32 pixels and vectors of length 12."""
    folder = tmp_path_factory.mktemp("clip")
    tower = {"layers": 1, "width": 16}
    config = {
        "embed_dim": 12,
        "vision_cfg": tower | {"image_size": 32, "patch_size": 16, "head_width": 8},
        "text_cfg": tower | {"context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    (folder / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(NAME, pretrained=None).eval()
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors", model


def pictures(height: int = 48, width: int = 80) -> torch.Tensor:
    return 2 * uniform((2, 3, height, width), "clip pictures") - 1


def by_hand(model, images: torch.Tensor) -> torch.Tensor:
    """Unit image vectors, the preprocessing written with torchvision's transforms."""
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    steps = [
        v2.Resize(32, InterpolationMode.BICUBIC, antialias=True),
        v2.CenterCrop(32),
        v2.Lambda(lambda x: x.clamp(0, 1)),
        v2.Normalize(mean, std),
    ]
    features = model.encode_image(v2.Compose(steps)((images + 1) / 2))
    return features / features.norm(dim=-1, keepdim=True)


def test_clip_is_the_cosine_after_resizing_and_cutting(tiny):
    file, model = tiny
    reward = load_reward(f"clip:{NAME}:{file}")
    with torch.no_grad():
        text = F.normalize(model.encode_text(open_clip.get_tokenizer(NAME)(PROMPTS)), dim=-1)
        expected = (by_hand(model, pictures()) * text).sum(-1)
        torch.testing.assert_close(reward(pictures(), PROMPTS), expected)
    assert reward.logit_scale == pytest.approx(1 / 0.07)
    assert reward.name == "clip" and "32x32" in reward.resize


def test_the_gradient_of_clip_is_in_the_pictures_alone(tiny):
    file, _ = tiny
    reward = load_reward(f"clip:{NAME}:{file}")
    images = pictures(32, 32).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.abs().max() > 0
    assert all(not p.requires_grad and p.grad is None for p in reward.networks[0].parameters())


def test_half_the_bits_are_nearly_the_same_reward(tiny):
    file, _ = tiny
    whole = load_reward(f"clip:{NAME}:{file}")
    half = load_reward(f"clip:{NAME}:{file}", dtype=torch.bfloat16)
    found = half(pictures(), PROMPTS)
    assert found.dtype == torch.float32 and half.fingerprint() != whole.fingerprint()
    torch.testing.assert_close(found, whole(pictures(), PROMPTS), atol=0.03, rtol=0)


def test_known_answers_of_the_preprocessing():
    """A flat picture is (v - mean) / std; of a wide one the middle square is seen."""
    flat = prepare(torch.full((1, 3, 20, 50), 0.2), (32, 32), CLIP_RULE)
    mean, std = (torch.tensor(CLIP_RULE[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(flat, ((0.6 - mean) / std).expand(1, 3, 32, 32))
    sides = torch.ones(1, 3, 32, 96)
    sides[..., 32:64] = -1
    seen = prepare(sides, (32, 32), CLIP_RULE) * std + mean
    assert seen[..., 2:-2].abs().max() < 1e-6


def test_hps_is_a_clip_under_the_key_state_dict(tiny, tmp_path):
    file, model = tiny
    torch.save(
        {"state_dict": {k: v.half() for k, v in model.state_dict().items()}, "epoch": 1},
        tmp_path / "HPS_v2.1_compressed.pt",
    )
    found = hps(
        find_weights("hpsv2", str(tmp_path), ["HPS_v2.1_compressed.pt"]),
        CPU,
        torch.float32,
        arch=NAME,
    )
    plain = load_reward(f"clip:{NAME}:{file}")
    torch.testing.assert_close(
        found(pictures(), PROMPTS), plain(pictures(), PROMPTS), atol=1e-3, rtol=0
    )
    assert (found.name, found.label) == ("hpsv2", "HPS v2.1")
    assert found.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hpsv2:/nowhere/x.pt", "hpsv2: /nowhere/x.pt is no file, folder or hub id"),
        ("hpsv2:{empty}", "holds none of HPS_v2.1"),
        ("hpsv2", "could not be fetched from xswu/HPSv2: .*Give them as a file: hpsv2:PATH"),
        ("aesthetic", "give the file of its head"),
        ("aesthetic:{head}", "name the CLIP of .*length 12"),
        ("clip:{head}", "name the architecture"),
    ],
)
def test_places_without_weights_are_refused(spec, message, tmp_path):
    """The suite is offline, so that nothing comes from the hub."""
    (tmp_path / "empty").mkdir()
    torch.save({"weight": torch.zeros(1, 12), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    places = {"empty": tmp_path / "empty", "head": tmp_path / "head.pth"}
    with pytest.raises(UserError, match=message):
        load_reward(spec.format(**places))


def test_aesthetic_heads_give_one_value_a_picture(tiny, tmp_path):
    """Version 1, a linear map, and version 2, five layers with nothing between, and their mean."""
    file, model = tiny
    first = {"weight": normal((1, 12), "w"), "bias": normal((1,), "b")}
    sizes = ((0, 12, 8), (2, 8, 4), (4, 4, 3), (6, 3, 2), (7, 2, 1))
    second = {f"layers.{i}.weight": normal((b, a), i, "w") for i, a, b in sizes}
    second |= {f"layers.{i}.bias": normal((b,), i, "b") for i, a, b in sizes}
    torch.save(first, tmp_path / "v1.pth")
    save_file(second, tmp_path / "sac+logos.safetensors")
    clip = f"+{NAME}:{file}"
    specs = [f"{tmp_path}/v1.pth{clip}", f"{tmp_path}/sac+logos.safetensors{clip}"]
    with torch.no_grad():
        features = by_hand(model, pictures())
        linear = (features @ first["weight"].T + first["bias"])[:, 0]
        deep = features
        for i, *_ in sizes:
            deep = deep @ second[f"layers.{i}.weight"].T + second[f"layers.{i}.bias"]
    expected = [linear, deep[:, 0], (linear + deep[:, 0]) / 2]
    for spec, value in zip([*specs, "++".join(specs)], expected, strict=True):
        reward = load_reward(f"aesthetic:{spec}")
        torch.testing.assert_close(reward(pictures(), PROMPTS), value)
    assert reward.logit_scale is None and reward.embed_prompts(PROMPTS).shape == (2, 0)
    images = pictures().requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.abs().max() > 0


def test_published_heads_name_their_towers():
    names = (
        "sa_0_4_vit_l_14_linear.pth",
        "sa_0_4_vit_b_16_linear.pth",
        "sa_0_4_vit_b_32_linear.pth",
    )
    towers = ["ViT-L-14:openai", "ViT-B-16:openai", "ViT-B-32:openai"]
    assert [_published(name) for name in names] == towers
    assert _published("sac+logos+ava1-l14-linearMSE.pth") == towers[0]
    assert _published("head.pth") == ""


@pytest.mark.parametrize(
    "state",
    [
        {"weight": torch.zeros(1, 12)},
        {"weight": torch.zeros(2, 12), "bias": torch.zeros(2)},
        {
            "layers.0.weight": torch.zeros(3, 12),
            "layers.0.bias": torch.zeros(3),
            "layers.1.weight": torch.zeros(1, 4),
            "layers.1.bias": torch.zeros(1),
        },
        {},
    ],
)
def test_other_heads_are_refused(state):
    with pytest.raises(UserError, match="head.pth: is no head of an aesthetic predictor"):
        head_of_weights(state, "head.pth")


def test_a_missing_package_is_named_with_the_line_that_installs_it():
    from diffkit.models.named_weights import optional_module

    with pytest.raises(
        UserError, match=r'hpsv2 needs the package .*pip install "diffkit\[rewards\]"'
    ):
        optional_module("no_such_package.part", "rewards", "the reward hpsv2")


@pytest.mark.parametrize("quick", [True, False])
def test_weights_of_a_tag_are_computed_with_their_own_gelu(tiny, monkeypatch, quick):
    """open_clip only warns where a tag's weights were trained with QuickGELU; all numbers of
    clip:ViT-B-32:openai and of the aesthetic heads were of another function."""
    file, model = tiny
    tags = {NAME: {"tag": {"url": "somewhere", "quick_gelu": quick}}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", tags)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(file))
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *_, **__: None)
    fetched = clip._fetched(open_clip, NAME, "tag")
    towers = fetched.visual, fetched.transformer
    gelu = open_clip.transformer.QuickGELU
    assert all(any(isinstance(m, gelu) for m in t.modules()) is quick for t in towers)
    read = clip._from_file(open_clip, NAME, "tag", str(file))
    assert any(isinstance(m, gelu) for m in read.modules()) is quick
    # Caches know values of the one from values of the other.
    plain, _ = (clip._from_file(open_clip, NAME, "", str(file)) for _ in range(2))
    keys = [clip.Clip("clip", "clip", m, open_clip.get_tokenizer(NAME)).key for m in (read, plain)]
    assert (keys[0] != keys[1]) is quick
