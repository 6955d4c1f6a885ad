"""Videos that cannot be used: set aside with the reason, tried again when asked, and not too many of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from encode.config import WindowsConfig
from manifests.errors import LatentlineError
from tests.encode.small_job import NOTHING, Job
from tests.encode.video_files import write_video


def test_a_video_that_cannot_be_opened_is_quarantined_and_the_others_kept(job: Job) -> None:
    job.video("b").write_bytes(b"this is no video")
    result = job.encode()
    assert result.counts.samples == 2
    ((video, start, end), error) = next(iter(result.quarantined.items()))
    assert (video, start, end) == (str(job.video("b")), None, None)
    assert error
    assert "\n" not in error
    (row,) = [row for row in job.manifests("latents") if row["status"] != "ok"]
    assert (row["status"], row["source"], row["error"], row["shard"]) == ("quarantined", video, error, None)
    assert {row["source"] for row in job.manifests("latents")} == {str(job.video(stem)) for stem in "abc"}


def cut(path: Path) -> None:
    """Damage the second half of a video, so that it opens but its frames do not decode."""
    data = bytearray(path.read_bytes())
    begin = data.find(b"mdat") + 4
    data[begin : len(data) - 2000] = b"\xff" * (len(data) - 2000 - begin)
    path.write_bytes(bytes(data))


def test_a_video_whose_frames_do_not_decode_is_quarantined(job: Job) -> None:
    cut(job.video("c"))
    result = job.encode()
    assert [Path(video).stem for video, _, _ in result.quarantined] == ["c"]
    assert result.counts.samples == 2
    assert job.encode().encoded == NOTHING
    assert [Path(video).stem for video, _, _ in job.encode().quarantined] == ["c"]


def test_a_video_too_short_is_quarantined_with_both_numbers(job: Job) -> None:
    result = job.encode(num_frames=21)
    (error,) = result.quarantined.values()
    assert error == "too short: 20 frames at 10 fps, a window needs 21"
    assert result.counts.samples == 2
    (row,) = [row for row in job.manifests("latents") if row["status"] == "quarantined"]
    assert row["error"] == error


def test_a_repaired_video_is_a_new_source(job: Job) -> None:
    good = job.video("b").read_bytes()
    job.video("b").write_bytes(b"this is no video")
    assert len(job.encode().quarantined) == 1
    job.video("b").write_bytes(good)
    result = job.encode()
    assert result.encoded == {"latents": 1, "context": 0}
    assert (result.counts.samples, result.quarantined) == (3, {})


def test_quarantined_windows_are_tried_again_only_when_asked(job: Job) -> None:
    job.video("b").write_bytes(b"this is no video")
    job.encode()
    assert job.plan()[1].missing == NOTHING
    assert job.plan(create=False, retry=True)[1].missing == {"latents": 1, "context": 0}
    assert len(job.encode(retry=True).quarantined) == 1


def test_a_probe_that_failed_for_a_passing_reason_is_forgotten_on_a_retry(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = WindowsConfig(mode="uniform", count=2)
    # A decoder that never answers in time is what an overloaded file server looks like.
    with monkeypatch.context() as patched:
        patched.setattr("encode.survey.DecodePool", _Unlucky)
        assert len(job.encode(windows=windows, max_failed=0.9).quarantined) == 1
    assert len(job.encode(windows=windows).quarantined) == 1
    retried = job.encode(windows=windows, retry=True)
    assert (retried.quarantined, retried.counts.samples) == ({}, 6)
    assert job.encode(windows=windows).counts.samples == 6


class _Unlucky:
    """A real pool that loses video b."""

    def __init__(self, *arguments: Any) -> None:
        from encode.pool import DecodePool

        self._pool = DecodePool(*arguments)

    def __enter__(self) -> _Unlucky:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()

    def probe(self, path: Path) -> Any:
        from encode.pool import DecoderLost

        if path.stem == "b":
            raise DecoderLost("took longer than 1 s")
        return self._pool.probe(path)


def test_too_many_unusable_videos_stop_the_job_before_it_encodes(job: Job) -> None:
    for stem in "ab":
        job.video(stem).write_bytes(f"no video {stem}".encode())
    with pytest.raises(
        LatentlineError, match=r"2 of 3 videos cannot be used, more than encode\.max_failed = 0\.5"
    ) as error:
        job.encode()
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    assert not (job.cache / "snapshots").exists()
    assert not job.tars("latents")


def test_too_many_undecodable_videos_leave_no_snapshot_in_any_run(job: Job) -> None:
    for stem in "ab":
        cut(job.video(stem))
    for _ in range(2):
        with pytest.raises(LatentlineError, match=r"2 of 3 videos cannot be used"):
            job.encode()
        assert not (job.cache / "snapshots").exists()
    assert job.encode(max_failed=0.7).counts.samples == 1


def test_one_long_bad_video_is_one_video_however_many_windows_it_has(job: Job) -> None:
    write_video(job.video("d"), 60, fps=10)
    job.caption("d", "a long one")
    cut(job.video("d"))
    result = job.encode(windows=WindowsConfig(mode="slide", stride=1), max_failed=0.25)
    assert len(result.quarantined) == 1
