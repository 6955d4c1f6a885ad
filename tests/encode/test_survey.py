"""What a recipe wants of the cache: every entry named once, by what determines its bytes and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from encode.config import DataConfig, DatasetConfig, EncodeConfig, FiltersConfig, WindowsConfig
from encode.survey import Survey, check, survey
from manifests.cache import Cache
from manifests.config import ModelConfig
from manifests.errors import UsageError
from tests.encode.video_files import write_video

Look = Callable[..., Survey]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three videos of 20 frames at 10 fps; two share a caption."""
    (tmp_path / "data" / "videos").mkdir(parents=True)
    (tmp_path / "data" / "metas").mkdir()
    for number, (stem, caption) in enumerate([("a", "a circle"), ("b", "a square"), ("c", "a circle")]):
        write_video(tmp_path / "data" / "videos" / f"{stem}.mp4", 20 + number, fps=10)
        (tmp_path / "data" / "metas" / f"{stem}.txt").write_text(caption)
    return tmp_path / "data"


@pytest.fixture
def look(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> Look:
    """Survey `folder`, or the given datasets, with changes to the settings."""
    model = ModelConfig(path=str(tiny_checkpoint))

    def run(cache: Cache | None = None, datasets: dict | None = None, **changes: object) -> Survey:
        base = EncodeConfig(
            cache=str(tmp_path / "cache"),
            height=32,
            width=48,
            num_frames=9,
            fps=10.0,
            dtype="float32",
            decode_workers=1,
        )
        data = DataConfig(datasets=datasets or {"d": DatasetConfig(layout="folder", path=str(folder))})
        return survey(check(model, data, replace(base, **changes)), cache, remember=True)

    return run


def keys(found: Survey, kind: str) -> set[str]:
    return {row["key"] for row in found.wanted.to_pylist() if row["kind"] == kind}


def test_each_window_and_each_different_caption_is_wanted_once(look: Look) -> None:
    found = look(windows=WindowsConfig(mode="uniform", count=2))
    assert len(keys(found, "latents")) == 6
    # Two captions, the null context and the default negative prompt.
    assert len(keys(found, "context")) == 4
    assert len(found.wanted) == 10
    assert found.null_key in keys(found, "context")
    assert set(found.negative_keys.values()) < keys(found, "context")
    assert found.num_items == 3
    assert not found.failed
    samples = found.samples.to_pylist()
    assert [(Path(row["source"]).stem, row["start"], row["caption"]) for row in samples] == [
        ("a", 0, "a circle"), ("a", 11, "a circle"),
        ("b", 0, "a square"), ("b", 12, "a square"),
        ("c", 0, "a circle"), ("c", 13, "a circle"),
    ]  # fmt: skip


def test_moving_the_videos_changes_no_key(look: Look, folder: Path, tmp_path: Path) -> None:
    before = look()
    shutil.move(folder, tmp_path / "elsewhere")
    os.rename(tmp_path / "elsewhere" / "videos" / "a.mp4", tmp_path / "elsewhere" / "videos" / "renamed.mp4")
    os.rename(tmp_path / "elsewhere" / "metas" / "a.txt", tmp_path / "elsewhere" / "metas" / "renamed.txt")
    after = look(datasets={"d": DatasetConfig(layout="folder", path=str(tmp_path / "elsewhere"))})
    for kind in ("latents", "context"):
        assert keys(after, kind) == keys(before, kind)


def test_editing_a_caption_changes_one_context_and_no_latents(look: Look, folder: Path) -> None:
    before = look()
    (folder / "metas" / "b.txt").write_text("a large square")
    after = look()
    assert keys(after, "latents") == keys(before, "latents")
    assert len(keys(after, "context") - keys(before, "context")) == 1


def test_a_negative_prompt_wants_one_more_context(look: Look) -> None:
    before, after = look(), look(negative_prompts=("blurry",))
    assert keys(after, "context") - keys(before, "context") == {after.negative_keys["blurry"]}


@pytest.mark.parametrize(
    "changes",
    [{"height": 48}, {"width": 64}, {"num_frames": 13}, {"fps": 5.0}, {"fps": "source"}, {"dtype": "bfloat16"}],
)
def test_a_window_that_would_be_other_bytes_has_another_key(look: Look, changes: dict) -> None:
    assert not keys(look(), "latents") & keys(look(**changes), "latents")


@pytest.mark.parametrize("changes", [{"shard_mb": 1.0}, {"decode_workers": 2}, {"snapshot": "x"}, {"text_batch": 1}])
def test_how_the_job_runs_is_in_no_key(look: Look, changes: dict) -> None:
    assert look(**changes).wanted.equals(look().wanted)


def test_more_random_windows_keep_those_there_are(look: Look) -> None:
    few = look(windows=WindowsConfig(mode="random", count=2, seed=3))
    many = look(windows=WindowsConfig(mode="random", count=5, seed=3))
    other = look(windows=WindowsConfig(mode="random", count=5, seed=4))
    assert len(keys(few, "latents")) == 6
    assert keys(few, "latents") < keys(many, "latents")
    assert keys(other, "latents") != keys(many, "latents")


def test_two_datasets_may_hold_the_same_video_and_share_its_entries(look: Look, folder: Path) -> None:
    one = look()
    both = look(
        datasets={
            "d": DatasetConfig(layout="folder", path=str(folder)),
            "e": DatasetConfig(layout="folder", path=str(folder), prompt="a shape"),
        }
    )
    assert keys(both, "latents") == keys(one, "latents")
    assert len(both.samples) == 2 * len(one.samples)
    assert set(both.samples["dataset"].to_pylist()) == {"d", "e"}
    assert len(keys(both, "context") - keys(one, "context")) == 1
    assert both.num_items == one.num_items == 3


def test_clips_of_a_table_are_windows_of_their_own(look: Look, folder: Path) -> None:
    rows = ["videos/a.mp4,0,1,first", "videos/a.mp4,1,2,second", "videos/a.mp4,,,whole", "videos/a.mp4,1.5,2,short"]
    (folder / "clips.csv").write_text("\n".join(["video,start,end,caption", *rows]) + "\n")
    found = look(datasets={"t": DatasetConfig(layout="table", path=str(folder / "clips.csv"))})
    latents = [row for row in found.wanted.to_pylist() if row["kind"] == "latents"]
    assert [(row["clip_start"], row["clip_end"]) for row in latents] == [(0, 1), (1, 2), (None, None), (1.5, 2)]
    assert found.num_items == 4
    ((video, start, end), error), *more = found.failed.items()
    assert (Path(video).name, start, end) == ("a.mp4", 1.5, 2)
    assert error == "too short: 5 frames at 10 fps, a window needs 9"
    assert not more
    assert [row["error"] for row in latents] == [None, None, None, error]


def test_what_cannot_be_used_becomes_an_entry_with_its_error(look: Look, folder: Path) -> None:
    (folder / "videos" / "b.mp4").write_bytes(b"no video at all")
    found = look(num_frames=21)
    errors = {Path(video).stem: error for (video, _, _), error in found.failed.items()}
    assert set(errors) == {"a", "b"}
    assert errors["a"] == "too short: 20 frames at 10 fps, a window needs 21"
    rows = {Path(row["source"]).stem: row for row in found.wanted.to_pylist() if row["kind"] == "latents"}
    assert {stem: row["error"] for stem, row in rows.items()} == {**errors, "c": None}
    assert all("\n" not in error for error in errors.values())


def test_a_cache_remembers_videos_and_a_change_is_noticed(look: Look, folder: Path, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"), create=True)
    first = look(cache)
    assert len(list((tmp_path / "cache" / "sources").iterdir())) == 1
    assert look(cache).wanted.equals(first.wanted)
    assert len(list((tmp_path / "cache" / "sources").iterdir())) == 1
    write_video(folder / "videos" / "a.mp4", 30, fps=10)
    assert len(keys(look(cache), "latents") - keys(first, "latents")) == 1
    assert len(list((tmp_path / "cache" / "sources").iterdir())) == 2


def test_many_clips_of_a_video_are_one_source(look: Look, folder: Path, tmp_path: Path) -> None:
    rows = [f"videos/a.mp4,{i / 100},{i / 100 + 1},clip {i}" for i in range(50)]
    (folder / "clips.csv").write_text("\n".join(["video,start,end,caption", *rows]) + "\n")
    cache = Cache(str(tmp_path / "cache"), create=True)
    found = look(cache, datasets={"t": DatasetConfig(layout="table", path=str(folder / "clips.csv"))})
    assert found.num_items == 50
    (file,) = (tmp_path / "cache" / "sources").iterdir()
    assert pq.read_table(file).num_rows == 1


def test_a_link_to_nothing_is_an_error_that_names_it(look: Look, folder: Path) -> None:
    (folder / "videos" / "a.mp4").unlink()
    (folder / "videos" / "a.mp4").symlink_to(folder / "gone.mp4")
    with pytest.raises(UsageError, match=r"videos/a\.mp4: cannot read this video: No such file"):
        look()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 33}, r"encode\.height = 33"),
        ({"num_frames": 8}, r"encode\.num_frames = 8"),
        ({"snapshot": "my snapshot"}, "my snapshot"),
    ],
)
def test_bad_settings_are_refused_before_a_video_is_read(look: Look, folder: Path, changes: dict, message: str) -> None:
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match=message):
        look(**changes)


def test_the_first_videos_that_pass_the_other_filters_are_kept(look: Look, folder: Path) -> None:
    """a has 20 frames, b 21 and c 22."""
    filters = FiltersConfig(min_frames=21, first=1)
    found = look(datasets={"d": DatasetConfig(layout="folder", path=str(folder), filters=filters)})
    assert [Path(source).stem for source in found.samples["source"].to_pylist()] == ["b"]
    assert found.left_out == {"d": {"min_frames": 1, "first": 1}}
    assert found.num_items == 1
