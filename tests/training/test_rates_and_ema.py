"""Learning rates and the moving average against hand arithmetic and torch's own schedulers."""

from __future__ import annotations

import pytest
import torch

from diffkit.objectives.views import Ema, ema_decay, snapshot, weights_exchanged
from diffkit.training.rates import learning_rate


def rates(schedule, **options):
    return [
        learning_rate(s, peak=2.0, schedule=schedule, max_steps=10, **options) for s in range(10)
    ]


def test_known_rates():
    assert rates("constant", warmup_steps=4) == [0.5, 1.0, 1.5] + [2.0] * 7
    assert rates("linear") == pytest.approx([2.0 * (10 - s) / 10 for s in range(10)])
    stable = rates("warmup-stable-decay", warmup_steps=2, decay_steps=4)
    assert stable == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5])


def test_cosine_equals_torch():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    expected = []
    for _ in range(10):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates("cosine") == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "warmup-stable-decay"])
def test_every_step_learns(schedule):
    assert all(0 < r <= 2 for r in rates(schedule, warmup_steps=3, decay_steps=3))


def test_the_average_by_hand():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    ema = Ema(layer, 0.9)
    expected = 1.0
    for n, value in enumerate([2.0, 3.0, 5.0]):
        layer.weight.data.fill_(value)
        ema.update(n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert ema.weights["weight"].item() == pytest.approx(expected)
    assert ema_decay(10**6, 0.9) == 0.9


def test_a_view_gives_everything_back():
    layer = torch.nn.Linear(3, 2)
    before = snapshot(layer)
    other = {name: torch.randn_like(value) for name, value in before.items()}
    kept = {name: value.clone() for name, value in other.items()}
    with pytest.raises(RuntimeError), weights_exchanged(layer, other):
        assert torch.equal(layer.weight, kept["weight"])
        raise RuntimeError
    assert torch.equal(layer.weight, before["weight"])
    assert all(torch.equal(other[name], kept[name]) for name in kept)
