"""How maps are cut into tiles and addressed."""

from __future__ import annotations

import pytest
import torch

from diffkit.kernels.tiles import Tiles, flat_strides, flattenable


@pytest.mark.parametrize(
    ("shape", "last", "rows", "columns"),
    [
        ((1, 128, 512, 512), False, (1, 2048), (8, 256)),
        ((1, 128, 512, 512), True, (64, 32), (64, 32)),
        ((2, 3, 5, 7), False, (1, 64), (8, 64)),
        ((2, 3, 5, 7), True, (4, 64), (4, 64)),
        ((1, 1, 1, 1), True, (1, 1), (8, 1)),
    ],
)
def test_tiles_lie_along_the_memory(shape, last, rows, columns) -> None:
    order = torch.channels_last if last else torch.contiguous_format
    maps = torch.empty(shape, device="meta").contiguous(memory_format=order)
    for found, expected in ((Tiles.rows(maps), rows), (Tiles.columns(maps), columns)):
        assert (found.channels, found.pixels) == expected
        assert 1 <= found.warps <= 8


def test_pixels_become_one_axis() -> None:
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    for maps in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x[:, 1:],
        x[..., ::2],
        x[..., :1],
        x[:, :, :1],
    ):
        flat = flattenable(maps)
        b, c, pixel = flat_strides(flat)
        seen = flat.as_strided((2, flat.shape[1], maps[0, 0].numel()), (b, c, pixel))
        assert torch.equal(seen, maps.flatten(2))
    assert flattenable(x) is x and flat_strides(None) == (0, 0, 0)
