"""`latentline demo`: a small model that knows shapes learns an object it has never seen, on a CPU.

Twelve clips of the object are encoded and a LoRA is trained on them, by the stages every user runs. Base and adapted
model are then asked for what the clips did not show, and what they made is measured against the truth.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from infer.video import contact_sheet, read_frames, write_mp4
from manifests.errors import EXIT_DONE, LatentlineError
from pipeline.demo.draw import Clip, draw_clip
from pipeline.demo.measure import Measured, measure
from pipeline.demo.videos import make_videos
from pipeline.demo.world import Scene, exactly, scenes
from pipeline.encode_stage import encode_stage
from pipeline.recipe import Recipe, load_recipe, resolved, to_toml
from pipeline.report import console, log, quiet_libraries
from pipeline.stages import infer_stage, train_stage

CHECKPOINT = Path(__file__).parent / "tiny_cosmos"
"""The embedded model; its README.md says what it is and how it was made."""

NUM_VIDEOS = 12
SEED = 0
ASKED = 3
"""Captions of each domain that are asked for: none of them is in the training clips."""

GIVEN_FRAMES = 5
"""Frames a video is continued from: 2 latent frames."""


@dataclass(frozen=True)
class Question:
    """One video to ask for. kind: what it is of and from, a row of the table. first: frames that were given."""

    name: str
    kind: str
    truth: Clip
    first: int = 0


def run_demo(output: Path, *, executor: str = "ray") -> dict[str, Any]:
    """Encode clips of the new object, train a LoRA on the cache, generate with and without it, and measure.

    Everything is under `output`, what is returned in demo.json too; a second run reuses what is there: nothing is
    encoded again, the finished training run is found and videos are kept.
    """
    begin = time.monotonic()
    quiet_libraries()
    log(f"1/5 {NUM_VIDEOS} clips of an object the model has never seen")
    data = output / "data"
    make_videos(data, training_scenes())
    recipe = demo_recipe(output, executor=executor)
    (output / "demo.toml").write_text(to_toml(resolved(recipe)))
    log("2/5 encode: videos and captions to latents and contexts, once")
    encoded, _ = encode_stage(recipe)
    log("3/5 train: a LoRA from the cache alone")
    trained = train_stage(recipe)
    log("4/5 infer: the same questions to the base model and to the model with the LoRA")
    asked = questions()
    requests = write_requests(asked, output / "questions")
    videos = {}
    for who, adapters in (("base", {}), ("lora", recipe.infer.adapters)):
        part = replace(recipe.infer, adapters=adapters, output=str(output / "videos" / who))
        videos[who] = _generate(replace(recipe, infer=part), requests)
    log("5/5 measure: pixels against the truth")
    measured = {who: average(asked, folder) for who, folder in videos.items()}
    sheet = output / "contact_sheet.png"
    write_sheet(asked, videos, sheet)
    console.print(results_table(measured))
    result = {
        "recipe": str(output / "demo.toml"),
        "checkpoint": str(CHECKPOINT),
        "data": str(data),
        "cache": encoded["cache"],
        "samples": encoded["samples"],
        "encoded": encoded["encoded"],
        "adapter": trained["adapter"],
        "loss": trained["loss"],
        "videos": {who: str(folder) for who, folder in videos.items()},
        "measured": {who: {kind: asdict(value) for kind, value in rows.items()} for who, rows in measured.items()},
        "contact_sheet": str(sheet),
        "seconds": round(time.monotonic() - begin, 1),
    }
    (output / "demo.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    return result


def demo_recipe(output: Path, *, executor: str) -> Recipe:
    return load_recipe(
        "demo",
        [
            f"model.path={CHECKPOINT}",
            f"data.datasets.sks.path={output / 'data'}",
            f"encode.cache={output / 'cache'}",
            f"encode.executor={executor}",
            f"train.output={output / 'train'}",
            f"infer.output={output / 'videos'}",
            f"infer.adapters.sks.path={output / 'train' / 'adapter'}",
        ],
    )


def training_scenes() -> list[Scene]:
    """Clips of the new object, each with a caption of its own."""
    return _first(NUM_VIDEOS, "sks")


def questions() -> list[Question]:
    """The new object from text and continued from frames, with captions that no training clip has; and base shapes."""
    new = [exactly(scene) for scene in _first(NUM_VIDEOS + ASKED, "sks")[NUM_VIDEOS:]]
    old = [exactly(scene) for scene in _first(50, "base") if len(scene.things) == 1 and scene.pillar is None][:ASKED]
    asked = []
    for number, scene in enumerate(new):
        asked.append(Question(f"sks_text_{number}", "sks from text", draw_clip(scene)))
        asked.append(Question(f"sks_video_{number}", "sks from video", draw_clip(scene), GIVEN_FRAMES))
    for number, scene in enumerate(old):
        asked.append(Question(f"base_text_{number}", "base shapes from text", draw_clip(scene)))
    return asked


def _first(count: int, domain: Any) -> list[Scene]:
    return [scene for scene, _ in zip(scenes(SEED, domain), range(count), strict=False)]


def write_requests(asked: list[Question], folder: Path) -> Path:
    """Write the questions as `infer` reads them, with the frames that some are continued from."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for question in asked:
        entry = {"name": question.name, "prompt": question.truth.scene.caption}
        if question.first:
            write_mp4(folder / f"{question.name}.mp4", question.truth.frames[: question.first], 16.0)
            entry["input_path"] = f"{question.name}.mp4"
        entries.append(entry)
    path = folder / "requests.json"
    path.write_text(json.dumps(entries, indent=2) + "\n")
    return path


def _generate(recipe: Recipe, requests: Path) -> Path:
    made, code = infer_stage(recipe, str(requests), guardrail=False)
    if code != EXIT_DONE:
        raise LatentlineError(f"infer: {made['failed'][0]}")
    return Path(recipe.infer.output)


def average(asked: list[Question], videos: Path) -> dict[str, Measured]:
    """By kind of question, the mean of what was measured."""
    rows: dict[str, list[Measured]] = {}
    for question in asked:
        frames = read_frames(videos / f"{question.name}.mp4")
        rows.setdefault(question.kind, []).append(measure(frames, question.truth, first=question.first))
    return {
        kind: Measured(*(float(np.mean(values)) for values in zip(*map(_values, found), strict=True)))
        for kind, found in rows.items()
    }


def _values(measured: Measured) -> tuple[float, ...]:
    return measured.appears, measured.colour, measured.place, measured.psnr


def results_table(measured: dict[str, dict[str, Measured]]) -> Table:
    """A row a kind of question and model."""
    table = Table(title="Measured from pixels, means over videos", title_justify="left")
    for heading in ("asked for", "model", "appears", "colour error", "place error", "PSNR"):
        table.add_column(heading, justify="left" if heading in ("asked for", "model") else "right")
    for kind in next(iter(measured.values())):
        for who, rows in measured.items():
            row = rows[kind]
            colour = "-" if np.isnan(row.colour) else f"{row.colour:.0f} of 441"
            table.add_row(kind, who, f"{row.appears:.0%}", colour, f"{row.place:.1f} px", f"{row.psnr:.1f} dB")
    return table


def write_sheet(asked: list[Question], videos: dict[str, Path], path: Path) -> None:
    """Three rows a question: ground truth, base, LoRA."""
    rows = []
    for question in asked:
        rows.append((f"{question.name}, ground truth: {question.truth.scene.caption}", question.truth.frames))
        rows += [(who, read_frames(folder / f"{question.name}.mp4")) for who, folder in videos.items()]
    contact_sheet(path, [(label, frames.repeat(2, 1).repeat(2, 2)) for label, frames in rows])
