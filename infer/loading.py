"""Loading a diffusers pipeline: is it the right one, with NVIDIA's guardrail or with nothing in its place."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import is_cosmos_guardrail_available

from infer.video import Frames
from manifests.config import ModelConfig
from manifests.errors import LatentlineError, UsageError


class NoGuardrail:
    """Stands where the pipeline wants a safety checker, and lets everything pass."""

    def to(self, *args: object, **kwargs: object) -> NoGuardrail:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True


def require_guardrail() -> None:
    """Raise UsageError unless `cosmos_guardrail` is installed."""
    if not is_cosmos_guardrail_available():
        raise UsageError(
            "cosmos_guardrail is not installed: `pip install cosmos_guardrail`, or pass --no-guardrail; the "
            "NVIDIA Open Model License requires a guardrail, so without it you answer for providing one"
        )


def build_guardrail() -> Any:
    """NVIDIA's checker of prompts and videos, for a pipeline; a video it rejects is a `LatentlineError`."""
    from cosmos_guardrail import CosmosSafetyChecker

    class Guardrail(CosmosSafetyChecker):
        def check_video_safety(self, frames: Frames) -> Frames:
            checked = super().check_video_safety(frames)
            if checked is None:
                raise LatentlineError("the guardrail rejects the generated video; change the prompt or seed")
            return checked

    return Guardrail()


def check_checkpoint(model: ModelConfig, expected: str) -> None:
    """Raise UsageError unless the model is a folder or hub repository of the pipeline class `expected`."""
    path = Path(model.path)
    is_hub_id = not path.exists() and not path.is_absolute() and len(path.parts) == 2 and path.parts[0] != ".."
    if not is_hub_id and not (path / "model_index.json").is_file():
        raise UsageError(f"model.path: {model.path} has no model_index.json; give a diffusers folder or a hub id")
    try:
        index = DiffusionPipeline.load_config(model.path, revision=model.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"model.path: cannot load {model.path} at revision {model.revision}: {reason}") from error
    if index["_class_name"] != expected:
        raise UsageError(f"model.path: {model.path} is a {index['_class_name']}, not a {expected}; see model.family")


@contextmanager
def quiet_about(word: str) -> Iterator[None]:
    """Drop diffusers' loading warnings that mention `word`: NoGuardrail is of another type on purpose."""

    def keep(record: logging.LogRecord) -> bool:
        return word not in record.getMessage()

    loader = logging.getLogger("diffusers.pipelines.pipeline_utils")
    loader.addFilter(keep)
    try:
        yield
    finally:
        loader.removeFilter(keep)
