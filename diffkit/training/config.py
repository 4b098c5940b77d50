"""The flags that every objective shares, and the combinations of them that cannot work."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffkit.errors import UserError
from diffkit.training.rates import RateSchedule, learning_rate

if TYPE_CHECKING:
    from diffkit.models.latent_diffusion import LatentDiffusion
    from diffkit.training.companions import Companions

__all__ = ["Trained", "TrainConfig"]

MixedPrecision = Literal["no", "bf16", "fp16"]
Trained = Literal["denoiser", "text encoders"]


@dataclass
class TrainConfig:
    """What to train, on what, for how long."""

    data: str
    """Training data: a folder of pictures or of shards, or hub:OWNER/NAME."""
    output: Path
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, and the result in model/ or
    lora/. The same command on the same folder goes on where it stopped."""
    model: str = "embedded"
    """What to start from: a diffusers folder, a hub id, a .safetensors file, or `embedded`."""
    variant: str | None = None
    """Which weight files of the model, such as fp16 for *.fp16.safetensors."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    max_steps: int = 1000
    """Training steps in all."""
    batch_size: int = 8
    """Samples of one optimizer step, over all processes."""
    accumulation: int = 1
    """Parts in which each process works off its share of a batch; more parts need less memory."""
    seed: int = 0
    """Every random draw follows from it."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    lr_schedule: RateSchedule = "constant"
    """What follows the warm-up."""
    warmup_steps: int = 0
    """Steps in which the rate rises linearly to its peak."""
    decay_steps: int | None = None
    """Last steps of warmup-stable-decay, in which the rate falls linearly; a tenth by default."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit needs bitsandbytes."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    max_grad_norm: float | None = 1.0
    """Gradients of a longer norm are scaled down to it."""
    ema: float | None = None
    """Decay of a moving average of the weights, such as 0.9999; the average is then the result."""

    lora_rank: int | None = None
    """Train a LoRA of this rank instead of all weights."""
    lora_alpha: float | None = None
    """Scale of the LoRA, alpha / rank; the rank itself by default."""
    lora_targets: tuple[str, ...] | None = None
    """Names of the layers that get a LoRA; the model family's own by default."""

    split: str = "train"
    """Split of shards or of a hub data set."""
    image_column: str | None = None
    """Column of the pictures in shards or a hub data set; found by its type by default."""
    caption_column: str | None = None
    """Column of the captions; `text` or the like by default."""
    streaming: bool = False
    """Read shards or a hub data set in order as it comes, where it is too large for the disk."""
    size: int | None = None
    """Edge of the training pictures in pixels; the model's own by default."""
    max_aspect: float = 1.0
    """Most elongated picture shape, long side to short; above 1 pictures go into buckets of equal
    area instead of being cut to squares."""
    crop: Literal["center", "random"] = "center"
    """Which part of a picture that is not square."""
    flip: bool = False
    """Mirror half of the visits of a picture."""
    cache_latents: bool = False
    """Encode every picture once, and keep the latents on disk."""
    cache_embeddings: bool = False
    """Encode every caption once, and keep the embeddings on disk."""
    cache: Path | None = None
    """Folder of the caches; OUTPUT/cache by default."""
    workers: int = 2
    """Threads that read pictures ahead."""

    mixed_precision: MixedPrecision = "no"
    """Precision of the networks; weights in training and losses stay in float32."""
    attention: str = "sdpa"
    """How attention is computed: sdpa, classic (explicit softmax; faster for tiny models on a CPU),
    xformers, or the name of a diffusers backend."""
    gradient_checkpointing: bool = False
    """Compute activations twice to save memory."""
    compile: bool = False
    """Compile the trained networks with torch.compile."""

    checkpoint_every: int = 500
    """Steps from one checkpoint to the next."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 10
    """Steps from one write of metrics.jsonl to the next; each step has its row."""
    tracker: Literal["none", "tensorboard", "wandb"] = "tensorboard"
    """Where numbers and validation pictures go besides the output folder."""
    validation_prompts: Path | None = None
    """File of prompts, one a line, of which pictures are made during training."""
    validation_every: int = 500
    """Steps from one set of validation pictures to the next."""
    validation_steps: int = 25
    """Sampling steps of a validation picture."""
    validation_guidance: float | None = None
    """Guidance scale of validation pictures; the model card's by default, else the family's."""

    push_to_hub: str | None = None
    """Upload the finished result to this hub repository, OWNER/NAME; that this can be done is found
    out at the start."""
    hub_private: bool = False
    """Make that repository private when it does not exist yet."""

    config: Path | None = None
    """YAML file with values for any of these flags; flags on the command line win."""
    dry_run: bool = False
    """Show the resolved configuration and what it will cost; write nothing."""
    overwrite: bool = False
    """Throw away an earlier run in the output folder and start anew."""

    def decay(self) -> int:
        """Steps of the final decay."""
        if self.decay_steps is None:
            return max(1, self.max_steps // 10)
        return self.decay_steps

    def rate(self, step: int) -> float:
        """Learning rate of step `step` = 0, 1, ..."""
        return learning_rate(
            step,
            peak=self.learning_rate,
            schedule=self.lr_schedule,
            max_steps=self.max_steps,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay(),
        )

    def needs_captions(self) -> bool:
        """Whether pictures without a caption would be trained on, silently, as if it were empty."""
        return True

    # What a method changes of the common way; the harness asks, and knows no method by name.

    def trained(self) -> frozenset[Trained]:
        """Networks that train, whole or by a LoRA; of text encoders those that are CLIP.

        The others are frozen in the precision of the run. A method may add parameters to these.
        """
        return frozenset({"denoiser"})

    def changes_prompts(self) -> bool:
        """Whether a prompt is encoded otherwise after a step than before it."""
        return "text encoders" in self.trained()

    def captions(self) -> tuple[str, ...]:
        """Captions of every picture in place of its own; empty to keep those."""
        return ()

    def companions(self) -> Companions | None:
        """A second set of pictures that every batch has some of; None for none."""
        return None

    def pairs(self) -> bool:
        """Whether the data are preference pairs; a sample is then a pair."""
        return False

    def trajectories(self) -> bool:
        """Whether the data are noise-image pairs of `diffkit trajectories`."""
        return False

    def prepared(self, model: LatentDiffusion) -> LatentDiffusion:
        """What trains, made of the model that was loaded; by default that itself."""
        return model

    def adapted(self, model: LatentDiffusion) -> tuple[str, ...] | None:
        """Names of the layers that get a LoRA; None for the model family's own."""
        return self.lora_targets

    def sampling_guidance(self, model: LatentDiffusion) -> float | None:
        """The guidance scale of what trains; None for that of the model's card or family."""
        return None

    def result_name(self) -> str:
        """Name of the folder of the result in the output folder."""
        return "model" if self.lora_rank is None else "lora"

    def card(self, model: LatentDiffusion) -> dict[str, Any]:
        """What the model card says of the kind of the result: attributes of `ModelCard`."""
        return {"relation": "finetune" if self.lora_rank is None else "adapter"}

    def canonical(self) -> TrainConfig:
        """The same run with None for a value that is the default which depends on the model."""
        return self

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work on any machine."""
        self._check_ranges()
        if self.decay_steps is not None and self.lr_schedule != "warmup-stable-decay":
            raise UserError(
                f"decay_steps: {self.lr_schedule} has no final decay; use it with "
                "--lr-schedule warmup-stable-decay."
            )
        decay = self.decay() if self.lr_schedule == "warmup-stable-decay" else 0
        if self.warmup_steps + decay > self.max_steps:
            least = max(0, min(self.max_steps // 10, self.max_steps - decay))
            raise UserError(
                f"warmup_steps: {self.warmup_steps} steps of warm-up and {decay} of decay do not "
                f"fit into max_steps = {self.max_steps}; use --warmup-steps {least}, or make "
                "--max-steps larger."
            )
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_targets):
            raise UserError("lora_alpha, lora_targets: they shape a LoRA; add --lora-rank.")
        wanted = self.companions()
        making = wanted is not None and wanted.folder is None
        if self.cache is not None and not (self.cache_latents or self.cache_embeddings or making):
            raise UserError("cache: nothing is cached; add --cache-latents or --cache-embeddings.")
        if self.changes_prompts():
            self._check_changing_prompts()
        if self.pairs():
            self._check_pairs()
        if self.trajectories():
            self._check_trajectories()
        if self.cache_latents and self.crop == "random":
            raise UserError("cache_latents: needs the same crop at every visit; use --crop center.")

        if self.hub_private and self.push_to_hub is None:
            raise UserError("hub_private: nothing is pushed; add --push-to-hub OWNER/NAME.")
        if self.streaming and (self.cache_latents or self.cache_embeddings):
            raise UserError("streaming: what is read once is not cached; leave the caches out.")
        if self.streaming and self.max_aspect != 1:
            raise UserError("streaming: has no aspect buckets; leave --max-aspect out.")

    def _check_changing_prompts(self) -> None:
        if self.cache_embeddings:
            raise UserError(
                "cache_embeddings: prompts are encoded by what is trained here, so each step "
                "encodes them anew; leave it out."
            )
        if self.compile:
            raise UserError(
                "compile: prompts are encoded inside the training step here, which torch.compile "
                "cannot take; leave it out."
            )

    def _check_pairs(self) -> None:
        if self.streaming:
            raise UserError(
                "streaming: preference pairs are looked up by number, which no stream gives; leave "
                "it out."
            )
        if self.image_column is not None:
            raise UserError(
                "image_column: a pair has two pictures, in the columns jpg_0 and jpg_1, image_0 "
                "and image_1, or winner and loser; leave it out and name the columns so."
            )

    def _check_trajectories(self) -> None:
        of_pictures = ["split", "image_column", "caption_column", "streaming", "size", "max_aspect"]
        of_pictures += ["crop", "flip", "cache_latents"]
        usual = {field.name: field.default for field in fields(TrainConfig)}
        for name in of_pictures:
            if getattr(self, name) != usual[name]:
                raise UserError(
                    f"{name}: is about pictures, and the pairs of `diffkit trajectories` are noise "
                    "and latents as they are; leave it out."
                )

    def _check_ranges(self) -> None:
        positive = ["max_steps", "batch_size", "accumulation", "learning_rate", "lora_rank", "size"]
        positive += ["checkpoint_every", "keep", "log_every", "validation_every", "max_grad_norm"]
        positive += ["validation_steps", "decay_steps", "lora_alpha", "workers"]
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}: {value} is too small; it must be above 0.")
        for name in ("warmup_steps", "weight_decay", "validation_guidance"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"{name}: {value} must not be negative.")
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{name}: {value} is not in [0, 1).")

    def check_sharded(self) -> None:
        """Raise `UserError` for what cannot be while FSDP shards the networks."""

    def check_processes(self, processes: int) -> int:
        """Samples of one micro-batch; raises `UserError` when the batch cannot be split evenly."""
        parts = processes * self.accumulation
        if self.batch_size % parts:
            up = -(-self.batch_size // parts) * parts
            raise UserError(
                f"batch_size: {self.batch_size} cannot be split over {processes} process(es) x "
                f"{self.accumulation} accumulation part(s); {up} can."
            )
        return self.batch_size // parts
