"""`latentline report RUN`: what a training run's folder tells, as one page; finished, running, stopped or empty."""

from __future__ import annotations

import base64
import io
import math
import re
import time
import tomllib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from infer.video import read_frames, spread_frames
from manifests.errors import LatentlineError, UsageError
from pipeline.charts import Line, line_chart, number, smoothed
from pipeline.run_facts import read_dataset_facts, size_line
from pipeline.run_page import page
from train.adapters import WEIGHTS_NAME
from train.metrics import METRICS_NAME, read_metrics

RECIPE_NAME = "recipe.toml"
PAGE_NAME = "report.html"

_SIGMA = re.compile(r"validation/loss_(sigma_|q)(\d+(?:\.\d+)?)")
_SIGMA_COLOURS = ("--s1", "--s2", "--s3", "--s4", "--s5")
_SAMPLE_STEPS, _SAMPLES_A_STEP = 4, 6
_PICTURE_WIDTH, _STRIP_FRAMES = 720, 4
_QUIET_SECONDS = 120.0

Records = Sequence[dict[str, Any]]


def write_report(run: Path, output: Path | None = None) -> dict[str, Any]:
    """Write the page of a run to `output`, by default `report.html` in it; return where, and the run's state.

    Raises `UsageError` for a folder that is no run, `LatentlineError` if the page cannot be written.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: no such folder; give a run's, which is train.output of its recipe")
    recipe_file = run / RECIPE_NAME
    if not recipe_file.is_file() and not (run / METRICS_NAME).is_file():
        raise UsageError(f"{run}: neither {RECIPE_NAME} nor {METRICS_NAME} is in it; give train.output of a recipe")
    recipe = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else None
    records = read_metrics(run)
    steps = _steps(recipe_file, recipe)
    state = _state(run, records, steps)
    text = page(
        title=run.resolve().name,
        state=state,
        tiles=_tiles(records, steps),
        charts=_charts(records),
        no_charts="Nothing is recorded yet: the first record comes with the first step.",
        samples=_samples(run / "samples"),
        dataset=_dataset_rows(run),
        recipe=recipe,
        made=f"Made {datetime.now():%Y-%m-%d %H:%M} from {run.resolve()}",
    )
    target = output or run / PAGE_NAME
    temporary = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise LatentlineError(f"{target}: cannot be written: {error.strerror or error}") from error
    return {"report": str(target), "state": state[1], "steps": _done(records), "records": len(records)}


def _steps(path: Path, recipe: str | None) -> int | None:
    if recipe is None:
        return None
    try:
        return tomllib.loads(recipe).get("train", {}).get("steps")
    except tomllib.TOMLDecodeError as error:
        raise LatentlineError(f"{path}: not valid TOML: {error}") from error


def _done(records: Records) -> int:
    return max((int(record["step"]) for record in records), default=0)


def _state(run: Path, records: Records, steps: int | None) -> tuple[str, str, str]:
    """(class, word, sentence) of how far the run is. Whether one still runs can be told from the records' age alone."""
    if not records:
        return "empty", "Not begun", "The run's folder is there, but no step is recorded in it."
    done, of = _done(records), f" of {steps:,}" if steps else ""
    if steps and done >= steps and (run / "adapter" / WEIGHTS_NAME).is_file():
        return "finished", "Finished", f"All {steps:,} steps are done; the adapter is in {run / 'adapter'}."
    age = max(0.0, time.time() - (run / METRICS_NAME).stat().st_mtime)
    slow = [record.get("seconds_per_step", 0.0) for record in records[-5:]]
    gap = max([*(b["step"] - a["step"] for a, b in zip(records[-5:], records[-4:], strict=False)), 1])
    if age < max(_QUIET_SECONDS, 5 * gap * max(slow)):
        return "running", "Running", f"Step {done:,}{of}; the last record is {_duration(age)} old."
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    again = f" from {checkpoints[-1]}" if checkpoints else ""
    return (
        "stopped",
        "Stopped",
        f"Step {done:,}{of}; the last record is {_duration(age)} old. The same command continues{again}.",
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _points(records: Records, name: str, scale: float = 1.0) -> list[tuple[float, float]]:
    found = {
        int(record["step"]): record[name] * scale
        for record in records
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    }
    return sorted(found.items())


def _tiles(records: Records, steps: int | None) -> dict[str, str]:
    if not records:
        return {}
    tiles = {"step": f"{_done(records):,}" + (f" / {steps:,}" if steps else "")}
    wanted = (
        ("loss", "training loss", 1.0, ""),
        ("validation/loss", "validation loss", 1.0, ""),
        ("samples_per_second", "samples a second", 1.0, ""),
        ("seconds_per_step", "seconds a step", 1.0, ""),
        ("data_wait_share", "waiting for data", 100.0, " %"),
        ("peak_memory_bytes", "peak memory", 2.0**-30, " GiB"),
    )
    for name, label, scale, unit in wanted:
        if points := _points(records, name, scale):
            last = points[-20:] if name == "loss" else points[-1:]
            value = sum(y for _, y in last) / len(last)
            tiles[label] = f"{value:.3g}{unit}"
    return tiles


def _charts(records: Records) -> list[str]:
    """The figures for which there are records, losses first."""
    charts = []
    loss, held_out = _points(records, "loss"), _points(records, "validation/loss")
    if loss or held_out:
        span = max(1, min(50, len(loss) // 10))
        lines = [Line("each record", loss, "--a", faint=True)] if span > 1 else []
        name = f"training, mean of {span} records" if span > 1 else "training"
        lines.append(Line(name, smoothed(loss, span), "--a"))
        lines.append(Line("validation", held_out, "--b", dots=True))
        charts.append(line_chart("Loss", "", lines, log_y=True))
    sigmas = sorted({name for record in records for name in record if _SIGMA.fullmatch(name)}, key=_sigma)
    if sigmas:
        lines = []
        for index, name in enumerate(sigmas):
            place = round(index * (len(_SIGMA_COLOURS) - 1) / max(1, len(sigmas) - 1))
            lines.append(Line(_sigma_label(name), _points(records, name), _SIGMA_COLOURS[place]))
        charts.append(line_chart("Validation loss by sigma", "", lines, log_y=True))
    for title, unit, name, scale in (
        ("Learning rate", "", "lr", 1.0),
        ("Throughput", "samples/s", "samples_per_second", 1.0),
        ("Peak GPU memory", "GiB", "peak_memory_bytes", 2.0**-30),
        ("Gradient norm", "", "grad_norm", 1.0),
        ("Time waiting for data", "%", "data_wait_share", 100.0),
    ):
        if points := _points(records, name, scale):
            is_norm = name == "grad_norm"
            lines = [Line(title.lower(), points, "--a")]
            charts.append(line_chart(title, unit, lines, log_y=is_norm, from_zero=not is_norm))
    return charts


def _sigma(name: str) -> float:
    match = _SIGMA.fullmatch(name)
    assert match
    return float(match[2])


def _sigma_label(name: str) -> str:
    """`sigma 0.25`, or `quantile 0.25` where the name gives the quantile of sigma."""
    return f"{'quantile' if '/loss_q' in name else 'sigma'} {_sigma(name):g}"


def _samples(folder: Path) -> list[tuple[str, str]]:
    """Pictures of the newest steps; where a step has videos alone, a strip of frames of each."""
    numbered = [(int(match[1]), path) for path in folder.glob("step_*") if (match := re.search(r"(\d+)$", path.name))]
    found = []
    for step, path in sorted(numbered, reverse=True)[:_SAMPLE_STEPS]:
        files = sorted(path.glob("*.png")) or sorted(path.glob("*.mp4"))
        for file in files[:_SAMPLES_A_STEP]:
            try:
                picture = Image.open(file) if file.suffix == ".png" else _strip(file)
                found.append((f"step {step:,}: {file.stem}", _data_uri(picture)))
            except (OSError, UnidentifiedImageError, LatentlineError):
                found.append((f"step {step:,}: {file.name} cannot be read; is it being written?", _blank()))
    return found


def _strip(video: Path) -> Image.Image:
    frames = [Image.fromarray(frame) for frame in spread_frames(read_frames(video), _STRIP_FRAMES)]
    strip = Image.new("RGB", (sum(frame.width for frame in frames), frames[0].height))
    left = 0
    for frame in frames:
        strip.paste(frame, (left, 0))
        left += frame.width
    return strip


def _data_uri(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    if picture.width > _PICTURE_WIDTH:
        picture = picture.resize((_PICTURE_WIDTH, round(picture.height * _PICTURE_WIDTH / picture.width)))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _blank() -> str:
    return _data_uri(Image.new("RGB", (_PICTURE_WIDTH, 90), (128, 128, 128)))


def _dataset_rows(run: Path) -> dict[str, Any] | None:
    facts = read_dataset_facts(run)
    if facts is None:
        return None
    return {
        "datasets": ", ".join(f"{name}: {count:,} samples" for name, count in facts["datasets"].items()),
        "samples": number(facts["samples"]),
        "videos": number(facts["videos"]),
        "captions": number(facts["captions"]),
        "sizes": "; ".join(map(size_line, facts["sizes"])),
        "snapshot": facts["snapshot"],
    }
