"""From a configuration to a finished run: model, data, caches, objective, trainer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from diffkit.console import say
from diffkit.data.fill import cache_embeddings, cache_latents
from diffkit.data.folder import ImageFolder
from diffkit.data.hub import load_table, open_source
from diffkit.data.labels import match_labels
from diffkit.data.loader import TrainingData
from diffkit.data.paired import PairedData
from diffkit.data.preference_columns import left_out
from diffkit.data.preference_sources import open_pairs
from diffkit.data.preferences import PreferenceData
from diffkit.data.prompts import read_prompts
from diffkit.data.recaption import Recaptioned
from diffkit.data.records import ImageSource
from diffkit.data.scan import require_captions
from diffkit.data.stream import StreamedData
from diffkit.data.trajectories import TrajectoryData
from diffkit.data.trajectory_store import is_trajectory_folder
from diffkit.errors import UserError
from diffkit.generation.card import read_card
from diffkit.models.classes import Classes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.publish import check_destination
from diffkit.models.text_encoders import TEXT_TARGETS, clip_encoders
from diffkit.objectives.base import Objective
from diffkit.randomness import address
from diffkit.training.companions import make_companions
from diffkit.training.config import TrainConfig
from diffkit.training.configfile import dump, to_plain
from diffkit.training.devices import DTYPES, make_accelerator, release_accelerator
from diffkit.training.folder import RunFolder
from diffkit.training.publish import publish, write_result_card
from diffkit.training.registry import method_of
from diffkit.training.trackers import make_tracker, require_tracker
from diffkit.training.trainer import Trainer
from diffkit.training.validation import Validation

__all__ = [
    "build_companions",
    "build_data",
    "build_model",
    "build_objective",
    "example_prompts",
    "fill_caches",
    "picture_side",
    "train",
]

Data = TrainingData | StreamedData | PairedData | PreferenceData | TrajectoryData

LORA_NAME = "default"
EXAMPLES = 4
LOOKED_AT = 256
"""Samples whose captions are read in search of different ones."""


def train(config: TrainConfig) -> int:
    """Run or resume the training that `config` describes; returns the exit code.

    Raises `UserError` before anything was written when the run cannot start, and `RunFailed` when
    it breaks off.
    """
    config.check()
    folder = RunFolder(config)
    folder.check(config)
    if config.push_to_hub is not None:
        check_destination(config.push_to_hub, online=True)
    if not config.overwrite and folder.finished(config):
        say(f"{folder.path}: finished already; the result is {folder.result}.")
        publish(config, folder)
        return 0
    accelerator = make_accelerator(config)
    try:
        config.check_processes(accelerator.num_processes)
        code = _train(config, folder, accelerator)
        if code == 0 and accelerator.is_main_process:
            publish(config, folder)
        return code
    finally:
        folder.release()
        release_accelerator(accelerator)


def _train(config: TrainConfig, folder: RunFolder, accelerator: Any) -> int:
    main = accelerator.is_main_process
    model = build_model(config)
    data: Data = build_data(config, model)
    wanted, size = config.companions(), picture_side(config, model, data)
    companions = None
    if wanted is not None and wanted.folder is not None:
        companions = build_companions(config, model, ImageFolder(wanted.folder))
    objective = build_objective(config, model)
    objective.meet(example_prompts(config, model, data))
    require_tracker(config.tracker)
    for encoder in model.conditioner.encoders.values():
        encoder.to(accelerator.device)
    validate = None
    if config.validation_prompts is not None:
        validate = Validation(
            model,
            config.validation_prompts,
            size=size,
            seed=config.seed,
            steps=config.validation_steps,
            guidance_scale=_validation_guidance(config, model),
            folder=folder.samples if main else None,
            encode_anew=config.changes_prompts(),
        )
    if main:
        folder.hold()
        folder.prepare(config, dump(config))
    accelerator.wait_for_everyone()
    if wanted is not None and wanted.folder is None:
        made = make_companions(config, wanted, size, folder.cache, accelerator)
        companions = build_companions(config, model, ImageFolder(made))
    if companions is not None and isinstance(data, TrainingData):
        data = PairedData(data, companions)
    fill_caches(config, folder, model, data, accelerator)
    name = config.tracker if main else "none"
    tracker = partial(make_tracker, name, folder.path, config=to_plain(config))
    options: dict[str, Any] = {"validate": validate, "data_identity": data.fingerprint()}
    card = partial(write_result_card, config=config, model=model, metrics=folder.metrics)
    options["describe"] = card
    trainer = Trainer(objective, data, config, accelerator, folder, tracker, **options)
    if config.cache_embeddings:
        model.conditioner.free()  # captions, validation prompts and the null are encoded
    return trainer.run()


def _validation_guidance(config: TrainConfig, model: LatentDiffusion) -> float:
    if config.validation_guidance is not None:
        return config.validation_guidance
    usual = config.sampling_guidance(model)
    if usual is not None:
        return usual
    return read_card(config.model, config.revision).guidance(model.family.guidance_scale)


def build_model(config: TrainConfig) -> LatentDiffusion:
    """Load the model with exactly the parameters trainable that the run trains.

    A LoRA trains on frozen weights in the precision of the run; full training keeps float32. Where
    text encoders train whole, all of them keep float32: the result is saved from memory. The VAE
    keeps float32: it is small, cached latents then serve every precision, and without the cache
    autocast does its arithmetic.
    """
    options: dict[str, Any] = {"variant": config.variant, "revision": config.revision}
    loaded = LatentDiffusion.load(config.model, attention=config.attention, **options)
    model = config.prepared(loaded)
    dtype = DTYPES[config.mixed_precision]
    network: Any
    for network in model.networks.values():
        network.requires_grad_(False)
    trained, encoders = config.trained(), clip_encoders(model.conditioner)
    whole = config.lora_rank is None
    if whole and "text encoders" in trained:
        for encoder in encoders.values():
            encoder.requires_grad_(True)
    else:
        for encoder in model.conditioner.encoders.values():
            _lower(encoder, dtype)
    if whole and "denoiser" in trained:
        model.denoiser.model.requires_grad_(True)
    else:
        model.denoiser.to(dtype)
    if config.lora_rank is not None:
        from diffkit.models.lora import add_lora

        text = TEXT_TARGETS if "text encoders" in trained else ()
        shape = config.lora_rank, config.lora_alpha, config.adapted(model)
        add_lora(model, *shape, name=LORA_NAME, seed=config.seed, text_targets=text)
    model.denoiser.train()
    if config.gradient_checkpointing:
        network = model.denoiser.model
        network.enable_gradient_checkpointing()
        if config.changes_prompts():
            for network in encoders.values():
                network.gradient_checkpointing_enable()
    return model


def _lower(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Cast a text encoder; layers that overflow in float16 (T5's) stay as transformers has them."""
    wide: set[str] = set()
    if dtype == torch.float16:
        wide = set(getattr(encoder, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers()):
        if tensor.is_floating_point() and wide.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def build_data(
    config: TrainConfig, model: LatentDiffusion
) -> TrainingData | StreamedData | PreferenceData | TrajectoryData:
    """The batches of the run; raises `UserError` for data or a size that cannot be used."""
    if config.trajectories():
        _check_labels(config, model)
        if not is_trajectory_folder(config.data):
            raise UserError(
                f"data: {config.data} holds no pairs of noise and picture; give a folder made by "
                "`diffkit trajectories`. From pictures `gan` learns with --gan.pictures."
            )
        pairs = TrajectoryData(config.data, batch_size=config.batch_size, seed=config.seed)
        pairs.check(model)
        return pairs
    options = _data_options(config, model)
    if config.pairs():
        return _build_pairs(config, model, options)
    columns: dict[str, Any] = {
        "image_column": config.image_column,
        "caption_column": config.caption_column,
    }
    labels, captions = _check_labels(config, model), config.captions()
    if config.streaming:
        table = load_table(config.data, config.split, streaming=True)
        columns["captions"] = labels is None and config.needs_captions()
        return StreamedData(table, config.data, **options, **columns)
    source = open_source(config.data, split=config.split, **columns)
    if labels is not None and captions:
        raise UserError(
            f"model: {model.family.name} models read no text, and this training is about a prompt; "
            "give a text-to-image model."
        )
    if labels is not None and labels.count:
        source, model.conditioner.classes = match_labels(source, labels)
    elif captions:
        source = Recaptioned(source, captions)
    elif labels is None and config.needs_captions():
        require_captions(source)
    return TrainingData(source, max_aspect=config.max_aspect, **options)


def _build_pairs(
    config: TrainConfig, model: LatentDiffusion, options: dict[str, Any]
) -> PreferenceData:
    classes = _check_labels(config, model)
    if classes is not None and classes.count:
        raise UserError(
            f"model: {model.family.name} models are conditioned on classes, and preference pairs "
            "have captions; give a text-to-image model."
        )
    source = open_pairs(config.data, split=config.split, caption_column=config.caption_column)
    if classes is None and config.needs_captions():
        require_captions(source, "pair")
    left = source.ties + source.unlabelled + source.equal
    if left:
        say(f"{config.data}: {left} of {source.rows} rows are left out: {left_out(source)}.")
    return PreferenceData(source, max_aspect=config.max_aspect, **options)


def build_companions(
    config: TrainConfig, model: LatentDiffusion, source: ImageSource
) -> TrainingData:
    """These pictures as the second set of the run, with an order and draws of their own."""
    wanted = config.companions()
    assert wanted is not None
    source = Recaptioned(source, (wanted.caption,))
    options = _data_options(config, model) | {"seed": address(config.seed, "companions")}
    return TrainingData(source, max_aspect=config.max_aspect, **options)


def picture_side(config: TrainConfig, model: LatentDiffusion, data: Data) -> int:
    """Side in pixels of the square pictures that the run is about."""
    if isinstance(data, TrajectoryData) and len(set(data.header.size)) == 1:
        return data.header.size[0]
    return config.size or model.default_size


def _data_options(config: TrainConfig, model: LatentDiffusion) -> dict[str, Any]:
    size = config.size or model.default_size
    model.check_size(size, size)
    return {
        "resolution": size,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "multiple": model.size_multiple,
        "crop": config.crop,
        "flip": config.flip,
    }


def _check_labels(config: TrainConfig, model: LatentDiffusion) -> Classes | None:
    """The classes of a model without text; `UserError` for flags that are not for it."""
    classes = model.conditioner.classes
    if classes is not None and config.cache_embeddings:
        raise UserError(
            f"cache_embeddings: {model.family.name} models read no captions; leave it out."
        )
    if classes is not None and classes.count and config.streaming:
        raise UserError(
            "streaming: the classes of a stream are not known at the start, and this model is "
            "conditioned on them; leave --streaming out."
        )
    if config.max_aspect != 1 and model.family.square:
        raise UserError(f"max_aspect: {model.family.name} pictures are square; leave it out.")
    return classes


def build_objective(config: TrainConfig, model: LatentDiffusion) -> Objective:
    """The method with its own configuration."""
    lora = None if config.lora_rank is None else LORA_NAME
    return method_of(config).build(model, config, lora)


def example_prompts(config: TrainConfig, model: LatentDiffusion, data: Data) -> list[str]:
    """The first different prompts that the run is about, at most 4.

    Captions of the data's first samples; names of classes for a class-conditional model; the
    validation prompts of a stream, whose captions are not known at the start.
    """
    classes = model.conditioner.classes
    found: Iterable[str] = ()
    if classes is not None:
        found = (classes.name(number) for number in range(classes.count))
    elif not isinstance(data, StreamedData):
        part = data.own if isinstance(data, PairedData) else data
        found = (part.captions(position)[0] for position in range(min(len(part), LOOKED_AT)))
    elif config.validation_prompts is not None:
        found = read_prompts(config.validation_prompts)
    distinct = dict.fromkeys(found)
    return list(distinct)[:EXAMPLES]


def fill_caches(
    config: TrainConfig,
    folder: RunFolder,
    model: LatentDiffusion,
    data: Data,
    accelerator: Any,
) -> None:
    """Encode what the run wants cached, each process its share, on the run's device."""
    if isinstance(data, StreamedData):
        return
    sets = (data.own, data.companions) if isinstance(data, PairedData) else (data,)
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    if config.cache_latents:
        model.codec.to(accelerator.device)
        for part in sets:
            assert not isinstance(part, TrajectoryData)  # refused by the config
            cache_latents(part, folder.cache, model.codec, **place)
        model.codec.to("cpu")
    if config.cache_embeddings:
        for encoder in model.conditioner.encoders.values():
            encoder.to(accelerator.device)
        for part in sets:
            cache_embeddings(part, folder.cache, model.conditioner, **place)
    accelerator.wait_for_everyone()
