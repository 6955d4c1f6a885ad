"""The array script under a real SLURM: preempted, requeued, cancelled, resubmitted in part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.array import SCRIPT, array_expression
from tests import jobs
from tests.command import latentline
from tests.pipeline.conftest import Reference
from tests.services import Slurm, slurm_cluster

TASKS = 3


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def test_a_preempted_task_continues_and_a_cancelled_one_is_submitted_again(
    slurm: Slurm, tmp_path: Path, tiny_checkpoint: Path, demo_dataset: Path, reference: Reference
) -> None:
    recipe = jobs.write_job(tmp_path, tiny_checkpoint, demo_dataset)
    cache = tmp_path / "cache"
    plan = jobs.encode(recipe, "--plan", "--tasks", str(TASKS))
    assert plan["array"] == f"0-{TASKS - 1}"
    job = slurm.submit(f"--array={plan['array']}%2", SCRIPT, str(recipe))

    jobs.wait_until(lambda: jobs.num_committed(cache, "latents") > 1)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    slurm.run("scancel", f"{job}_2")
    log = slurm.folder / f"latentline-encode-{job}_0.log"
    jobs.wait_until(lambda: "stopped by SIGUSR1" in log.read_text())
    jobs.wait_until(lambda: {slurm.states(job).get(task) for task in "01"} <= {"COMPLETED", None})
    assert log.read_text().count("to encode: ") == 2
    assert not (cache / "snapshots" / "train.json").exists()

    missing = latentline("encode", recipe, "--missing", "--format", "slurm")
    assert missing.out == "2\n"
    again = slurm.submit(f"--array={missing.out.strip()}", SCRIPT, str(recipe))
    jobs.wait_until((cache / "snapshots" / "train.json").exists)
    jobs.wait_until(lambda: set(slurm.states(again).values()) <= {"COMPLETED"})

    assert jobs.committed(cache) == reference.tars
    assert jobs.samples(cache) == reference.samples
    nothing = latentline("encode", recipe, "--missing", "--format", "slurm")
    assert (nothing.code, nothing.out) == (0, "")
    assert "nothing is missing" in nothing.err


def test_a_task_without_its_total_needs_a_planned_array(
    tmp_path: Path, tiny_checkpoint: Path, demo_dataset: Path
) -> None:
    recipe = jobs.write_job(tmp_path, tiny_checkpoint, demo_dataset)
    done = latentline("encode", recipe, "--task", "1")
    assert done.code == 2
    assert "--plan --tasks N" in done.error()
    jobs.encode(recipe, "--plan", "--tasks", "2")
    outside = latentline("encode", recipe, "--task", "2")
    assert outside.code == 2
    assert "the tasks 0 to 1" in outside.err


@pytest.mark.parametrize(
    ("indices", "expression"),
    [([], ""), ([4], "4"), ([5, 0, 3, 4], "0,3-5"), ([1, 2], "1-2"), ([0, 2, 4], "0,2,4")],
)
def test_array_expressions(indices: list[int], expression: str) -> None:
    assert array_expression(indices) == expression
