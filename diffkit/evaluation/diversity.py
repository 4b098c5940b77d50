"""How different the pictures of a set are from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.errors import UserError

__all__ = ["unit_rows", "vendi_score", "within_group_distance"]


def within_group_distance(features: Tensor, groups: Tensor) -> Tensor:
    """Mean distance between two pictures of one prompt, a value a prompt: (G,) float64.

        D_g = mean_{i < j in g} |x_i - x_j|

    A model that answers a prompt with one and the same picture has 0.

    Args:
        features: (n, d).
        groups: (n,) integers, the prompt of each picture. A group of one picture has no pair and
            is left out; the values follow the other groups in ascending order.

    Raises:
        UserError: no group has two pictures.
    """
    distances = []
    for group in torch.unique(groups):
        members = features[groups == group].double()
        if len(members) > 1:
            distances.append(torch.nn.functional.pdist(members).mean())
    if not distances:
        raise UserError(
            "the distance within a prompt needs two pictures of some prompt; "
            "there is one picture of each"
        )
    return torch.stack(distances)


def vendi_score(features: Tensor, weights: Tensor | None = None, block: int = 4096) -> float:
    """Effective number of different pictures in features (n, d), between 1 and n.

        exp(-sum_i l_i log l_i),   l the eigenvalues of K / n,  K_ij = cosine(x_i, x_j)

    (Friedman & Dieng 2023, "The Vendi score"). The non-zero eigenvalues are also those of the
    (d, d) second moment of the unit vectors, which is what is decomposed when n > d: the memory is
    that of the smaller matrix plus a block of rows.

    Args:
        weights: (n,) how often each row counts, for a bootstrap; once each without. A copy of a
            picture adds nothing new, so resamples score lower than the set itself.
    """
    n, width = features.shape
    if weights is None:
        weights = torch.ones(n, device=features.device)
    shares = weights.double() / weights.sum()
    if n <= width:
        rows = unit_rows(features) * shares.sqrt()[:, None]
        matrix = rows @ rows.T
    else:
        matrix = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for rows, share in zip(features.split(block), shares.split(block)):
            unit = unit_rows(rows)
            matrix += unit.T @ (unit * share[:, None])
    values = torch.linalg.eigvalsh(matrix).clamp(min=0)
    return float(torch.special.entr(values).sum().exp())


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (n, d) scaled to length 1, float64."""
    return torch.nn.functional.normalize(rows.double(), dim=1)
