import os
import pty
import subprocess
import sys

from train.progress import TrainProgress, describe_record

RECORD = {
    "loss": 0.51234,
    "lr": 4.316e-5,
    "seconds_per_step": 2.04,
    "samples_per_second": 3.9,
    "data_wait_share": 0.004,
}

SCRIPT = f"""
from train.progress import TrainProgress
with TrainProgress(steps=50, done=10) as progress:
    for step in range(11, 51):
        progress.show({{"step": step, **{RECORD!r}}})
"""


def show(stderr):
    return subprocess.run([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=stderr, check=True)


def test_a_record_in_words():
    words = describe_record(RECORD | {"peak_memory_bytes": 3 * 2**30})
    assert words == "loss 0.5123  lr 4.32e-05  2.04 s/step  data wait 0.4%  3.9 samples/s  3.0 GiB"


def test_without_a_terminal_there_are_few_lines_and_the_last_step_is_one():
    done = show(subprocess.PIPE)
    lines = done.stderr.decode().splitlines()
    assert done.stdout == b""
    assert lines == [f"step {step}/50  {describe_record(RECORD)}" for step in (11, 50)]


def test_on_a_terminal_there_is_a_live_bar():
    ours, theirs = pty.openpty()
    show(theirs)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "50/50" in shown
    assert "loss 0.5123  lr 4.32e-05  2.04 s/step  data wait 0.4%" in shown
    assert "\x1b[" in shown


def test_other_ranks_are_silent(capfd):
    with TrainProgress(steps=2, done=0, quiet=True) as progress:
        progress.show({"step": 2, **RECORD})
    assert capfd.readouterr() == ("", "")
