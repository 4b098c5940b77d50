"""The classifier from which a LatentLPIPS network gets its trunk: VGG16 on latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkit.perceptual.latent_lpips import LatentLpips, LatentLpipsConfig, LatentTrunk

__all__ = ["LatentClassifier", "shared_label_loss"]


class LatentClassifier(nn.Module):
    """Logits (B, classes) of latents (B, C, h, w); `trunk` is what a `LatentLpips` keeps.

    Arguments:
        config: of the trunk.
        classes: K.
        dense: VGG's own head: means of 7x7 places, two hidden layers of 64 times the width with
            dropout 1/2. Otherwise one linear layer on the mean over space, for small sets.
    """

    def __init__(self, config: LatentLpipsConfig, classes: int, dense: bool = True) -> None:
        super().__init__()
        self.trunk = LatentTrunk(config)
        last, hidden = config.widths[-1], 64 * config.width
        layers: list[nn.Module]
        if dense:
            layers = [nn.Linear(last * 49, hidden), nn.ReLU(inplace=True), nn.Dropout()]
            layers += [nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout()]
            layers += [nn.Linear(hidden, classes)]
        else:
            layers = [nn.Linear(last, classes)]
        self.places = 7 if dense else 1
        # The layout "pre_pool" has no pool behind the last stage.
        self.pool = config.layout == "pre_pool" and dense
        self.head = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """Unnormalised log-probabilities (B, classes)."""
        last = self.trunk(latents)[-1]
        if self.pool:
            last = F.max_pool2d(last, 2)
        logits: Tensor = self.head(F.adaptive_avg_pool2d(last, self.places).flatten(1))
        return logits

    def metric(self) -> LatentLpips:
        """A `LatentLpips` with this trunk, its heads 1."""
        parameter = next(self.parameters())
        network = LatentLpips(self.trunk.config).to(parameter.device)
        network.trunk.load_state_dict(self.trunk.state_dict())
        return network


def shared_label_loss(logits: Tensor, present: Tensor) -> Tensor:
    """-sum_k (y_k / sum y) log softmax(logits)_k, (B,) in float32.

    The plain cross-entropy where each sample has one label; words of a caption share the
    probability (Mahajan et al., "Exploring the Limits of Weakly Supervised Pretraining", 2018,
    section 2.2).

    Arguments:
        logits: (B, K).
        present: y, (B, K) of 0 and 1, at least one 1 in each row.
    """
    share = present.float() / present.float().sum(1, keepdim=True)
    return -(share * torch.log_softmax(logits.float(), 1)).sum(1)
