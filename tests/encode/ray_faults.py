"""Faults that happen inside encoders: `ray.init(runtime_env=setup())` installs them in Ray's workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

FATAL = 250
"""Frames all at least this bright end the process that encodes them, as a bug in a driver or a kernel would."""


def install() -> None:
    from encode import cosmos25_models

    encode = cosmos25_models.VideoEncoder.encode

    def fatal(self: Any, frames_THWC: np.ndarray) -> Any:
        if frames_THWC.min() >= FATAL:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, frames_THWC)

    cosmos25_models.VideoEncoder.encode = fatal  # type: ignore[method-assign]


def setup() -> dict[str, Any]:
    path = str(Path(__file__).parents[2])
    return {"worker_process_setup_hook": "tests.encode.ray_faults.install", "env_vars": {"PYTHONPATH": path}}
