from pathlib import Path

import pytest

from encode.probe import probe
from tests.encode.video_files import write_video


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_last_frame_that_is_shown_for_a_second_is_no_missing_second(tmp_path: Path, suffix: str) -> None:
    info = probe(write_video(tmp_path / f"timelapse.{suffix}", 6, fps=1))
    assert (info.num_frames, info.fps, info.duration) == (6, 1.0, 6.0)
    assert not info.variable_frame_rate
