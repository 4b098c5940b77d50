"""`diffkit protect`: make imitation of pictures by models harder, and say what that cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffkit.console import say, set_quiet
from diffkit.errors import UserError

if TYPE_CHECKING:
    from diffkit.protection.job import Job, Request
    from diffkit.protection.run import Outcome
    from diffkit.protection.settings import Settings

__all__ = ["ProtectConfig", "configs", "main"]


@dataclass(frozen=True)
class ProtectConfig:
    """Protect pictures against imitation and editing by a latent diffusion model.

    PATHS are picture files or folders, searched to the bottom. Originals stay as they are. Run it
    again with the same words and it goes on where it stopped. Under accelerate launch the pictures
    are shared out over the processes. `diffkit audit` measures what a protection is worth.
    """

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PATH...")]
    """Pictures (png, jpg, webp, tif, bmp) and folders of them."""

    output: Path = Path("protected")
    """Folder for the results: the same names below it, each with a record NAME.json."""

    method: str = "auto"
    """random, photoguard, photoguard-diffusion, texture, pid, advdm, advdm-, mist, sds+, sds-,
    sdst+, sdst-, ace, ace+, fsmg, aspl, diffusionguard; auto is sdst- on a GPU, texture on a
    CPU."""

    strength: str | None = None
    """Largest change of a pixel: low (4), medium (8), high (16), or 1 to 32 levels of 255; default
    the method's, which is medium, and high for photoguard-diffusion."""

    steps: int | None = None
    """Steps of the attack; default the method's."""

    step_levels: float | None = None
    """Size of a step in levels; default the method's."""

    model: str = "embedded"
    """The attacked model: a diffusers folder, a .safetensors file or a hub id. The embedded one
    protects no real picture."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    ensemble: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A further model whose autoencoder is attacked too; repeat the flag for several."""

    prompt: str | None = None
    """What the model is told; default "a picture"."""

    target: str | None = None
    """What encodings are pulled to: text:WORD, checker, zero or a picture file; default the
    method's."""

    mask: Path | None = None
    """White where pixels may change: a picture, or a folder of them with the pictures' names.
    For photoguard-diffusion and diffusionguard: white is what an editor keeps."""

    t_range: str | None = None
    """Share of the noise schedule between which times are drawn, 1 being noise: LO-HI, or high for
    0.6-1; default 0-1, for ace and ace+ high."""

    times: Literal["uniform", "greedy"] = "uniform"
    """How times are drawn; greedy is SimAC's choice."""

    eot: int | None = None
    """Draws of noise, time and transform that are averaged in a step."""

    transforms: str = ""
    """Changes to survive, one a draw: identity, jpeg, resize, blur, noise, joined by commas."""

    views: int | None = None
    """Views of a step: 1 is the whole picture, 2 adds a detail of large ones; default 2, and 1 for
    methods of the encoder on a CPU."""

    tiles: bool = False
    """Look at all of a large picture in tiles (methods of the encoder)."""

    norm: Literal["linf", "l2"] | None = None
    """Steps by sign or by length (photoguard-diffusion)."""

    momentum: float = 0.0
    """Momentum of the steps."""

    decay: bool = False
    """Make the steps smaller towards the end."""

    random_start: bool | None = None
    """Begin at a random point of the budget; default the method's."""

    sample_latents: bool = False
    """Encode to samples of the posterior instead of its mean."""

    keep_best: bool = False
    """Keep the best step instead of the last."""

    contrast: bool = False
    """Change flat areas less, where a change is seen most."""

    max_lpips: float | None = None
    """Lower the strength of each picture until its LPIPS is at most this."""

    lpips: str = "alex"
    """Backbone of LPIPS: alex, vgg, alex:PATH, vgg:PATH."""

    ace_output: Literal["native", "eps"] | None = None
    """What ace pulls to the target: the network's output or its noise."""

    residual_weight: float | None = None
    """Weight of the residual in sdst, 5 by default."""

    clean: Path | None = None
    """Folder of unprotected pictures of the same subject that fsmg and aspl learn from; default
    the pictures themselves."""

    class_prompt: str | None = None
    """What else the surrogate of ace, fsmg and aspl is to remember, such as "a painting"."""

    class_images: Path | None = None
    """Folder of pictures of the class prompt; without it the model makes them."""

    class_count: int | None = None
    """Pictures of the class prompt to be made, 200 by default."""

    prior_weight: float | None = None
    """Weight of these pictures; 1 by default, and 0 on a CPU."""

    surrogate: Literal["lora", "full"] | None = None
    """What fsmg trains: a LoRA, the default, or all weights of the denoiser."""

    rounds: int | None = None
    """Rounds of attack and training; default 5 for ace, one for 6 steps for aspl."""

    train_steps: int | None = None
    """Training steps of a round; default 5 for ace, 3 for aspl, 1000 for fsmg."""

    train_text_encoder: bool = False
    """Let the surrogate train its CLIP text encoders too."""

    keep_jpeg: bool = False
    """Save JPEG files as JPEG again instead of PNG; weakens the protection."""

    seed: int = 0
    """Of all draws, together with each file's bytes."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the model; pictures are always fp32."""

    batch_size: Annotated[int, tyro.conf.arg(aliases=["--batch"])] = 1
    """Pictures of one size at once."""

    low_vram: bool = False
    """Spare memory from the start: two passes and recomputed activations."""

    dry_run: bool = False
    """Print what it would take, and stop."""

    preview: bool = False
    """For each picture also OUTPUT/previews/NAME.png: before, after, the difference times 8, and
    an edit of both."""

    report: bool = False
    """Measure the effect on edits of each picture, beside that of random noise."""

    purify: str | None = None
    """With --report: what is left after these, as in diffkit audit, such as jpeg75,resize."""

    overwrite: bool = False
    """Replace results that were made with other settings."""

    json: bool = False
    """Print what was done as JSON on stdout, and nothing else."""


def configs() -> dict[str, type]:
    """The one config of this command."""
    return {"": ProtectConfig}


def main(config: ProtectConfig) -> int:
    """Protect the pictures; returns 1 when some could not be. See `ProtectConfig`."""
    set_quiet(config.json)
    if config.purify is not None and not config.report:
        raise UserError("--purify: needs --report, which measures with it.")

    from diffkit.commands.protect_words import closing, hints, opening
    from diffkit.generation.engine import choose_device, choose_dtype
    from diffkit.generation.run import Processes
    from diffkit.protection.job import plan_job
    from diffkit.protection.run import run_job

    processes = Processes.current(config.device)
    device = choose_device(processes.device or config.device)
    dtype = choose_dtype(config.dtype, device)
    request = _request(config, device)
    request.check()
    for line in opening(request, config.model, device, config.method == "auto"):
        say(line)
    if config.dry_run:
        return _dry_run(config, request, dtype, device, processes.rank)
    model, ensemble, identity = _models(config, request, dtype, device)
    job = plan_job(request, identity, on_cpu=device == "cpu")
    for line in hints(job, request, processes.count, config.report or config.preview):
        say(line)
    if config.preview:
        _check_previews(job, request)
    if model is not None and job.pending:
        from diffkit.commands.protect_estimate import Models, estimate_job

        estimate = estimate_job(job, request, Models([model, *ensemble]), device, dtype)
        say(estimate.words)
        if config.report or config.preview:
            say("Edits for --report and --preview come on top, and may take longer than the rest.")
        request = estimate.fitted(request)
    extras, perceptual = _measures(config, request, model)
    outcome = run_job(
        job,
        request,
        model,
        ensemble=ensemble,
        extras=extras,
        perceptual=perceptual,
        weights=identity.get("weights", ()),
        processes=processes,
    )
    if processes.rank == 0:
        for line in closing(outcome, request, config.model):
            say(line)
        if config.json:
            print(json.dumps(_as_json(outcome, request, config.model)))
    return 1 if _bad(outcome) else 0


def _check_previews(job: Job, request: Request) -> None:
    """Refuse a folder "previews" among the results, whose pictures previews would replace."""
    for item in job.items:
        if item.output.relative_to(request.output).parts[0].lower() == "previews":
            raise UserError(
                f"--preview: writes into {request.output / 'previews'}, where the result of "
                f"{item.source.path} goes. Rename that folder or protect it by itself."
            )


def _dry_run(config: ProtectConfig, request: Request, dtype: Any, device: str, rank: int) -> int:
    """Say what it would take; reads configs and headers, writes nothing."""
    from diffkit.commands.protect_estimate import Models, estimate_job
    from diffkit.commands.protect_words import left_out
    from diffkit.protection.job import plan_job

    job = plan_job(request, None)
    sources = [config.model, *config.ensemble]
    models = Models([], sources, config.revision)
    estimate = estimate_job(job, request, models, device, dtype)
    say(estimate.words)
    for line in left_out(job.skipped, {}):
        say(line)
    if config.json and rank == 0:
        skipped = {str(item.path): item.reason for item in job.skipped}
        print(json.dumps(estimate.as_json() | {"skipped": skipped}))
    return 0


def _request(config: ProtectConfig, device: str) -> Request:
    from diffkit.protection.job import Request

    return Request(
        paths=config.paths,
        output=config.output,
        settings=_settings(config, device),
        mask=config.mask,
        keep_jpeg=config.keep_jpeg,
        max_lpips=config.max_lpips,
        lpips=config.lpips,
        batch_size=config.batch_size,
        lean=config.low_vram,
        overwrite=config.overwrite,
        clean=config.clean,
        class_images=config.class_images,
    )


def _settings(config: ProtectConfig, device: str) -> Settings:
    from diffkit.protection.settings import Settings

    method = config.method
    if method == "auto":
        method = "texture" if device == "cpu" else "sdst-"
    transforms = tuple(word.strip() for word in config.transforms.split(",") if word.strip())
    return Settings(
        method=method,
        levels=_levels(config.strength),
        steps=config.steps,
        step_levels=config.step_levels,
        prompt=config.prompt,
        target=config.target,
        t_range=_t_range(config.t_range),
        times=config.times,
        draws=config.eot,
        sampled=config.sample_latents,
        transforms=transforms,
        views=config.views,
        tiles=config.tiles,
        ensemble=config.ensemble,
        momentum=config.momentum,
        decay=config.decay,
        norm=config.norm,
        random_start=config.random_start,
        keep_best=config.keep_best,
        contrast=config.contrast,
        output_kind=config.ace_output,
        residual_weight=config.residual_weight,
        surrogate=config.surrogate,
        rounds=config.rounds,
        train_steps=config.train_steps,
        train_text_encoder=config.train_text_encoder,
        class_prompt=config.class_prompt,
        class_count=config.class_count,
        prior_weight=config.prior_weight,
        seed=config.seed,
    )


def _levels(text: str | None) -> int | None:
    from diffkit.protection.budget import LARGEST
    from diffkit.protection.settings import STRENGTHS

    if text is None or text in STRENGTHS:
        return None if text is None else STRENGTHS[text]
    if text.isdecimal() and 1 <= int(text) <= LARGEST:
        return int(text)
    raise UserError(
        f"--strength {text}: give {', '.join(STRENGTHS)}, or a whole number of levels from 1 to "
        f"{LARGEST}."
    )


def _t_range(text: str | None) -> tuple[float, float] | None:
    from diffkit.protection.methods import HIGH

    if text is None or text == "high":
        return None if text is None else HIGH
    low, dash, high = text.partition("-")
    try:
        return float(low), float(high)
    except ValueError:
        raise UserError(
            f"--t-range {text}: give LO-HI between 0 and 1, or high for 0.6-1."
        ) from None


def _models(
    config: ProtectConfig, request: Request, dtype: Any, device: str
) -> tuple[Any, list[Any], dict[str, Any]]:
    """(model, ensemble, what names them in the parameters that decide a result)."""
    from diffkit.generation.engine import weights_digest
    from diffkit.models.latent_diffusion import LatentDiffusion
    from diffkit.models.model_card import public_name
    from diffkit.protection.protect import check_mask, prepared

    if request.settings.row.loss is None:
        return None, [], {}
    sources = [config.model, *config.ensemble]
    loaded = [
        LatentDiffusion.load(
            source, dtype=dtype, device=device, revision=config.revision if not i else None
        )
        for i, source in enumerate(sources)
    ]
    # Both refuse what cannot be done before anything is written.
    check_mask(loaded[0], request.settings, request.mask is not None)
    with prepared(loaded[0], request.settings, loaded[1:]):
        pass
    identity = {
        "names": [public_name(source) for source in sources],
        "revision": config.revision,
        "weights": [weights_digest(model) for model in loaded],
        "dtype": config.dtype,
    }
    return loaded[0], loaded[1:], identity


def _measures(config: ProtectConfig, request: Request, model: Any) -> tuple[list[Any], Any]:
    """What is measured of each picture beyond its pixels, and the LPIPS network if it is here."""
    import torch

    from diffkit.perceptual.lpips import load_lpips

    extras: list[Any] = []
    if config.report or config.preview:
        from diffkit.commands.protect_report import effect_of, preview_of

        if model is None:
            raise UserError("--report, --preview: edit with a model; the method random has none.")
        if config.report:
            extras.append(effect_of(model, request, config.purify))
        if config.preview:
            extras.append(preview_of(model, request))
    device = torch.device("cpu") if model is None else model.device
    try:
        return extras, load_lpips(config.lpips, device)
    except UserError as error:
        if config.max_lpips is not None or config.lpips != "alex":
            raise
        say(f"LPIPS is not measured: {error}")
        return extras, None


def _bad(outcome: Outcome) -> bool:
    """Whether a file that is a picture by its name was not protected; links are none."""
    from diffkit.protection.image_file import FORMATS

    endings = {ending for known in FORMATS.values() for ending in known}
    paths = [item.path for item in outcome.skipped if not item.path.is_symlink()]
    return bool(outcome.failed) or any(path.suffix.lower() in endings for path in paths)


def _as_json(outcome: Outcome, request: Request, source: str) -> dict[str, Any]:
    from diffkit.commands.protect_words import measured, model_name
    from diffkit.protection.notice import notice

    return {
        "method": request.settings.method,
        "levels": request.settings.rule().levels,
        "output": str(request.output),
        "made": [str(path.relative_to(request.output)) for path in outcome.made],
        "kept": outcome.kept,
        "skipped": {str(item.path): item.reason for item in outcome.skipped},
        "failed": outcome.failed,
        "measured": measured(outcome.made),
        "notices": notice(model_name(request, source)),
    }
