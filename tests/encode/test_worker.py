"""One worker, one task: what is committed, what is quarantined, what is tried again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from encode.job import plan_encode
from encode.worker import Oversight, ShardReport, ShardWorker
from manifests.cache import Cache
from manifests.errors import CorruptError
from manifests.plan import Plan, ShardTask
from manifests.store import Store
from pipeline.recipe import resolved, validate
from tests import jobs
from tests.encode.video_files import write_video
from tests.pipeline.recipes import recipe_values

Make = Callable[..., tuple[ShardWorker, Plan]]


@pytest.fixture
def make_worker(tiny_checkpoint: Path, demo_dataset: Path, tmp_path: Path) -> Any:
    workers = []

    def make(**encode: Any) -> tuple[ShardWorker, Plan]:
        values = recipe_values(tmp_path, tiny_checkpoint, demo_dataset)
        values["encode"] |= {"windows": {"mode": "slide", "stride": 2}, **encode}
        recipe = validate(values, "test")
        planned = plan_encode(recipe.model, recipe.data, recipe.encode, resolved(recipe), create=True)
        workers.append(ShardWorker(recipe.model, recipe.encode, planned.plan.footer))
        return workers[-1], planned.plan

    yield make
    for worker in workers:
        worker.close()


def _task(plan: Plan, kind: str) -> ShardTask:
    return next(task for task in plan.tasks() if task.kind == kind)


def _halves(task: ShardTask) -> tuple[ShardTask, ShardTask]:
    """Two tasks made of one."""
    middle = len(task.rows) // 2
    parts = {"a": task.rows[:middle], "b": task.rows[middle:]}
    first, second = (dataclasses.replace(task, shard_id=task.shard_id + end, rows=rows) for end, rows in parts.items())
    return first, second


def _flipped(data: bytes) -> bytes:
    """With one bit changed in the middle, where a tensor is."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_a_report_counts_what_was_done(make_worker: Make, tmp_path: Path) -> None:
    worker, plan = make_worker()
    task = _task(plan, "latents")
    report = worker.run(task)
    assert (report.rows, report.entries, report.quarantined) == (len(task.rows), len(task.rows), 0)
    assert report.committed
    assert 0 < report.encode_seconds + report.wait_seconds <= report.seconds
    again = worker.run(task)
    assert again == ShardReport(task.shard_id, "latents", len(task.rows), again.began)
    assert set(jobs.committed(tmp_path / "cache")) == {task.shard_id}


@pytest.mark.parametrize("kind", ["latents", "context"])
def test_an_abandoned_task_leaves_nothing(make_worker: Make, tmp_path: Path, kind: str) -> None:
    worker, plan = make_worker()
    task = _task(plan, kind)
    started: list[str] = []

    def starting(keys: Sequence[str]) -> None:
        started.extend(keys)
        if len(started) > 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        worker.run(task, Oversight(starting=starting))
    assert not list((tmp_path / "cache" / "entries").rglob("*"))
    assert worker.run(task).entries == len(task.rows)


def test_an_expected_task_is_decoded_ahead(make_worker: Make, demo_dataset: Path, tmp_path: Path) -> None:
    """Its video is gone by the time it runs. One decoder: when that answers, what was asked of it before is done."""
    worker, plan = make_worker(decode_workers=1)
    first, second = _halves(_task(plan, "latents"))
    video = Path(shutil.copy(second.rows[0]["source"], tmp_path / "soon_gone.mp4"))
    second = dataclasses.replace(second, rows=tuple(row | {"source": str(video)} for row in second.rows[:2]))
    worker.expect(second)
    worker.run(first)
    assert worker._pool is not None
    worker._pool.probe(video).result()
    video.unlink()
    report = worker.run(second)
    assert (report.entries, report.quarantined) == (2, 0)


def test_another_task_than_the_expected_may_follow(make_worker: Make, tmp_path: Path) -> None:
    worker, plan = make_worker()
    first, second = _halves(_task(plan, "latents"))
    worker.expect(dataclasses.replace(second, rows=second.rows[1:]))
    worker.run(first)
    assert worker.run(second).entries == len(second.rows)
    assert set(jobs.committed(tmp_path / "cache")) == {first.shard_id, second.shard_id}


@pytest.fixture(scope="module")
def slow_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only its first frame is a key frame: for a window at its end all of it must be decoded, half a second's work."""
    options = {"preset": "ultrafast", "g": "250"}
    folder = tmp_path_factory.mktemp("slow")
    return write_video(folder / "slow.mp4", 120, fps=16, height=720, width=1280, options=options)


def _slow(task: ShardTask, video: Path) -> ShardTask:
    """The task, its second window being the end of a slow video."""
    rows = [row | {"source": str(video), "start": 100} if i == 1 else row for i, row in enumerate(task.rows)]
    return dataclasses.replace(task, rows=tuple(rows))


def test_a_video_that_loses_its_decoder_twice_is_quarantined(make_worker: Make, slow_video: Path) -> None:
    worker, plan = make_worker(decode_timeout=1e-6)
    report = worker.run(_slow(_task(plan, "latents"), slow_video))
    assert str(slow_video) in [what for what, _ in report.errors]
    assert {"was stopped" in error for _, error in report.errors} == {True}
    assert (
        report.entries + report.quarantined == report.rows
    )  # another window may be decoded before a look at the clock


def test_a_lost_decoder_is_not_the_videos_fault_at_first(make_worker: Make, slow_video: Path) -> None:
    worker, plan = make_worker(decode_workers=1)
    killed: list[int] = []
    done = threading.Event()

    def kill_the_decoder_that_reads_it() -> None:
        while not killed and not done.is_set():
            for pid in worker._pool.pids if worker._pool else ():
                with contextlib.suppress(OSError):
                    if str(slow_video) in map(os.readlink, Path(f"/proc/{pid}/fd").iterdir()):
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
            time.sleep(0.002)

    thread = threading.Thread(target=kill_the_decoder_that_reads_it)
    thread.start()
    try:
        report = worker.run(_slow(_task(plan, "latents"), slow_video))
    finally:
        done.set()
        thread.join()
    assert len(killed) == 1
    assert (report.entries, report.errors) == (report.rows, ())


def test_refused_and_lone_captions_leave_the_bytes_of_the_others(make_worker: Make, tmp_path: Path) -> None:
    """Batches are cut as they would be anyway, so the other batches round as they do anyway."""
    worker, plan = make_worker(text_batch=2)
    task = _task(plan, "context")
    captions = [row for row in task.rows if row["caption"] is not None]
    refused, alone = captions[0]["key"], captions[2]["key"]
    report = worker.run(task, Oversight(refused={refused: "it killed three encoders"}, alone={alone}))
    assert [error for _, error in report.errors] == ["it killed three encoders"]
    cache = Cache(str(tmp_path / "cache"))
    rows = {row["key"]: row for row in cache.rows("context").to_pylist()}
    assert rows[refused]["status"] == "quarantined"
    assert {key for key, row in rows.items() if row["status"] == "ok"} == set(rows) - {refused}


def test_what_does_not_read_back_is_written_again(make_worker: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that flips a bit of the first tar, and of the first one only."""
    worker, plan = make_worker()
    written: list[str] = []
    write = Store.write

    def flipping(store: Store, path: str, data: bytes) -> None:
        if path.endswith(".tar"):
            written.append(path)
            if len(written) == 1:
                data = _flipped(data)
        write(store, path, data)

    monkeypatch.setattr(Store, "write", flipping)
    task = _task(plan, "context")
    report = worker.run(task)
    assert report.committed
    assert len(written) == 2


def test_a_disk_that_always_flips_a_bit_is_an_error(make_worker: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, plan = make_worker()
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda store, path, data: write(store, path, _flipped(data)))
    with pytest.raises(CorruptError, match="read back"):
        worker.run(_task(plan, "context"))
