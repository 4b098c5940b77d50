"""The panel that says what the model is: the short form of `diffkit info`."""

from __future__ import annotations

from diffkit.commands.panels import Panel, Stage
from diffkit.evaluation.cost import model_cost
from diffkit.generation.engine import size_rule
from diffkit.models.cost import parameter_count
from diffkit.models.skeleton import skeleton


def what_it_is(stage: Stage) -> Panel:
    """Parts, parameters, schedule and multiply-accumulates."""
    model, schedule = stage.model, stage.model.schedule
    size = size_rule(model).native
    cost = model_cost(skeleton(stage.source), size.width, size.height)
    # As in `diffkit info`: a scale that is an input of the network costs no second call.
    steps = stage.card.step_count(model.family.steps)
    scale = stage.card.guidance(model.family.guidance_scale)
    guided = scale > 1 and not model.family.takes_guidance
    parts = [
        (name, f"{type(part).__name__}, {parameter_count(part):,} parameters")
        for name, part in model.networks.items()
    ]
    return Panel(
        title="The model",
        text="What made these pictures, read from its configs.",
        command=f"diffkit info {stage.source}",
        table=(
            ("family", model.family.name),
            *parts,
            ("schedule", f"{schedule.kind}, predicts {schedule.prediction_type}"),
            ("picture", f"{size} pixels"),
            (
                "work a picture",
                f"{cost.macs(steps, guided) / 1e9:,.2f} billion multiply-accumulates in {steps} "
                f"steps of {'two calls, for guidance' if guided else 'one call'}",
            ),
        ),
    )
