"""Weights in and out: what a file or folder holds, and the same weights in another format.

| format | adapter | full model |
|---|---|---|
| diffusers | `pytorch_lora_weights.safetensors` with metadata | a transformer's folder |
| peft | `adapter_config.json`, `adapter_model.safetensors` | - |
| nvidia | `.pt` | `.pt` |
| comfyui | `.safetensors` (untested with Cosmos-Predict2.5) | - |
| model | fused into the base: a whole model's folder | put into the base's folder |
| dcp | read only | read only |
| trained | - | `trained_weights.safetensors` of a run, read only; the base gives the rest |

Tensors keep their bits unless another dtype is asked for. Every name must have its partner, every shape must fit.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from manifests.config import ModelConfig
from manifests.disk import writing
from manifests.errors import UsageError
from manifests.family import find_family
from manifests.fingerprint import component_folder
from train.adapters import CONFIG_NAMES, WEIGHTS_NAME, load_adapter
from train.formats import comfyui, dcp, peft_folder
from train.formats.adapter import Adapter, FullModel, cast, fold_alpha
from train.formats.diffusers_files import (
    MODEL_NAME,
    check_full,
    fill,
    read_diffusers,
    read_safetensors,
    read_transformer,
    write_diffusers,
)
from train.formats.names import unmatched
from train.formats.nvidia import read_nvidia, write_nvidia

Format = Literal["diffusers", "peft", "nvidia", "comfyui", "model"]
Source = Literal["diffusers", "peft", "nvidia", "comfyui", "dcp", "trained"]

TRAINED_NAME = "trained_weights.safetensors"
CONTROL_PREFIX = "controlnet."
"""Of the names of a Transfer model's control branch."""

_SUFFIXES: dict[str, str] = {"nvidia": ".pt", "comfyui": ".safetensors"}


@dataclass(frozen=True)
class Loaded:
    """source: the format it was found in. family: the model family its names are of."""

    source: Source
    family: str
    weights: Adapter | FullModel


def load_weights(
    path: Path, *, family: str = "cosmos2.5", alpha: float | None = None, ema: bool = False, scratch: Path | None = None
) -> Loaded:
    """Read weights in whatever format `path` is: recognised by the files in a folder, or by a file's names.

    alpha: lora_alpha of an adapter that does not say it. ema: the moving average of an NVIDIA checkpoint. scratch:
    where a distributed checkpoint is gathered, by default beside it. Raises `UsageError` for what is none of the
    formats, or does not fit the family.
    """
    names = find_family("train", ModelConfig(path=str(path), family=family)).ORIGINAL_NAMES
    source = find_source(path)
    if ema and source not in ("nvidia", "dcp"):
        raise UsageError(f"{path}: --ema is for NVIDIA's checkpoints; this is {source}'s format, which holds one set")
    weights: Adapter | FullModel
    if source == "dcp":
        weights = dcp.read_dcp(path, names, scratch or path.parent, alpha=alpha, ema=ema)
    elif source == "nvidia":
        weights = read_nvidia(path, names, alpha=alpha, ema=ema)
    elif source == "comfyui":
        weights = comfyui.read_comfyui(path, read_safetensors(path), names, alpha=alpha)
    elif source == "peft":
        state = read_safetensors(path / peft_folder.WEIGHTS_NAME)
        weights = peft_folder.read_peft(path, state, CONFIG_NAMES)
    elif source == "trained":
        weights = FullModel(read_safetensors(path / TRAINED_NAME if path.is_dir() else path), is_part=True)
    elif (folder := _transformer_folder(path)) is not None:
        weights = read_transformer(folder)
    else:
        weights = read_diffusers(path, alpha=alpha)
    if alpha is not None and isinstance(weights, FullModel):
        raise UsageError(f"{path}: --alpha is for adapters; this is a full model")
    if any(name.startswith(CONTROL_PREFIX) for name in weights.tensors):
        raise UsageError(
            f"{path}: a control branch has no other format than the run's folder `controlnet`, diffusers' own"
        )
    if strangers := [name for name in weights.tensors if names.to_original(name) is None]:
        raise unmatched(path, strangers, "matches nothing in the model")
    return Loaded(source, family, weights)


def find_source(path: Path) -> Source:
    """Say which format a file or folder is in; `UsageError` if it is none, or not there."""
    if path.is_dir():
        if (path / dcp.METADATA_NAME).is_file():
            return "dcp"
        if (path / peft_folder.CONFIG_NAME).is_file():
            return "peft"
        if (path / TRAINED_NAME).is_file():
            if (path / WEIGHTS_NAME).is_file():
                raise UsageError(
                    f"{path}: holds {TRAINED_NAME} beside a LoRA, which no other format can; give one file"
                )
            return "trained"
        if (path / WEIGHTS_NAME).is_file() or _transformer_folder(path) is not None:
            return "diffusers"
        hint = f"; did you mean {path / 'adapter'}?" if (path / "adapter" / WEIGHTS_NAME).is_file() else ""
        raise UsageError(
            f"{path}: none of {WEIGHTS_NAME}, {peft_folder.CONFIG_NAME}, {MODEL_NAME}*.safetensors, model_index.json "
            f"and {dcp.METADATA_NAME} is in this folder{hint}"
        )
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder")
    if path.suffix in (".pt", ".pth"):
        return "nvidia"
    if path.name == TRAINED_NAME:
        return "trained"
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: weights are read from .safetensors and .pt files and from folders")
    first = next(iter(read_safetensors(path, only_first=True)), "")
    if first.startswith(comfyui.PREFIX):
        return "comfyui"
    if first.startswith(peft_folder.PREFIX):
        raise UsageError(f"{path}: a peft file without its {peft_folder.CONFIG_NAME}; give the folder that holds both")
    return "diffusers"


def save_weights(
    loaded: Loaded,
    form: Format,
    output: Path,
    *,
    base: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    fold: bool = False,
) -> list[str]:
    """Write the weights to `output`, which appears whole or not at all; return what a user should know.

    base: the model they belong to; names and shapes are then checked against it. Needed for `model`, and for full
    models in diffusers' format, whose config.json it gives. dtype: to convert to; None keeps what is stored.
    fold: scale B so that alpha = rank. Raises `UsageError` for what a format cannot hold and if `output` exists.
    """
    check_output(form, output)
    weights = loaded.weights
    if base is not None:
        weights = _checked(weights, base)
    elif isinstance(weights, FullModel) and weights.is_part:
        raise UsageError(f"{TRAINED_NAME} holds what was trained alone: pass --base MODEL, which gives the rest")
    elif form == "model" or (form == "diffusers" and isinstance(weights, FullModel)):
        raise UsageError(f"--to {form} needs --base MODEL, the diffusers model these weights belong to")
    if isinstance(weights, FullModel) and (form in ("peft", "comfyui") or fold):
        raise UsageError(f"{'--fold-alpha' if fold else f'--to {form}'} is for adapters; this is a full model")
    notes = list(weights.notes)
    if fold and isinstance(weights, Adapter):
        weights = fold_alpha(weights)
    if dtype is not None and form != "model":
        weights = cast(weights, dtype)
    if loaded.source == "dcp":
        notes.append(dcp.WARNING)
    if "comfyui" in (form, loaded.source):
        notes.append(comfyui.UNTESTED)
    if form == "nvidia" and isinstance(weights, Adapter):
        notes.append(f"a .pt holds no alpha: NVIDIA's experiment must say lora_alpha={weights.config['lora_alpha']}")
    building = output.parent / f".{output.name}.building"
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(building)
        try:
            _write(weights, form, building, base or ModelConfig(path="", family=loaded.family), dtype)
            building.rename(output)
        finally:
            _remove(building)
    return notes


def check_output(form: Format, output: Path) -> None:
    """Raise `UsageError` if the output cannot be made there."""
    suffix = _SUFFIXES.get(form, "")
    if output.suffix != suffix and (suffix or output.suffix in (".pt", ".safetensors")):
        what = f"a {suffix} file" if suffix else "a folder"
        raise UsageError(f"--output {output}: --to {form} writes {what}")
    if output.exists():
        raise UsageError(f"--output {output}: is there already; choose another, or remove it")


def _write(
    weights: Adapter | FullModel, form: Format, output: Path, base: ModelConfig, dtype: torch.dtype | None
) -> None:
    family = find_family("train", base)
    if form == "nvidia":
        write_nvidia(output, weights, family.ORIGINAL_NAMES)
    elif form == "model":
        _write_model(output, weights, base, family, dtype)
    elif isinstance(weights, FullModel):
        empty = family.stock(family.empty_transformer(base, projected=False))
        fill(empty, weights, output).save_pretrained(output)
    elif form == "comfyui":
        comfyui.write_comfyui(output, weights, family.ORIGINAL_NAMES)
    elif form == "peft":
        peft_folder.write_peft(output, weights, base.path or None)
    else:
        write_diffusers(output, weights)


def _write_model(
    folder: Path, weights: Adapter | FullModel, base: ModelConfig, family: ModuleType, dtype: torch.dtype | None
) -> None:
    """Copy the base's folder, with another transformer in it. Sums are formed in float32, stored as the base was."""
    source = component_folder(base, "transformer")
    if not (source.parent / "model_index.json").is_file():
        raise UsageError(f"--base {base.path}: has no model_index.json beside its transformer; give a whole model")
    if isinstance(weights, FullModel):
        transformer = fill(family.stock(family.empty_transformer(base, projected=False)), weights, folder)
        transformer = transformer.to(dtype) if dtype is not None else transformer
    else:
        stored = {name: tensor.dtype for name, tensor in read_transformer(source).tensors.items()}
        transformer = fuse(base, family, weights)
        for name, parameter in transformer.named_parameters():
            parameter.data = parameter.data.to(dtype or stored[name])
    shutil.copytree(source.parent, folder, ignore=lambda at, _: ["transformer"] if Path(at) == source.parent else [])
    transformer.save_pretrained(folder / "transformer")


def fuse(base: ModelConfig, family: ModuleType, adapter: Adapter) -> torch.nn.Module:
    """Return the base's transformer in float32 with the adapter merged into its weights by peft."""
    transformer = family.stock(family.load_transformer(base, torch.float32, projected=False))
    with tempfile.TemporaryDirectory(prefix="latentline-") as folder:
        write_diffusers(Path(folder), adapter)
        load_adapter(transformer, Path(folder))
    transformer.fuse_lora(safe_fusing=True)
    transformer.unload_lora()
    return transformer


def _checked(weights: Adapter | FullModel, base: ModelConfig) -> Adapter | FullModel:
    """Check names and shapes against the base, without loading its weights."""
    empty = find_family("train", base).empty_transformer(base, projected=False)
    if isinstance(weights, FullModel):
        if weights.is_part:
            if unknown := weights.tensors.keys() - empty.state_dict().keys():
                raise unmatched("the source", unknown, "is not a weight of the base model")
            whole = read_transformer(component_folder(base, "transformer")).tensors
            whole = {name: tensor.float() for name, tensor in whole.items()} | weights.tensors
            weights = FullModel(whole, notes=(f"{len(weights.tensors)} of {len(whole)} weights are the run's",))
        check_full(empty, weights, "the source")
        return weights
    linears = {name: module for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}
    if unknown := [module for module in weights.modules if module not in linears]:
        raise unmatched("the source", unknown, "is no linear layer of the base model")
    for module in weights.modules:
        expected = (linears[module].out_features, linears[module].in_features)
        found = (
            weights.tensors[f"{module}.lora_B.weight"].shape[0],
            weights.tensors[f"{module}.lora_A.weight"].shape[1],
        )
        if found != expected:
            raise UsageError(f"the source: {module} adapts a {list(found)} layer, the base's is {list(expected)}")
    return weights


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _transformer_folder(path: Path) -> Path | None:
    """The folder with a transformer's weights, if `path` is one or a whole model."""
    if (path / "model_index.json").is_file():
        return path / "transformer"
    return path if path.is_dir() and any(path.glob(f"{MODEL_NAME}*.safetensors")) else None
