"""ImageReward against the formulas of BLIP, written out on weights of the original names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.clip import CLIP_RULE, prepare
from diffkit.randomness import normal, uniform
from diffkit.rewards.image_reward import MEAN, STD, of_weights
from diffkit.rewards.spec import load_reward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", "cat", "on", "mat"]
PROMPTS = ["red apple", "cat on red mat cat"]
WIDTH, LAYERS, HEADS = 128, 2, 2  # two heads of 64, as in the original sixteen and twelve


def _linear(state: dict[str, Tensor], name: str, out: int, inside: int) -> None:
    state[f"{name}.weight"] = normal((out, inside), name, "w") / inside**0.5
    state[f"{name}.bias"] = 0.1 * normal((out,), name, "b")


def _norm(state: dict[str, Tensor], name: str, width: int) -> None:
    state[f"{name}.weight"] = 1 + 0.1 * normal((width,), name, "w")
    state[f"{name}.bias"] = 0.1 * normal((width,), name, "b")


def _attention(state: dict[str, Tensor], name: str, inside: int) -> None:
    for part, width in (("query", WIDTH), ("key", inside), ("value", inside)):
        _linear(state, f"{name}.self.{part}", WIDTH, width)
    _linear(state, f"{name}.output.dense", WIDTH, WIDTH)
    _norm(state, f"{name}.output.LayerNorm", WIDTH)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Two layers of each tower; pictures of 32 pixels in four patches."""
    see, read = "blip.visual_encoder", "blip.text_encoder"
    state = {
        f"{see}.cls_token": normal((1, 1, WIDTH), "cls"),
        f"{see}.pos_embed": normal((1, 5, WIDTH), "pos"),
        f"{see}.patch_embed.proj.weight": normal((WIDTH, 3, 16, 16), "patch") / 28,
        f"{see}.patch_embed.proj.bias": normal((WIDTH,), "patch bias"),
        f"{read}.embeddings.word_embeddings.weight": normal((len(WORDS) + 2, WIDTH), "words"),
        f"{read}.embeddings.position_embeddings.weight": normal((40, WIDTH), "positions"),
        f"{read}.embeddings.position_ids": torch.arange(40)[None],
        "blip.vision_proj.weight": torch.zeros(4, WIDTH),
    }
    for i in range(LAYERS):
        block, layer = f"{see}.blocks.{i}", f"{read}.encoder.layer.{i}"
        _norm(state, f"{block}.norm1", WIDTH)
        _norm(state, f"{block}.norm2", WIDTH)
        _linear(state, f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        _linear(state, f"{block}.attn.proj", WIDTH, WIDTH)
        _linear(state, f"{block}.mlp.fc1", 2 * WIDTH, WIDTH)
        _linear(state, f"{block}.mlp.fc2", WIDTH, 2 * WIDTH)
        _attention(state, f"{layer}.attention", WIDTH)
        _attention(state, f"{layer}.crossattention", WIDTH)
        _linear(state, f"{layer}.intermediate.dense", 2 * WIDTH, WIDTH)
        _linear(state, f"{layer}.output.dense", WIDTH, 2 * WIDTH)
        _norm(state, f"{layer}.output.LayerNorm", WIDTH)
    _norm(state, f"{see}.norm", WIDTH)
    _norm(state, f"{read}.embeddings.LayerNorm", WIDTH)
    sizes = (WIDTH, 1024, 128, 64, 16, 1)
    for place, inside, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        _linear(state, f"mlp.layers.{place}", out, inside)
    return state


class Formulas:
    """BLIP by its formulas, one sample, on a state dict of the original names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v)]
        scores = parts[0] @ parts[1].transpose(1, 2) / parts[0].shape[-1] ** 0.5
        return (scores.softmax(-1) @ parts[2]).transpose(0, 1).flatten(1)

    def see(self, pixels: Tensor) -> Tensor:
        own = "blip.visual_encoder"
        weight = self.state[f"{own}.patch_embed.proj.weight"]
        bias = self.state[f"{own}.patch_embed.proj.bias"]
        x = F.conv2d(pixels[None], weight, bias, stride=16)[0].flatten(1).T
        x = torch.cat([self.state[f"{own}.cls_token"][0], x]) + self.state[f"{own}.pos_embed"][0]
        for i in range(LAYERS):
            block = f"{own}.blocks.{i}"
            h = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            x = x + self.linear(f"{block}.attn.proj", self.attend(*h.chunk(3, -1)))
            h = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", F.gelu(h))
        return self.norm(f"{own}.norm", x, 1e-6)

    def attention(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        q = self.linear(f"{name}.self.query", x)
        k, v = self.linear(f"{name}.self.key", y), self.linear(f"{name}.self.value", y)
        out = self.linear(f"{name}.output.dense", self.attend(q, k, v))
        return self.norm(f"{name}.output.LayerNorm", out + x, 1e-12)

    def score(self, pixels: Tensor, tokens: list[int]) -> Tensor:
        picture, own = self.see(pixels), "blip.text_encoder"
        words = self.state[f"{own}.embeddings.word_embeddings.weight"][tokens]
        places = self.state[f"{own}.embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(f"{own}.embeddings.LayerNorm", words + places, 1e-12)
        for i in range(LAYERS):
            layer = f"{own}.encoder.layer.{i}"
            x = self.attention(f"{layer}.attention", x, x)
            x = self.attention(f"{layer}.crossattention", x, picture)
            h = F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            h = self.linear(f"{layer}.output.dense", h)
            x = self.norm(f"{layer}.output.LayerNorm", h + x, 1e-12)
        x = x[0]
        for place in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{place}", x)
        return (x[0] - MEAN) / STD


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    place = tmp_path_factory.mktemp("imagereward")
    torch.save(weights, place / "ImageReward.pt")
    (place / "vocab.txt").write_text("\n".join(WORDS))
    return place


def pictures() -> Tensor:
    return 2 * uniform((2, 3, 40, 60), "image reward") - 1


def test_it_is_blip_read_without_padding_and_without_a_causal_mask(folder, weights):
    reward = load_reward(f"imagereward:{folder}")
    pixels = prepare(pictures(), (32, 32), CLIP_RULE)
    rows = reward.embed_prompts(PROMPTS)
    assert rows.shape == (2, 2, 35)
    tokens = [[2, 5, 6, 3], [2, 7, 8, 5, 9, 7, 3]]
    expected = [Formulas(weights).score(x, ids) for x, ids in zip(pixels, tokens)]
    r = reward.measure(pictures(), rows)
    torch.testing.assert_close(r, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_the_reward_stops_at_two(folder):
    """R = -relu(2 - r) is never above 0; beyond r = 2 it has no gradient."""
    reward = load_reward(f"imagereward:{folder}")
    rows, images = reward.embed_prompts(PROMPTS), pictures().requires_grad_()
    low, high = reward.measure(images, rows).detach().tolist()
    head = reward.scorer.mlp[-1]
    with torch.no_grad():
        head.bias += (2 - (low + high) / 2) * STD  # now one lies below 2 and one above
    r, value = reward.measure(images, rows), reward.score(images, rows)
    torch.testing.assert_close(value, -torch.relu(2 - r))
    assert sorted((value < 0).tolist()) == [False, True] and value.max() == 0
    value.sum().backward()
    moved = images.grad.flatten(1).abs().amax(1) > 0
    assert moved.tolist() == (r < 2).tolist()
    assert all(not p.requires_grad and p.grad is None for p in reward.scorer.parameters())


def test_it_has_no_logit_scale_and_cuts_prompts(folder):
    reward = load_reward(f"imagereward:{folder}")
    assert reward.logit_scale is None and reward.name == "imagereward"
    long = reward.embed_prompts(["cat " * 50, "cat"])
    assert long[0, 1].sum() == 35 and long[1, 1].sum() == 3


def test_wrong_files_are_refused(folder, weights, tmp_path):
    missing = {k: v for k, v in weights.items() if "crossattention" not in k}
    with pytest.raises(UserError, match="x.pt: are not the weights of ImageReward"):
        of_weights(missing, "x.pt")
    torch.save(weights, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="put the vocab.txt of google-bert/.* beside"):
        load_reward(f"imagereward:{tmp_path}")
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, *(f"word{i}" for i in range(9))]))
    with pytest.raises(UserError, match=r"19 in place of 10"):
        load_reward(f"imagereward:{tmp_path}")
