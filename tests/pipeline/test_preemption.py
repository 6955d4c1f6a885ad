"""Jobs that are stopped, killed, or run beside each other: nothing lost, nothing twice, the same bytes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from manifests.cache import Cache
from manifests.events import read_events
from tests import jobs
from tests.pipeline.conftest import Reference

NUM_VIDEOS = 4000  # enough for a few seconds of reading
KILLED_JOB = Path(__file__).with_name("killed_job.py")


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path, demo_dataset: Path) -> Path:
    return jobs.write_job(tmp_path, tiny_checkpoint, demo_dataset)


def _whole(cache: Path, reference: Reference) -> None:
    assert jobs.committed(cache) == reference.tars
    assert jobs.samples(cache) == reference.samples


def _events(cache: Path) -> list[dict]:
    store = Cache(str(cache)).store
    return [event for folder in (cache / "events").iterdir() for event in read_events(store, folder.name)]


def test_a_signal_stops_between_entries_and_the_same_command_continues(
    recipe: Path, tmp_path: Path, reference: Reference
) -> None:
    cache = tmp_path / "cache"
    before = 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process = jobs.start("encode", recipe)
        jobs.wait_until(lambda before=before: jobs.num_committed(cache, "latents") > before, process)
        process.send_signal(number)
        begin = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75
        assert time.monotonic() - begin < 10
        last = err.splitlines()[-1]
        assert number.name in last
        assert "run the same command to continue" in last
        assert "Traceback" not in err
        assert jobs.orphans(cache) == []
        assert _events(cache)[-1]["event"] == "preempted"
        before = jobs.num_committed(cache, "latents")

    committed = len(jobs.committed(cache))
    assert 0 < committed < len(reference.tars)
    result = jobs.encode(recipe)
    assert sum(result["encoded"].values()) == len(reference.tars) - committed
    _whole(cache, reference)


def test_a_signal_while_videos_are_read_keeps_what_is_known_of_them(
    tmp_path: Path, tiny_checkpoint: Path, demo_dataset: Path
) -> None:
    videos = tmp_path / "many" / "videos"
    videos.mkdir(parents=True)
    video = next((demo_dataset / "videos").glob("*.mp4")).read_bytes()
    for number in range(NUM_VIDEOS):
        (videos / f"{number:04d}.mp4").write_bytes(video + bytes(number))
    recipe = jobs.write_job(tmp_path, tiny_checkpoint, videos.parent, decode_workers=1)
    cache = tmp_path / "cache"
    process = jobs.start("encode", recipe, "--set", 'data.datasets.shapes.prompt="many"')
    jobs.wait_until((cache / "format.json").exists, process)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    [remembered] = (cache / "sources").glob("*.parquet")
    assert 0 < len(pq.read_table(remembered)) < NUM_VIDEOS


@pytest.mark.parametrize("point", ["write", "commit", "committed"])
def test_a_killed_job_loses_at_most_the_shard_in_work(
    recipe: Path, tmp_path: Path, reference: Reference, point: str
) -> None:
    cache, count = tmp_path / "cache", 9
    process = jobs.start(KILLED_JOB, recipe, point, str(count), python=True, PYTHONPATH=str(jobs.REPOSITORY))
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    survived = jobs.committed(cache)
    assert len(survived) == (count if point == "committed" else count - 1)
    assert survived.items() <= reference.tars.items()
    assert len(jobs.orphans(cache)) == (point != "committed")

    result = jobs.encode(recipe)
    assert sum(result["encoded"].values()) == len(reference.tars) - len(survived)
    _whole(cache, reference)
    assert len(jobs.orphans(cache)) == (point != "committed")  # invisible, and left to `cache gc`


def test_a_job_killed_again_and_again_gets_done(recipe: Path, tmp_path: Path, reference: Reference) -> None:
    cache = tmp_path / "cache"
    for _ in range(3):
        before = len(list(cache.rglob("*.parquet")))
        process = jobs.start("encode", recipe)
        jobs.wait_until(lambda before=before: len(list(cache.rglob("*.parquet"))) > before + 5, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    jobs.encode(recipe)
    _whole(cache, reference)


def test_two_drivers_of_one_job_share_the_work(recipe: Path, tmp_path: Path, reference: Reference) -> None:
    drivers = [jobs.start("encode", recipe, "--json") for _ in range(2)]
    results = []
    for driver in drivers:
        out, err = driver.communicate(timeout=240)
        assert driver.returncode == 0, err
        results.append(json.loads(out))
    assert {result["snapshot"] for result in results} == {reference.snapshot}
    encoded = [sum(result["encoded"].values()) for result in results]
    assert sum(encoded) == len(reference.tars)
    _whole(tmp_path / "cache", reference)
    assert jobs.orphans(tmp_path / "cache") == []
    shards = [event for event in _events(tmp_path / "cache") if event["event"] == "shard"]
    assert {event["driver"] for event in shards if event["committed"]} == {event["driver"] for event in shards}
    duplicates = sum(not event["committed"] and event["entries"] > 0 for event in shards)
    assert duplicates <= len(reference.tars)  # no driver encodes a shard twice, however their paths cross
