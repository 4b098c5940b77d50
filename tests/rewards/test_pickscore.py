"""PickScore on a tiny `CLIPModel`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from diffkit.errors import UserError
from diffkit.models.clip import CLIP_RULE, prepare
from diffkit.randomness import uniform
from diffkit.rewards.spec import load_reward
from tests import tiny

PROMPTS = ["cat", "a very long prompt of many letters"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pickscore")
    text = {
        "vocab_size": 514, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": tiny.MAX_LENGTH,
        "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(place)
    tiny.clip_tokenizer().save_pretrained(place)
    return place


def test_it_is_the_cosine_and_has_a_logit_scale(folder):
    reward, model = load_reward(f"pickscore:{folder}"), CLIPModel.from_pretrained(folder).eval()
    images = 2 * uniform((2, 3, 40, 64), "pick") - 1
    tokenizer = tiny.clip_tokenizer()
    with torch.no_grad():
        pixels = prepare(images, (32, 32), CLIP_RULE)
        image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        texts = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, truncation=True, max_length=12, return_tensors="pt").input_ids
            texts.append(model.get_text_features(input_ids=ids).pooler_output)
        expected = (image * F.normalize(torch.cat(texts), dim=-1)).sum(-1)
        torch.testing.assert_close(reward(images, PROMPTS), expected)
    assert reward.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))


def test_the_gradient_is_in_the_pictures_alone(folder):
    reward = load_reward(f"pickscore:{folder}")
    images = (2 * uniform((2, 3, 32, 32), "pick") - 1).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.abs().max() > 0
    assert all(not p.requires_grad and p.grad is None for p in reward.networks[0].parameters())


def test_places_that_are_no_pickscore_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="pickscore: /nowhere is no folder or hub id"):
        load_reward("pickscore:/nowhere")
    with pytest.raises(UserError, match="pickscore: cannot be read from"):
        load_reward(f"pickscore:{tmp_path}")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="pickscore: .*tokenizer|pickscore: cannot be read"):
        load_reward(f"pickscore:{tmp_path}")
