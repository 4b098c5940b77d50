"""Feature networks: the embedded one, Inception, and CLIP, from files that are given."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
from diffkit.assets import path
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from diffkit.errors import UserError
from diffkit.evaluation.extractors import load_extractor
from diffkit.evaluation.metrics.registry import METRICS
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.evaluation.pictures import to_float
from diffkit.models.clip import load_clip, prepare
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.named_weights import load_named_weights, optional_module
from diffkit.randomness import integers

PIXELS = integers(0, 256, (2, 3, 48, 40), 0, "pictures").to(torch.uint8)


class Code:
    """A pickle of this class would run a command."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights, since the true ones need a download, and torch-fidelity's network
    with these weights."""
    # The constructor insists on a file: an empty one tells the names and shapes that it wants.
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    original = FeatureExtractorInceptionV3.load_state_dict

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state, *args, **kwargs):
            return original(self, self.state_dict())

    torch.manual_seed(0)
    theirs = Unloaded("inception", ["2048"], feature_extractor_weights_path=nothing)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(theirs.state_dict(), file)
    return file, theirs


def test_the_embedded_network():
    extractor = load_extractor("embedded")
    images = to_float(PIXELS)
    with torch.no_grad():
        expected = FeatureNetwork.load(path("features")).features(images)
    assert torch.equal(extractor(images), expected)
    assert extractor.dim == expected.shape[1] and "64x64" in extractor.resize
    assert not extractor.inception


def test_inception_is_torch_fidelitys(inception):
    """Floats in [-1, 1] become the 8-bit pixels again that torch-fidelity is given."""
    file, theirs = inception
    extractor = load_extractor(f"inception:{file}")
    assert torch.equal(extractor(to_float(PIXELS)), theirs(PIXELS)[0])
    assert extractor.inception and "TensorFlow" in extractor.resize
    tools = Toolbox()
    assert METRICS["frechet"].title(extractor, tools) == "FID"
    assert METRICS["kernel"].title(extractor, tools) == "KID"


def test_only_inception_numbers_are_called_fid():
    extractor, tools = load_extractor("embedded"), Toolbox()
    for metric in METRICS.values():
        if "scorer" not in metric.needs:
            title = metric.title(extractor, tools)
            assert "FID" not in title and "KID" not in title and "CLIP" not in title
    assert "feature network" in METRICS["frechet"].title(extractor, tools)


def test_inception_needs_a_file_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"Download https://.*inception:PATH"):
        load_extractor("inception")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="are not the weights of torch-fidelity's Inception"):
        load_extractor(f"inception:{tmp_path / 'other.pth'}")


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """Name of a tiny CLIP of open_clip's own class, and a file of random weights of it."""
    folder = tmp_path_factory.mktemp("clip")
    tower = {"layers": 1, "width": 16}
    config = {
        "embed_dim": 12,
        "vision_cfg": tower | {"image_size": 32, "patch_size": 16, "head_width": 8},
        "text_cfg": tower | {"context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip", pretrained=None).eval()
    save_file(model.state_dict(), folder / "weights.safetensors")
    return "tiny-clip", folder / "weights.safetensors", model


def test_clip_from_a_file_is_open_clips(tiny_clip):
    """At the model's own size nothing is resized, so that both towers agree to rounding."""
    name, file, theirs = tiny_clip
    clip = load_clip(f"clip:{name}:{file}", torch.device("cpu"))
    extractor = load_extractor(f"clip:{name}:{file}")
    picture = integers(0, 256, (3, 32, 32), 1, "picture").to(torch.uint8)
    pil = Image.fromarray(picture.permute(1, 2, 0).numpy())
    transform = image_transform_v2(PreprocessCfg(**theirs.visual.preprocess_cfg), is_train=False)
    texts = ["a dog", "a cat on a mat"]
    with torch.no_grad():
        expected = theirs.encode_image(transform(pil)[None], normalize=True)
        of_texts = theirs.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    torch.testing.assert_close(extractor(to_float(picture)[None]), expected)
    torch.testing.assert_close(clip.embed_texts(texts), of_texts)
    assert extractor.dim == 12 and not extractor.inception and "32x32" in extractor.resize
    assert extractor.key == clip.key and extractor.name == "clip:tiny-clip"


def test_clip_resizes_as_open_clip_does():
    """Bicubic and antialiased on tensors: within two levels of Pillow's 8-bit result."""
    row, column = np.linspace(0, 255, 200)[:, None], np.linspace(255, 0, 300)[None]
    planes = [row + 0 * column, column + 0 * row, (row + column) / 2]
    pil = Image.fromarray(np.stack(planes, -1).astype(np.uint8))
    pixels = torch.from_numpy(np.array(pil)).permute(2, 0, 1)[None]
    for mode in ("shortest", "squash"):
        cfg = PreprocessCfg(size=(64, 64), resize_mode=mode)
        rule = {"mean": cfg.mean, "std": cfg.std, "interpolation": "bicubic", "resize_mode": mode}
        expected = image_transform_v2(cfg, is_train=False)(pil)
        levels = (prepare(to_float(pixels), (64, 64), rule)[0] - expected).abs() * 0.27 * 255
        assert levels.max() < 2


@pytest.mark.slow
def test_a_tag_beside_a_file_takes_the_tags_rule(tmp_path):
    """RN50 of OpenAI has its quick GELU; "inception" statistics come with some LAION weights."""
    theirs = open_clip.create_model("RN50", pretrained=None, force_quick_gelu=True).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    clip = load_clip(f"clip:RN50:openai={tmp_path / 'weights.safetensors'}", torch.device("cpu"))
    with torch.no_grad():
        tokens = open_clip.get_tokenizer("RN50")(["a dog"])
        expected = theirs.encode_text(tokens, normalize=True)
    torch.testing.assert_close(clip.embed_texts(["a dog"]), expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip", "name the architecture"),
        ("clip:ViT-Z:openai", "knows no 'ViT-Z'"),
        ("clip:ViT-B-32:nothing", "neither a file nor a tag; tags: openai"),
        ("clip:ViT-B-32:nothing=a.pt", "no weights tagged 'nothing'"),
        ("resnet", "extractor 'resnet': unknown"),
    ],
)
def test_unknown_names_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        load_extractor(spec)


def test_a_clip_file_of_another_model_is_refused(tiny_clip, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="are not weights of tiny-clip"):
        load_clip(f"clip:{tiny_clip[0]}:{tmp_path / 'w.pt'}", torch.device("cpu"))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"weight": Code()}, protocol=2))
    with pytest.raises(UserError, match="cannot be read as plain weights"):
        load_named_weights(tmp_path / "w.pth")
    torch.save({"weight": torch.zeros(1), "code": Code()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="cannot be read as plain weights"):
        load_named_weights(tmp_path / "w.pt")


def test_weight_files_of_several_kinds(tmp_path):
    state = {"weight": torch.arange(3.0)}
    torch.save({"state_dict": {"module.weight": state["weight"]}}, tmp_path / "a.pt")
    save_file(state, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        found = load_named_weights(tmp_path / name)
        assert list(found) == ["weight"] and torch.equal(found["weight"], state["weight"])
    torch.save({"weight": torch.zeros(1), "epoch": 3}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="a dictionary of tensors"):
        load_named_weights(tmp_path / "c.pt")
    (tmp_path / "d.pt").write_bytes(b"")
    for name, message in (("d.pt", "cannot be read"), ("e.pt", "no such file")):
        with pytest.raises(UserError, match=message):
            load_named_weights(tmp_path / name)


def test_a_missing_package_is_named_with_its_install_line():
    with pytest.raises(UserError, match=r'the metric x needs the package no_such.*diffkit\[e\]"'):
        optional_module("no_such.part", "e", "the metric x")
