"""What steps cost, and the fit that follows them."""

from __future__ import annotations

import random

import pytest

from emoe.engine.costs import CostFit, Costs
from emoe.errors import ConfigError

TRUTH = Costs(forward=0.03, row=0.002, byte=1 / 2e9, expert=2e-5)


def steps(count: int, seed: int = 0):
    """Rows, bytes and experts as a server meets them: decode rows, now and then a prompt."""
    random_ = random.Random(seed)
    for _ in range(count):
        rows = random_.randint(1, 16) + random_.choice((0, 0, 0, 64))
        yield rows, random_.randint(0, 200_000_000), random_.randint(100, 400) + 8 * rows


def test_a_step_is_the_sum_of_its_parts():
    assert Costs(1.0, 2.0, 3.0, 4.0).step(10, 100, 1000) == 1 + 20 + 300 + 4000


def test_the_fit_finds_costs_that_differ_by_factors_from_what_was_believed():
    fit = CostFit(Costs(forward=0.01, row=0.01, byte=1 / 5e8, expert=1e-5))
    for each in steps(600):
        fit.saw(*each, TRUTH.step(*each))
    found = fit.costs
    assert (found.forward, found.row, found.byte) == pytest.approx((TRUTH.forward, TRUTH.row, TRUTH.byte), rel=0.1)
    assert found.expert == pytest.approx(TRUTH.expert, rel=0.35)  # the smallest part of these steps
    assert fit.error < 0.02


def test_noise_is_reported_as_the_error_and_hardly_moves_the_costs():
    random_ = random.Random(1)
    fit = CostFit(TRUTH)
    for each in steps(2000):
        fit.saw(*each, TRUTH.step(*each) * random_.lognormvariate(0, 0.1))
    assert 0.05 < fit.error < 0.12
    for rows, loaded, experts in steps(50, seed=2):
        assert fit.costs.step(rows, loaded, experts) == pytest.approx(TRUTH.step(rows, loaded, experts), rel=0.08)


@pytest.mark.parametrize("stall", [10.0, 1000.0])
def test_a_step_in_which_the_machine_stood_still_moves_no_forecast_by_a_tenth(stall):
    fit = CostFit(TRUTH)
    for number, each in enumerate(steps(400)):
        fit.saw(*each, TRUTH.step(*each) + (stall if number % 50 == 49 else 0.0))
    assert fit.costs.step(8, 50_000_000, 300) == pytest.approx(TRUTH.step(8, 50_000_000, 300), rel=0.1)


def test_parts_that_come_together_and_wrong_beliefs_never_make_the_fit_run_away():
    """A server with little in memory: bytes and experts grow with each other, and all was believed twice as dear."""
    truth, believed = Costs(0.025, 2e-4, 1 / 20e9, 4e-6), Costs(0.05, 4e-4, 1 / 10e9, 8e-6)
    chance = random.Random(0)
    fit = CostFit(believed)
    errors = []
    for _ in range(4000):
        rows = chance.randint(6, 8) + chance.choice([0] * 9 + [100])
        experts = int(48 * (30 + 0.6 * rows))
        each = rows, int(0.5 * experts * chance.uniform(0.8, 1.2)) * 2_650_000, experts
        seconds = truth.step(*each) * chance.lognormvariate(0, 0.1)
        errors.append(abs(fit.costs.step(*each) - seconds) / seconds)
        fit.saw(*each, seconds)
    assert max(errors[100:]) < 0.6  # noise alone has a step in a thousand that is off by 0.35
    assert sum(errors[100:]) / len(errors[100:]) < 0.1
    assert fit.error < 0.12


def test_a_machine_that_becomes_slower_is_followed():
    slower = Costs(TRUTH.forward, TRUTH.row, TRUTH.byte * 3, TRUTH.expert)
    fit = CostFit(TRUTH)
    for each in steps(1000):
        fit.saw(*each, TRUTH.step(*each))
    for each in steps(1000, seed=3):
        fit.saw(*each, slower.step(*each))
    assert fit.costs.byte == pytest.approx(slower.byte, rel=0.1)


def test_what_steps_never_show_stays_as_it_was_believed():
    fit = CostFit(TRUTH)
    for _ in range(5000):
        fit.saw(4, 0, None, 0.05)
    assert fit.costs.byte == TRUTH.byte
    assert fit.costs.step(4) == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_without_a_time_says_nothing(seconds):
    fit = CostFit(TRUTH)
    fit.saw(4, 0, None, seconds)
    assert fit.costs == TRUTH and fit.error is None


@pytest.mark.parametrize(
    "values", [{"row": -1.0}, {"byte": float("nan")}, dict.fromkeys(("forward", "row", "byte", "expert"), 0.0)]
)
def test_costs_that_make_no_sense_are_refused(values):
    with pytest.raises(ConfigError, match="cost"):
        Costs(**values)
