"""Hints: the control videos of Transfer models, as training and inference both know them.

`edge` and `vis` are computed from the frames a model sees, after the resize: Canny's edges, and a blurred copy.
Training draws their parameters from NVIDIA's distributions, by hash; inference uses one of five presets. `depth` and
`seg` are videos somebody gives. All are uint8 RGB, [T, H, W, 3].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from manifests.errors import UsageError

HintKind = Literal["edge", "vis", "depth", "seg"]
Preset = Literal["very_low", "low", "medium", "high", "very_high"]
COMPUTED: tuple[HintKind, ...] = ("edge", "vis")
GIVEN: tuple[HintKind, ...] = ("depth", "seg")
PRESETS: tuple[Preset, ...] = ("very_low", "low", "medium", "high", "very_high")
KINDS_NAME = "hints.json"
POLICY = "canny-rgb-3ch/bilateral-gaussian-rescale/depth-bilinear-seg-nearest/2"
"""Names how hints are made, for fingerprints; changes whenever the same parameters would give other pixels."""

_EDGE_PRESETS = ((20, 50), (50, 100), (100, 200), (200, 300), (300, 400))
_VIS_PRESETS = ((1, 4), (4, 4), (2, 10), (1, 16), (4, 16))
_PRESET_BILATERAL = {"d": 30, "sigma_color": 150.0, "sigma_space": 100.0}

Frames: TypeAlias = npt.NDArray[np.uint8]


def training_parameters(kind: HintKind, key: str) -> dict[str, Any]:
    """Draw the parameters of a computed hint as NVIDIA's training does; a pure function of `key`, on every machine.

    edge: Canny thresholds `low` in [20, 100) and `high` = low + [50, 150). vis: `downscale` in {1, 2, 3, 4}; then
    `bilateral` (3 in 10), `gaussian` (5 in 10) or both; `rescale`, down and up again, by 4 to 17.
    """
    draws = _Draws(f"{kind}/{key}")
    if kind == "edge":
        low = draws.integer(20, 100)
        return {"low": low, "high": low + draws.integer(50, 150)}
    parameters: dict[str, Any] = {"downscale": draws.integer(1, 5)}
    which = draws.uniform(0, 1)
    if which < 0.3 or which >= 0.8:
        sigmas = {"sigma_color": draws.integer(100, 300), "sigma_space": draws.integer(50, 150)}
        parameters["bilateral"] = {"d": draws.integer(15, 50), **sigmas}
    if which >= 0.3:
        size = 21 + 2 * draws.integer(0, 5)
        parameters["gaussian"] = {"size": size, "sigma": round(draws.uniform(10.5, 14.5), 4)}
    return parameters | {"rescale": draws.integer(4, 18)}


def preset_parameters(kind: HintKind, preset: Preset) -> dict[str, Any]:
    """The parameters of a computed hint at inference; `medium` is the usual one."""
    number = PRESETS.index(preset)
    if kind == "edge":
        low, high = _EDGE_PRESETS[number]
        return {"low": low, "high": high}
    downscale, rescale = _VIS_PRESETS[number]
    return {"downscale": downscale, "bilateral": dict(_PRESET_BILATERAL), "rescale": rescale}


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """Parameters as the text that manifests hold and keys hash."""
    return json.dumps(parameters, sort_keys=True, separators=(",", ":"))


def make_hint(kind: HintKind, parameters: Mapping[str, Any], frame_HWC: Frames) -> Frames:
    """Compute `edge` or `vis` of one frame, by OpenCV's own code.

    Intel's (IPP), which OpenCV's packages prefer, takes twice as long for the bilateral filter, measured on an AMD
    EPYC; it rounds otherwise, by at most 1.
    """
    cv2.ipp.setUseIPP(False)  # of this thread
    if kind == "edge":
        edges_HW = cv2.Canny(np.ascontiguousarray(frame_HWC), parameters["low"], parameters["high"])
        return np.asarray(cv2.cvtColor(edges_HW, cv2.COLOR_GRAY2RGB), dtype=np.uint8)
    height, width = frame_HWC.shape[:2]
    picture = np.ascontiguousarray(frame_HWC)
    factor = parameters["downscale"]
    if factor > 1:
        picture = cv2.resize(picture, _over(width, height, factor), interpolation=cv2.INTER_AREA)
    if given := parameters.get("bilateral"):
        picture = cv2.bilateralFilter(picture, given["d"], given["sigma_color"], given["sigma_space"])
    if given := parameters.get("gaussian"):
        picture = cv2.GaussianBlur(picture, (given["size"], given["size"]), given["sigma"])
    if factor > 1:
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
    small = Image.fromarray(picture).resize(_over(width, height, parameters["rescale"]), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def is_blank(frames_THWC: Frames) -> bool:
    """Say whether a hint is black throughout (-1 in the model's range), which the model is given as a zero latent."""
    return not frames_THWC.any()


def name_of(kind: str, variant: int) -> str:
    """The name of one of a window's hints."""
    return f"{kind}/{variant}"


def kind_of(name: str) -> str:
    """The kind of a hint by its name."""
    return name.partition("/")[0]


def write_kinds(folder: Path, kinds: Sequence[str]) -> None:
    """Say beside weights which kinds of hint they were trained on."""
    (folder / KINDS_NAME).write_text(json.dumps({"hints": sorted(kinds)}) + "\n", encoding="utf-8")


def read_kinds(folder: Path) -> list[str] | None:
    """The kinds of hint that weights in a folder were trained on; None where it does not say, as released ones."""
    path = folder / KINDS_NAME
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["hints"]) if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not readable as {{'hints': [...]}}; correct it, or remove it") from error


def _over(width: int, height: int, factor: int) -> tuple[int, int]:
    return max(1, width // factor), max(1, height // factor)


class _Draws:
    """Endless uniform numbers that depend on a key alone."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._count = 0

    def uniform(self, low: float, high: float) -> float:
        """In [low, high)."""
        digest = hashlib.sha256(f"hint/{self._key}/{self._count}".encode()).digest()
        self._count += 1
        return low + (high - low) * int.from_bytes(digest[:6], "big") / 2**48

    def integer(self, low: int, high: int) -> int:
        """In [low, high)."""
        return int(self.uniform(low, high))
