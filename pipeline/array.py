"""Encoding as a job array: how many tasks it has is kept beside its plan, so that any of them can be run again.

A shard belongs to a task by a hash of its name and the number of tasks; what SLURM calls the size of an array
changes when a few tasks are resubmitted (`--array=3,7`), so it cannot be that number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from itertools import groupby
from typing import Any

from encode.job import EncodePlan
from manifests.errors import CorruptError, UsageError
from manifests.plan import task_of
from manifests.schema import KINDS

SCRIPT = str(files("pipeline") / "slurm" / "encode.sbatch")


def array_tasks(planned: EncodePlan) -> int:
    """How many tasks the job was planned for; 1 when nothing is missing. `UsageError` if that was not said."""
    if not planned.plan.num_entries:
        return 1
    assert planned.cache is not None
    path = _path(planned)
    try:
        return int(json.loads(planned.cache.store.read(path))["tasks"])
    except FileNotFoundError:
        raise UsageError(
            f"cache {planned.cache.url!r}: this job was planned for no array; run `latentline encode RECIPE --plan "
            "--tasks N` first, or write --task I/N"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{planned.cache.url}/{path}: unreadable; run `latentline encode RECIPE --plan`") from error


def plan_array(planned: EncodePlan, tasks: int) -> dict[str, Any]:
    """Keep the number of tasks of a job, instead of an earlier number if there is one; say how to submit it."""
    assert planned.cache is not None
    if planned.plan.num_entries:
        planned.cache.store.write(_path(planned), json.dumps({"tasks": tasks}).encode())
    pending = missing_tasks(planned, tasks)
    return {
        "cache": planned.cache.url,
        "plan": planned.plan.plan_id if planned.plan.num_entries else None,
        "entries_missing": planned.missing,
        "shards": planned.num_shards,
        "tasks": tasks,
        "array": array_expression(pending),
        "submit": f"sbatch --array={array_expression(pending)} {SCRIPT} RECIPE" if pending else None,
    }


def missing_tasks(planned: EncodePlan, tasks: int) -> list[int]:
    """Return the tasks that have a shard to do, ascending."""
    return sorted({task_of(shard_id, tasks) for kind in KINDS for shard_id in planned.plan.shard_ids(kind)})


def array_expression(indices: Iterable[int]) -> str:
    """[0, 3, 4, 5] as "0,3-5", for `sbatch --array`."""
    runs = []
    for _, group in groupby(enumerate(sorted(indices)), key=lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(runs)


def _path(planned: EncodePlan) -> str:
    """One for all plans of a job: a repair or a retry is a further plan of the same job."""
    return f"plans/{planned.plan.plan_id.rpartition('-')[0]}.array.json"
