"""README.md of everything that is saved: where it comes from, how it was made, how it scores."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffkit import __version__
from diffkit.files import atomic_write
from diffkit.models.loading import EMBEDDED, is_hub_id, resolve

if TYPE_CHECKING:
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["CARD_FILE", "ModelCard", "licence_of", "public_name", "with_scores", "write_model_card"]

CARD_FILE = "README.md"
Relation = Literal["finetune", "adapter", "merge", "quantized"]

_SCORES = "<!-- scores -->"
_UNKNOWN_LICENCE = (
    "The licence of the base model could not be read here. Look it up before you publish this one: "
    "what is made from a model is usually bound by the model's licence."
)


@dataclass(frozen=True)
class ModelCard:
    """What a model folder says of itself.

    Attributes:
        base_model: what it was made from: "embedded", a folder, a hub id; "" when it was built in
            memory.
        relation: how it was made from it, in the hub's words.
        text: True when its input is text.
        licence: of the base model, in the hub's words (`apache-2.0`); None when unknown.
        data: names of the data that it was trained on; `hub:OWNER/NAME` for hub data sets.
        objective: what training minimised, or what else was done.
        settings: flags that shaped it, by name.
        metrics: numbers measured while it was made, by name.
        adapter: what kind of adapter it is, in the hub's words, if it is one.
        loading: the lines of Python after the base model's; by default those of a model or a LoRA.
        command: the line of a shell that uses it, where no Python of stock diffusers does.
    """

    base_model: str = ""
    relation: Relation = "finetune"
    text: bool = True
    licence: str | None = None
    data: Sequence[str] = ()
    objective: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    adapter: Literal["lora", "textual_inversion", "proxy_reward"] = "lora"
    loading: Sequence[str] = ()
    command: str = ""

    @classmethod
    def of(cls, model: LatentDiffusion, **values: Any) -> ModelCard:
        """A card with what the loaded model itself tells; `values` are further attributes."""
        known = {"base_model": model.source, "licence": licence_of(model.source)}
        return cls(**{**known, "text": bool(model.family.text_components), **values})

    def render(self, title: str) -> str:
        """The text of README.md: the hub's YAML header, then what a person reads."""
        parts = [f"---\n{self._header()}\n---", f"# {title}", self._summary(), self._usage()]
        if self.objective:
            parts.append(f"## How it was made\n\n{self.objective}")
        if self.settings:
            parts.append(_table(("setting", "value"), self.settings))
        if self.data:
            names = "\n".join(f"- {public_name(name)}" for name in self.data)
            parts.append(f"## Data\n\n{names}")
        parts.append(_table(("measured", "value"), self.metrics) if self.metrics else "")
        of_base = ", that of the base model" if self.base_model else ""
        licence = f"`{self.licence}`{of_base}." if self.licence else _UNKNOWN_LICENCE
        parts.append(f"## Licence\n\n{licence}")
        return "\n\n".join(filter(None, parts)) + "\n"

    def _header(self) -> str:
        from huggingface_hub import ModelCardData

        hub_base = self.base_model if is_hub_id(self.base_model) else None
        datasets = [name.removeprefix("hub:") for name in self.data if name.startswith("hub:")]
        kind = [self.adapter] if self.relation == "adapter" else []
        values = {
            "base_model": hub_base,
            "base_model_relation": self.relation if hub_base else None,
            "datasets": datasets or None,
            "library_name": "diffusers",
            "license": self.licence,
            "pipeline_tag": "text-to-image" if self.text else "unconditional-image-generation",
            "tags": ["diffkit", "diffusers", *kind],
        }
        present: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
        return ModelCardData(**present).to_yaml()

    def _summary(self) -> str:
        if not self.base_model:
            return f"Diffusion model, written by diffkit {__version__}."
        kinds = {
            "lora": "LoRA adapter for",
            "textual_inversion": "Textual inversion for",
            "proxy_reward": "Latent proxy reward for",
        }
        kind = kinds[self.adapter] if self.relation == "adapter" else "Diffusion model made from"
        return f"{kind} {public_name(self.base_model)}, written by diffkit {__version__}."

    def _usage(self) -> str:
        if self.command:
            return f"## Use\n\nTHIS is this folder.\n\n```\n{self.command}\n```"
        lines = ["from diffusers import DiffusionPipeline", ""]
        if self.relation == "adapter":
            base = f'"{public_name(self.base_model)}"'
            if self.base_model == EMBEDDED:
                lines.insert(1, "from diffkit.models.loading import resolve")
                base = f'resolve("{EMBEDDED}")'
            lines.append(f"pipeline = DiffusionPipeline.from_pretrained({base})")
            usual = 'pipeline.load_lora_weights("THIS")  # this folder, or its hub id'
            lines += self.loading or [usual]
        else:
            lines.append(
                'pipeline = DiffusionPipeline.from_pretrained("THIS")  # this folder, or its hub id'
            )
            lines += self.loading
        return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def write_model_card(folder: str | os.PathLike[str], card: ModelCard, title: str = "") -> Path:
    """Write README.md into a saved model or adapter, atomically; returns its path.

    `title` is the name of the folder by default.
    """
    path = Path(folder) / CARD_FILE
    with atomic_write(path, "w") as file:
        file.write(card.render(title or Path(folder).resolve().name))
    return path


def with_scores(text: str, report: Mapping[str, Any], name: str) -> str:
    """A card's text with the scores of an evaluation, in its header and as a table.

    Args:
        text: of README.md, with or without scores of an earlier evaluation, which are replaced.
        report: report.json of `diffkit evaluate`, of which the numbers of "model" are taken.
        name: of the model, for the header.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub import ModelCard as HubCard

    rows = [metric for metric in report["metrics"] if "model" in metric["values"]]
    card = HubCard(_without_scores(text), ignore_metadata_errors=True)
    header: Any = card.data
    source = (report.get("reference") or {}).get("source") or "prompts"
    header.model_name = name
    header.eval_results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type=re.sub(r"\W+", "-", public_name(source)) or "prompts",
            dataset_name=public_name(source),
            metric_type=row["name"],
            metric_value=row["values"]["model"]["value"],
        )
        for row in rows
    ]
    lines = ["| metric | value | interval | n | measured with |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        value = row["values"]["model"]
        low, high = value.get("low"), value.get("high")
        interval = "" if low is None else f"{low:.4g} to {high:.4g}"
        tools = ", ".join(filter(None, (row.get("extractor"), row.get("resize"))))
        cells = (row["label"], f"{value['value']:.4g}", interval, str(row["n"]), tools)
        lines.append("| " + " | ".join(cells) + " |")
    heading = f"{_SCORES}\n## Scores\n\nBy `diffkit evaluate`, seed {report['seed']}.\n\n"
    return f"{card.content.rstrip()}\n\n{heading}" + "\n".join(lines) + f"\n{_SCORES}\n"


def _without_scores(text: str) -> str:
    return re.sub(rf"\n*{_SCORES}.*?{_SCORES}\n?", "\n", text, flags=re.DOTALL)


def licence_of(source: str) -> str | None:
    """The licence that a model's README.md states, in the hub's words; None when it states none.

    `source` is "embedded", a folder or a hub id, of which the card is fetched when it is not in the
    hub's cache. A card that cannot be read or fetched counts as none.
    """
    from huggingface_hub import ModelCard as HubCard
    from huggingface_hub import hf_hub_download

    path = Path(resolve(source)) / CARD_FILE if source else None
    try:
        if path is not None and not path.is_file() and is_hub_id(source):
            path = Path(hf_hub_download(source, CARD_FILE))
        if path is None or not path.is_file():
            return None
        header: Any = HubCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return None
    return header.license if isinstance(header.license, str) else None


def public_name(source: str) -> str:
    """How a published text names a model or data: hub ids whole, of local paths the last part."""
    name = source.removeprefix("hub:")
    if source == EMBEDDED:
        return "diffkit's embedded model"
    if source.startswith("hub:") or is_hub_id(name):
        return name
    return Path(name).expanduser().resolve().name if name else ""


def _table(head: tuple[str, str], rows: Mapping[str, object]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    for name, value in rows.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)
