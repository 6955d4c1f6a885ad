"""Digests of model weights: what a producer of entries is recognised by.

A digest covers tensors as they are stored (name, dtype, shape, bytes), not the files they are split into, so
the same weights give the same digest after a re-shard or a move.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.keys import KEY_DIGITS, digest, file_digest

_MEMO_VERSION = 1


def component_folder(model: ModelConfig, name: str) -> Path:
    """Return the local folder of one component (`vae`, `transformer`, ...), downloading it from the hub if
    `model.path` is a hub id. Raises `UsageError` when there is none."""
    if name == "controlnet" and model.controlnet is not None:
        return _controlnet_folder(model.controlnet, model.controlnet_revision)
    local = Path(model.path).expanduser()
    if local.is_dir():
        folder = local / name
        if not folder.is_dir():
            hint = "set model.controlnet" if name == "controlnet" else "is it a diffusers checkpoint?"
            raise UsageError(f"model.path {model.path!r} has no {name!r} folder; {hint}")
        return folder
    if local.is_file():
        raise UsageError(
            f"model.path {model.path!r} is a file; `latentline export {model.path} --to model --base MODEL --output "
            "FOLDER` makes a model's folder of a checkpoint"
        )
    if local.is_absolute() or model.path.startswith((".", "~")):
        raise UsageError(f"model.path {model.path!r}: no such folder")
    try:
        root = snapshot_download(model.path, revision=model.revision, allow_patterns=[f"{name}/*"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"model.path {model.path!r} (revision {model.revision!r}): neither a local folder nor a model the hub "
            f"gives: {reason}"
        ) from error
    folder = Path(root) / name
    if not folder.is_dir():
        raise UsageError(f"model.path {model.path!r} (revision {model.revision!r}) has no {name!r} folder")
    return folder


def _controlnet_folder(path: str, revision: str | None) -> Path:
    """A controlnet of its own: released ones lie at the root of a branch, without a pipeline around them."""
    local = Path(path).expanduser()
    if not local.is_dir():
        if local.is_absolute() or path.startswith((".", "~")):
            raise UsageError(f"model.controlnet {path!r}: no such folder")
        try:
            local = Path(snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"model.controlnet {path!r} (revision {revision!r}): neither a local folder nor a model the hub gives: "
                f"{reason}"
            ) from error
    if not (local / "config.json").is_file():
        raise UsageError(f"model.controlnet {path!r} has no config.json; give the folder of a CosmosControlNetModel")
    return local


def component_config(model: ModelConfig, name: str, kind: str) -> dict[str, Any]:
    """Return the `config.json` of a component; `UsageError` unless it is of the class `kind`."""
    path = component_folder(model, name) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("_class_name") != kind:
        found = config.get("_class_name") if isinstance(config, dict) else None
        raise UsageError(f"{path}: is of a {found}, not of a {kind}")
    return config


def weights_digest(folder: Path, prefix: str = "") -> str:
    """Hash the safetensors weights in `folder` whose names start with `prefix`.

    Remembered in the user's cache folder by path, size and modification time of the files, since a text
    encoder's 16 GB take a while. Raises `UsageError` if no tensor matches.
    """
    files = sorted(folder.glob("*.safetensors"))
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    memo = _memo_folder() / f"{digest([_MEMO_VERSION, stamps, prefix])}.json"
    if memo.is_file():
        return str(json.loads(memo.read_text())["digest"])
    tensors: dict[str, tuple[Path, dict, int]] = {}
    for file in files:
        header, base = _header(file)
        for name, spec in header.items():
            if name != "__metadata__" and name.startswith(prefix):
                tensors[name] = (file, spec, base)
    if not tensors:
        what = f"no tensor named {prefix}*" if prefix else "no safetensors weights"
        raise UsageError(f"{folder}: {what}")
    state = hashlib.sha256()
    for name in sorted(tensors):
        file, spec, base = tensors[name]
        state.update(json.dumps([name, spec["dtype"], spec["shape"]]).encode())
        begin, end = spec["data_offsets"]
        _update_from_file(state, file, base + begin, end - begin)
    result = state.hexdigest()[:KEY_DIGITS]
    memo.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as file_:
        json.dump({"digest": result, "folder": str(folder)}, file_)
    os.replace(file_.name, memo)
    return result


def files_digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """Hash the small files in `folder` that match one of the patterns, by name and bytes."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    if not files:
        raise UsageError(f"{folder}: none of {', '.join(patterns)}")
    return digest([[file.name, file_digest(file)] for file in files])


def _header(file: Path) -> tuple[dict, int]:
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > min(size, 100_000_000):
            raise UsageError(f"{file}: not a safetensors file")
        try:
            return json.loads(handle.read(length)), 8 + length
        except ValueError as error:
            raise UsageError(f"{file}: not a safetensors file") from error


def _update_from_file(state: hashlib._Hash, file: Path, offset: int, size: int) -> None:
    with open(file, "rb") as handle:
        handle.seek(offset)
        while size > 0:
            chunk = handle.read(min(size, 1 << 22))
            if not chunk:
                raise UsageError(f"{file}: ends before its header says it does")
            state.update(chunk)
            size -= len(chunk)


def _memo_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "latentline" / "digests"
