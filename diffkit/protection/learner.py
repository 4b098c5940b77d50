"""A surrogate that can be trained: LoRA adapters on the attacked model, or a copy of its denoiser.

The base weights never move. Adapters (rank 4, A ~ N(0, 1/rank^2), B = 0, as in ACE, Zheng et al.
2023, arXiv:2310.04687, and its code) are float32 on a base of any dtype and are taken off at the
end. A full surrogate is a float32 copy of the denoiser that computes in the base's dtype: in
bfloat16 a step of 5e-7 would be rounded away in all but about 1 % of the weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioner, Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora, remove_lora
from diffkit.models.lora_layers import lora_layers
from diffkit.models.text_encoders import TEXT_TARGETS, clip_encoders, encode_prompts
from diffkit.protection.settings import Settings
from diffkit.protection.surrogate import Surrogate, frozen

__all__ = ["ADAPTER", "RANK", "Learner", "learner"]

ADAPTER = "diffkit_surrogate"
"""Name of the adapter while it is on."""

RANK = 4
_FEED_FORWARD = "ff.net.0.proj"
_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
_RATE, _TEXT_RATE, _FULL_RATE = 1e-4, 5e-6, 5e-7
_WEIGHT_DECAY = 1e-2


@dataclass
class Learner:
    """What trains, and the surrogate that it belongs to.

    Attributes:
        surrogate: of the attack, told the instance prompt.
        prompt: that prompt.
        groups: parameters with their learning rates, as AdamW takes them.
        encodes: the text encoders train too.
        compute: dtype of the activations.
    """

    surrogate: Surrogate
    prompt: str
    groups: list[dict[str, Any]]
    encodes: bool = False
    compute: torch.dtype = torch.float32
    _known: dict[str, Conditioning] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that trains."""
        return [parameter for group in self.groups for parameter in group["params"]]

    def optimizer(self) -> torch.optim.AdamW:
        """A new AdamW (weight decay 1e-2) on the parameters."""
        groups = [dict(group) for group in self.groups]
        return torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)

    def told(self, prompt: str) -> Surrogate:
        """The surrogate with another prompt, with a graph to text encoders that train."""
        conditioner = self.surrogate.conditioner
        assert conditioner is not None and self.surrogate.cond is not None
        if self.encodes:
            device = self.surrogate.network.device
            # sizes are told anew with every view
            return replace(self.surrogate, cond=_encoded(conditioner, prompt).to(device))
        if prompt not in self._known:
            cond = self.surrogate.cond
            if prompt != self.prompt:
                cond = conditioner.encode([prompt], _ANY_SIZE).to(self.surrogate.network.device)
            self._known[prompt] = cond
        return replace(self.surrogate, cond=self._known[prompt])

    def settle(self) -> None:
        """Encode the instance prompt again after text encoders were trained."""
        if self.encodes:
            with torch.no_grad():
                self.surrogate = self.told(self.prompt)

    def weights(self) -> list[Tensor]:
        """A copy of what trains."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def restore(self, weights: list[Tensor]) -> None:
        """Put a copy back."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, weights, strict=True):
                parameter.copy_(value)
        self.settle()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Inside, what trains requires gradients; outside no pass through it keeps any."""
        try:
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
                parameter.grad = None


@contextlib.contextmanager
def learner(
    model: LatentDiffusion, settings: Settings, surrogate: Surrogate, seed: int
) -> Iterator[Learner]:
    """The trainable surrogate of a method; afterwards the model is as it was.

    Arguments:
        model: frozen by `prepared`; gets the adapter inside the block.
        settings: `surrogate` and `train_text_encoder` decide what trains.
        surrogate: of `prepared`, told the instance prompt.
        seed: of the adapter's first weights.

    Raises:
        UserError: no layer to adapt, or no CLIP text encoder to train.
    """
    prompt = settings.prompt_for(model)
    if settings.surrogate == "full":
        network = _float32_copy(surrogate.network)
        groups = [{"params": _own_weights(network.model), "lr": _FULL_RATE}]
        with frozen([network.model]):
            if surrogate.network.model.is_gradient_checkpointing:
                network.model.enable_gradient_checkpointing()  # type: ignore[operator]
            told = replace(surrogate, denoiser=network)
            yield Learner(told, prompt, groups, compute=model.dtype)
        return
    encodes = settings.train_text_encoder
    if encodes and not clip_encoders(model.conditioner):
        raise UserError(
            f"--train-text-encoder: {model.family.name} models have no CLIP text encoder; leave it "
            "out."
        )
    encoders = list(model.conditioner.encoders.values()) if encodes else []
    with frozen(encoders), _adapted(model, seed, encodes) as groups:
        yield Learner(surrogate, prompt, groups, encodes, model.dtype)


@contextlib.contextmanager
def _adapted(model: LatentDiffusion, seed: int, text: bool) -> Iterator[list[dict[str, Any]]]:
    """The model with the adapter, and its parameters by learning rate."""
    before = [(layer, dict(layer.scaling)) for layer in _layers(model)]
    targets = tuple(model.family.lora_targets) or _ATTENTION
    if _FEED_FORWARD not in targets:
        targets = (*targets, _FEED_FORWARD)
    found = add_lora(
        model,
        RANK,
        targets=targets,
        name=ADAPTER,
        seed=seed,
        init="gaussian",
        text_targets=TEXT_TARGETS if text else (),
        lasting=False,
    )
    try:
        for parameter in found.values():
            parameter.requires_grad_(False)
        own = f"{model.family.denoiser}."
        groups = [
            {"params": [p for key, p in found.items() if key.startswith(own)], "lr": _RATE},
            {
                "params": [p for key, p in found.items() if not key.startswith(own)],
                "lr": _TEXT_RATE,
            },
        ]
        yield [group for group in groups if group["params"]]
    finally:
        remove_lora(model, ADAPTER)
        for layer, scaling in before:
            # a weight read from a scale and set again may differ in its last bit
            layer.scaling.update(scaling)


def _layers(model: LatentDiffusion) -> list[Any]:
    networks = [model.denoiser.model, *model.conditioner.encoders.values()]
    return [layer for network in networks for _, layer in lora_layers(network)]


_ANY_SIZE = (64, 64)


def _encoded(conditioner: Conditioner, prompt: str) -> Conditioning:
    return encode_prompts(conditioner, [prompt], _ANY_SIZE)


class _Float32Denoiser(Denoiser):
    """A float32 network that computes in another dtype."""

    compute = torch.float32

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """As `Denoiser`, under autocast where the dtypes differ."""
        kind = self.device.type
        with torch.autocast(kind, self.compute, enabled=self.compute != torch.float32):
            output: Tensor = super().forward(*arguments, **options)
        return output


def _float32_copy(denoiser: Denoiser) -> _Float32Denoiser:
    network = copy.deepcopy(denoiser.model).float()
    made = _Float32Denoiser(network, denoiser.family, denoiser.schedule)
    made.compute = denoiser.dtype
    return made


def _own_weights(network: nn.Module) -> list[nn.Parameter]:
    """All weights but those of adapters that the user's model carries."""
    adapters = {
        id(parameter)
        for _, layer in lora_layers(network)
        for part in (layer.lora_A, layer.lora_B)
        for parameter in part.parameters()
    }
    return [p for p in network.parameters() if id(p) not in adapters]
