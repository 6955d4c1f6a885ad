import math

import pytest

from train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from train.schedule import effective_lr, milestones


def lr(schedule: ScheduleConfig, step: int, steps: int = 1000, peak: float = 1e-4) -> float:
    return effective_lr(OptimizerConfig(lr=peak), schedule, step, steps=steps)


def test_lambda_linear_passes_through_its_named_points():
    schedule = ScheduleConfig(kind="lambda_linear", warmup=2000, f_start=1e-6, f_max=0.5, f_min=0.2, cycle=100_000)
    assert lr(schedule, 0) == pytest.approx(1e-10)
    assert lr(schedule, 1000) == pytest.approx(1e-4 * (1e-6 + 0.5) / 2, rel=1e-6)
    assert lr(schedule, 2000) == pytest.approx(0.5e-4)
    assert lr(schedule, 51_000) == pytest.approx(0.35e-4)
    assert lr(schedule, 100_000) == pytest.approx(0.2e-4)
    assert lr(schedule, 250_000) == pytest.approx(0.2e-4)


def test_lambda_linear_with_a_thousand_steps_never_leaves_the_warm_up():
    config = TrainConfig(
        output="x", steps=1000, optimizer=OptimizerConfig(lr=4.316e-5),
        schedule=ScheduleConfig(kind="lambda_linear", warmup=2000),
    )  # fmt: skip
    rates = milestones(config)
    assert list(rates) == sorted(rates)
    assert max(rates.values()) == rates[999] < 0.25 * 4.316e-5


def test_cosine_warms_up_and_ends_at_its_minimum():
    schedule = ScheduleConfig(kind="cosine", warmup=10, min_lr=1e-6)
    assert lr(schedule, 0, steps=101) == 0
    assert lr(schedule, 5, steps=101) == pytest.approx(0.5e-4)
    assert lr(schedule, 10, steps=101) == pytest.approx(1e-4)
    assert lr(schedule, 55, steps=101) == pytest.approx(1e-6 + (1e-4 - 1e-6) * 0.5 * (1 + math.cos(math.pi / 2)))
    assert lr(schedule, 100, steps=101) == pytest.approx(1e-6)


def test_constant_is_constant_after_the_warm_up():
    schedule = ScheduleConfig(kind="constant", warmup=4)
    assert [round(lr(schedule, step) / 1e-4, 6) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("kind", ["lambda_linear", "cosine", "constant"])
def test_a_run_of_one_step_has_a_rate(kind):
    assert lr(ScheduleConfig(kind=kind), 0, steps=1) >= 0
