"""Windows of video files, decoded or refused."""

from pathlib import Path

import numpy as np
import pytest

from encode.decode import DecodeError, DecodeJob, decode_window, probe
from manifests.errors import LatentlineError


def window(path: Path, first: int, num_frames: int, fps: float | None = None, **rest) -> np.ndarray:
    size = {"height": 32, "width": 64} | rest
    return decode_window(DecodeJob(path=path, first=first, num_frames=num_frames, fps=fps, **size))


def error_of(path: Path, **job) -> str:
    with pytest.raises(DecodeError) as caught:
        window(path, **job) if job else probe(path)
    assert isinstance(caught.value, LatentlineError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)
