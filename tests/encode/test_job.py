"""Stage 1 from settings to snapshot: nothing is encoded twice, nothing bad is hidden, nothing half-done is left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from encode.config import DataConfig, DatasetConfig, WindowsConfig
from encode.job import run_encode
from manifests.cache import Cache
from manifests.config import ModelConfig
from manifests.errors import CorruptError, UsageError
from manifests.schema import KINDS
from manifests.shards import read_tensors
from manifests.snapshot import load_snapshot
from tests.encode.small_job import NOTHING, Job
from tests.encode.video_files import write_video


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    before = state()
    yield
    assert state() == before


def test_a_second_run_encodes_nothing_and_makes_the_same_snapshot(job: Job) -> None:
    first = job.encode()
    assert first.encoded == {"latents": 3, "context": 4}
    assert (first.counts.samples, first.quarantined) == (3, {})
    tars = job.tars("latents")
    _, planned = job.plan()
    assert planned.missing == NOTHING
    assert planned.wanted == {"latents": 3, "context": 4}
    assert (planned.num_shards, planned.missing_bytes) == (0, 0)
    second = job.encode()
    assert second.encoded == NOTHING
    assert second.snapshot.hash == first.snapshot.hash
    assert job.tars("latents") == tars


def test_the_plan_states_the_bytes_that_are_then_written(job: Job) -> None:
    _, planned = job.plan()
    assert planned.entry_bytes["latents"] == 16 * 3 * 4 * 6 * 4
    reports = run_encode(job.model, job.config, planned)
    assert sum(report.bytes for report in reports) == planned.missing_bytes
    assert len(reports) == planned.num_shards


def test_an_edited_caption_costs_one_context(job: Job) -> None:
    before = job.encode().snapshot
    job.caption("b", "a large square")
    after = job.encode()
    assert after.encoded == {"latents": 0, "context": 1}
    assert after.snapshot.hash != before.hash
    assert "a large square" in after.snapshot.table["caption"].to_pylist()
    # The old snapshot is still whole: a run on it can go on.
    assert load_snapshot(Cache(str(job.cache)).store, before.hash).num_samples == 3


def test_equal_captions_share_one_context(job: Job) -> None:
    table = job.encode().snapshot.table
    places = {(row["caption"], row["context_shard"], row["context_offset"]) for row in table.to_pylist()}
    assert len(places) == 2


def test_moved_and_renamed_videos_are_not_encoded_again(job: Job) -> None:
    first = job.encode()
    shutil.move(job.root / "data", job.root / "moved")
    os.rename(job.root / "moved" / "videos" / "a.mp4", job.root / "moved" / "videos" / "z.mp4")
    os.rename(job.root / "moved" / "metas" / "a.txt", job.root / "moved" / "metas" / "z.txt")
    job.data = DataConfig(datasets={"d": DatasetConfig(layout="folder", path=str(job.root / "moved"))})
    second = job.encode()
    assert second.encoded == NOTHING
    assert second.snapshot.hash == first.snapshot.hash


def test_a_moved_cache_needs_nothing_again(job: Job) -> None:
    first = job.encode()
    shutil.move(job.cache, job.root / "cache2")
    second = job.encode(cache=str(job.root / "cache2"))
    assert second.encoded == NOTHING
    row = second.snapshot.sample(0)
    assert read_tensors(Cache(str(job.root / "cache2")).store, row.latents)["latents"].shape == (16, 3, 4, 6)
    assert second.snapshot.hash == first.snapshot.hash


def test_videos_moved_between_plan_and_run_are_found(job: Job) -> None:
    job.plan()
    shutil.move(job.root / "data", job.root / "moved")
    job.data = DataConfig(datasets={"d": DatasetConfig(layout="folder", path=str(job.root / "moved"))})
    result = job.encode()
    assert result.quarantined == {}
    assert result.counts.samples == 3


def test_more_windows_encode_only_the_new_ones(job: Job) -> None:
    windows = WindowsConfig(mode="random", count=1, seed=1)
    first = job.encode(windows=windows)
    second = job.encode(windows=replace(windows, count=3))
    assert first.encoded["latents"] == 3
    assert second.encoded == {"latents": 6, "context": 0}
    assert second.counts.samples == 9


def test_an_interrupted_run_goes_on_where_it_was(job: Job) -> None:
    config, planned = job.plan(shard_mb=0.001)
    seen = []

    def stop_after_three(report: Any) -> None:
        seen.append(report)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_encode(job.model, config, planned, on_report=stop_after_three)
    _, again = job.plan(shard_mb=0.001)
    assert sum(again.missing.values()) == 7 - sum(report.entries for report in seen)
    assert again.plan.plan_id == planned.plan.plan_id
    assert job.encode(shard_mb=0.001).counts.samples == 3


def test_two_datasets_are_told_apart_in_the_snapshot(job: Job) -> None:
    one = job.data.datasets["d"]
    job.data = DataConfig(datasets={"d": one, "e": replace(one, prompt="a shape")})
    result = job.encode()
    assert result.encoded == {"latents": 3, "context": 5}
    assert result.counts.samples == 6
    datasets = result.snapshot.table["dataset"].to_pylist()
    assert (datasets.count("d"), datasets.count("e")) == (3, 3)


def test_clips_of_a_table_become_samples_of_their_own(job: Job) -> None:
    table = job.root / "data" / "clips.csv"
    table.write_text("video,start,end,caption\nvideos/a.mp4,0,1,first\nvideos/a.mp4,1,2,second\n")
    job.data = DataConfig(datasets={"t": DatasetConfig(layout="table", path=str(table))})
    snapshot = job.encode().snapshot
    store = Cache(str(job.cache)).store
    latents = {s.captions[""]: read_tensors(store, s.latents)["latents"] for s in map(snapshot.sample, range(2))}
    assert set(latents) == {"first", "second"}
    assert (latents["first"] - latents["second"]).abs().max() > 0.1


def test_a_missing_caption_is_refused_before_anything_is_written(job: Job) -> None:
    (job.root / "data" / "metas" / "b.txt").unlink()
    with nothing_written(job.root), pytest.raises(UsageError, match=r"1 videos without a caption: videos/b\.mp4"):
        job.encode()


@pytest.mark.parametrize(
    "changes", [{"height": 40}, {"num_frames": 10}, {"snapshot": "a/b"}, {"cache": "ftp://host/cache"}]
)
def test_bad_settings_are_refused_before_anything_is_written(job: Job, changes: dict) -> None:
    with nothing_written(job.root), pytest.raises(UsageError):
        job.encode(**changes)


def test_a_model_that_is_not_there_is_refused_before_anything_is_written(job: Job) -> None:
    job.model = ModelConfig(path=str(job.root / "nowhere"))
    with nothing_written(job.root), pytest.raises(UsageError, match="no such folder"):
        job.encode()


def test_a_dry_run_writes_nothing_with_or_without_a_cache(job: Job) -> None:
    with nothing_written(job.root):
        _, planned = job.plan(create=False)
    assert (planned.missing, planned.cache) == ({"latents": 3, "context": 4}, None)
    job.encode()
    write_video(job.video("d"), 25, fps=10)
    job.caption("d", "a new one")
    with nothing_written(job.root):
        _, planned = job.plan(create=False)
    assert planned.missing == {"latents": 1, "context": 1}


def test_another_model_gets_entries_of_its_own_in_the_same_cache(job: Job, tiny_checkpoint: Path) -> None:
    from pipeline.demo.checkpoint import build_tiny_checkpoint

    first = job.encode()
    job.model = ModelConfig(path=str(build_tiny_checkpoint(job.root / "other", seed=7)))
    second = job.encode(snapshot="other")
    assert second.encoded == first.encoded
    assert Cache(str(job.cache)).summary("latents").entries == 6


def test_manifests_say_how_entries_were_made(job: Job) -> None:
    job.encode()
    cache = Cache(str(job.cache))
    for kind in KINDS:
        for shard in cache.shard_ids(kind).to_pylist():
            _, footer = cache.manifest(kind, shard)
            assert footer["recipe"] == {"test": 1}
            assert footer["fingerprint"]["dtype"] == "float32"
            assert {"torch", "diffusers", "av"} <= footer["packages"].keys()


def test_a_damaged_entry_is_noticed_when_read(job: Job) -> None:
    snapshot = job.encode().snapshot
    sample = snapshot.sample(0)
    shard = job.cache / sample.latents.shard
    data = bytearray(shard.read_bytes())
    data[sample.latents.offset + sample.latents.size - 1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CorruptError, match=sample.latents.shard):
        read_tensors(Cache(str(job.cache)).store, sample.latents)
