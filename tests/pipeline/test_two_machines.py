"""Two agents of torchrun that meet on this machine as on two: `latentline train` follows the curve of one process."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.command import latentline
from tests.jobs import start
from tests.pipeline.places import Place
from tests.pipeline.transfer import losses
from tests.services import free_port


def test_two_agents_of_two_ranks_train_as_one_process(encoded: Place, tmp_path: Path) -> None:
    settings = ["--set", "train.batch_size=4", "--set", "train.output="]
    alone = latentline("train", encoded.recipe, *settings[:-1], f"{settings[-1]}{tmp_path}/alone")
    assert alone.code == 0, alone.err
    meeting = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=test"]
    command = ["-m", "torch.distributed.run", *meeting, "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    command += ["-m", "pipeline.cli", "train", str(encoded.recipe), *settings[:-1], f"{settings[-1]}{tmp_path}/shared"]
    agents = [start(*command, "--set", "train.parallel=hybrid", python=True) for _ in range(2)]
    try:
        ends = [agent.communicate(timeout=240) for agent in agents]
    finally:
        for agent in agents:
            with suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
    assert [agent.returncode for agent in agents] == [0, 0], [err[-2000:] for _, err in ends]
    assert "step 4/4" in "".join(err for _, err in ends)
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
