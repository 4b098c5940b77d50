"""The training loop. It knows phases and players and no method.

Training step s = 0, 1, ...: the global batch of s is shared out over processes and micro-batches;
each phase that is due computes its player's losses on fresh addressed draws, adds up gradients of
the mean over the global batch, and makes one optimizer step a repeat. Nothing that a step does
depends on how the run got there except weights and optimizer state, so a resumed run repeats an
uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from diffkit.console import say
from diffkit.errors import RunFailed, UserError
from diffkit.files import storage_errors
from diffkit.objectives.base import Objective, Phase, reduce_loss
from diffkit.randomness import address
from diffkit.training.checkpoints import Checkpoint, tensor_file_errors
from diffkit.training.config import TrainConfig
from diffkit.training.devices import shard_by_block
from diffkit.training.folder import RunFolder
from diffkit.training.metrics import Metrics, StepRecord
from diffkit.training.players import Player, shaped_like, whole
from diffkit.training.report import Report
from diffkit.training.signals import StopRequest
from diffkit.training.trackers import Tracker

__all__ = ["StepBatches", "Trainer"]

INTERRUPTED = 130


class StepBatches(Protocol):
    """Training data, addressed by step."""

    def batches(
        self,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        workers: int = 4,
        ahead: int = 2,
    ) -> Iterator[Any]:
        """This process's micro-batches of each step in [first_step, last_step), with `keys`.

        `ahead` of them are prepared by `workers` threads; closing the iterator ends those.
        """
        ...


class Trainer:
    """Trains the players of one objective.

    Arguments:
        objective: the method.
        data: its batches.
        config: the common flags.
        accelerator: of `make_accelerator`.
        folder: where the run lies; prepared by the caller.
        tracker: made once the start of the run is known.
        validate: makes validation pictures after a number of steps, called on every process.
        data_identity: changes with the set of samples; a run does not go on with another set.
        describe: adds the model card to the saved result.
    """

    def __init__(
        self,
        objective: Objective,
        data: StepBatches,
        config: TrainConfig,
        accelerator: Any,
        folder: RunFolder,
        tracker: Callable[[int], Tracker],
        validate: Callable[[int, Tracker], None] | None = None,
        data_identity: str = "",
        describe: Callable[[Path], object] = lambda folder: None,
    ) -> None:
        self.objective = objective
        self.data = data
        self.config = config
        self.accelerator = accelerator
        self.folder = folder
        self.phases: Sequence[Phase] = tuple(objective.phases())
        self._make_tracker = tracker
        self._validate = validate
        self._data_identity = data_identity
        self._describe = describe
        self._said: Tensor | None = None
        averaged = set(objective.averaged())
        self.players = {
            name: Player(name, module, config, average=name in averaged)
            for name, module in objective.players().items()
        }
        config.check_processes(accelerator.num_processes)
        if len(self.phases) > 1 and accelerator.ddp_handler is not None:
            # A phase may leave some of its player's parameters unused.
            accelerator.ddp_handler.find_unused_parameters = True
        for player in self.players.values():
            shard_by_block(accelerator, player.plain)
            player.wrap(accelerator)
            if config.compile:
                player.plain.compile()
        objective.place(accelerator.device)

    # -- the run --------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the last step and save the result.

        Returns 0, or 130 after Ctrl-C or SIGTERM, with a checkpoint written in both cases. Raises
        `RunFailed` for a loss that is not finite and for storage that ran out; the last good
        checkpoint stays.
        """
        start = self.resume()
        config, main = self.config, self.accelerator.is_main_process
        tracker = self._make_tracker(start)
        self.metrics = Metrics(
            self.folder.metrics,
            reduce=lambda x: self.accelerator.reduce(x, "sum"),
            write=main,
            skipped_steps=config.mixed_precision == "fp16",
            track=tracker.row,
        )
        self.metrics.rewind(start)
        report = Report(start, config.max_steps, self.objective.shown())
        place = (self.accelerator.process_index, self.accelerator.num_processes)
        stream = self.data.batches(
            start, config.max_steps, *place, config.accumulation, config.workers
        )
        with (
            StopRequest() as stop,
            closing(tracker),
            closing(cast(Generator[Any, None, None], stream)),
            report,
        ):
            for step in range(start, config.max_steps):
                batches = [next(stream) for _ in range(config.accumulation)]
                self.metrics.record(self.step(step, batches))
                done = step + 1
                stopping = self._agreed(stop)
                if stopping or self._due(done, config.log_every):
                    self.metrics.flush()
                    self.objective.inspect()
                    report.show(self.metrics.last)
                if stopping or self._due(done, config.checkpoint_every):
                    self.checkpoint(done)
                if self._validate and self._due(done, config.validation_every):
                    # Trackers want their steps in order: these pictures after the rows before.
                    self.metrics.flush()
                    self._show(done, tracker)
                if stopping and done < config.max_steps:
                    say(f"stopped after step {done}; the same command goes on from there.")
                    return INTERRUPTED
        self._finish()
        return 0

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.config.max_steps

    def _agreed(self, stop: StopRequest) -> bool:
        """Whether to stop now; processes must do so at the same step.

        What they say after one step they hear after the next, so that a GPU is never waited for
        while it has nothing to do.
        """
        if self.accelerator.num_processes == 1:
            return stop.requested
        said = torch.full((), float(stop.requested), device=self.accelerator.device)
        heard, self._said = self._said, self.accelerator.reduce(said, "sum")
        return heard is not None and bool(heard > 0)

    def _show(self, done: int, tracker: Tracker) -> None:
        assert self._validate is not None
        with self.results(), self.accelerator.autocast():
            self._validate(done, tracker)
        self.metrics.pause()

    def _finish(self) -> None:
        say(f"saving {self.folder.result}")
        with self.results():
            if self.accelerator.is_main_process:
                with storage_errors(self.folder.result), tensor_file_errors():
                    self.objective.save(self.folder.result)
                    self._describe(self.folder.result)
                self.folder.mark_finished(self.config.max_steps)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def results(self) -> Iterator[None]:
        """Inside the block the main process's players hold the weights of the result, whole."""
        with ExitStack() as stack:
            for player in self.players.values():
                stack.enter_context(player.result(self.accelerator.is_main_process))
            yield

    # -- one step -------------------------------------------------------------------------------

    def step(self, step: int, batches: Sequence[Any]) -> StepRecord:
        """All phases that are due in training step `step`, on this process's micro-batches."""
        config = self.config
        epoch = min(batches[0].keys.epochs)
        rate = config.rate(step)
        record = StepRecord(step + 1, epoch, rate, samples=(step + 1) * config.batch_size)
        due = [phase for phase in self.phases if phase.due(step)]
        material: dict[tuple[int, int], tuple[Any, Any]] = {}
        with self.accelerator.autocast():
            self.objective.begin(step)
        for place, phase in enumerate(due):
            self._route(phase)
            self.players[phase.player].set_rate(rate * phase.rate)
            again = max((later.repeats for later in due[place + 1 :]), default=0)
            for repeat in range(phase.repeats):
                self._optimize(phase, step, repeat, batches, material, record)
                if repeat >= again:
                    material = {key: kept for key, kept in material.items() if key[1] != repeat}
        for player in self.players.values():
            if player.ema is not None:
                player.ema.update(step)
        return record

    def _route(self, phase: Phase) -> None:
        if len(self.players) > 1:
            for name, player in self.players.items():
                player.freeze(name != phase.player)

    def _optimize(
        self,
        phase: Phase,
        step: int,
        repeat: int,
        batches: Sequence[Any],
        material: dict[tuple[int, int], tuple[Any, Any]],
        record: StepRecord,
    ) -> None:
        """One optimizer step of the phase's player."""
        player, accelerator, config = self.players[phase.player], self.accelerator, self.config
        watched: dict[str, Tensor] = {}
        prefix = f"{phase.name}/" if len(self.phases) > 1 else ""
        rank, world = accelerator.process_index, accelerator.num_processes
        for micro, batch in enumerate(batches):
            # Dropout layers and the like take from torch's own generator.
            torch.manual_seed(address(config.seed, step, phase.name, repeat, micro, rank))
            if (micro, repeat) not in material:
                draws = self.objective.draw(batch, repeat)
                with torch.no_grad(), accelerator.autocast():
                    material[micro, repeat] = draws, self.objective.shared(draws)
            draws, shared = material[micro, repeat]
            last = micro == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(player.module):
                with accelerator.autocast():
                    terms = player.module(phase.name, draws, shared)
                accelerator.backward(reduce_loss(terms["loss"], config.batch_size, world))
            record.add(prefix, terms, 1 / (config.batch_size * phase.repeats))
            for name in self.objective.watched():
                if name in terms:
                    part = _sum(terms[name]) / config.batch_size
                    watched[name] = watched[name] + part if name in watched else part
        norm = self._clip(player)
        record.add_norm(prefix, norm, 1 / (phase.repeats * world))
        player.optimizer.step()
        skipped = getattr(player.optimizer, "step_was_skipped", False)
        player.optimizer.zero_grad(set_to_none=True)
        means = self._means(watched)
        if not skipped:  # by the gradient scaler, after an overflow
            self.objective.stepped(phase.name, means)

    def _means(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums of the parts over all processes; a collective call where there are any."""
        if not parts:
            return {}
        flat = self.accelerator.reduce(torch.cat([p.flatten() for p in parts.values()]), "sum")
        sums = flat.split([part.numel() for part in parts.values()])
        return {name: total.view_as(parts[name]) for name, total in zip(parts, sums, strict=True)}

    def _clip(self, player: Player) -> Tensor:
        """Scale the gradient down to the longest norm that is allowed; returns its own norm."""
        self.accelerator.unscale_gradients(player.optimizer)
        limit = self.config.max_grad_norm
        longest = float("inf") if limit is None else limit
        norm = torch.nn.utils.clip_grad_norm_(player.parameters, longest)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    # -- checkpoints ----------------------------------------------------------------------------

    def checkpoint(self, done: int) -> Path | None:
        """Write the state after `done` steps; a collective call, the main process writes."""
        self.metrics.flush()
        main = self.accelerator.is_main_process
        files: dict[str, dict[str, Tensor]] = {}
        numbers: dict[str, Any] = {"data": self._data_identity}
        for name, player in self.players.items():
            files[name] = player.weights(main)
            files[f"{name}.optimizer"], numbers[name] = player.optimizer_state(main)
            if average := player.average(main):
                files[f"{name}.ema"] = average
        for name, tensors in self.objective.state().items():
            files[f"{name}.state"] = whole(tensors, main)
        if self.accelerator.scaler is not None:
            numbers["scaler"] = self.accelerator.scaler.state_dict()
        path = None
        if main:
            path = self.folder.checkpoints.write(Checkpoint(done, files, numbers))
        self.accelerator.wait_for_everyone()
        self.metrics.pause()
        return path

    def resume(self) -> int:
        """Load the newest whole checkpoint; returns the number of steps made."""
        checkpoint = self.folder.checkpoints.latest()
        self._check_start(0 if checkpoint is None else checkpoint.step)
        if checkpoint is None:
            return 0
        if checkpoint.numbers.get("data", self._data_identity) != self._data_identity:
            raise UserError(
                f"{self.config.data}: pictures were added, removed or renamed since step "
                f"{checkpoint.step}, so the run cannot go on as it was. Restore them, or choose "
                "another --output."
            )
        files = checkpoint.files
        for name, player in self.players.items():
            try:
                player.load_weights(files[name])
                player.load_optimizer_state(files[f"{name}.optimizer"], checkpoint.numbers[name])
                player.load_average(files.get(f"{name}.ema", {}))
            except KeyError as error:
                raise RunFailed(
                    f"step {checkpoint.step}: the checkpoint lacks {error} of player {name}; it "
                    "was written for another model. Start anew with --overwrite."
                ) from error
        self._restore(checkpoint)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.numbers["scaler"])
        say(f"going on after step {checkpoint.step}.")
        return checkpoint.step

    @torch.no_grad()
    def _restore(self, checkpoint: Checkpoint) -> None:
        """Give the objective's own tensors back their values."""
        for name, tensors in self.objective.state().items():
            found = checkpoint.files.get(f"{name}.state", {})
            if missing := sorted(tensors.keys() - found.keys()):
                raise RunFailed(
                    f"step {checkpoint.step}: the checkpoint lacks {missing[0]} of {name}; it was "
                    "written by another version of the method. Start anew with --overwrite."
                )
            for key, tensor in tensors.items():
                tensor.copy_(shaped_like(found[key], tensor))

    def _check_start(self, step: int) -> None:
        """Raise `RunFailed` unless all processes found the checkpoint of the same step."""
        mine = torch.tensor([step], device=self.accelerator.device)
        steps = self.accelerator.gather(mine).tolist()
        if min(steps) != max(steps):
            raise RunFailed(
                f"{self.folder.checkpoints.folder}: the processes found checkpoints of different "
                f"steps ({steps}, by rank). All need to see the same --output, on storage that "
                "they share."
            )


def _sum(term: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The sum over samples of a term, (), or of both of a pair, (2,); float32."""
    if isinstance(term, tuple):
        return torch.stack([_sum(part) for part in term])
    return term.detach().float().sum()
