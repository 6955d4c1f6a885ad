"""Running a plan's shard tasks: in this process here, on Ray actors in `encode.ray_executor`.

Both yield one report a shard and leave the same bytes in the cache. Both may run beside other drivers of the same
plan: each begins at another place, and a shard that is committed meanwhile is not encoded again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from encode.config import EncodeConfig
from encode.stopping import Stop
from encode.worker import Oversight, ShardReport, ShardWorker
from manifests.cache import is_first
from manifests.config import ModelConfig
from manifests.plan import Plan, task_of
from manifests.schema import KINDS

Event = Callable[..., None]
"""Called as event(name, **facts) with what happens; see `manifests.events`."""


def run_local(
    model: ModelConfig, config: EncodeConfig, plan: Plan, *, index: int, total: int, stop: Stop, event: Event
) -> Iterator[ShardReport]:
    """Run the tasks of worker `index` of `total` in this process, one after the other.

    Raises `Preempted` between two entries once `stop` is requested; the shard in work is abandoned.
    """
    worker = ShardWorker(model, config, plan.footer)
    oversight = Oversight(check=stop.check)
    try:
        for task, following in pairwise(chain(start_anywhere(plan).tasks(index=index, total=total), [None])):
            assert task is not None
            stop.check()
            if following is not None:
                worker.expect(following)
            yield worker.run(task, oversight)
    finally:
        worker.close()


def num_tasks(plan: Plan, index: int, total: int) -> int:
    """How many shard tasks worker `index` of `total` has."""
    return sum(task_of(shard_id, total) == index for kind in KINDS for shard_id in plan.shard_ids(kind))


def start_anywhere(plan: Plan) -> Plan:
    """The plan with each kind's shards turned by a random number of them, so that drivers side by side rarely meet."""
    pieces = []
    for kind in KINDS:
        rows = plan.table.filter(pc.equal(plan.table["kind"], kind)).combine_chunks()
        begins = np.flatnonzero(is_first(rows["shard_id"].combine_chunks()))
        begin = int(random.choice(begins)) if len(begins) else 0
        pieces += [rows.slice(begin), rows.slice(0, begin)]
    return replace(plan, table=pa.concat_tables(pieces))
