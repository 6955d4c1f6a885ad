"""Image contexts: the embedding of a reference image, as a file: `.npy`, or `.safetensors` with one tensor, of [M, W].

Transfer's is the last hidden state of SigLIP2's vision model (so400m-patch16-naflex): 256 tokens of 1,152 values. The
cache keeps it as a hint of the kind `IMAGE`, one a file: no window of a video, so its row has none either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from manifests.config import ModelConfig
from manifests.errors import LatentlineError, UsageError
from manifests.fingerprint import component_folder

if TYPE_CHECKING:
    import torch

IMAGE = "image_context"
SUFFIXES = (".npy", ".safetensors")
NO_WINDOW: Mapping[str, Any] = {"start": 0, "num_frames": 0, "fps": None, "height": 0, "width": 0}
_ERRORS = (OSError, ValueError, EOFError, SafetensorError)


def wanted_shape(model: ModelConfig) -> tuple[int, int]:
    """(M, W) of the image context a model takes; UsageError if it takes none."""
    config = json.loads((component_folder(model, "transformer") / "config.json").read_text())
    if not config.get("img_context_dim_in"):
        raise UsageError(f"model.path {model.path!r}: this model takes no image context; leave it out")
    return config["img_context_num_tokens"], config["img_context_dim_in"]


def fault_of_file(path: Path, shape: Sequence[int]) -> str | None:
    """Say why a file is no image context of this shape, None if it is one; its values are not read."""
    try:
        found = _shape(path)
    except _ERRORS as error:
        return f"unreadable: {' '.join(str(error).split())}"
    return None if found == tuple(shape) else f"of shape {list(found)}, the model takes {list(shape)}"


def read_image_context(path: Path) -> torch.Tensor:
    """The embedding [M, W], float32; LatentlineError if it cannot be read or is not finite."""
    import safetensors.torch
    import torch  # seconds to load, and planning reads shapes alone

    try:
        if path.suffix.lower() == ".npy":
            values = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        else:
            [values] = safetensors.torch.load_file(path).values()
    except _ERRORS as error:
        raise LatentlineError(f"{path}: cannot read this image context: {' '.join(str(error).split())}") from error
    if not bool(torch.isfinite(values).all()):
        raise LatentlineError(f"{path}: the image context is not finite")
    return values.float()


def _shape(path: Path) -> tuple[int, ...]:
    if path.suffix.lower() == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype.kind != "f":
            raise ValueError(f"holds {array.dtype}, not floating point numbers")
        return array.shape
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise ValueError(f"holds {len(names)} tensors, not one")
        return tuple(file.get_slice(names[0]).get_shape())
