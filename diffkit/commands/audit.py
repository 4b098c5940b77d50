"""`diffkit audit`: what a protection is worth against editing, imitation and purification."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffkit.console import say, set_quiet
from diffkit.errors import UserError

if TYPE_CHECKING:
    from diffkit.audit.request import AuditRequest

__all__ = ["AuditConfig", "configs", "main"]

_DEFAULT_STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)


@dataclass(frozen=True)
class AuditConfig:
    """Measure what protected pictures do to edits and imitations, beside random noise.

    CLEAN and PROTECTED are two pictures, or two folders whose pictures belong together by their
    records (NAME.json) or their paths; what has no partner is listed. Every number has an interval
    and the same number for random noise of equal strength; there is no verdict. The same command
    on the same output goes on where it stopped. Open OUTPUT/audit.html to read the result.
    """

    clean: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CLEAN")]
    """The original picture, or a folder of them."""

    protected: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PROTECTED")]
    """What diffkit protect, or another tool, made of it."""

    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A model that edits and imitates: a diffusers folder, a .safetensors file or a hub id. Give
    the attacked one first, and again for others that were not attacked. Default embedded, which
    says nothing about real pictures."""

    threats: str = "sdedit"
    """Joined by commas: sdedit, sdedit:guided, inpaint (needs --mask), and on folders lora,
    dreambooth, textual-inversion."""

    purify: str = "default"
    """What is done to the pictures first, joined by commas, such as jpeg75,resize,sdedit0.2; none
    for nothing, default for what needs no further model."""

    prompt: str | None = None
    """What editors are asked for; default the attack's own of each record, else "a picture"."""

    mask: Path | None = None
    """White where inpaint repaints: a picture, or a folder of them with the clean pictures'
    names. If it is the protection's own mask, random noise keeps within it too."""

    strengths: tuple[float, ...] = _DEFAULT_STRENGTHS
    """Strengths of sdedit, on a grid of 100 steps."""

    seeds: int | None = None
    """Noises that each picture is edited from; default 8 for fewer than 8 pictures, else 4."""

    steps: int | None = None
    """Training steps of lora (1000), dreambooth (1000) and textual-inversion (6000)."""

    rank: int = 4
    """Rank of lora."""

    vectors: int = 8
    """Embedding rows of the new word of textual-inversion."""

    learning_rate: float | None = None
    """Of lora (1e-4), dreambooth (5e-7) and textual-inversion (2e-3)."""

    instance_prompt: str | None = None
    """What the pictures are learnt as, with {} for the new word of textual-inversion (sks for
    others); default the captions of CLEAN, else "a picture in the style of {}"."""

    class_prompt: str | None = None
    """Adds prior preservation to lora and dreambooth: the prompt of the class pictures."""

    class_images: Path | None = None
    """A folder of class pictures; without it the model draws 100 for lora, 200 for dreambooth."""

    samples: int = 100
    """Pictures that each imitator draws."""

    sample_prompts: Path | None = None
    """A file of prompts for the imitators, one a line; default what they learnt."""

    partial: tuple[int, ...] = ()
    """Also train on sets of which so many per cent are protected, such as 25 50 75."""

    extractor: str = "embedded"
    """The network of feature distances: embedded, inception, inception:PATH, clip:ARCH:TAG,
    clip:ARCH:PATH."""

    scorer: str = "embedded"
    """The network of text alignment and image cosine: embedded, clip:ARCH:TAG, clip:ARCH:PATH."""

    lpips: str = "alex"
    """Backbone of LPIPS: alex, vgg, alex:PATH, vgg:PATH."""

    seed: int = 0
    """Of all draws."""

    resamples: int = 2000
    """Bootstrap resamples behind every interval."""

    batch_size: int = 8
    """Pictures at once; halved where the GPU's memory does not suffice."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the models."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    output: Path = Path("audit")
    """Folder for audit.html, audit.json, and what was measured so far."""

    dry_run: bool = False
    """Say how many edits and trainings this makes and about how long it takes, and stop."""

    overwrite: bool = False
    """Throw away what an earlier audit left in the output folder."""

    json: bool = False
    """Print the report as JSON on stdout, and nothing else."""


def configs() -> dict[str, type]:
    """The one config of this command."""
    return {"": AuditConfig}


def main(config: AuditConfig) -> int:
    """Audit; returns 1 when some pictures were refused or broke off. See `AuditConfig`."""
    set_quiet(config.json)

    from diffkit.audit.page import write_page
    from diffkit.audit.report import build_report
    from diffkit.audit.run import run_audit
    from diffkit.audit.summary import print_summary
    from diffkit.files import write_json

    request = _request(config)
    if "embedded" in request.models:
        say("The embedded model knows emoji only: it says nothing about real pictures (--model).")
    place = config.clean, config.protected, config.output
    audit = run_audit(request, *place, config.overwrite, config.dry_run)
    if config.dry_run:
        if config.json:
            print(json.dumps({"kind": "diffkit audit plan", "models": audit.plans}))
        return 0
    report = build_report(audit, request)
    write_json(config.output / "audit.json", report)
    page = write_page(report, audit, config.output)
    if config.json:
        print(json.dumps(report))
    else:
        for line in report["notice"]:
            say(line)
        print_summary(report)
        say(f"open {page.resolve().as_uri()}")
    return 0 if audit.complete else 1


def _request(config: AuditConfig) -> AuditRequest:
    from diffkit.audit.mimicry_settings import MimicrySettings
    from diffkit.audit.request import AuditRequest, purifier_list
    from diffkit.audit.threats import parse_threats
    from diffkit.data.prompts import read_prompts
    from diffkit.generation.engine import choose_device, choose_dtype

    threats = parse_threats(config.threats, config.strengths)
    if config.strengths != _DEFAULT_STRENGTHS and "sdedit" not in threats.main:
        raise UserError("--strengths: are those of sdedit; add it to --threats.")
    device = choose_device(config.device)
    choose_dtype(config.dtype, device)
    prompts = () if config.sample_prompts is None else tuple(read_prompts(config.sample_prompts))
    return AuditRequest(
        models=config.model or ("embedded",),
        threats=threats,
        purify=purifier_list(config.purify),
        prompt=config.prompt,
        mask=config.mask,
        seeds=config.seeds,
        mimicry=MimicrySettings(
            steps=config.steps,
            rank=config.rank,
            vectors=config.vectors,
            learning_rate=config.learning_rate,
            instance_prompt=config.instance_prompt,
            class_prompt=config.class_prompt,
            class_images=config.class_images,
            samples=config.samples,
            sample_prompts=prompts,
            partial=config.partial,
        ),
        extractor=config.extractor,
        scorer=config.scorer,
        lpips=config.lpips,
        seed=config.seed,
        resamples=config.resamples,
        batch_size=config.batch_size,
        dtype=config.dtype,
        device=device,
        command=_given(config),
    )


def _given(config: AuditConfig) -> dict[str, Any]:
    """CLEAN, PROTECTED and the flags that are not at their defaults, as JSON knows them.

    Of absolute paths, which are this machine's, the last parts.
    """
    from diffkit.audit.purifiers.naming import public_text

    def public(value: Any) -> Any:
        if isinstance(value, tuple):
            return [public(item) for item in value]
        return public_text(str(value)) if isinstance(value, (str, Path)) else value

    given: dict[str, Any] = {"clean": public(config.clean), "protected": public(config.protected)}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        unnamed = (*given, "overwrite", "json", "dry_run")
        if field.name not in unnamed and value != field.default:
            words = field.name in ("prompt", "instance_prompt", "class_prompt")
            given[field.name] = value if words else public(value)
    return given
