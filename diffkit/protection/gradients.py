"""The gradient of an attack at native pixels: views, input transforms, draws, autoencoders.

    g = sum_v  g_v / mean |g_v|,     g_v = J_v^T J_E^T c,     c = mean_k dJ(moments; t_k, eps_k)

with J_v the Jacobian of the view (crop and resize) and J_E that of the encoder; the tiles of a
picture, weighted by their windows and summed, count as one view. All losses depend on the pixels
through the encoder's moments alone, so K draws of noise and time cost K passes of the denoiser and
one of the encoder. With input transforms each draw sees another picture and needs an encoder pass
of its own. Every view has draws of its own.

Plain: the encoder's graph is kept while c is computed, but for what frozen layers can do without
(`models.sparing`). Lean: the encoder runs without a graph, c is computed, and the encoder's
pieces are run again one at a time (`Codec.encode_moments_vjp`); the denoiser recomputes its
activations too. Both are the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffkit.models.conditioner import Sizes
from diffkit.models.sparing import sparing
from diffkit.protection.budget import as_signed
from diffkit.protection.methods import Method
from diffkit.protection.outline import shrink_outline
from diffkit.protection.scene import Scene
from diffkit.protection.surrogate import Surrogate
from diffkit.protection.targets import draw_target
from diffkit.protection.transforms import TRANSFORMS
from diffkit.protection.views import View, ViewPlan
from diffkit.randomness import address as seed_of
from diffkit.randomness import normal, uniform

__all__ = ["HELD_OUT", "Draws", "ImageGradient", "Pictures"]

HELD_OUT = 8
"""Fixed draws of time and noise behind a score."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size that are attacked together.

    Attributes:
        pixels: uint8 (B, C, H, W) of the clean pictures, C = 3 or 1 for grey ones.
        seeds: one a picture: all its draws are addressed by it.
        alpha: (B, 1, H, W) float32 in [0, 1]; the model sees the picture on white. None is opaque.
        keep: (B, 1, H, W) 1 where an editor keeps the picture; only for methods against editing.
    """

    pixels: Tensor
    seeds: Sequence[int]
    alpha: Tensor | None = None
    keep: Tensor | None = None

    @property
    def clean(self) -> Tensor:
        """The same as x, (B, C, H, W) float32 in [-1, 1]; made anew, for there may be many."""
        return as_signed(self.pixels)

    def shown(self, x: Tensor) -> Tensor:
        """What the model sees of x: (B, 3, H, W). Grey is one channel shown three times."""
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        return x if self.alpha is None else self.alpha * x + (1 - self.alpha)

    def to(self, device: torch.device | str) -> Pictures:
        """The same on a device."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        alpha, keep = moved(self.alpha), moved(self.keep)
        return replace(self, pixels=self.pixels.to(device), alpha=alpha, keep=keep)

    def select(self, rows: slice) -> Pictures:
        """Some of the pictures."""
        alpha = None if self.alpha is None else self.alpha[rows]
        keep = None if self.keep is None else self.keep[rows]
        return Pictures(self.pixels[rows], list(self.seeds)[rows], alpha, keep)


@dataclass(frozen=True)
class Draws:
    """What is random in an attack, and what is fixed for its whole length.

    Attributes:
        t_range: times are drawn between these fractions of the model's axis.
        sampled: encode to a sample of the posterior, not to its mean.
        count: K, draws averaged in a step.
        transforms: names of input transforms to choose from in each draw; empty for none.
        target: what `draw_target` draws, or "zero" for an empty encoding.
        output_kind, residual_weight: see `Scene`.
        choose: (row of the picture, u in [0, 1)) -> fraction in [0, 1) of the time axis, in place
            of the uniform draw; see `timesteps`.
    """

    t_range: tuple[float, float] = (0.0, 1.0)
    sampled: bool = False
    count: int = 1
    transforms: tuple[str, ...] = ()
    target: str = ""
    output_kind: str = "native"
    residual_weight: float = 5.0
    choose: Callable[[int, float], float] | None = None


@dataclass
class ImageGradient:
    """Callable (x, step) -> gradient of J at x, (B, C, H, W) float32; see the module.

    Arguments:
        surrogates: the model; several for an ensemble of autoencoders, whose gradients are added
            after each is divided by its mean size.
        method: its loss.
        pictures: what is attacked.
        plan: the views.
        draws: the random part.
        lean: spare memory, see the module.
    """

    surrogates: Sequence[Surrogate]
    method: Method
    pictures: Pictures
    plan: ViewPlan
    draws: Draws
    lean: bool = False
    _targets: dict[tuple[int, tuple[int, int]], Tensor] = field(default_factory=dict)
    _starts: dict[tuple[int, View | None], Tensor] = field(default_factory=dict)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        return self.at(x, step, None)

    def at(self, x: Tensor, step: int, u: Tensor | None) -> Tensor:
        """The gradient at step `step`; with `u` (B,) at these fractions of the time axis."""
        total = torch.zeros_like(x)
        groups = self._views(step)
        alone = len(groups) * len(self.surrogates) == 1
        for number in range(len(self.surrogates)):
            tiles = torch.zeros_like(x) if self.plan.tiling else None
            for place, views in enumerate(groups):
                g = self._view_gradient(x, views, step, number, u, place)
                if tiles is not None and views[0].windowed:
                    tiles += g
                else:
                    total += g if alone else g / _mean_size(g, views)
            if tiles is not None:
                # their windows sum to one, so that together they are one view of the picture
                total += tiles / tiles.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
        return total

    def plain(self, x: Tensor, step: int, u: Tensor) -> Tensor:
        """The gradient of the first surrogate's J summed over the whole views, nothing divided.

        Its size can be compared from time to time; `at` divides views by their mean size.
        """
        total = torch.zeros_like(x)
        for place, view in enumerate(self.plan.whole):
            total += self._view_gradient(x, [view] * len(x), step, 0, u, place)
        return total

    def score(self, x: Tensor) -> Tensor:
        """J on a fixed set of draws and the views of every step, without gradient: (B,)."""
        judged = self.method.score or self.method.loss
        assert judged is not None
        values = torch.zeros(len(x), device=x.device)
        groups = [[view] * len(x) for view in self.plan.whole]
        # one draw where nothing is drawn
        count = HELD_OUT if self.method.denoiser != "none" or self.draws.sampled else 1
        with torch.no_grad():
            for place, views in enumerate(groups):
                for number in range(len(self.surrogates)):
                    moments, frame = self._encoded(x, views, number, -1, place)
                    for k in range(count):
                        scene = self._scene(moments, frame, number, ("held out", k), None)
                        values += judged(scene).float() / (count * len(groups))
        return values

    # -- one view -----------------------------------------------------------------------------

    def _views(self, step: int) -> list[list[View]]:
        """For each view of the step: that of every picture. All of one group have one size."""
        rows = [self.plan.at(step, seed) for seed in self.pictures.seeds]
        return [list(group) for group in zip(*rows, strict=True)]

    def _view_gradient(
        self,
        x: Tensor,
        views: list[View],
        step: int,
        number: int,
        u: Tensor | None,
        place: int = 0,
    ) -> Tensor:
        """That of the step's view number `place`."""
        if not self.draws.transforms:
            addresses = [(step, k) for k in range(self.draws.count)]
            return self._passed(x, views, number, step, addresses, None, u, place)
        total = torch.zeros_like(x)
        for k in range(self.draws.count):
            total += self._passed(x, views, number, step, [(step, k)], k, u, place)
        return total / self.draws.count

    def _passed(
        self,
        x: Tensor,
        views: list[View],
        number: int,
        step: int,
        addresses: Sequence[tuple[int, int]],
        transformed: int | None,
        u: Tensor | None,
        place: int = 0,
    ) -> Tensor:
        """One pass of the encoder: the cotangents of some draws, pulled back to the pixels."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            images, frame = self._framed(leaf, views, number, step, transformed, place)
        window = _window(views)

        def cotangent(moments: Tensor) -> Tensor:
            total = torch.zeros_like(moments)
            for address in addresses:
                start = moments.detach().requires_grad_()
                scale = self._scale(number, start)
                with torch.enable_grad():
                    scene = self._scene(start, frame, number, address, u)
                    assert self.method.loss is not None
                    value = scale * self.method.loss(scene).sum()
                    total += torch.autograd.grad(value, start)[0] / scale
            total /= len(addresses)
            return total if window is None else total * _resized(window, total)

        pulled = self._pull(self.surrogates[number], images.detach(), cotangent)
        (g,) = torch.autograd.grad(images, leaf, pulled)
        return g

    def _scale(self, number: int, moments: Tensor) -> float:
        """What a loss is multiplied with on its way through the denoiser, 1 for most.

        Gradients of a mean over many latents fall below what float16 can hold. Losses of whole
        edits are sums, whose gradients do not.
        """
        denoiser = self.surrogates[number].denoiser
        means = self.method.denoiser == "backward" and not self.method.edits
        if denoiser is None or not means or denoiser.dtype != torch.float16:
            return 1.0
        return float(self.surrogates[number].codec.channels * moments[0, 0].numel())

    def _pull(
        self, surrogate: Surrogate, images: Tensor, cotangent: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """J_E^T c at the images of a view."""
        sizes: list[Tensor] = []

        def bounded(moments: Tensor) -> Tensor:
            # Sums over many elements leave the range of half precision on their way back.
            c = cotangent(moments)
            sizes.append(c.abs().flatten(1).amax(1).clamp_min(1e-30).view(-1, 1, 1, 1))
            return c / sizes[0]

        if self.lean:
            pulled = surrogate.codec.encode_moments_vjp(images, bounded)
        else:
            leaf = images.requires_grad_()
            with torch.enable_grad(), sparing(images):
                moments = surrogate.codec.encode_moments(leaf)
            (pulled,) = torch.autograd.grad(moments, leaf, bounded(moments.detach()))
        return pulled * sizes[0]

    def _encoded(
        self, x: Tensor, views: list[View], number: int, step: int, place: int = 0
    ) -> tuple[Tensor, _Frame]:
        images, frame = self._framed(x, views, number, step, None, place)
        return self.surrogates[number].codec.encode_moments(images), frame

    def _framed(
        self,
        x: Tensor,
        views: list[View],
        number: int,
        step: int,
        transformed: int | None = None,
        place: int = 0,
    ) -> tuple[Tensor, _Frame]:
        """The views' images (B, 3, h, w) behind a draw's transform, and what belongs to them."""
        seeds = self._seeds(place)

        def seen(x: Tensor) -> Tensor:
            images = _through(views, self.pictures.shown(x))
            return (
                images if transformed is None else self._transform(images, seeds, step, transformed)
            )

        images = seen(x)
        height, width = x.shape[-2:]
        keep = None
        if self.pictures.keep is not None:
            kept = self.pictures.keep
            keep = torch.cat([view.mask(kept[i : i + 1]) for i, view in enumerate(views)])
        if keep is not None and self.method.shrinks_mask and step >= 0:
            rows = zip(keep, self.pictures.seeds, strict=True)
            keep = torch.stack([shrink_outline(row, (seed, step)) for row, seed in rows])
        if keep is not None and self.surrogates[number].inpaints:
            # what an inpainting model is given: the picture without what is to be painted
            images = images * keep
        start = None
        if self.method.needs_start and transformed is None:
            start = self._start(number, views)
        elif self.method.needs_start:
            with torch.no_grad():  # through the same draw, or the attack would follow the transform
                start = self.surrogates[number].codec.encode_moments(seen(self.pictures.clean))
        sizes = [view.sizes(height, width) for view in views]
        target = self._target(number, views[0].size)
        return images, _Frame(seeds, sizes, keep, start, target)

    def _start(self, number: int, views: list[View]) -> Tensor:
        """Moments of the clean pictures; kept for the views that all pictures share."""
        shared = views[0] if all(view == views[0] for view in views) else None
        if (number, shared) in self._starts:
            return self._starts[number, shared]
        with torch.no_grad():
            clean = _through(views, self.pictures.shown(self.pictures.clean))
            moments = self.surrogates[number].codec.encode_moments(clean)
        if shared in self.plan.whole or shared in self.plan.tiling:
            self._starts[number, shared] = moments
        return moments

    def _target(self, number: int, size: tuple[int, int]) -> Tensor | None:
        if not self.draws.target:
            return None
        key = (number, size)
        if key not in self._targets:
            codec = self.surrogates[number].codec
            picture = torch.zeros(1, 3, *size)
            if self.draws.target != "zero":
                picture = draw_target(self.draws.target, *size)
            with torch.no_grad():
                moments = codec.encode_moments(picture.to(self.pictures.pixels.device))
            empty = self.draws.target == "zero"
            self._targets[key] = torch.zeros_like(moments) if empty else moments
        return self._targets[key]

    def _seeds(self, place: int) -> list[int]:
        """Of the draws of view number `place` of a step, one a picture."""
        seeds = list(self.pictures.seeds)
        return seeds if place == 0 else [seed_of(seed, "view", place) for seed in seeds]

    def _transform(self, images: Tensor, seeds: Sequence[int], step: int, draw: int) -> Tensor:
        """Each draw puts all pictures through one transform, chosen by the step."""
        names = self.draws.transforms
        chosen = names[(step * self.draws.count + draw) % len(names)]
        return TRANSFORMS[chosen](images, seeds, step, draw)

    # -- one draw -----------------------------------------------------------------------------

    def _scene(
        self,
        moments: Tensor,
        frame: _Frame,
        number: int,
        place: tuple[int | str, int],
        u: Tensor | None,
    ) -> Scene:
        surrogate = self.surrogates[number]
        addresses = [(seed, *place) for seed in frame.seeds]
        shape = (surrogate.codec.channels, *moments.shape[-2:])
        scene = Scene(
            surrogate,
            moments,
            self._normal(addresses, shape, "eta").to(moments) if self.draws.sampled else None,
            None,
            None,
            frame.sizes,
            addresses,
            frame.start,
            frame.target,
            frame.keep,
            self.draws.output_kind,
            self.draws.residual_weight,
        )
        if self.method.denoiser == "none":
            return scene
        fractions = self._fractions(addresses) if u is None else u
        t = surrogate.times(fractions).to(moments.device)
        eps = self._normal(addresses, shape, "eps").to(moments)
        return replace(scene, t=t, eps=eps)

    def _fractions(self, addresses: Sequence[tuple[int | str, ...]]) -> Tensor:
        low, high = self.draws.t_range
        u = torch.stack([uniform((), *address, "time") for address in addresses])
        if self.draws.choose is not None:
            return torch.tensor([self.draws.choose(i, value) for i, value in enumerate(u.tolist())])
        return low + (high - low) * u

    @staticmethod
    def _normal(
        addresses: Sequence[tuple[int | str, ...]], shape: Sequence[int], purpose: str
    ) -> Tensor:
        return torch.stack([normal(shape, *address, purpose) for address in addresses])


@dataclass(frozen=True)
class _Frame:
    """What belongs to the views of one group."""

    seeds: Sequence[int]
    sizes: Sequence[Sizes]
    keep: Tensor | None
    start: Tensor | None
    target: Tensor | None


def _through(views: list[View], x: Tensor) -> Tensor:
    """The view of every picture: (B, C, H, W) -> (B, C, h, w)."""
    if all(view == views[0] for view in views):
        return views[0].apply(x)
    return torch.cat([view.apply(x[i : i + 1]) for i, view in enumerate(views)])


def _mean_size(g: Tensor, views: list[View]) -> Tensor:
    """mean |g| of each picture over the pixels that its view covers: (B, 1, 1, 1)."""
    areas = torch.tensor([view.height * view.width for view in views], dtype=g.dtype).to(g.device)
    return (g.abs().flatten(1).sum(1) / (areas * g.shape[1])).clamp_min(1e-30).view(-1, 1, 1, 1)


def _window(views: list[View]) -> Tensor | None:
    return views[0].window() if views[0].windowed else None


def _resized(window: Tensor, like: Tensor) -> Tensor:
    """A window of pixels (h, w) at the resolution of latents, (1, 1, h', w')."""
    window = window.to(like)[None, None]
    return interpolate(window, like.shape[-2:], mode="bilinear", antialias=True)
