"""Ranks started by one command, by torchrun and by SLURM: signals, exit codes, and one line for one mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manifests.errors import UsageError
from pipeline.launch import Node, count_gpus, parse_node
from tests import jobs
from tests.pipeline.recipes import write_recipe
from tests.services import Slurm, free_port, slurm_cluster
from tests.train.caches import make_snapshot
from train.metrics import read_metrics

SCRIPT = jobs.REPOSITORY / "pipeline" / "slurm" / "train.sbatch"
MANY_STEPS = "train.steps=100000"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    make_snapshot(folder / "cache", tiny_checkpoint)
    values = {
        "model": {"path": str(tiny_checkpoint)},
        "encode": {"cache": str(folder / "cache")},
        "train": {
            "output": str(folder / "run"),
            "steps": 4,
            "batch_size": 2,
            "dtype": "float32",
            "lora": {"rank": 4},
            "track": {"tensorboard": False},
        },
    }
    return write_recipe(folder, values)


@pytest.fixture
def run_in(tmp_path: Path, recipe: Path) -> Callable[..., list[str]]:
    """Arguments of `latentline train` into a folder of the test's own."""

    def arguments(*options: str) -> list[str]:
        settings = [part for option in options if "=" in option for part in ("--set", option)]
        flags = [option for option in options if "=" not in option]
        return ["train", str(recipe), "--set", f'train.output="{tmp_path}"', *settings, *flags]

    return arguments


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def steps_done(folder: Path) -> int:
    records = read_metrics(folder)
    return records[-1]["step"] if records else 0


def the_error(err: str) -> str:
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_a_signal_reaches_the_ranks_and_the_same_command_continues(
    run_in: Callable[..., list[str]], tmp_path: Path
) -> None:
    process = jobs.start(*run_in("--gpus", "2", MANY_STEPS))
    jobs.wait_until(lambda: steps_done(tmp_path) > 2, process)
    ranks = children(process.pid)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "run the same command to continue" in the_error(err)
    assert len(ranks) == 2
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)

    steps = steps_done(tmp_path) + 2
    done = jobs.run(*run_in("--gpus", "2", f"train.steps={steps}", "train.context_parallel=2", "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["resumed_from"], result["steps"]) == (steps - 2, steps)


def test_two_machines_stop_together_when_one_is_told_to(run_in: Callable[..., list[str]], tmp_path: Path) -> None:
    port = free_port()
    machines = [
        jobs.start(*run_in("--gpus", "1", "--node", f"{index}/2@127.0.0.1:{port}", MANY_STEPS)) for index in range(2)
    ]
    jobs.wait_until(lambda: steps_done(tmp_path) > 2, machines[0])
    machines[1].send_signal(signal.SIGUSR1)
    errors = [machine.communicate(timeout=60)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [75, 75], errors
    assert all("run the same command to continue" in the_error(err) for err in errors)


def test_a_rank_that_dies_takes_the_others_with_it(run_in: Callable[..., list[str]], tmp_path: Path) -> None:
    process = jobs.start(*run_in("--gpus", "2", MANY_STEPS))
    jobs.wait_until(lambda: steps_done(tmp_path) > 2, process)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "rank 1 was ended by SIGKILL" in err
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_a_mistake_all_ranks_notice_is_told_once(run_in: Callable[..., list[str]]) -> None:
    done = jobs.run(*run_in("--gpus", "2", "train.context_parallel=3"))
    assert done.returncode == 2
    assert "train.context_parallel: 3 ranks a sample do not divide 2 ranks" in the_error(done.stderr)
    assert done.stdout == ""


def test_samples_that_ranks_cannot_share_are_known_before_anything_is_written(
    run_in: Callable[..., list[str]], tmp_path: Path
) -> None:
    done = jobs.run(*run_in("--gpus", "2", "train.context_parallel=4"))
    assert done.returncode == 2
    assert "allows 1, 2, 3, 6" in the_error(done.stderr)
    assert not list(tmp_path.iterdir())


def test_under_torchrun_too_a_mistake_is_told_once(run_in: Callable[..., list[str]]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*torchrun, jobs.LATENTLINE, *run_in("train.context_parallel=2", "train.objective.conditioning={0=0.5,2=0.6}")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize("text", ["2/2@host:1", "0/2", "0/2@host", "0/2@host:0", "a/2@host:1"])
def test_a_machine_is_named_in_full(text: str) -> None:
    assert parse_node("1/2@host:29500") == Node(1, 2, "host", 29500)
    with pytest.raises(UsageError, match="--node"):
        parse_node(text)


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_a_number_of_gpus_is_a_number(text: str) -> None:
    assert count_gpus("1") == 1
    with pytest.raises(UsageError, match="--gpus"):
        count_gpus(text)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def test_under_slurm_a_stopped_run_queues_again_and_continues(
    slurm: Slurm, run_in: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Two tasks on one node stand for two nodes."""
    steps = 400
    job = slurm.submit(
        "--ntasks-per-node=2", "--ntasks=2", str(SCRIPT), *run_in(f"train.steps={steps}")[1:], "--gpus=1"
    )
    jobs.wait_until(lambda: steps_done(tmp_path) > 2)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    log = slurm.folder / f"latentline-train-{job}.log"
    jobs.wait_until(lambda: "run the same command to continue" in log.read_text())
    stopped = steps_done(tmp_path)
    assert 2 < stopped < steps
    jobs.wait_until(
        lambda: slurm.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T") == "COMPLETED"
    )
    assert f"resuming {tmp_path} from step {stopped}" in log.read_text()
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, steps + 1))
