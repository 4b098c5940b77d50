"""Saved statistics come back as they were, and only to the network that made them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffkit.assets import path
from safetensors.numpy import load_file, save_file

from diffkit.errors import UserError
from diffkit.evaluation.extractors import load_extractor
from diffkit.evaluation.features import stream_features
from diffkit.evaluation.pictures import PictureSet
from diffkit.evaluation.reference import Reference


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(reference, extractor, pictures) of the sample."""
    pictures, extractor = PictureSet.open(path("sample"), num=64), load_extractor()
    file = tmp_path_factory.mktemp("features") / "a.f32"
    features = stream_features(pictures, extractor, file)
    return Reference.of(features, extractor, pictures.resize, "sample"), extractor, pictures


def test_a_reference_survives_the_disk(made, tmp_path):
    reference, extractor, pictures = made
    reference.save(tmp_path / "r.safetensors")
    loaded = Reference.load(tmp_path / "r.safetensors")
    assert np.array_equal(loaded.features, reference.features) and loaded.n == 64
    assert torch.equal(loaded.moments.mean, reference.moments.mean)
    assert torch.equal(loaded.moments.cov, reference.moments.cov)
    assert loaded.moments.n == 64 and loaded.source == "sample"
    loaded.check(extractor, pictures.resize)


def test_the_file_is_plain_safetensors(made, tmp_path):
    """Written by hand, piece by piece; read by the library."""
    reference, _, _ = made
    reference.save(tmp_path / "r.safetensors")
    tensors = load_file(tmp_path / "r.safetensors")
    assert {name: str(array.dtype) for name, array in tensors.items()} == {
        "mean": "float64",
        "cov": "float64",
        "features": "float32",
    }


def test_the_moments_are_numpys(made):
    reference, _, _ = made
    features = reference.features.astype(np.float64)
    np.testing.assert_allclose(reference.moments.mean, features.mean(0), rtol=1e-9)
    np.testing.assert_allclose(reference.moments.cov, np.cov(features.T), rtol=1e-7, atol=1e-12)


def test_another_extractor_or_rule_is_refused(made):
    reference, extractor, pictures = made
    other = dataclasses.replace(extractor, name="inception", key="b")
    with pytest.raises(UserError, match="extractor embedded; this run's is inception"):
        reference.check(other, pictures.resize)
    with pytest.raises(UserError, match="embedded of other weights"):
        reference.check(dataclasses.replace(extractor, key="b"), pictures.resize)
    with pytest.raises(UserError, match="another resize rule"):
        reference.check(extractor, "pictures scaled otherwise")


def test_files_that_are_no_reference_are_refused(made, tmp_path):
    reference, _, _ = made
    with pytest.raises(UserError, match="no such file"):
        Reference.load(tmp_path / "none.safetensors")
    save_file({"features": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is not a reference"):
        Reference.load(tmp_path / "other.safetensors")
    reference.save(tmp_path / "torn.safetensors")
    data = (tmp_path / "torn.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is torn"):
        Reference.load(tmp_path / "torn.safetensors")
