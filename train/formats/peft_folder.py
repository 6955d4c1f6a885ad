"""peft's folder: `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained` loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from manifests.errors import UsageError
from train.formats.adapter import Adapter, described_adapter, split
from train.formats.names import unmatched

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# What no other format can say. A peft config must leave these as they are by default.
_UNSUPPORTED = (
    "use_rslora",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "lora_bias",
    "target_parameters",
)


def read_peft(folder: Path, state: dict[str, Tensor], kept: tuple[str, ...]) -> Adapter:
    """Read a folder's tensors and configuration. kept: names of the configuration that describe an adapter."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text())
    except ValueError as error:
        raise UsageError(f"{folder / CONFIG_NAME}: not valid JSON: {error}") from error
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{folder / CONFIG_NAME}: peft_type {config.get('peft_type')!r} is not LORA")
    unsupported = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise UsageError(f"{folder / CONFIG_NAME}: {unsupported[0]} = {config[unsupported[0]]!r} is not supported")
    if strangers := [name for name in state if not name.startswith(PREFIX)]:
        raise unmatched(folder / WEIGHTS_NAME, strangers, f"does not begin with {PREFIX!r}")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    config = {name: value for name, value in config.items() if name in kept}
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    else:
        config["target_modules"] = sorted({split(name)[0] for name in tensors})
    return described_adapter(folder, tensors, config)


def write_peft(folder: Path, adapter: Adapter, base: str | None) -> None:
    """Write the folder. base: the base model's path or id, put into the configuration."""
    config = LoraConfig(**adapter.config, base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(str(folder))
    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
