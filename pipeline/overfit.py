"""`latentline train RECIPE --overfit 4`: can this recipe learn a few samples by heart? If not, nothing else will help.

It trains on the first samples of the order, with no text dropout and the peak learning rate from the first step on, and
measures them before, between and after with fixed noise (as validation does, at `train.validation.sigmas`). The check
passes if that loss ends at no more than three quarters of where it began.

    OUTPUT/overfit-4/overfit.json     the verdict and the curve
    OUTPUT/overfit-4/overfit.png      the curve
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from manifests.cache import Cache
from manifests.errors import EXIT_DONE, EXIT_FAILURE, UsageError
from manifests.order import Order
from manifests.snapshot import Snapshot, load_snapshot
from pipeline.recipe import Recipe
from pipeline.report import log, quiet_libraries
from pipeline.stages import prepare_output
from train.config import EmaConfig, SamplesConfig, ScheduleConfig, TrainConfig, ValidationConfig
from train.metrics import read_metrics

PASSING_SHARE = 0.75
"""Of the loss before training, that the loss after it may be at most."""

_MEASURED = 20
_BAR = 40

Curve = Sequence[tuple[int, float]]
"""(step, loss) of each measurement."""


def few_samples(snapshot: Snapshot, seed: int, count: int) -> Snapshot:
    """The snapshot of the first `count` samples of the training order."""
    if not 1 <= count <= snapshot.num_samples:
        raise UsageError(f"--overfit {count}: the snapshot has {snapshot.num_samples} samples; give 1 to that many")
    order = Order(snapshot.hash, seed, snapshot.num_samples)
    return snapshot.part(sorted(order[position][1] for position in range(count)))


def overfit_config(config: TrainConfig, count: int) -> TrainConfig:
    """The recipe's training with what the check changes, in a folder of its own."""
    return replace(
        config,
        output=str(Path(config.output) / f"overfit-{count}"),
        objective=replace(config.objective, text_dropout=0.0),
        schedule=ScheduleConfig(kind="constant"),
        ema=EmaConfig(),
        samples=SamplesConfig(),
        validation=ValidationConfig(
            every=math.ceil(config.steps / _MEASURED), samples=count, sigmas=config.validation.sigmas
        ),
        checkpoint_every=max(config.checkpoint_every, config.steps),
    )


def overfit_stage(recipe: Recipe, count: int, *, dry_run: bool = False) -> tuple[dict[str, Any], int]:
    """Run the check, or with `dry_run` describe its training; return the result and the exit code, 1 if it failed."""
    from train.lock import only_writer
    from train.model import check, describe
    from train.trainer import train

    quiet_libraries()
    store = Cache(recipe.encode.cache).store
    snapshot = load_snapshot(store, recipe.train.snapshot or recipe.encode.snapshot)
    chosen = few_samples(snapshot, recipe.train.seed, count)
    recipe = replace(recipe, train=overfit_config(recipe.train, count))
    config = recipe.train
    if dry_run:
        return describe(recipe.model, config, chosen), EXIT_DONE
    check(recipe.model, config, chosen)
    with only_writer(Path(config.output)):
        result = train(recipe.model, config, chosen, prepare_output(recipe, chosen, store), held_out=chosen)
    curve = [
        (record["step"], record["validation/loss"])
        for record in read_metrics(Path(config.output))
        if "validation/loss" in record
    ]
    passed = has_learnt(curve)
    verdict = {
        "passed": passed,
        "criterion": f"the loss with fixed noise ends at or under {PASSING_SHARE:.0%} of where it began",
        "samples": chosen.num_samples,
        "steps": result.steps,
        "loss_before": curve[0][1],
        "loss_after": curve[-1][1],
        "share": curve[-1][1] / curve[0][1],
    }
    if int(os.environ.get("RANK", "0")) == 0:
        for line in chart_lines(curve):
            log(line)
        folder = Path(config.output)
        (folder / "overfit.json").write_text(json.dumps({**verdict, "curve": curve}, indent=2) + "\n")
        draw_chart(folder / "overfit.png", curve)
    verdict |= {"curve_png": str(Path(config.output) / "overfit.png")}
    return verdict, EXIT_DONE if passed else EXIT_FAILURE


def has_learnt(curve: Curve) -> bool:
    """Say whether the curve meets the criterion."""
    return curve[-1][1] <= PASSING_SHARE * curve[0][1]


def chart_lines(curve: Curve) -> list[str]:
    """The curve as text, a line a measurement, the criterion marked in each."""
    top = max(loss for _, loss in curve)
    limit = round(_BAR * PASSING_SHARE * curve[0][1] / top)
    lines = []
    for step, loss in curve:
        bar = list(f"{'#' * round(_BAR * loss / top):<{_BAR + 1}}")
        bar[limit] = "|"
        lines.append(f"step {step:>6}  loss {loss:8.4f}  {''.join(bar).rstrip()}")
    return lines


def draw_chart(path: Path, curve: Curve, size: tuple[int, int] = (640, 320)) -> None:
    """Write the curve as a PNG, the criterion as a line across."""
    width, height = size
    left, right, top, bottom = 56, width - 16, 24, height - 32
    last, most = max(step for step, _ in curve) or 1, max(loss for _, loss in curve) or 1.0

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * loss / most

    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=12)
    draw.rectangle((left, top, right, bottom), outline="#999999")
    limit = PASSING_SHARE * curve[0][1]
    draw.line([place(0, limit), place(last, limit)], fill="#cc3333")
    draw.text((left + 4, place(0, limit)[1] + 2), f"passes at or under {limit:.4f}", fill="#cc3333", font=font)
    points = [place(step, loss) for step, loss in curve]
    draw.line(points, fill="#225588", width=2)
    for x, y in points:
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill="#225588")
    draw.text((left, 6), "loss on the samples trained on, with fixed noise", fill="black", font=font)
    draw.text((8, top), f"{most:.3f}", fill="black", font=font)
    draw.text((8, bottom - 12), "0", fill="black", font=font)
    draw.text((left, bottom + 8), f"steps 0 to {last}", fill="black", font=font)
    image.save(path)
