"""A model family is one file a stage, found by name."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from manifests.config import ModelConfig
from manifests.errors import UsageError


def find_family(stage: str, model: ModelConfig) -> ModuleType:
    """Import `<stage>/<family>.py`, e.g. `encode/cosmos25.py` for the family `cosmos2.5`.

    Raises `UsageError` if the stage has no such file; an import error inside the file stays what it is.
    """
    name = f"{stage}.{model.family_module}"
    if not model.family_module.isidentifier() or importlib.util.find_spec(name) is None:
        raise UsageError(f"model.family {model.family!r}: latentline has no {stage}/{model.family_module}.py")
    return importlib.import_module(name)
