"""Learning-rate schedules: pure functions of the optimizer step.

Steps count from 0 and are optimizer steps of the whole run, never of a process or a micro-batch, so a
schedule does not change with the number of ranks.
"""

from __future__ import annotations

import math

from train.config import OptimizerConfig, ScheduleConfig, TrainConfig


def factor(schedule: ScheduleConfig, step: int, *, steps: int, peak_lr: float) -> float:
    """Return what the peak learning rate is multiplied by at an optimizer step.

    step: 0-based. steps: optimizer steps of the run; only `cosine` depends on it. peak_lr turns the absolute
    `min_lr` into a factor.

    `lambda_linear` follows NVIDIA's LambdaLinearScheduler with one cycle: f_start at step 0, f_max at
    `warmup`, f_min at `cycle`; past `cycle`, where NVIDIA's has no value, it stays at f_min.
    """
    if schedule.kind == "lambda_linear":
        if step < schedule.warmup:
            return schedule.f_start + (schedule.f_max - schedule.f_start) * step / schedule.warmup
        left = max(schedule.cycle - step, 0) / max(schedule.cycle - schedule.warmup, 1)
        return schedule.f_min + (schedule.f_max - schedule.f_min) * min(left, 1.0)
    if step < schedule.warmup:
        return step / schedule.warmup
    if schedule.kind == "constant":
        return 1.0
    progress = min((step - schedule.warmup) / max(steps - 1 - schedule.warmup, 1), 1.0)
    floor = schedule.min_lr / peak_lr
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def effective_lr(optimizer: OptimizerConfig, schedule: ScheduleConfig, step: int, *, steps: int) -> float:
    """Return the learning rate the optimizer uses at a 0-based step."""
    return optimizer.lr * factor(schedule, step, steps=steps, peak_lr=optimizer.lr)


def milestones(config: TrainConfig) -> dict[int, float]:
    """Return the learning rate at steps that show the schedule's shape, for a dry run.

    Keys are the first and last step, the end of the warm-up if the run reaches it, and four between.
    """
    last = config.steps - 1
    steps = {0, last, *(round(last * part / 4) for part in range(1, 4))}
    if config.schedule.warmup <= last:
        steps.add(config.schedule.warmup)
    return {step: effective_lr(config.optimizer, config.schedule, step, steps=config.steps) for step in sorted(steps)}
