"""Several ranks on the CPU make what one makes: exactly where each has videos of its own, within rounding elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infer.team import Layout, choose_layout
from infer.video import read_frames
from manifests.errors import UsageError
from tests.ranks import run_jobs


def layout(parallel: str, world: int, videos: int, *, guided: bool = True, tokens: int = 24) -> Layout:
    return choose_layout(parallel, world, videos=videos, guided=guided, tokens=[tokens])


def test_auto_gives_each_rank_videos_and_shares_one_where_there_are_too_few() -> None:
    assert layout("auto", 4, 9) == layout("requests", 4, 1) == Layout(4, 1, 1)
    assert layout("auto", 4, 2) == layout("auto", 4, 3) == Layout(2, 2, 1)
    assert layout("auto", 4, 1) == Layout(1, 2, 2)
    assert layout("auto", 3, 1) == Layout(1, 1, 3)
    assert layout("auto", 4, 1, guided=False) == Layout(1, 1, 4)
    assert layout("auto", 8, 1, tokens=6) == Layout(2, 2, 2)  # four do not divide 6 tokens
    assert layout("cfg", 4, 9) == Layout(2, 2, 1)
    assert layout("context", 4, 9) == Layout(1, 1, 4)
    assert layout("auto", 1, 1) == Layout(1, 1, 1)


@pytest.mark.parametrize(
    ("parallel", "world", "guided", "message"),
    [
        ("cfg", 3, True, "3 ranks are not pairs"),
        ("cfg", 2, False, "a video without guidance has no second half"),
        ("context", 5, True, "5 ranks do not divide a video's 24 tokens"),
    ],
)
def test_ranks_that_cannot_share_are_told_so(parallel: str, world: int, guided: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layout(parallel, world, 4, guided=guided)


@dataclass(frozen=True)
class Made:
    """The output folder of a job, and [rank, name] of each video written."""

    output: Path
    by: list[list[Any]]


JOBS: dict[str, tuple[int, str, str]] = {  # world, inputs, infer.parallel
    "one": (1, "in.json", "auto"),
    "requests": (2, "in.json", "requests"),
    "cfg": (2, "in.json", "cfg"),
    "context": (3, "in.json", "context"),
    "auto": (3, "in.json", "auto"),
    "alone": (1, "a red circle", "auto"),
    "together": (4, "a red circle", "auto"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Made]:
    """Text, an image, a long video and one that fails, by one rank and by several; and a single video."""
    folder = tmp_path_factory.mktemp("ranks")
    Image.new("RGB", (48, 32), "red").save(folder / "a.png")
    (folder / "bad.png").write_bytes(b"no image")
    entries = [
        {"name": "text", "prompt": "a red circle"},
        {"name": "bad", "prompt": "p", "input_path": "bad.png"},
        {"name": "image", "prompt": "a red circle", "input_path": "a.png", "seed": 3},
        {"name": "long", "prompt": "a square", "num_output_frames": 16, "chunk_size": 9, "chunk_overlap": 5},
    ]
    (folder / "in.json").write_text(json.dumps(entries))
    shared = {"num_steps": 2, "height": 32, "width": 48, "guidance": 3.0, "dtype": "float32"}
    todo = []
    for name, (world, inputs, parallel) in JOBS.items():
        frames = 9 if inputs == "in.json" else 13
        config = shared | {"output": str(folder / name), "num_frames": frames, "parallel": parallel}
        source = str(folder / inputs) if inputs == "in.json" else inputs
        todo.append({"world": world, "model": str(tiny_checkpoint), "inputs": source, "config": config})
    out = run_jobs("tests.infer.ranks", todo, folder)
    by: dict[str, list[list[Any]]] = {name: [] for name in JOBS}
    for line in out.splitlines():
        index, rank, name = json.loads(line)
        by[list(JOBS)[index]].append([rank, name])
    return {name: Made(folder / name, by[name]) for name in JOBS}


def videos(output: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted(output.glob("*.mp4"))}


def results(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "results.json").read_text())["videos"]


@pytest.mark.parametrize("parallel", ["requests", "cfg", "context", "auto"])
def test_ranks_make_what_one_makes(made: dict[str, Made], parallel: str) -> None:
    one, several = made["one"].output, made[parallel].output
    assert sorted(name for _, name in made[parallel].by) == ["image", "long", "text"]
    assert sorted(path.name for path in several.iterdir()) == sorted(path.name for path in one.iterdir())
    if parallel in ("requests", "auto"):
        assert videos(several) == videos(one)
        assert (several / "contact_sheet.png").read_bytes() == (one / "contact_sheet.png").read_bytes()
    else:
        assert {rank for rank, _ in made[parallel].by} == {0}
        for name in videos(one):
            assert_same_frames(several / f"{name}.mp4", one / f"{name}.mp4")
    ours, theirs = results(several), results(one)
    assert all(record.pop("seconds") is not None for record in ours + theirs)
    assert ours == theirs
    assert [record["status"] for record in ours] == ["made", "failed", "made", "made"]


def test_one_video_is_made_by_all_ranks_together(made: dict[str, Made]) -> None:
    """Two halves of guidance, two parts of the tokens each."""
    assert made["together"].by == [[0, "a_red_circle"]]
    assert_same_frames(*(made[name].output / "a_red_circle.mp4" for name in ("together", "alone")))


def assert_same_frames(video: Path, other: Path) -> None:
    """Equal but for rounding before compression."""
    frames, expected = read_frames(video).astype(int), read_frames(other).astype(int)
    assert frames.shape == expected.shape
    assert np.abs(frames - expected).mean() < 0.05
