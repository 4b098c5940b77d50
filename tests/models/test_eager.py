from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffkit.models.cost import saved_for_backward
from diffkit.models.eager import eager, eager_sum, eager_terms


@pytest.fixture
def decoder() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)
    return nn.Sequential(*layers).requires_grad_(False).double()


def loss(decoder: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (decoder(x) - target).square().flatten(1).mean(1)


def sample(count: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 2, 6, 6, dtype=torch.float64)
    return x, torch.randn(count, 3, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_values_and_gradients_are_those_of_the_plain_call(decoder: nn.Module, chunk: int) -> None:
    x, target = sample()
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    results = []
    for made_at_once in (True, False):
        leaf = x.clone().requires_grad_()
        behind = 2 * leaf  # what waits for its own backward pass, as a denoiser would
        if made_at_once:
            values = eager(lambda a, b: loss(decoder, a, b), behind, target, chunk=chunk)
        else:
            values = loss(decoder, behind, target)
        (grad,) = torch.autograd.grad((weights * values).sum(), leaf)
        results.append((values.detach(), grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_a_known_gradient() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    values = eager(lambda a: a.square().sum(1), x)
    assert values.tolist() == [5.0, 25.0]
    (values * torch.tensor([1.0, 10.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, 4.0], [60.0, 80.0]]


def test_it_keeps_the_gradient_alone(decoder: nn.Module) -> None:
    x, target = sample()
    x.requires_grad_()
    with saved_for_backward([decoder]) as plain:
        loss(decoder, x, target)
    images: list[weakref.ref[Tensor]] = []

    def watched(a: Tensor, b: Tensor) -> Tensor:
        assert all(image() is None for image in images), "two samples' graphs live at once"
        image = decoder(a)  # the graph of the square keeps it
        images.append(weakref.ref(image))
        return (image - b).square().flatten(1).mean(1)

    values = eager(watched, x, target)
    assert len(images) == 5 and all(image() is None for image in images)
    assert values.grad_fn is not None
    (kept,) = values.grad_fn.saved_tensors  # type: ignore[attr-defined]
    assert kept.shape == x.shape
    assert plain.elements > 5 * kept.numel()


def test_without_grad_mode_it_only_computes_values(decoder: nn.Module) -> None:
    x, target = sample()
    modes = []

    def watched(a: Tensor, b: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return loss(decoder, a, b)

    with torch.no_grad():
        first = eager(watched, x.clone().requires_grad_(), target)
    second = eager(watched, x, target)
    assert not any(modes) and not first.requires_grad and not second.requires_grad
    assert torch.equal(first, second)
    torch.testing.assert_close(first, loss(decoder, x, target))


def test_checkpoints_inside_and_further_terms(decoder: nn.Module) -> None:
    x, target = sample()
    x.requires_grad_()

    def terms(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        image = checkpoint(decoder, a, use_reentrant=False)
        return (image - b).square().flatten(1).mean(1), image

    values, images = eager_terms(terms, x, target)
    assert values.requires_grad and not images.requires_grad
    assert torch.allclose(images, decoder(x))
    (grad,) = torch.autograd.grad(values.sum(), x)
    (plain,) = torch.autograd.grad(loss(decoder, x, target).sum(), x)
    torch.testing.assert_close(grad, plain)


def test_it_runs_under_the_callers_autocast(decoder: nn.Module) -> None:
    seen: list[torch.dtype] = []
    network = decoder.float()
    x = torch.randn(2, 2, 6, 6, requires_grad=True)

    def watched(a: Tensor) -> Tensor:
        image = network(a)
        seen.append(image.dtype)
        return image.float().square().flatten(1).mean(1)

    with torch.autocast("cpu", torch.bfloat16):
        values = eager(watched, x)
    values.sum().backward()
    assert seen == [torch.bfloat16] * 2
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_the_backward_pass_is_not_cast_down() -> None:
    """Attention's products were made again in float16 when the gradient was taken in autocast."""
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, 1, 6, 8)

    def attend(query: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            found = nn.functional.scaled_dot_product_attention(query, key, value)
        return found.square().sum((1, 2, 3))

    query = torch.randn(1, 1, 6, 8, requires_grad=True)
    (plain,) = torch.autograd.grad(attend(query).sum(), query)
    with torch.autocast("cpu", torch.float16):
        value_of = eager(attend, query)
    (grad,) = torch.autograd.grad(value_of.sum(), query)
    assert torch.allclose(grad, plain, rtol=1e-5, atol=1e-6)


def test_a_sum_of_losses_by_hand() -> None:
    """f_1 = x^2, f_2 = 3 x: total w1 x^2 + w2 3 x, gradients 2 x and 3."""
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0], [-1.0, 1.0]], requires_grad=True)
    losses = (lambda x: x.square().sum(1), lambda x: 3 * x.sum(1))
    total, values, squares = eager_sum(losses, torch.tensor([1.0, 0.5]), x, chunks=(None, 2))
    assert values.tolist() == [[5.0, 9.0, 2.0], [9.0, 9.0, 0.0]]
    assert squares.tolist() == [[20.0, 36.0, 8.0], [18.0, 18.0, 18.0]]
    assert total.tolist() == [9.5, 13.5, 2.0]
    assert not values.requires_grad and not squares.requires_grad
    total.mean().backward()
    assert torch.allclose(x.grad, (2 * x.detach() + 1.5) / 3)


def test_a_sum_gives_gradient_to_its_argument_alone(decoder: nn.Module) -> None:
    decoder.requires_grad_(True)
    x, target = (part.requires_grad_() for part in sample(3))

    def distance(x: Tensor, target: Tensor) -> Tensor:
        return loss(decoder, x, target)

    total, _, squares = eager_sum([distance], torch.ones(1), x, target, chunks=[1])
    total.sum().backward()
    (expected,) = torch.autograd.grad(distance(x, target.detach()).sum(), x)
    assert torch.allclose(x.grad, expected)
    assert torch.allclose(squares[0], expected.flatten(1).square().sum(1))
    assert target.grad is None
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_a_weight_of_zero_keeps_infinite_losses_out() -> None:
    x = torch.tensor([[1.0], [2.0]], requires_grad=True)
    losses = (lambda x: x.sum(1), lambda x: (x.sum(1) - 1).log())
    total, values, _ = eager_sum(losses, torch.tensor([1.0, 0.0]), x, chunks=(None, None))
    total.sum().backward()
    assert values[1].tolist() == [-float("inf"), 0.0]
    assert total.tolist() == [1.0, 2.0]
    assert x.grad.tolist() == [[1.0], [1.0]]


def test_a_sum_without_grad_mode_only_computes_values() -> None:
    x = torch.tensor([[1.0], [2.0]])
    losses = (lambda x: x.sum(1), lambda x: x.square().sum(1))
    total, values, squares = eager_sum(losses, torch.tensor([1.0, 2.0]), x, chunks=(1, None))
    assert total.tolist() == [3.0, 10.0]
    assert values.tolist() == [[1.0, 2.0], [1.0, 4.0]]
    assert not squares.any()


def test_small_gradients_survive_float16() -> None:
    """Gradients of a mean over many places are below float16's smallest number inside a network;
    no gradient scaler multiplies a loss whose gradient is taken at once."""
    layer = nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    x = torch.ones(1, 1, 256, 256, requires_grad=True)

    def mean(x: Tensor) -> Tensor:
        return 1e-3 * layer(x).float().flatten(1).mean(1)

    with torch.autocast("cpu", torch.float16):
        total, _, squares = eager_sum([mean], torch.ones(1), x, chunks=[None])
    total.sum().backward()
    expected = 1e-3 / 256**2  # 1.5e-8; float16 has nothing between 0 and 6e-8
    torch.testing.assert_close(x.grad, torch.full_like(x, expected), rtol=0.01, atol=0)
    assert squares.item() == pytest.approx(expected**2 * 256**2, rel=0.02)
