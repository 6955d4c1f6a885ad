"""What happened in a job, one JSON object a line, kept in the cache beside what the job made.

An object store cannot append, so a driver keeps its lines in parts of its own, `events/<plan>/<driver>-<part>.jsonl`:
the current part is put anew, whole, every few seconds until it is large enough, then the next one begins. Puts are
atomic, so a reader never sees half a line; a killed driver loses the lines of the last few seconds and nothing else.
All parts of a plan, by time, are the job's one stream: `read_events`.

Every event has `time` (seconds since the epoch), `event`, `driver`. Drivers write `started`, `shard`, `quarantined`,
`retry`, `preempted`, `failed` and `finished`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import time
import uuid
from typing import Any

from manifests.errors import LatentlineError
from manifests.store import Store

FLUSH_SECONDS = 5.0
PART_BYTES = 2**20

_log = logging.getLogger(__name__)


class EventLog:
    """One driver's events of one plan. A store that refuses them costs a warning, never the job."""

    def __init__(self, store: Store, plan_id: str) -> None:
        host = re.sub(r"[^A-Za-z0-9]+", "-", platform.node()) or "host"
        self.driver = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{host}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._store = store
        self._plan_id = plan_id
        self._part = 0
        self._lines: list[bytes] = []
        self._flushed = 0.0
        self._warned = False

    def write(self, event: str, /, **facts: Any) -> None:
        """Add an event; what was added is in the cache a few seconds later, or after `flush`."""
        record = {"time": round(time.time(), 3), "event": event, "driver": self.driver, **facts}
        self._lines.append(json.dumps(record).encode() + b"\n")
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        data = b"".join(self._lines)
        try:
            self._store.write(f"{_folder(self._plan_id)}/{self.driver}-{self._part:04d}.jsonl", data)
        except LatentlineError as error:
            if not self._warned:
                _log.warning("events are not recorded: %s", error)
            self._warned = True
        self._flushed = time.monotonic()
        if len(data) >= PART_BYTES:
            self._part += 1
            self._lines = []


def read_events(store: Store, plan_id: str) -> list[dict[str, Any]]:
    """Return the events of all drivers of a plan, by time."""
    lines = [line for info in store.list(_folder(plan_id)) for line in store.read(info.path).splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda event: event["time"])


def _folder(plan_id: str) -> str:
    return f"events/{plan_id}"
