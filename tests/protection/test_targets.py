from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffkit.errors import UserError
from diffkit.protection.targets import check_target, draw_target, target_digest


@pytest.mark.parametrize("word", ["MIST", "I", "no ai"])
@pytest.mark.parametrize("size", [(128, 128), (256, 384), (512, 320)])
def test_text_is_black_and_white_and_a_quarter_white(word: str, size: tuple[int, int]) -> None:
    target = draw_target(f"text:{word}", *size)
    assert target.shape == (1, 3, *size) and target.dtype == torch.float32
    assert set(target.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(target[:, :1].expand_as(target), target)
    assert 0.2 <= float((target > 0).float().mean()) <= 0.3
    assert torch.equal(target, draw_target(f"text:{word.upper()}", *size))


def test_rows_of_capitals_are_shifted_by_half_a_word() -> None:
    white = draw_target("text:H", 512, 1024)[0, 0] > 0
    filled = white.any(1).long()
    edges = (filled[1:] - filled[:-1]).nonzero()[:, 0]
    assert int(edges[0]) + 1 == 32  # cap height R/16, from the first row on
    pitch = int(edges[1]) + 1
    first, second, third = (white[i * pitch : (i + 1) * pitch] for i in range(3))
    assert torch.equal(first, third)
    columns = first.any(0).long()
    starts = ((columns[1:] - columns[:-1]) == 1).nonzero()[:, 0] + 1
    period = int(starts[1] - starts[0])
    assert torch.equal(
        second[:, : -period // 2],
        first[:, period // 2 : first.shape[1]][:, : 1024 - (period + 1) // 2],
    )
    assert not torch.equal(first, second)


def test_checker() -> None:
    target = draw_target("checker", 64, 32)
    assert target[0, 0, :4, 0].tolist() == [-1, -1, 1, 1]
    assert target[0, 1, 2, :4].tolist() == [1, 1, -1, -1]
    assert float(target.mean()) == 0


def test_a_picture_file_is_resized_and_counts_by_its_bytes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    path = tmp_path / "target.png"
    Image.fromarray(pixels).save(path)
    same = draw_target(str(path), 24, 36)
    assert torch.equal(same[0].permute(1, 2, 0), torch.from_numpy(pixels).float() / 127.5 - 1)
    small = draw_target(str(path), 8, 16)
    assert small.shape == (1, 3, 8, 16) and small.abs().max() <= 1
    before = target_digest(str(path))
    path.rename(tmp_path / "moved.png")
    assert target_digest(str(tmp_path / "moved.png")) == before
    Image.fromarray(255 - pixels).save(path)
    assert target_digest(str(path)) != before
    assert len({before, target_digest("checker"), target_digest("text:A")}) == 3
    assert target_digest("text:a ") == target_digest("text:A")


def test_targets_that_cannot_be_drawn(tmp_path: Path) -> None:
    for spec, message in (
        ("text: ", "no word"),
        ("text:漢", "no '漢'"),
        ("mist", "is no file"),
        (str(tmp_path), "is no file"),
    ):
        with pytest.raises(UserError, match=message):
            check_target(spec)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(UserError, match="known format"):
        draw_target(str(broken), 8, 8)
    with pytest.raises(UserError, match="does not exist"):
        target_digest(str(tmp_path / "gone.png"))
