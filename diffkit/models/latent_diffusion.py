"""A diffusion model: codec, conditioner, denoiser, schedule, loaded and saved together."""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffkit.errors import UserError
from diffkit.files import atomic_directory, read_json, write_json
from diffkit.models.classes import CARD_NAME, read_defaults, read_stored
from diffkit.models.codec_kinds import open_codec
from diffkit.models.conditioner import Conditioner
from diffkit.models.denoiser import Denoiser, set_attention
from diffkit.models.families import Family, PipelineKind, family_of
from diffkit.models.loading import EMBEDDED, is_hub_id, load_pipeline, quiet_libraries, resolve
from diffkit.models.model_card import ModelCard, write_model_card
from diffkit.models.schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["EMBEDDED", "LatentDiffusion"]


class LatentDiffusion:
    """Four small parts over one stock diffusers pipeline; a method takes only those it needs.

    Attributes:
        codec: images <-> latents.
        conditioner: prompts -> `Conditioning`.
        denoiser: (z_t, t, conditioning) -> output.
        schedule: alpha_t, sigma_t and the parametrisation.
        family: what this model can do.
        source: the path or hub id that it was loaded from, "" for one built in memory.

    Example:
        >>> model = LatentDiffusion.load("embedded")
        >>> cond = model.conditioner.encode(["red apple, noto style, blue background"])
    """

    def __init__(self, pipeline: DiffusionPipeline, source: str = "", **load_options: Any) -> None:
        table = family_of(type(pipeline).__name__)
        network: Any = getattr(pipeline, table.denoiser)
        classes = None
        if table.classes is not None:
            stored = read_stored(resolve(source), load_options.get("revision"))
            classes = table.classes(pipeline, stored)
            table = table.with_classes(classes)
        self.family: Family = table.of(network)
        self._pipeline = pipeline
        self.source = source
        self._load_options = load_options
        self.schedule = Schedule.from_scheduler(pipeline.scheduler, self.family.flow_spacing)
        autoencoder = None if table.codec is None else getattr(pipeline, table.codec)
        self.codec = open_codec(autoencoder, network.config.in_channels)
        self.conditioner = Conditioner(self.family, pipeline, classes)
        self.denoiser = Denoiser(network, self.family, self.schedule)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] = EMBEDDED,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        revision: str | None = None,
        config: str | os.PathLike[str] | None = None,
        attention: str = "sdpa",
    ) -> LatentDiffusion:
        """Load a model from where users keep them.

        Args:
            source: "embedded", a diffusers folder, a single `.safetensors` file, or a hub id.
            dtype, device: of the networks.
            variant: as in diffusers, for folders and hub ids; a folder that has one variant
                and no plain weights needs none.
            revision: branch, tag or commit of a hub id.
            config: diffusers folder or hub id with the configs of a single file; without it
                diffusers fetches them from the hub.
            attention: see `set_attention`.

        Raises:
            UserError: nothing is there, it is no model that diffkit knows, or it is a pickle.
        """
        name = os.fspath(source)
        options: dict[str, Any] = {"variant": variant, "revision": revision, "config": config}
        with quiet_libraries():
            pipeline = load_pipeline(name, dtype=dtype, **options)
        model = cls(pipeline, name, dtype=dtype, **options)
        set_attention(model.denoiser.model, attention)
        return model.to(device)

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of the hub id that it was loaded from; None by default."""
        revision: str | None = self._load_options.get("revision")
        return revision

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler that the model is saved and sampled with."""
        return self._pipeline.scheduler

    def set_scheduler(self, scheduler: Any) -> None:
        """Save and sample with another scheduler from now on; `schedule` is read out of it.

        The model becomes one of its family's first pipeline class: a `DDIMPipeline` turns whatever
        scheduler it is loaded with into a `DDIMScheduler`.
        """
        if type(self._pipeline).__name__ in self.family.siblings:
            wanted = self.family.pipeline_class(self.family.kind)
            self._pipeline = wanted(**self._pipeline.components)
        self._pipeline.register_modules(scheduler=scheduler)
        self.schedule = Schedule.from_scheduler(scheduler, self.family.flow_spacing)
        self.denoiser.schedule = self.schedule

    def with_denoiser(self, network: torch.nn.Module) -> LatentDiffusion:
        """A model with this denoiser; everything else is shared."""
        twin = copy.copy(self._pipeline)
        twin.register_modules(**{self.family.denoiser: network})
        return LatentDiffusion(twin, self.source, **self._load_options)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's dtype."""
        return self.denoiser.dtype

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LatentDiffusion:
        """Move every network."""
        for module in self.networks.values():
            if device is not None:
                module.to(device)
            if dtype is not None:
                module.to(dtype)
        return self

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """Every network of the pipeline that is in memory, by component name."""
        parts = self._pipeline.components
        return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of this size in pixels."""
        self.check_size(height, width)
        factor = self.codec.factor
        return self.codec.channels, height // factor, width // factor

    @property
    def size_multiple(self) -> int:
        """Picture sides must be multiples of this: the codec's factor times the patch size.

        A U-Net needs no more: diffusers' upsamplers restore odd latent sizes.
        """
        return self.codec.factor * self.denoiser.geometry.patch

    @property
    def working_multiple(self) -> int:
        """Picture sides at multiples of this pass through every level without padding or cropping.

        The codec's factor times the patch size, or for a U-Net times all of its downsampling.
        """
        return self.codec.factor * self.denoiser.multiple

    @property
    def default_size(self) -> int:
        """The side in pixels that the model was trained at, from its own config."""
        return self.denoiser.geometry.sample[0] * self.codec.factor

    def check_size(self, height: int, width: int) -> None:
        """Raise `UserError` with the nearest right size when a picture size cannot be used."""
        unit = self.size_multiple
        if self.family.square and height != width:
            raise UserError(f"size {width}x{height}: {self.family.name} pictures are square.")
        if height >= unit and width >= unit and height % unit == 0 and width % unit == 0:
            return
        near = [max(unit, round(side / unit) * unit) for side in (width, height)]
        raise UserError(
            f"size {width}x{height}: both sides must be multiples of {unit} for this model; "
            f"the nearest is {near[0]}x{near[1]}."
        )

    def pipeline(self, kind: PipelineKind | None = None) -> DiffusionPipeline:
        """A stock diffusers pipeline that shares this model's weights; by default its own kind."""
        self._restore_encoders()
        if kind is None:
            wanted = self.family.loader(type(self._pipeline).__name__)
        else:
            wanted = self.family.pipeline_class(kind)
        if type(self._pipeline) is wanted:
            return self._pipeline
        # Without a dtype from_pipe would turn the shared weights into float32.
        return wanted.from_pipe(self._pipeline, dtype=self.dtype)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a plain diffusers folder that `DiffusionPipeline.from_pretrained` loads.

        A README.md in it says what the model was made from; see `diffkit.models.model_card`. Names
        of classes and the null class go to `diffkit.json`; see `diffkit.models.classes`.

        Raises:
            UserError: the folder exists and `overwrite` is false, or cannot be written; or the
                model carries LoRA adapters, with which plain diffusers could not load it.
            RunFailed: the disk is full; an older folder stays whole.
        """
        if any(getattr(network, "peft_config", None) for network in self.networks.values()):
            raise UserError(
                f"{folder}: this model carries LoRA adapters; write them with save_lora, or merge "
                "them into the model with merge_lora first"
            )
        self._restore_encoders()
        with atomic_directory(folder, overwrite=overwrite) as place, quiet_libraries():
            self._pipeline.save_pretrained(place, safe_serialization=True)
            _forget_folders(place)
            self._save_defaults(place)
            write_model_card(place, ModelCard.of(self), title=Path(folder).name)
        return Path(folder)

    def _save_defaults(self, place: Path) -> None:
        """How it is sampled, as its source says, and its classes."""
        classes = self.conditioner.classes
        stored = {} if classes is None else classes.stored()
        if kept := read_defaults(resolve(self.source), self.revision) | stored:
            write_json(place / CARD_NAME, kept)
        if stored and "id2label" in inspect.signature(type(self._pipeline).__init__).parameters:
            # stock DiTPipeline reads names from its index, but does not write them there
            index = read_json(place / "model_index.json")
            write_json(place / "model_index.json", index | {"id2label": stored.get("id2label")})

    def _restore_encoders(self) -> None:
        # Conditioner.free() dropped them; model_index.json would otherwise name none.
        missing = [n for n in self._freed_names() if getattr(self._pipeline, n) is None]
        if not missing:
            return
        here = {n: part for n, part in self._pipeline.components.items() if part is not None}
        with quiet_libraries():
            again = load_pipeline(self.source, parts=here, **self._load_options)
        # Not setattr: it cannot bring back the entry of model_index.json.
        self._pipeline.register_modules(**{n: getattr(again, n) for n in missing})

    def _freed_names(self) -> list[str]:
        return [] if self.conditioner.encoders else list(self.family.text_components)


def _forget_folders(place: Path) -> None:
    """Leave out of the configs from which folder of this machine each part was read."""
    for path in (*place.glob("*.json"), *place.glob("*/*.json")):
        values = read_json(path)
        source = values.get("_name_or_path") if isinstance(values, dict) else None
        if isinstance(source, str) and not is_hub_id(source):
            del values["_name_or_path"]
            write_json(path, values)
