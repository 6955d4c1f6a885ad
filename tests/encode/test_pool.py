import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from encode.decode import DecodeError, DecodeJob, decode_window
from encode.pool import DecodePool, DecoderLost
from tests.encode.video_files import numbers_of, write_video

TIMEOUT = 60.0


def job_of(path: Path, first: int = 0, num_frames: int = 4, height: int = 32, width: int = 64) -> DecodeJob:
    return DecodeJob(path=path, first=first, num_frames=num_frames, fps=None, height=height, width=width)


def slow_job(path: Path) -> DecodeJob:
    """A good window that takes a second or more: hundreds of frames blown up to 1080p."""
    return job_of(path, num_frames=100, height=1080, width=1920)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("pool") / "numbered.mp4", 120)


def wait_until_running(pool: DecodePool, number: int) -> list[int]:
    deadline = time.monotonic() + TIMEOUT
    while len(pool.pids) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return pool.pids


def assert_gone(pids: list[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_frames_come_in_the_order_of_the_jobs_and_stay_valid(video: Path) -> None:
    jobs = [job_of(video, first) for first in (40, 0, 99, 7, 63)]
    with DecodePool(2, TIMEOUT) as pool:
        results = list(pool.imap(jobs))
        assert pool.wait_seconds > 0
    assert [job for job, _ in results] == jobs
    for job, frames in results:
        assert isinstance(frames, np.ndarray)
        np.testing.assert_array_equal(frames, decode_window(job))


def test_a_bad_video_is_an_error_of_its_job_alone(video: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video" * 100)
    with DecodePool(1, TIMEOUT) as pool:
        results = [result for _, result in pool.imap([job_of(video), job_of(bad), job_of(video, 8)])]
    assert numbers_of(results[0]) == [0, 1, 2, 3]
    assert isinstance(results[1], DecodeError)
    assert str(bad) in str(results[1])
    assert "\n" not in str(results[1])
    assert numbers_of(results[2]) == [8, 9, 10, 11]


def test_no_more_than_ahead_jobs_are_taken_before_they_are_asked_for(video: Path) -> None:
    taken = []

    def jobs():
        for first in range(20):
            taken.append(first)
            yield job_of(video, first)

    with DecodePool(2, TIMEOUT) as pool:
        results = pool.imap(jobs(), ahead=3)
        assert taken == [0, 1, 2]
        for consumed in range(5):
            next(results)
            assert len(taken) <= consumed + 3
        results.close()


def test_decoding_goes_on_while_the_consumer_is_busy(video: Path) -> None:
    with DecodePool(1, TIMEOUT) as pool:
        results = pool.imap([job_of(video, first) for first in range(4)], ahead=4)
        next(results)
        pool.submit(job_of(video)).result()  # behind the others, in the one decoder
        waited = pool.wait_seconds
        assert len(list(results)) == 3
        assert pool.wait_seconds - waited < 0.2


def test_a_hanging_decoder_is_stopped_and_replaced(video: Path) -> None:
    with DecodePool(1, timeout_seconds=1.5) as pool:
        assert numbers_of(pool.submit(job_of(video)).result()) == [0, 1, 2, 3]
        pids = pool.pids
        os.kill(pids[0], signal.SIGSTOP)
        hung, next_one = pool.submit(job_of(video, 4)), pool.submit(job_of(video, 8))
        with pytest.raises(DecoderLost, match=r"took over 1\.5 s"):
            hung.result(TIMEOUT)
        assert numbers_of(next_one.result(TIMEOUT)) == [8, 9, 10, 11]
        assert pool.pids != pids
        assert_gone(pids)


def test_a_video_slower_than_the_limit_is_stopped(video: Path) -> None:
    with DecodePool(1, timeout_seconds=0.05) as pool, pytest.raises(DecoderLost, match=r"numbered\.mp4"):
        pool.submit(slow_job(video)).result(TIMEOUT)


def test_a_killed_decoder_loses_its_own_job_only(video: Path) -> None:
    with DecodePool(2, TIMEOUT) as pool:
        list(pool.imap([job_of(video), job_of(video)]))
        doomed = pool.submit(slow_job(video))
        others = [pool.submit(job_of(video, first)) for first in range(6)]
        for future in others:
            future.result(TIMEOUT)
        pids = pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # reaped already
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(DecoderLost, match=r"numbered\.mp4: its decoder process died \(SIGKILL\)"):
            doomed.result(TIMEOUT)
        assert numbers_of(pool.submit(job_of(video, 12)).result(TIMEOUT)) == [12, 13, 14, 15]
        assert numbers_of(pool.submit(job_of(video, 20)).result(TIMEOUT)) == [20, 21, 22, 23]
    assert_gone(pids)


def test_a_decoder_ignores_signals_meant_for_its_parent(video: Path) -> None:
    with DecodePool(1, TIMEOUT) as pool:
        pool.submit(job_of(video)).result(TIMEOUT)
        future = pool.submit(slow_job(video))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pool.pids[0], number)
        assert future.result(TIMEOUT).shape == (100, 1080, 1920, 3)


def test_a_window_beyond_the_memory_limit_is_an_error(video: Path) -> None:
    with DecodePool(1, TIMEOUT, memory_mib=600) as pool:
        with pytest.raises(DecodeError, match="600 MiB"):
            pool.submit(slow_job(video)).result(TIMEOUT)
        assert numbers_of(pool.submit(job_of(video)).result(TIMEOUT)) == [0, 1, 2, 3]


def test_probing_runs_in_a_decoder_too(video: Path, tmp_path: Path) -> None:
    with DecodePool(1, TIMEOUT) as pool:
        assert pool.probe(video).result(TIMEOUT).num_frames == 120
        with pytest.raises(DecodeError, match="No such file"):
            pool.probe(tmp_path / "none.mp4").result(TIMEOUT)


def test_close_leaves_nothing(video: Path) -> None:
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    pool = DecodePool(2, TIMEOUT)
    pool.submit(job_of(video)).result(TIMEOUT)
    running = [pool.submit(slow_job(video)) for _ in range(5)]
    pids = wait_until_running(pool, 2)
    pool.close()
    pool.close()
    assert_gone(pids)
    assert all(future.done() for future in running)
    del running
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decoder-")]
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(job_of(video))
    if open_before:
        assert len(os.listdir("/proc/self/fd")) <= open_before


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is a Linux call")
def test_decoders_do_not_outlive_a_killed_parent(video: Path) -> None:
    script = f"""
        import time
        from encode.pool import DecodeJob, DecodePool
        pool = DecodePool(1, 60)
        job = dict(path={str(video)!r}, first=0, fps=None)
        pool.submit(DecodeJob(num_frames=1, height=16, width=16, **job)).result()
        pool.submit(DecodeJob(num_frames=100, height=4096, width=4096, **job))
        print(pool.pids[0], flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_decoder_process_imports_no_torch_and_no_recipe() -> None:
    script = "import sys, encode.decode_worker; print(sorted({'torch', 'pydantic', 'pyarrow'} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
