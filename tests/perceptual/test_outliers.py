"""The outlier mask: what it removes, what it fills in, and how well its quantiles are sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from diffkit.perceptual import outliers
from diffkit.perceptual.outliers import SAMPLED, outlier_mask, outlier_quantiles


def noise(side: int, maps: int = 1, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(1, maps, side, side, generator=draws)


def by_pooling(target: Tensor, closing: int, opening: int) -> Tensor:
    """The mask as it is usually written, with exact quantiles."""
    flat = target.flatten(2)
    count = flat.shape[2]
    low, high = (
        flat.kthvalue(max(1, int(share * count)), dim=2).values[..., None, None]
        for share in (0.02, 0.98)
    )
    margin = 2 * target.std((2, 3), keepdim=True)
    keep = ((low - margin <= target) & (target <= high + margin)).float()
    keep = functional.max_pool2d(keep, closing, 1, closing // 2)
    return (-functional.max_pool2d(-keep, opening, 1, opening // 2)).bool()


@pytest.mark.parametrize(("ratio", "closing", "opening"), [(4, 1, 3), (8, 3, 5), (16, 3, 5)])
@pytest.mark.parametrize("shape", [(3, 50, 64), (2, 7, 5), (2, 2, 2)])
def test_it_is_the_pooled_form(ratio, closing, opening, shape) -> None:
    draws = torch.Generator().manual_seed(3)
    target = torch.randn(2, *shape, generator=draws) ** 3
    target[torch.rand(target.shape, generator=draws) > 0.99] = 60.0
    mask = outlier_mask(target, ratio)
    assert mask is not None and torch.equal(mask, by_pooling(target, closing, opening))


@pytest.mark.parametrize("reach", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 40, 33), (2, 7, 5), (1, 2, 2)])
def test_a_gpu_spreads_by_pooling(reach: int, shape: tuple[int, ...]) -> None:
    draws = torch.Generator().manual_seed(4)
    for share in (0.02, 0.9):
        marks = torch.rand(shape, generator=draws) < share
        assert torch.equal(outliers._pooled(marks, reach), outliers._spread(marks, reach))


def test_a_batch_takes_the_operations_of_a_sample() -> None:
    """Each sample, and each MiB of it, had some 25 of its own: 6000 launches for one of 512 pixels
    on a GPU, which spent its time on them."""
    counts = []
    for batch in (1, 32):
        with Count() as count:
            mask = outlier_mask(torch.randn(batch, 8, 16, 16), 8)
        assert mask is not None and mask.shape == (batch, 8, 16, 16)
        counts.append(count.operations)
    assert counts[0] == counts[1] < 100


def test_pieces_put_together_are_the_whole() -> None:
    """Of more entries than are worked on at once, over samples and over channels."""
    for shape in ((5, 3, 300, 300), (2, 13, 300, 300)):
        target = torch.randn(shape, generator=torch.Generator().manual_seed(5)) ** 3
        mask = outlier_mask(target, 8)
        assert mask is not None
        for i, c in ((0, 0), (1, shape[1] - 1)):
            alone = outlier_mask(target[i : i + 1, c : c + 1], 8)
            assert alone is not None and torch.equal(mask[i : i + 1, c : c + 1], alone)


class Count(TorchDispatchMode):
    """Counts operations, views included."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_a_block_of_outliers_goes_with_a_rim_and_a_speck_stays() -> None:
    target = noise(64)
    target[0, 0, 20:25, 30:35] = 100.0
    mask = outlier_mask(target, 8)
    assert mask is not None and (~mask).sum() == 49
    assert not mask[0, 0, 19:26, 29:36].any()
    target = noise(64)
    target[0, 0, 10, 10] = 100.0
    at_eight, at_four = outlier_mask(target, 8), outlier_mask(target, 4)
    assert at_eight is not None and at_eight.all()
    assert at_four is not None and (~at_four).sum() == 9


def test_many_outliers_move_the_quantile_into_themselves() -> None:
    """25 of 32 x 32 are more than 2 %, 25 of 36 x 36 are fewer."""
    for side, removed in ((32, 0), (36, 49)):
        target = noise(side)
        target[0, 0, 10:15, 10:15] = 100.0
        mask = outlier_mask(target, 8)
        assert mask is not None and (~mask).sum() == removed


def test_constant_and_small_maps() -> None:
    """With a strict comparison a constant map would be masked completely."""
    for side in (2, 4, 8, 80):
        mask = outlier_mask(torch.full((2, 3, side, side), 0.3), 8)
        assert mask is not None and mask.all()
    assert outlier_mask(noise(1), 8) is None
    for ratio in (1, 2):
        assert outlier_mask(noise(64), ratio) is None


def test_sampled_quantiles_keep_what_exact_ones_keep() -> None:
    """Noise, stripes whose period divides the width, a ramp and heavy tails, at 128 and 256."""
    for height, width in ((128, 128), (256, 192)):
        x = torch.arange(width).expand(height, width)
        smooth = torch.sin(2 * torch.pi * x / 16) + 0.1 * noise(256)[0, 0, :height, :width]
        kinds = [noise(256)[0, 0], smooth, x / width, noise(256, seed=2)[0, 0] ** 5]
        target = torch.stack([kind[:height, :width].float() for kind in kinds])[None]
        sampled, exact = outlier_mask(target, 8), by_pooling(target, 3, 5)
        assert sampled is not None and target[0, 0].numel() > SAMPLED
        kept = [mask.float().mean((2, 3)) for mask in (sampled, exact)]
        assert (kept[0] - kept[1]).abs().max() <= 0.005
        low, high = outlier_quantiles(target[0])
        within = ((target[0] >= low) & (target[0] <= high)).float().mean((1, 2))
        assert (within - 0.96).abs().max() <= 0.01


def test_low_precision_and_no_gradient() -> None:
    target = noise(64, 3)
    target[0, 1, 20:25, 30:35] = 100.0
    half = target.bfloat16().requires_grad_()
    mask, exact = outlier_mask(half, 8), outlier_mask(half.detach().float(), 8)
    assert mask is not None and exact is not None and torch.equal(mask, exact)
    assert not mask.requires_grad


def test_shape_is_checked() -> None:
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        outlier_mask(torch.zeros(3, 8, 8), 8)
