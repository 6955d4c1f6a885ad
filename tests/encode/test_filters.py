"""What a dataset's filters leave out is counted under the first filter that does, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from encode.config import DataConfig, DatasetConfig, EncodeConfig
from encode.survey import Survey, check, survey
from manifests.config import ModelConfig
from manifests.errors import UsageError
from tests.encode.layouts import write_files
from tests.encode.video_files import write_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Videos of 10, 30 and 60 frames at 10 fps, a small one of 30, one at 5 fps, and one that is broken."""
    root = tmp_path / "data"
    write_files(root, {"bad.mp4": b"no video", "videos/.keep": b""})
    write_video(root / "short.mp4", 10, fps=10)
    write_video(root / "plain.mp4", 30, fps=10)
    write_video(root / "long.mp4", 60, fps=10)
    write_video(root / "small.mp4", 30, fps=10, height=32, width=64)
    write_video(root / "slow.mp4", 30, fps=5)
    rows = [f"{name}.mp4,{name},,,{score}" for score, name in enumerate(("short", "plain", "long", "small", "slow"))]
    rows += ["bad.mp4,bad,,,9", "long.mp4,part,1,3.5,9"]
    write_files(root, {"t.csv": "video,caption,start,end,score\n" + "\n".join(rows) + "\n"})
    return root


def look(folder: Path, checkpoint: Path, **filters: Any) -> Survey:
    config = EncodeConfig(
        cache=str(folder / "cache"), height=32, width=48, num_frames=9, fps=10.0, dtype="float32", decode_workers=1
    )
    dataset = DatasetConfig(layout="table", path=str(folder / "t.csv"), filters=filters)
    request = check(ModelConfig(path=str(checkpoint)), DataConfig(datasets={"d": dataset}), config)
    return survey(request, None, remember=False)


def test_each_filter_counts_what_it_drops(folder: Path, tiny_checkpoint: Path) -> None:
    def left(**filters: Any) -> tuple[set[str], dict[str, int]]:
        found = look(folder, tiny_checkpoint, **filters)
        assert found.num_windows == len(found.samples) == found.num_items
        return set(found.samples["caption"].to_pylist()), found.left_out.get("d", {})

    everything = {"short", "plain", "long", "small", "slow", "bad", "part"}
    assert left() == (everything, {})
    assert left(min_frames=30) == (everything - {"short", "part"}, {"min_frames": 2})
    assert left(min_frames=25, max_seconds=3.0) == (
        {"plain", "small", "bad", "part"},
        {"min_frames": 1, "max_seconds": 2},
    )
    assert left(min_seconds=3, min_height=33) == ({"plain", "long", "slow", "bad"}, {"min_seconds": 2, "min_height": 1})
    assert left(min_width=65, min_fps=6) == (everything - {"small", "slow"}, {"min_width": 1, "min_fps": 1})
    assert left(where="score >= 2", min_fps=6) == ({"long", "small", "bad", "part"}, {"where": 2, "min_fps": 1})


def test_what_is_broken_is_not_filtered_but_told(folder: Path, tiny_checkpoint: Path) -> None:
    found = look(folder, tiny_checkpoint, min_frames=1000, where="score = 9 or score = 0")
    assert found.left_out == {"d": {"where": 4, "min_frames": 2}}
    assert [Path(video).name for video, _, _ in found.failed] == ["bad.mp4"]


def test_nothing_left_is_an_error_with_the_counts(folder: Path, tiny_checkpoint: Path) -> None:
    (folder / "bad.mp4").write_bytes((folder / "plain.mp4").read_bytes())
    message = r"no video is left .*data\.datasets\.d: 2 by where, 5 by min_height"
    with pytest.raises(UsageError, match=message) as caught:
        look(folder, tiny_checkpoint, where="score > 1", min_height=1000)
    assert "\n" not in str(caught.value)


def test_images_need_a_job_of_one_frame(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_files(tmp_path, {"images/a.png": b"", "images/b.jpg": b""})
    dataset = DatasetConfig(layout="folder", path=str(tmp_path), media="images", prompt="x")
    config = EncodeConfig(cache=str(tmp_path / "cache"), height=32, width=48, num_frames=9)
    with pytest.raises(UsageError, match=r"data\.datasets\.d: 2 images are videos of 1 frame, encode\.num_frames is 9"):
        check(ModelConfig(path=str(tiny_checkpoint)), DataConfig(datasets={"d": dataset}), config)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, None), "a have a weight, b have none; give one to every dataset, or to none"),
        ((0.0, 0.0), "the weights of a, b sum to 0"),
    ],
)
def test_weights_of_datasets_say_something_together(weights: tuple, message: str) -> None:
    datasets = {
        name: DatasetConfig(layout="table", path="t.csv", weight=weight)
        for name, weight in zip("ab", weights, strict=True)
    }
    with pytest.raises(UsageError, match=message):
        _ = DataConfig(datasets=datasets).mixture
