"""What a purifier is: a picture of 8-bit pixels in, one of the same size out, seeded where random.

The same seed draws the same noise whatever the picture is, so that a clean picture and its
protected twin are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffkit.errors import RunFailed, UserError

if TYPE_CHECKING:
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["Amount", "Kind", "ModelUse", "Models", "Purifier", "Work"]

Work = Callable[[Tensor, int], Tensor]
"""(pixels uint8 (3, H, W), seed) -> pixels uint8 (3, H, W)."""

ModelUse = Literal["none", "audited", "given"]
"""Whether a purifier needs a model: no; the audited one unless told; one that the user gives."""


@dataclass(frozen=True)
class Amount:
    """The number behind a purifier's name, as in noise0.05: its meaning, default and range."""

    name: str
    default: float
    least: float
    most: float
    whole: bool = False

    def read(self, text: str, name: str) -> float:
        """The number in `text`, the default for none. Raises `UserError` outside the range."""
        try:
            value = float(text) if text else self.default
        except ValueError:
            value = math.nan
        if not self.least <= value <= self.most or (self.whole and value != int(value)):
            number = "a whole number" if self.whole else "a number"
            raise UserError(
                f"--purify {name}{text}: its {self.name} must be {number} from {self.least:g} to "
                f"{self.most:g}, for example {name}{self.default:g}."
            )
        return int(value) if self.whole else value


class Models:
    """The models that purifiers run, each loaded at its first use and once.

    Arguments:
        audited: the model that purifiers use unless told another, loaded or by where it lies;
            None where there is none.
        prompt: what the models with text are told of every picture.
        device, dtype: of the models that are loaded here.
    """

    def __init__(
        self,
        audited: LatentDiffusion | str | None = None,
        *,
        prompt: str = "",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.audited = audited
        self.prompt = prompt
        self.device = torch.device(device)
        self.dtype = dtype
        self._kept: dict[str, Any] = {}

    def of(self, source: str | None) -> LatentDiffusion:
        """The model at `source`, the audited one for None. Raises `UserError` when there is none.

        Its parameters get no gradients.
        """
        from diffkit.models.latent_diffusion import LatentDiffusion

        wanted = self.audited if source is None else source
        if wanted is None:
            raise UserError("a purifier needs a model and none is given.")
        if isinstance(wanted, LatentDiffusion):
            return wanted

        def load() -> LatentDiffusion:
            model = LatentDiffusion.load(wanted, dtype=self.dtype, device=self.device)
            for network in model.networks.values():
                network.requires_grad_(False).eval()
            return model

        loaded: LatentDiffusion = self.keep(wanted, load)
        return loaded

    def keep(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gave at the first call with this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


@dataclass(frozen=True)
class Kind:
    """One row of the registry: what stands before the number and the colon.

    Attributes:
        name: the word that the user types.
        words: for the report, with {amount} where the number goes.
        build: (amount, models, source or None) -> the work; loads what it needs, and raises
            `UserError` where that cannot be had.
        amount: the number behind the name, None for a kind without one.
        random: the result depends on the seed.
        model: whether and which.
        more: fixed parameters, for the report.
    """

    name: str
    words: str
    build: Callable[[float, Models, str | None], Work]
    amount: Amount | None = None
    random: bool = False
    model: ModelUse = "none"
    more: Mapping[str, Any] = field(default_factory=dict)


class Purifier:
    """A kind with its number and model, ready to be called.

    Attributes:
        name: as in the report, "noise0.05" or "sdedit0.2:FOLDER" (the folder's name, not its path).
        words: what it does, one line.
        parameters: every number that decides the result, for the report.
        deterministic: the seed plays no part.
        source: where its model lies, None for none and for the audited one.
    """

    def __init__(self, kind: Kind, amount: float, source: str | None, models: Models) -> None:
        from diffkit.audit.purifiers.naming import short_source

        self.kind = kind
        self.deterministic = not kind.random
        self.words = kind.words.format(amount=f"{amount:g}")
        number = "" if kind.amount is None else f"{amount:g}"
        short = None if source is None else short_source(source)
        self.name = f"{kind.name}{number}" + ("" if short is None else f":{short}")
        self.parameters: dict[str, Any] = dict(kind.more)
        if kind.amount is not None:
            self.parameters[kind.amount.name] = amount
        if kind.model != "none":
            self.parameters["model"] = "audited" if short is None else short
        self.source = source
        self._amount, self._models = amount, models
        self._work: Work | None = None

    def prepare(self) -> Purifier:
        """Load what it needs now instead of at the first picture; raises `UserError`."""
        if self._work is None:
            self._work = self.kind.build(self._amount, self._models, self.source)
        return self

    @torch.no_grad()
    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """The purified picture, uint8 (3, H, W) on the CPU, of uint8 (3, H, W); never in place."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3:
            raise ValueError(
                f"{self.name}: pixels must be uint8 (3, H, W), not {pixels.dtype} "
                f"{tuple(pixels.shape)}"
            )
        self.prepare()
        assert self._work is not None
        try:
            result = self._work(pixels.cpu(), seed).cpu()
        except torch.OutOfMemoryError as error:
            raise RunFailed(
                f"{self.name}: out of memory with a picture of {pixels.shape[2]}x"
                f"{pixels.shape[1]}; leave this purifier out, or try --dtype bf16."
            ) from error
        assert result.dtype == torch.uint8 and result.shape == pixels.shape, self.name
        return result.clone() if result is pixels else result

    def many(self, pictures: Sequence[Tensor], seeds: Sequence[int]) -> list[Tensor]:
        """One call a picture, in order; sizes may differ."""
        if len(pictures) != len(seeds):
            raise ValueError(f"{len(pictures)} pictures with {len(seeds)} seeds")
        return [self(pixels, seed) for pixels, seed in zip(pictures, seeds)]
