"""The arms of the experiment on one-step students, and what each of them means."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ALONE",
    "ARMS",
    "BARE",
    "BEST",
    "DMD",
    "FIRST",
    "FULL",
    "HUBER",
    "LADDER",
    "LPL",
    "MATCHED",
    "MEANING",
    "MSE",
    "ON",
    "PLAIN_METRIC",
    "REGRESSIONS",
    "SECOND",
    "TEACHER",
    "TEACHERS",
    "VARIANTS",
    "WARMED",
]

TEACHER, BARE = "teacher", "teacher, 1 step"
BEST = "E-LatentLPIPS"
MSE, HUBER, PLAIN_METRIC, LPL = "MSE", "pseudo-Huber", "LatentLPIPS", "decoder features"
ON, FULL, DMD, MATCHED = "regression on", "full", "full, DMD2", "DMD2 alone"
ALONE: dict[str, Any] = {"discriminator": "none"}
WARMED: dict[str, Any] = {"warmup": 80, "loss": "relativistic", "weight": 0.03, "rate": 8.0}
BARELY: dict[str, Any] = {"noise_input": False, "multiscale": False, "mismatch": 0.0, "r1": "none"}
JUDGED: dict[str, Any] = WARMED | BARELY
SCALES: dict[str, Any] = {**JUDGED, "noise_input": True, "multiscale": True}
WHOLE: dict[str, Any] = {**SCALES, "mismatch": 0.25, "r1": "exact"}

TEACHERS: dict[str, dict[str, Any]] = {
    TEACHER: {"sampling_steps": None},
    BARE: {"sampling_steps": 1},
}
REGRESSIONS: dict[str, dict[str, Any]] = {
    MSE: {"gan": {**ALONE, "regression": "mse"}},
    HUBER: {"gan": {**ALONE, "regression": "huber"}},
    PLAIN_METRIC: {"gan": {**ALONE, "regression": "latentlpips"}},
    BEST: {"gan": ALONE},
    LPL: {"gan": {**ALONE, "regression": "lpl"}},
}
LADDER: dict[str, dict[str, Any]] = {
    ON: {"gan": ALONE},
    "discriminator": {"gan": JUDGED},
    "+ noise": {"gan": {**JUDGED, "noise_input": True}},
    "+ multi-scale": {"gan": SCALES},
    "+ mix-and-match": {"gan": {**WHOLE, "r1": "none"}},
    FULL: {"gan": WHOLE},
    DMD: {"gan": {**WHOLE, "dmd": True}, "dmd": {"updates": 2}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "approximated R1": {"gan": {**WHOLE, "r1": "approximate"}},
    MATCHED: {"gan": {**ALONE, "dmd": True, "warmup": 80}, "dmd": {"updates": 2}},
    "on MSE": {"gan": {**WHOLE, "regression": "mse"}, "start": MSE},
}
FIRST: dict[str, Any] = {"steps": 1500, "decay": 300, "batch_size": 16, "learning_rate": 2e-4}
SECOND: dict[str, Any] = {"steps": 320, "decay": 120, "batch_size": 8, "learning_rate": 5e-5}
SECOND |= {"beta1": 0.0, "start": BEST, "first": FIRST}
ARMS: dict[str, dict[str, Any]] = {
    **TEACHERS,
    **REGRESSIONS,
    **{arm: {**SECOND, **values} for arm, values in (LADDER | VARIANTS).items()},
}
MEANING = {
    MSE: "squared error of the latents",
    HUBER: "pseudo-Huber of the latents",
    PLAIN_METRIC: "LatentLPIPS, the same network without random maps",
    BEST: "E-LatentLPIPS",
    LPL: "features of the decoder (latent perceptual loss)",
    ON: f"{BEST} alone, for as many steps more",
    "discriminator": "a discriminator with heads at the last scale, told the prompt alone",
    "+ noise": "it is told the noise too",
    "+ multi-scale": "inputs and heads at every scale",
    "+ mix-and-match": "a quarter of what it sees as generated are other pairs' true latents",
    FULL: "and R1 of a single sample at every 16th step: the whole method",
    "approximated R1": "the whole method, R1 by noise and not by second derivatives",
    DMD: "the whole method and distribution matching",
    MATCHED: "distribution matching without a discriminator",
    "on MSE": f"the whole method, from the {MSE} student and with that regression",
}
