"""The arms of the protection experiment and everything that decides their numbers."""

from __future__ import annotations

from typing import Any

from runner.inputs import asset_digests

__all__ = [
    "ARMS",
    "BUDGETS",
    "CAUSE_METHODS",
    "FEWER",
    "METHODS",
    "MIMICRY_BUDGET",
    "PURIFIERS",
    "SCORING",
    "SEEDS",
    "SETTINGS",
    "STRENGTHS",
    "cause_arm",
    "edit_arm",
    "mimic_arm",
    "word",
]

SEEDS = (0, 1, 2)
BUDGETS = (8, 16)
"""Levels of 255."""

METHODS = (
    "random",
    "photoguard",
    "texture",
    "pid",
    "advdm",
    "advdm-",
    "mist",
    "sds+",
    "sds-",
    "sdst-",
    "ace",
    "ace+",
    "fsmg",
    "aspl",
)
LATENT = "latent"
"""The control that moves the latents themselves, by AdvDM's loss; it is no protection."""

STRENGTHS = (0.1, 0.2, 0.3, 0.5, 0.8)
PURIFIERS = ("jpeg75", "resize0.5", "sdedit0.2")
SHOWN = 0.3
"""The strength whose edits are also compared as pictures, and behind the purifiers."""

SETTINGS: dict[str, Any] = {
    "assets": asset_digests("model/vae", "model/unet", "model/text_encoder"),
    "artist": "openmoji 1.2.29",
    "attack": {"steps": 50, "prompt": ""},
}
EDIT: dict[str, Any] = {
    "kind": "edit",
    "strengths": list(STRENGTHS),
    "steps": 20,
    "purifiers": list(PURIFIERS),
    "held_out_draws": 16,
}
CAUSE_METHODS = ("random", "texture", "advdm")
CAUSE: dict[str, Any] = {
    "kind": "cause",
    "steps": 20,
    "purifiers": [
        *(f"jpeg{quality}" for quality in (90, 75, 50, 25, 10)),
        *(f"resize{factor}" for factor in (0.75, 0.5, 0.25)),
        *(f"sdedit{strength}" for strength in (0.1, 0.2, 0.5)),
    ],
}
MIMIC: dict[str, Any] = {
    "kind": "mimic",
    "rank": 4,
    "targets": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"],
    "learning_rate": 1e-3,
    "train_steps": 200,
    "batch_size": 4,
    "samples": 64,
    "sample_steps": 16,
    "guidance": 2.0,
}
SCORING: dict[str, Any] = {"assets": asset_digests("features")}

MIMICRY_BUDGET = 16
REPEATED = ("random", "mist", "ace+")
"""Methods whose mimicry is measured with every seed, and at both budgets; the others' once."""

ONCE = ("fsmg", "aspl")
"""Methods whose edits are made with one seed, for they train longest."""


def word(method: str) -> str:
    """The method in a file name: "sds+" is sds-plus."""
    return method.replace("+", "-plus").removesuffix("-") + ("-minus" if method[-1] == "-" else "")


def edit_arm(method: str, levels: int) -> str:
    """The arm that edits and purifies pictures protected by a method."""
    return f"{word(method)}-{levels}"


def mimic_arm(method: str, levels: int = 0, share: float = 1.0) -> str:
    """The arm that learns from them; `share` of the eight pictures are protected."""
    tail = f"-{levels}" if levels else ""
    return ("lora-" if share == 1 else f"lora-{share:.0%}-".replace("%", "")) + word(method) + tail


def _edits() -> dict[str, dict[str, Any]]:
    return {
        edit_arm(method, levels): {**EDIT, "method": method, "levels": levels}
        for levels in reversed(BUDGETS)
        for method in (*METHODS, LATENT)
    }


def _mimics() -> dict[str, dict[str, Any]]:
    wanted: list[tuple[str, int, float]] = [("clean", 0, 1.0)]
    wanted += [(m, levels, 1.0) for levels in reversed(BUDGETS) for m in REPEATED]
    wanted += [(m, MIMICRY_BUDGET, 0.5) for m in REPEATED if m != "random"]
    wanted += [("none", 0, 1.0)]
    wanted += [(m, MIMICRY_BUDGET, 1.0) for m in METHODS if m not in REPEATED]
    return {
        mimic_arm(method, levels, share): {
            **MIMIC,
            "method": method,
            "levels": levels,
            "share": share,
        }
        for method, levels, share in wanted
    }


def cause_arm(method: str) -> str:
    """The arm that looks for the reason of what purifiers leave of a method's effect."""
    return f"cause-{word(method)}-8"


def _causes() -> dict[str, dict[str, Any]]:
    return {cause_arm(method): {**CAUSE, "method": method, "levels": 8} for method in CAUSE_METHODS}


ARMS: dict[str, dict[str, Any]] = {**_edits(), **_mimics(), **_causes()}


def _once(arm: dict[str, Any]) -> bool:
    if arm["kind"] == "cause":
        return True
    if arm["kind"] == "edit":
        return arm["method"] in ONCE
    return arm["method"] not in (*REPEATED, "clean") or arm["levels"] not in (0, MIMICRY_BUDGET)


FEWER: dict[str, tuple[int, ...]] = {name: SEEDS[:1] for name, arm in ARMS.items() if _once(arm)}
"""Arms that are made with fewer seeds."""
