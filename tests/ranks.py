"""Jobs on several ranks of this machine, which are forked once everything is imported.

    python -m tests.ranks MODULE JOBS.json

runs jobs one after another; as processes of their own, ranks would take seconds each to import torch. A job is
{"world": number of ranks, "machine": ranks a machine, default all, ...}. Each rank has the environment torchrun would
give it and calls MODULE.run_rank(job, index of the job, rank); what MODULE imports is imported once for all ranks.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import jobs
from tests.services import free_port

SECONDS = 240
"""For all jobs; a rank that hangs is ended, and fails them."""

Job = dict[str, Any]


def run_jobs(module: str, todo: Sequence[Job], folder: Path) -> str:
    """Run the jobs and return what their ranks printed; fails with what they said if one fails."""
    (folder / "jobs.json").write_text(json.dumps(todo))
    process = jobs.start("-m", "tests.ranks", module, folder / "jobs.json", python=True)
    try:
        out, err = process.communicate(timeout=SECONDS + 40)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-4000:]
    return out


def _fork(run_rank: Callable[[Job, int, int], None], job: Job, index: int, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(SECONDS)
        world = job["world"]
        machine = job.get("machine", world)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % machine), "LOCAL_WORLD_SIZE": str(machine)}
        run_rank(job, index, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    run_rank = importlib.import_module(sys.argv[1]).run_rank
    for index, job in enumerate(json.loads(Path(sys.argv[2]).read_text())):
        port = free_port()
        children = {_fork(run_rank, job, index, rank, port) for rank in range(job["world"])}
        while children:
            child, status = os.wait()
            children.discard(child)
            if status:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"job {index}: a rank ended with {status}")


if __name__ == "__main__":
    main()
