"""Plans run in this process and on real Ray clusters, with encoders and nodes that die."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from encode import ray_executor
from encode.executors import run_local, start_anywhere
from encode.job import EncodePlan, plan_encode
from encode.ray_executor import run_ray
from encode.stopping import Stop, stop_on_signal
from encode.worker import ShardReport
from infer.video import write_mp4
from manifests.errors import LatentlineError, Preempted, UsageError
from manifests.schema import QUARANTINED
from pipeline.recipe import Recipe, resolved, validate
from tests import jobs
from tests.encode import ray_faults
from tests.pipeline.recipes import recipe_values


@dataclass
class Job:
    """A planned job and what it reports. on_event: called with each event, to disturb the job."""

    recipe: Recipe
    planned: EncodePlan
    events: list[dict[str, Any]] = field(default_factory=list)
    on_event: Callable[[dict[str, Any]], None] = lambda event: None

    def run(self, executor: Any, stop: Stop | None = None, index: int = 0, total: int = 1) -> Iterator[ShardReport]:
        def event(name: str, /, **facts: Any) -> None:
            self.events.append({"event": name, **facts})
            self.on_event(self.events[-1])

        recipe, plan = self.recipe, self.planned.plan
        return executor(recipe.model, recipe.encode, plan, index=index, total=total, stop=stop or Stop(), event=event)

    @property
    def cache(self) -> Path:
        return Path(self.recipe.encode.cache)

    def encoders(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "encoder"]


@pytest.fixture
def make_job(tiny_checkpoint: Path, demo_dataset: Path, tmp_path: Path) -> Callable[..., Job]:
    def make(folder: str = "job", dataset: Path = demo_dataset, **encode: Any) -> Job:
        values = recipe_values(tmp_path / folder, tiny_checkpoint, dataset)
        values["encode"] |= {"shard_mb": 0.001, "max_failed": 0.5, **encode}
        recipe = validate(values, "test")
        planned = plan_encode(recipe.model, recipe.data, recipe.encode, resolved(recipe), create=True)
        return Job(recipe, planned)

    return make


@contextmanager
def ray_cluster(num_cpus: int) -> Iterator[Cluster]:
    """A Ray whose files are in a folder of its own, so that nobody joins it unasked; a short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="ll-") as folder:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "temp_dir": folder})
        try:
            yield cluster
        finally:
            cluster.shutdown()


@contextmanager
def ray_here(address: str = "local", **options: Any) -> Iterator[None]:
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def kill(encoder: dict[str, Any]) -> None:
    os.kill(encoder["pid"], signal.SIGKILL)


def test_local_tasks_of_an_array_are_disjoint_and_complete(make_job: Callable[..., Job]) -> None:
    job = make_job()
    parts = [[report.shard_id for report in job.run(run_local, index=index, total=3)] for index in range(3)]
    shards = [shard_id for part in parts for shard_id in part]
    assert len(set(shards)) == len(shards) == job.planned.num_shards
    assert set(jobs.committed(job.cache)) == set(shards)


def test_a_driver_starts_anywhere_and_leaves_nothing_out(make_job: Callable[..., Job]) -> None:
    plan = make_job().planned.plan
    orders = [[task.shard_id for task in start_anywhere(plan).tasks()] for _ in range(20)]
    kinds = [task.kind for task in start_anywhere(plan).tasks()]
    assert kinds == sorted(kinds)
    assert len({tuple(order) for order in orders}) > 1
    assert {frozenset(order) for order in orders} == {frozenset(task.shard_id for task in plan.tasks())}


def test_what_another_driver_committed_is_not_encoded_again(make_job: Callable[..., Job]) -> None:
    job = make_job()
    list(job.run(run_local))
    before = jobs.committed(job.cache)
    again = list(job.run(run_local))
    assert len(again) == job.planned.num_shards
    assert not any(report.committed or report.entries for report in again)
    assert jobs.committed(job.cache) == before
    assert jobs.orphans(job.cache) == []


def test_a_local_run_stops_between_entries(make_job: Callable[..., Job]) -> None:
    job = make_job(shard_mb=1)
    with stop_on_signal() as stop:
        reports = job.run(run_local, stop)
        next(reports)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Preempted, match="SIGUSR1"):
            next(reports)
    assert len(jobs.committed(job.cache)) == 1
    assert jobs.orphans(job.cache) == []


def test_a_replaced_encoder_waits_for_the_gpu_its_predecessor_held(make_job: Callable[..., Job]) -> None:
    """GPUs are Ray's to count here; there need be none."""
    job = make_job(encoders=2)  # one more than there are GPUs: it is not placed at first, and must not be waited for
    with ray_here(num_cpus=8, num_gpus=1):
        reports = job.run(run_ray)
        next(reports)
        [encoder] = list(job.encoders())
        kill(encoder)
        rest = list(reports)
    assert 1 + len(rest) == job.planned.num_shards
    assert len(job.encoders()) > 1


def test_a_dead_node_loses_nothing_and_is_nobodys_fault(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encode.ray_executor.MAX_ATTEMPTS", 1)
    job = make_job(encoders=1)
    with ray_cluster(0) as cluster:
        node = cluster.add_node(num_cpus=1)
        with ray_here(cluster.address):
            reports = job.run(run_ray)
            done = [next(reports)]
            cluster.add_node(num_cpus=1)
            cluster.remove_node(node, allow_graceful=False)
            done += reports
    assert len(job.encoders()) > 1
    assert len(done) == job.planned.num_shards
    assert not any(report.errors for report in done)


@pytest.fixture(scope="module")
def four_cpus() -> Iterator[str]:
    """The address of a Ray that tests join one after another, each as a driver of its own.

    For the tests below: once this process has started and ended another Ray, actors on this one die at their start.
    """
    with ray_cluster(4) as cluster:
        yield cluster.address


def test_ray_leaves_the_bytes_a_local_run_leaves_though_an_encoder_is_killed(
    make_job: Callable[..., Job], four_cpus: str
) -> None:
    local, job = make_job("local"), make_job("ray", encoders=2)
    list(local.run(run_local))
    with ray_here(four_cpus):
        reports = job.run(run_ray)
        done = [next(reports), next(reports)]
        kill(job.encoders()[0])
        done += reports
    assert len(job.encoders()) >= 2
    assert any(event["event"] == "retry" for event in job.events)
    assert sorted(report.shard_id for report in done) == sorted(task.shard_id for task in job.planned.plan.tasks())
    assert jobs.committed(job.cache) == jobs.committed(local.cache)


def test_a_poisonous_video_is_quarantined_and_the_rest_of_its_shard_encoded(
    make_job: Callable[..., Job], four_cpus: str, demo_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "MAX_ATTEMPTS", 2)
    dataset = tmp_path / "poisoned"
    shutil.copytree(demo_dataset, dataset)
    write_mp4(dataset / "videos" / "white.mp4", np.full((17, 64, 96, 3), 255, np.uint8), 16.0)
    (dataset / "metas" / "white.txt").write_text("a white wall")
    job = make_job(dataset=dataset, windows={"mode": "head"}, shard_mb=1)
    with ray_here(four_cpus, runtime_env=ray_faults.setup()):
        reports = list(job.run(run_ray))
    assert len(job.encoders()) == 3
    [[what, error]] = [failure for report in reports for failure in report.errors]
    assert what.endswith("white.mp4")
    assert "the encoder died 2 times on it" in error
    assert job.planned.cache is not None
    rows = job.planned.cache.rows("latents").to_pylist()
    assert [row["source"] for row in rows if row["status"] == QUARANTINED] == [what]
    assert len(rows) == 5


def test_encoders_that_find_no_place_are_an_error_that_names_it(
    make_job: Callable[..., Job], four_cpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "START_SECONDS", 3.0)
    job = make_job()
    with ray_here(four_cpus):
        busy = ray.remote(num_cpus=4)(lambda: time.sleep(600)).remote()
        jobs.wait_until(lambda: ray.available_resources().get("CPU", 0) == 0)
        with pytest.raises(LatentlineError, match=r"each needs 1 CPU on one node, free are 0 of 4 CPU"):
            list(job.run(run_ray))
        ray.cancel(busy, force=True)


def test_an_encoder_without_progress_is_replaced(
    make_job: Callable[..., Job], four_cpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "STALL_SECONDS", 20.0)  # an encoder loads its models within it
    monkeypatch.setattr(ray_executor, "_LOOK_SECONDS", 1.0)
    job = make_job(decode_timeout=0.5)
    with ray_here(four_cpus):
        reports = job.run(run_ray)
        done = [next(reports)]
        os.kill(job.encoders()[0]["pid"], signal.SIGSTOP)
        done += reports
    assert len(done) == job.planned.num_shards
    assert any("no progress" in event.get("reason", "") for event in job.events)


def test_a_users_error_in_an_encoder_keeps_its_type_and_its_line(make_job: Callable[..., Job], four_cpus: str) -> None:
    job = make_job()
    with ray_here(four_cpus):
        shutil.rmtree(job.cache)
        with pytest.raises(UsageError, match="no such folder") as caught:
            list(job.run(run_ray))
    assert "\n" not in str(caught.value)


def test_ray_stops_within_seconds(make_job: Callable[..., Job], four_cpus: str) -> None:
    job = make_job(windows={"mode": "slide", "stride": 1}, height=64, width=96)
    with ray_here(four_cpus), stop_on_signal() as stop:
        reports = job.run(run_ray, stop)
        next(reports)
        os.kill(os.getpid(), signal.SIGTERM)
        begin = time.monotonic()
        with pytest.raises(Preempted, match="SIGTERM"):
            list(reports)
        assert time.monotonic() - begin < 5
    assert 1 <= len(jobs.committed(job.cache)) < job.planned.num_shards
    assert jobs.orphans(job.cache) == []


def test_no_cluster_at_the_address_is_one_line(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    job = make_job()
    with pytest.raises(LatentlineError, match=r"no Ray cluster answers at RAY_ADDRESS = '127\.0\.0\.1:1'"):
        list(job.run(run_ray))
