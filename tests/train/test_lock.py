import os
import signal
import subprocess
import sys

import pytest

from manifests.errors import UsageError
from train.lock import LOCK_NAME, only_writer

HOLDER = "import sys; from pathlib import Path; from train.lock import only_writer\n"
HOLDER += "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_told_who_has_the_folder(other, tmp_path):
    with pytest.raises(UsageError, match=rf"process {other.pid} on .* is writing to it"), only_writer(tmp_path / "run"):
        pytest.fail("entered")


def test_the_lock_ends_with_its_process_however_that_ends(other, tmp_path):
    other.send_signal(signal.SIGKILL)
    other.wait()
    with only_writer(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / LOCK_NAME).read_text()
    with only_writer(tmp_path / "run"):
        pass


def test_only_the_main_rank_takes_it(other, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with only_writer(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file: cannot be a folder to write to"), only_writer(tmp_path / "file"):
        pytest.fail("entered")
