"""The command line in this process: one of its own takes seconds to import torch, and is not what most tests test.

`tests.jobs` starts real processes, for what signals, kills and ranks do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import pytest
import torch

from pipeline.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit status and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def error(self) -> str:
        """The one line on stderr that says what is wrong; nothing else is an error, nothing is on stdout."""
        assert self.out == ""
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.err.splitlines()[-1] == line
        return line.removeprefix("error: ")


def latentline(*arguments: object) -> Outcome:
    """Run the command with as many threads as a process of its own has in tests."""
    code: Any = 0
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patched, _one_thread(), redirect_stdout(out), redirect_stderr(err):
        patched.setattr(sys, "argv", ["latentline", *map(str, arguments)])
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
    return Outcome(int(code), out.getvalue(), err.getvalue())


@contextmanager
def _one_thread() -> Iterator[None]:
    """As under OMP_NUM_THREADS=1: the last bits of sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
