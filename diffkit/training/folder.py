"""The output folder of a run: what lies in it, and whether a command may go on in it.

OUTPUT/config.yaml      the resolved configuration
OUTPUT/metrics.jsonl    one row a step
OUTPUT/checkpoints/     see `diffkit.training.checkpoints`
OUTPUT/samples/         validation pictures
OUTPUT/cache/           latents, embeddings and companion pictures, unless --cache says elsewhere
OUTPUT/model or lora    the result; some methods have another name for it
OUTPUT/finished.json    written last
"""

from __future__ import annotations

import fcntl
import shutil
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from diffkit.console import say
from diffkit.errors import UserError
from diffkit.files import atomic_write, check_writable, read_json, write_json
from diffkit.training.checkpoints import Checkpoints
from diffkit.training.config import TrainConfig
from diffkit.training.configfile import differing_keys, load, to_plain

__all__ = ["RunFolder"]

_OF_THE_CALL = ("output", "config", "dry_run", "overwrite")
"""Not part of what a run is; left out of config.yaml."""

_FREE = (
    *("checkpoint_every", "keep", "log_every", "tracker", "workers", "cache"),
    *("validation_prompts", "validation_every", "validation_steps", "validation_guidance"),
    *("push_to_hub", "hub_private"),
)
"""May change when a run goes on: they change no number of it."""

_SCHEDULE = ("max_steps", "lr_schedule", "decay_steps")
"""May change as long as the rates of the steps that were made stay what they were."""


class RunFolder:
    """The paths of one run, and the rules for going on in it."""

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.output)
        self.config_file = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.cache = config.cache or self.path / "cache"
        self.result = self.path / config.result_name()
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.keep)
        self._lock: IO[str] | None = None
        self._finished = self.path / "finished.json"

    def finished(self, config: TrainConfig) -> bool:
        """Whether this run was already made to its last step."""
        if not (self._finished.exists() and self.result.exists()):
            return False
        return bool(read_json(self._finished)["step"] == config.max_steps)

    def mark_finished(self, step: int) -> None:
        """Say that the result stands."""
        write_json(self._finished, {"step": step, "result": self.result.name})

    def pushed_to(self) -> str | None:
        """The hub repository that the finished result was pushed to."""
        found = read_json(self._finished).get("pushed_to")
        return None if found is None else str(found)

    def mark_pushed(self, repo_id: str) -> None:
        """Say that the result is on the hub."""
        write_json(self._finished, {**read_json(self._finished), "pushed_to": repo_id})

    def check(self, config: TrainConfig) -> None:
        """Raise `UserError` when the folder holds something else or another run; writes nothing."""
        if config.overwrite or not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; an output folder is needed here.")
        if not self.config_file.exists():
            own = {self.cache.name, ".lock"}
            foreign = [entry.name for entry in self.path.iterdir() if entry.name not in own]
            if foreign:
                raise UserError(
                    f"{self.path}: is not empty and holds no run (no config.yaml, but "
                    f"{sorted(foreign)[0]}); choose another --output."
                )
            return
        old = load(self.config_file, type(config))
        changed = differing_keys(_identity(old), _identity(config))
        steps = self._steps_made()
        schedule = {name: getattr(config, name) for name in _SCHEDULE}
        new = replace(old, **schedule)
        if any(old.rate(step) != new.rate(step) for step in range(steps)):
            for name, value in schedule.items():
                changed |= differing_keys(getattr(old, name), value, name)
        if config.max_steps < steps:
            changed["max_steps"] = (old.max_steps, config.max_steps)
        if changed:
            listed = "; ".join(f"{k}: {a!r} there, {b!r} now" for k, (a, b) in changed.items())
            raise UserError(
                f"{self.path}: holds a run of another configuration ({listed}). Give it the same "
                f"one{_as_flags(changed)}, choose another --output, or throw it away with "
                "--overwrite."
            )

    def hold(self) -> None:
        """Keep other processes out until `release`, or until this one ends in whatever way.

        Raises `UserError` when another one is at work here.
        """
        check_writable(self.path)
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.path}: another process is training here; wait for it or stop it."
            ) from error

    def release(self) -> None:
        """Let others in again."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _steps_made(self) -> int:
        paths = self.checkpoints.paths()
        return int(paths[-1].name.removeprefix("step-")) if paths else 0

    def prepare(self, config: TrainConfig, text: str) -> None:
        """Make the folder, throw away what --overwrite says, write config.yaml."""
        check_writable(self.path)
        if config.overwrite:
            self._discard()
        self.checkpoints.clean()
        with atomic_write(self.config_file, "w") as file:
            file.write(text)

    def _discard(self) -> None:
        # The marker of completeness goes first and the configuration last, so that a kill in
        # between leaves a folder that the next command still recognises as this run's.
        names = ["finished.json", self.result.name, "checkpoints", "samples", "tensorboard"]
        for name in [*names, "model", "lora", "metrics.jsonl", "config.yaml"]:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        say(f"{self.path}: the earlier run was thrown away.")


def _as_flags(changed: dict[str, tuple[Any, Any]]) -> str:
    """The old numbers as flags, as a default may have come from another flag; "" if there are none.

    Words are left out: they are paths and the like, which are known to who gave them.
    """
    numbers = {k: old for k, (old, _) in changed.items() if type(old) in (int, float)}
    flags = " ".join(f"--{k.replace('_', '-')} {old}" for k, old in numbers.items())
    return f" ({flags})" if flags else ""


def _identity(config: TrainConfig) -> dict[str, Any]:
    plain = to_plain(config.canonical())
    return {k: v for k, v in plain.items() if k not in (*_OF_THE_CALL, *_FREE, *_SCHEDULE)}


def saved_form(plain: dict[str, Any]) -> dict[str, Any]:
    """What config.yaml keeps of a plain configuration."""
    return {k: v for k, v in plain.items() if k not in _OF_THE_CALL}
