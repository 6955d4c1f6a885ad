"""ComfyUI's LoRA files: original names under `diffusion_model.`, alpha as a tensor, DoRA's magnitudes as `dora_scale`.

Untested with Cosmos-Predict2.5 in ComfyUI itself: the names are those its loader builds for the Predict2 model.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from manifests.errors import UsageError
from train.formats.adapter import LORA_A, LORA_B, MAGNITUDE, Adapter, make_adapter, split
from train.formats.names import NameMap, unmatched

PREFIX = "diffusion_model."
UNTESTED = "ComfyUI names are untested with Cosmos-Predict2.5 in ComfyUI itself"

_PART = re.compile(r"\.(lora_A\.weight|lora_B\.weight|dora_scale|alpha)$")


def read_comfyui(path: Path, state: dict[str, Tensor], names: NameMap, *, alpha: float | None) -> Adapter:
    """Read a file's tensors. alpha: for files without alpha tensors; those with them are believed.

    Raises `UsageError` for a tensor that is not the model's and for a module without alpha.
    """
    tensors, alphas, unknown = {}, {}, []
    for name, value in state.items():
        match = _PART.search(name)
        module = names.to_diffusers(name.removeprefix(PREFIX)[: match.start() - len(PREFIX)]) if match else None
        if match is None or module is None or not name.startswith(PREFIX):
            unknown.append(name)
        elif match.group(1) == "alpha":
            alphas[module] = float(value)
        elif match.group(1) == "dora_scale":
            tensors[f"{module}.{MAGNITUDE}"] = value.reshape(-1)
        else:
            tensors[f"{module}.{match.group(1)}"] = value
    if unknown:
        raise unmatched(path, unknown, "matches nothing in the model")
    modules = {split(name)[0] for name in tensors}
    if lone := sorted(alphas.keys() - modules):
        raise UsageError(f"{path}: {lone[0]} has an alpha and no LoRA")
    if without := sorted(modules - alphas.keys()):
        if alpha is None:
            raise UsageError(f"{path}: {without[0]} has no alpha; pass --alpha with the one it was trained with")
        alphas |= dict.fromkeys(without, alpha)
    return make_adapter(path, tensors, alphas)


def write_comfyui(path: Path, adapter: Adapter, names: NameMap) -> None:
    """Write the adapter with an alpha beside each module."""
    state, unknown = {}, []
    for module in adapter.modules:
        original = names.to_original(module)
        if original is None:
            unknown.append(module)
            continue
        stem = f"{PREFIX}{original}"
        state[f"{stem}.{LORA_A}"] = adapter.tensors[f"{module}.{LORA_A}"].contiguous()
        state[f"{stem}.{LORA_B}"] = adapter.tensors[f"{module}.{LORA_B}"].contiguous()
        state[f"{stem}.alpha"] = torch.tensor(adapter.alpha(module), dtype=torch.float32)
        if adapter.is_dora:
            state[f"{stem}.dora_scale"] = adapter.tensors[f"{module}.{MAGNITUDE}"].reshape(-1, 1).contiguous()
    if unknown:
        raise unmatched(path, unknown, "has no name in NVIDIA's code")
    save_file(state, path, metadata={"format": "pt"})
