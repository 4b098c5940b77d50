"""The spectra of the report: mean log power of each set on one axis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffkit.evaluation.pictures import PictureSet
from diffkit.perceptual.spectra import power_spectrum, ring_frequencies

__all__ = ["PICTURES", "spectrum_curves"]

PICTURES = 512
"""Pictures of each set, the first ones, that its curve is the mean of."""

# Below the rounding to 8 bits, whose power is 5e-6; a picture of one colour has none at all.
_FLOOR = 1e-8
_BATCH = 32


def spectrum_curves(sets: Mapping[str, PictureSet], data: Path | None) -> dict[str, Any]:
    """The report's "spectra": frequencies as a share of Nyquist, and mean log10 power by set.

    Curves of sets of other sizes are interpolated to the smallest one's frequencies. The real
    pictures of the folder `data` are brought to the sets' size first, where that is one size:
    frequencies are those of the pictures that are compared.
    """
    curves = dict(sets)
    sizes = {pictures.size for pictures in sets.values()}
    if data is not None:
        size = sizes.pop() if len(sizes) == 1 else None
        curves["reference"] = PictureSet.open(data, size=size, num=PICTURES)
    smallest = min(int(pictures.sizes[:PICTURES].min()) for pictures in curves.values())
    frequency = ring_frequencies(smallest, smallest).numpy()
    return {
        "frequency": frequency.tolist(),
        "sets": {name: _curve(pictures, frequency) for name, pictures in curves.items()},
        "n": {name: min(PICTURES, len(pictures)) for name, pictures in curves.items()},
    }


def _curve(pictures: PictureSet, frequency: npt.NDArray[np.float64]) -> list[float]:
    total = np.zeros_like(frequency)
    count = 0
    for batch in (piece for window in pictures.batches(_BATCH) for piece in window.pieces()):
        power = power_spectrum(batch.images).clamp(min=_FLOOR).log10().numpy()
        own = ring_frequencies(*batch.images.shape[-2:]).numpy()
        for row in power:
            total += np.interp(frequency, own, row)
        count += len(power)
        if count >= PICTURES:
            break
    return (total / count).tolist()
