"""What whoever protects a picture must be told, wherever results are shown."""

from __future__ import annotations

__all__ = ["notice"]


def notice(model: str, *, retention: str | None = None, cost: str | None = None) -> tuple[str, ...]:
    """Eight sentences or so about what a protection is and is not.

    Arguments:
        model: the attacked model, as a person knows it.
        retention: what purification leaves, measured on these pictures; None is not measured.
        cost: the measured change of the pictures; None where it stands elsewhere.
    """
    return (
        "This makes casual imitation and editing by specific models harder. It does not make them "
        "impossible, and it is no copyright protection and no proof of ownership.",
        f"It was computed against {model}. Other models, newer models, closed services and future "
        "ways of fine-tuning may ignore it, and what is published cannot be strengthened later.",
        "Steps that anyone can take (denoising, noisy upscaling, diffusion purification, redrawing "
        f"with another model) can remove most of it. Left on these pictures: "
        f"{retention or 'not measured'}.",
        "It does nothing for pictures that were collected already, and little where unprotected "
        "copies exist or only a minority of the pictures is protected.",
        "Resizing, cropping, screenshots and the JPEG or WebP compression of websites weaken it: "
        "protect the final size, as the last step, and upload without loss where you can.",
        f"It changes the picture{'' if cost is None else f': {cost}'}. How visible that is depends "
        "on flat areas; keep the original.",
        "More strength protects more only together with more visible change. Published tests of "
        "the strength low (4 levels) show little effect on fine-tuning.",
        "There is no verdict here: read each effect beside that of random noise of the same size, "
        "and take one that is not clearly above it for none.",
    )
