"""`latentline train --gpus N`: a rank on each GPU of a machine, started, signalled, ended and reported as one command.

Under torchrun the same ranks train the same way, but it exits 1 whatever they exit with, prints a traceback of its
own, and kills them half a minute after a signal. Here signals reach the ranks and are left to them, and the exit
status is theirs: 75 when they were preempted, 2 for a mistake of the user's.

On several machines start the command once on each, with `--node I/N@HOST:PORT`.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from manifests.errors import EXIT_DONE, EXIT_FAILURE, EXIT_PREEMPTED, UsageError
from pipeline.report import log

# A terminal that closes sends SIGHUP, which the ranks, in sessions of their own, would not hear.
_FORWARDED = {signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1, signal.SIGHUP: signal.SIGTERM}
_SAID = "LATENTLINE_SAID"

# After a rank has failed the others are of no use, but may have noticed and have something to say; after one was
# preempted they are about to end as well.
_SECONDS_AFTER_FAILURE = 3.0
_SECONDS_AFTER_PREEMPTION = 60.0


@dataclass(frozen=True)
class Node:
    """This machine among those of a run. host, port: where rank 0 listens, on machine 0."""

    index: int = 0
    total: int = 1
    host: str = "127.0.0.1"
    port: int = 0


def parse_node(text: str) -> Node:
    """Read `I/N@HOST:PORT`."""
    match = re.fullmatch(r"(\d+)/(\d+)@(.+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]) or not 0 < int(match[4]) < 65536:
        raise UsageError(f"--node {text!r}: write I/N@HOST:PORT with 0 <= I < N, HOST and PORT being machine 0's")
    return Node(int(match[1]), int(match[2]), match[3], int(match[4]))


def count_gpus(text: str) -> int:
    """Read `--gpus`: a number, or `all`. A machine without GPUs runs any number of ranks on its CPU."""
    import torch

    there = torch.cuda.device_count()
    if text == "all" and there:
        return there
    if text == "all":
        raise UsageError("--gpus all: PyTorch sees no GPU here; write a number of ranks for the CPU")
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"--gpus {text!r}: write a number of GPUs, or all")
    if there and int(text) > there:
        raise UsageError(f"--gpus {text}: this machine has {there}")
    return int(text)


def launch(arguments: Sequence[str], *, ranks: int, node: Node | None = None) -> int:
    """Run `latentline ARGUMENTS` on `ranks` ranks of this machine; return what this command is to exit with.

    That is the status of the rank that failed first; the others are ended. SIGTERM and SIGUSR1 are passed on, and
    SIGHUP as SIGTERM. Ranks whose launcher was killed stop as if it had sent SIGTERM (`follow_launcher`).
    """
    if "RANK" in os.environ:
        raise UsageError("--gpus starts the ranks itself; leave it out under torchrun")
    node = node or Node(port=_free_port())
    with tempfile.TemporaryDirectory(prefix="latentline-") as said, _forwarding() as (processes, received):
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // ranks))
        environment = os.environ | {
            "MASTER_ADDR": node.host,
            "MASTER_PORT": str(node.port),
            "WORLD_SIZE": str(node.total * ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": threads,
            _SAID: said,
        }
        try:
            for local_rank in range(ranks):
                own = {"RANK": str(node.index * ranks + local_rank), "LOCAL_RANK": str(local_rank)}
                command = [sys.executable, "-P", "-m", "pipeline.cli", *arguments]
                # In sessions of their own: Ctrl-C is for this process alone, which then ends them.
                processes.append(
                    subprocess.Popen(command, env=environment | own, stdin=subprocess.PIPE, start_new_session=True)
                )
            for number in received[:]:  # before all were there to hear it
                for process in processes:
                    process.send_signal(number)
            return _wait(processes, received, first_rank=node.index * ranks)
        finally:
            _end(processes, seconds=0)


def is_first_to_say(message: str) -> bool:
    """Say whether no other rank of this machine has printed this message: all make the same mistake at once."""
    folder = _folder_of_all_ranks()
    if folder is None:
        return True
    try:
        (folder / f"said-{hashlib.sha256(message.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def follow_launcher() -> None:
    """In a rank that `launch` started: send it SIGTERM once the launcher is gone, whose end of stdin then closes."""
    if _SAID not in os.environ:
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _folder_of_all_ranks() -> Path | None:
    """A temporary folder that this machine's ranks share: `launch`'s, or torchrun's ATTEMPT/LOCAL_RANK/error.json."""
    if said := os.environ.get(_SAID):
        return Path(said)
    if torchrun := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        folder = Path(torchrun).parents[1]
        return folder if folder.is_dir() else None
    return None


def _wait(processes: Sequence[subprocess.Popen[bytes]], received: Sequence[int], *, first_rank: int) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, EXIT_DONE)]
        if failed:
            break
        if None not in codes:
            return EXIT_DONE
        time.sleep(0.02)
    code = codes[failed[0]]
    assert code is not None
    if -code in received:
        code = EXIT_PREEMPTED  # before it could catch signals: nothing had begun
    _end(processes, seconds=_SECONDS_AFTER_PREEMPTION if code == EXIT_PREEMPTED else _SECONDS_AFTER_FAILURE)
    if code < 0:
        log(f"error: rank {first_rank + failed[0]} was ended by {signal.Signals(-code).name}")
        return EXIT_FAILURE
    return code


def _end(processes: Sequence[subprocess.Popen[bytes]], *, seconds: float) -> None:
    """Give the ranks some time to end, then kill those that have not: in a collective they hear no other signal."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.wait()


@contextmanager
def _forwarding() -> Iterator[tuple[list[subprocess.Popen[bytes]], list[int]]]:
    """(processes that signals are passed on to, signals received)."""
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(_FORWARDED[signal.Signals(number)])
        for process in processes:
            process.send_signal(received[-1])

    ignored = {number for number in _FORWARDED if signal.getsignal(number) == signal.SIG_IGN}  # by nohup
    before = {number: signal.signal(number, forward) for number in _FORWARDED.keys() - ignored}
    try:
        yield processes, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
