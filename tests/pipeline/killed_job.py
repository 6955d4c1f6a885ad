"""Runs `latentline encode RECIPE` and kills it at a point of a commit: python killed_job.py RECIPE POINT COUNT.

POINT is `write` (half of a tar has been written), `commit` (the tar is whole, the manifest is not there yet) or
`committed` (the manifest is there, nothing after it has happened); COUNT says at which shard.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import encode.worker
from manifests.store import Store
from pipeline.cli import main

_, RECIPE, POINT, COUNT = sys.argv


class KilledStore(Store):
    """A store whose process is killed, as by a machine that loses power."""

    shards = 0

    def write(self, path: str, data: bytes) -> None:
        if path.endswith(".tar"):
            self.shards += 1
            if POINT == "write" and self.shards == int(COUNT):
                super().write(path, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        super().write(path, data)

    def write_if_absent(self, path: str, data: bytes) -> bool:
        last = self.shards == int(COUNT)
        if POINT == "commit" and last:
            os.kill(os.getpid(), signal.SIGKILL)
        won = super().write_if_absent(path, data)
        if POINT == "committed" and last:
            os.kill(os.getpid(), signal.SIGKILL)
        return won


assert Path(RECIPE).is_file()
encode.worker.Store = KilledStore  # type: ignore[attr-defined]
sys.argv = ["latentline", "encode", RECIPE, "--executor", "local"]
main()
