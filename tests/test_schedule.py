"""The learning rate over a run, against its formulas."""

import math

import pytest

from bvae.config import TrainingConfig
from bvae.training.schedule import lr_factor


def factors(steps=8, steps_per_epoch=3, **options):
    return [
        lr_factor(TrainingConfig(**options), step, steps, steps_per_epoch) for step in range(1, steps + 1)
    ]


def test_exponential_multiplies_after_each_epoch():
    expected = [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert factors(schedule="exponential", lr_gamma=0.5) == pytest.approx(expected)


def test_linear_falls_to_zero_after_the_last_step():
    assert factors(schedule="linear") == pytest.approx([1 - i / 8 for i in range(8)])


def test_cosine_falls_on_half_a_wave():
    expected = [math.cos(math.pi * i / 16) ** 2 for i in range(8)]
    assert factors(schedule="cosine") == pytest.approx(expected)


def test_constant_is_one():
    assert factors(schedule="constant") == [1] * 8


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cosine", "constant"])
def test_warm_up_multiplies_the_first_steps(schedule):
    with_warmup, without = factors(schedule=schedule, warmup=4), factors(schedule=schedule)
    rise = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert with_warmup == pytest.approx([a * b for a, b in zip(rise, without, strict=True)])
    assert all(0 < factor <= 1 for factor in with_warmup)


def test_a_warm_up_longer_than_the_run_never_reaches_one():
    assert factors(steps=2, schedule="constant", warmup=8) == [1 / 8, 2 / 8]


def test_a_factor_that_grows_beyond_all_numbers_is_infinite():
    assert factors(steps=400, steps_per_epoch=1, schedule="exponential", lr_gamma=10.0)[-1] == math.inf
