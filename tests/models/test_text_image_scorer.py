"""The offline text-image scorer: cosine, gradients, any text, stock text tower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scorer import make_tokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffkit.errors import UserError
from diffkit.models.text_image_scorer import TextImageScorer, TextImageScorerConfig

NAMES = ["red apple", "banana", "cat face", "one o’clock", "piñata"]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return make_tokenizer(NAMES, ["fruit", "animal"])


@pytest.fixture
def scorer(tokenizer: CLIPTokenizer) -> TextImageScorer:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    sizes = TextImageScorerConfig(widths=(4, 6, 8), depths=(1, 1), embedding_size=12)
    return TextImageScorer(sizes, CLIPTextModel(config), tokenizer).eval()


def pictures(count: int, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_score_is_the_cosine_of_the_embeddings(scorer: TextImageScorer) -> None:
    images, prompts = pictures(3), ["red apple", "banana, flat style", "cat"]
    image, text = scorer.embed_images(images), scorer.embed_texts(prompts)
    assert image.shape == text.shape == (3, 12)
    for vectors in (image, text):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    score = scorer.score(images, prompts)
    assert score.shape == (3,)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, torch.cosine_similarity(image, text))
    assert score.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("size", [64, 96])
def test_gradient_reaches_the_images(scorer: TextImageScorer, size: int) -> None:
    images = pictures(2, size).requires_grad_()
    scorer.score(images, ["red apple", "banana"])[0].backward()
    assert images.grad is not None
    assert images.grad[0].abs().sum() > 0
    assert images.grad[1].abs().sum() == 0


def test_numbers_of_images_and_prompts_must_agree(scorer: TextImageScorer) -> None:
    with pytest.raises(UserError, match="2 images and 3 prompts"):
        scorer.score(pictures(2), ["a", "b", "c"])


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "日本語 🍎 café",
        "naïve\u0301",
        "a\x00b\u2028c",
        "🏳️‍🌈" * 40,
        "apple " * 500,
        "<|endoftext|>",
    ],
)
def test_any_prompt_is_embedded(scorer: TextImageScorer, prompt: str) -> None:
    tokens = scorer.tokenizer(prompt, truncation=True).input_ids
    assert 2 <= len(tokens) <= 32
    assert tokens[-1] == scorer.tokenizer.eos_token_id
    embedding = scorer.embed_texts([prompt, "banana"])
    assert embedding.isfinite().all()


def test_no_text_is_lost_in_encoding(tokenizer: CLIPTokenizer) -> None:
    """Every byte has a token of its own, so different texts have different tokens."""
    for text in ("日本語", "🍎", "ÿ", "\x01", "zyx"):
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.eos_token_id not in tokens
        assert tokenizer.decode(tokens).strip() == text


def test_known_words_are_single_tokens_in_lower_case(tokenizer: CLIPTokenizer) -> None:
    expected = ["red</w>", "apple</w>", ",</w>", "noto</w>", "style</w>"]
    assert tokenizer.tokenize("red apple, noto style") == expected
    assert tokenizer.tokenize("RED Apple,  NOTO\nstyle") == expected
    assert tokenizer.model_max_length == 32


def test_padding_does_not_change_a_text(scorer: TextImageScorer) -> None:
    """The tower is causal and pools at the first end token."""
    alone = scorer.embed_texts(["banana"])
    beside = scorer.embed_texts(["banana", "a red apple in noto style on a blue background"])
    torch.testing.assert_close(alone[0], beside[0], atol=1e-6, rtol=1e-5)


def test_save_and_load(scorer: TextImageScorer, tmp_path: Path) -> None:
    """Weights are rounded to float16 once; after that a round trip changes no bit."""
    scorer.save(tmp_path / "one")
    first = TextImageScorer.load(tmp_path / "one")
    first.save(tmp_path / "two")
    second = TextImageScorer.load(tmp_path / "two")
    images, prompts = pictures(2), ["Red apple", "日本"]
    torch.testing.assert_close(
        first.score(images, prompts), scorer.score(images, prompts), atol=5e-3, rtol=0
    )
    assert torch.equal(first.score(images, prompts), second.score(images, prompts))
    assert first.config == scorer.config
    assert not second.training
    assert all(parameter.dtype == torch.float32 for parameter in second.parameters())
    stored = load_file(tmp_path / "one" / "text_encoder" / "model.safetensors")
    assert all(
        value.dtype == torch.float16 for value in stored.values() if value.is_floating_point()
    )


def test_text_tower_is_a_stock_one(scorer: TextImageScorer, tmp_path: Path) -> None:
    """Plain transformers loads the subfolders and computes the same hidden states."""
    scorer.save(tmp_path / "scorer")
    loaded = TextImageScorer.load(tmp_path / "scorer")
    stock = CLIPTextModel.from_pretrained(tmp_path / "scorer" / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "scorer" / "tokenizer")
    assert type(stock) is CLIPTextModel
    tokens = tokenizer(
        ["red apple, noto style, blue background", ""], padding="max_length", return_tensors="pt"
    )
    assert tokens.input_ids.shape == (2, 32)
    states = stock.eval()(tokens.input_ids).last_hidden_state
    assert torch.equal(states, loaded.text_encoder(tokens.input_ids).last_hidden_state)


def test_loading_is_strict(scorer: TextImageScorer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        TextImageScorer.load(tmp_path / "absent")
    folder = tmp_path / "scorer"
    scorer.save(folder)
    with pytest.raises(UserError, match="exists already"):
        scorer.save(folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("log_scale")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="log_scale"):
        TextImageScorer.load(folder)
    config = folder / "config.json"
    config.write_text(json.dumps({"widths": [4]}), encoding="utf-8")
    with pytest.raises(UserError, match="embedding_size"):
        TextImageScorer.load(folder)


def test_a_missing_text_tower_is_named(scorer: TextImageScorer, tmp_path: Path) -> None:
    scorer.save(tmp_path / "scorer")
    (tmp_path / "scorer" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="text_encoder and tokenizer cannot be read"):
        TextImageScorer.load(tmp_path / "scorer")


def test_an_empty_tokenizer_is_refused(scorer: TextImageScorer, tmp_path: Path) -> None:
    """transformers makes a tokenizer of three tokens when tokenizer.json is absent."""
    scorer.save(tmp_path / "scorer")
    (tmp_path / "scorer" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer: has \d+ tokens"):
        TextImageScorer.load(tmp_path / "scorer")


def test_missing_text_weights_are_not_made_up(scorer: TextImageScorer, tmp_path: Path) -> None:
    """transformers fills a missing weight at random and only warns."""
    scorer.save(tmp_path / "scorer")
    path = tmp_path / "scorer" / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="token_embedding"):
        TextImageScorer.load(tmp_path / "scorer")
