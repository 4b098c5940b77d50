"""The purifiers by name, and the reading of `--purify jpeg75,resize,sdedit0.2:MODEL`."""

from __future__ import annotations

import re

from diffkit.audit.purifiers.base import Kind, Models, Purifier
from diffkit.audit.purifiers.cleaner import CLEANER
from diffkit.audit.purifiers.latent import LATENT
from diffkit.audit.purifiers.pixel_diffusion import PIXEL_DIFFUSION
from diffkit.audit.purifiers.plain import PLAIN
from diffkit.audit.purifiers.upscale import UPSCALE
from diffkit.errors import UserError

__all__ = ["DEFAULT_PURIFIERS", "PURIFIERS", "known_purifiers", "parse_purifiers"]

PURIFIERS: dict[str, Kind] = {
    kind.name: kind for kind in (*PLAIN, *CLEANER, *LATENT, *PIXEL_DIFFUSION, *UPSCALE)
}

DEFAULT_PURIFIERS = "jpeg90,jpeg75,jpeg50,resize,crop,adverse-cleaner,noise0.05,noise0.1"
"""What needs no second model. On one core adverse-cleaner takes some 20 s a megapixel, the others
less than a second."""

_ITEM = re.compile(r"(?P<name>[a-z]+(?:-[a-z]+)*)(?P<amount>[0-9.]*)(?::(?P<source>.+))?")


def parse_purifiers(text: str, models: Models | None = None) -> list[Purifier]:
    """Read a list such as "jpeg75,resize,noise0.05,sdedit0.2:MODEL,diffpure:PATH".

    Arguments:
        text: items separated by commas; NAME, NAMENUMBER, and :MODEL where a model is used. A path
            may hold no comma.
        models: where the models come from; without it only purifiers that need no audited model
            can be read.

    Returns:
        Purifiers not yet loaded (see `Purifier.prepare`), the deterministic ones first and
        otherwise in the order given.

    Raises:
        UserError: an unknown name, a number out of range, a model missing or not used, an item
            named twice, or an empty list.
    """
    models = models or Models()
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise UserError(f"--purify {text!r}: names no purifier. Known: {known_purifiers()}.")
    found: dict[str, Purifier] = {}
    for item in items:
        purifier = _read(item, models)
        if purifier.name in found:
            raise UserError(
                f"--purify {item}: {purifier.name} is there twice; name each once, and give "
                "models folders of different names."
            )
        found[purifier.name] = purifier
    return sorted(found.values(), key=lambda purifier: not purifier.deterministic)


def known_purifiers() -> str:
    """The names, with what may stand behind them: "jpeg75, resize0.5, sdedit0.2[:MODEL]"."""
    shown = {"none": "", "audited": "[:MODEL]", "given": ":PATH"}
    return ", ".join(
        kind.name + ("" if kind.amount is None else f"{kind.amount.default:g}") + shown[kind.model]
        for kind in PURIFIERS.values()
    )


def _read(item: str, models: Models) -> Purifier:
    match = _ITEM.fullmatch(item)
    kind = PURIFIERS.get(match["name"]) if match else None
    if match is None or kind is None:
        raise UserError(f"--purify {item}: unknown. Known: {known_purifiers()}.")
    if match["amount"] and kind.amount is None:
        raise UserError(f"--purify {item}: {kind.name} takes no number.")
    amount = 0.0 if kind.amount is None else kind.amount.read(match["amount"], kind.name)
    source = match["source"]
    if source is not None and kind.model == "none":
        raise UserError(f"--purify {item}: {kind.name} uses no model; write {kind.name}.")
    if source is None and kind.model == "given":
        raise UserError(f"--purify {item}: needs a model of its own, {kind.name}:PATH.")
    if source is None and kind.model == "audited" and models.audited is None:
        raise UserError(f"--purify {item}: needs a model; write {item}:MODEL.")
    return Purifier(kind, amount, source, models)
