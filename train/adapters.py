"""LoRA and DoRA adapters: injected by peft, kept in float32, stored as stock diffusers reads them.

The file is diffusers' `pytorch_lora_weights.safetensors` with the adapter's configuration (rank, alpha,
targets, DoRA) in its metadata: without it a loader would assume alpha = rank.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import Cosmos2_5_PredictBasePipeline
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from manifests.errors import UsageError
from train.config import LoraConfig

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_PREFIX = "transformer."
_METADATA = "lora_adapter_metadata"
_ADAPTER = "default"
# What describes the adapter; peft's other fields come and go with its versions, and loaders reject unknown ones.
CONFIG_NAMES = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "init_lora_weights",
    "target_modules",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
)


def add_adapter(
    transformer: torch.nn.Module,
    method: Literal["lora", "dora"],
    config: LoraConfig,
    default_targets: tuple[str, ...] = (),
    *,
    seed: int = 0,
) -> None:
    """Freeze the transformer and inject a fresh adapter whose parameters are float32 and alone trainable.

    seed: of the initial values, which are drawn on the CPU and so equal on every rank. Raises `UsageError`
    for a target that matches no linear layer.
    """
    targets = config.targets or default_targets
    _check_targets(transformer, targets)
    transformer.requires_grad_(False)
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        target_modules=list(targets),
        use_dora=method == "dora",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(transformer, peft_config)
    if method == "dora":
        _set_magnitudes(transformer)


def _inject(transformer: torch.nn.Module, peft_config: PeftLoraConfig) -> None:
    transformer.add_adapter(peft_config, _ADAPTER)
    for name, parameter in transformer.named_parameters():
        is_adapter = ".lora_" in name
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            parameter.data = parameter.data.float()


@torch.no_grad()
def _set_magnitudes(transformer: torch.nn.Module) -> None:
    """Set DoRA's magnitudes to the norms of the base rows in float32.

    peft rounds them to the base's dtype, so that on a bfloat16 base a fresh adapter would not be the identity.
    """
    for module in transformer.modules():
        if getattr(module, "lora_magnitude_vector", None):
            magnitude = module.lora_magnitude_vector[_ADAPTER].weight
            magnitude.copy_(torch.linalg.vector_norm(module.get_base_layer().weight.float(), dim=1))


def _check_targets(transformer: torch.nn.Module, targets: tuple[str, ...]) -> None:
    linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            suffixes = {".".join(parts[-n:]) for parts in (name.split(".") for name in linears) for n in (1, 2, 3)}
            near = difflib.get_close_matches(target, sorted(suffixes), n=3, cutoff=0.0)
            raise UsageError(
                f"train.lora.targets: {target!r} matches no linear layer of the model; near: {', '.join(near)}"
            )


def adapter_parameters(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return LoRA's or DoRA's parameters by the names they have in the adapter file, in a fixed order."""
    return {
        name.replace(f".{_ADAPTER}", ""): parameter
        for name, parameter in transformer.named_parameters()
        if ".lora_" in name
    }


def has_adapter(transformer: torch.nn.Module) -> bool:
    """Say whether the transformer has LoRA or DoRA."""
    return bool(getattr(transformer, "peft_config", None))


def adapter_state(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the adapter's tensors as stored: float32, on the CPU, without the file's prefix."""
    state = get_peft_model_state_dict(transformer, adapter_name=_ADAPTER)
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in sorted(state.items())
    }


def save_adapter(folder: Path, transformer: torch.nn.Module) -> Path:
    """Write the transformer's adapter into `folder`, as `write_adapter` does."""
    return write_adapter(folder, adapter_state(transformer), adapter_metadata(transformer))


def write_adapter(folder: Path, state: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Path:
    """Write `pytorch_lora_weights.safetensors` into `folder` and return its path.

    The file appears complete or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".adapter-", dir=folder))
    try:
        Cosmos2_5_PredictBasePipeline.save_lora_weights(
            building,
            transformer_lora_layers=state,
            weight_name=WEIGHTS_NAME,
            transformer_lora_adapter_metadata=metadata,
        )
        with open(building / WEIGHTS_NAME, "rb") as file:
            os.fsync(file.fileno())
        os.replace(building / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    finally:
        shutil.rmtree(building)
    return folder / WEIGHTS_NAME


def adapter_metadata(transformer: torch.nn.Module) -> dict[str, Any]:
    """What describes the adapter in its file: peft's configuration."""
    config = transformer.peft_config[_ADAPTER].to_dict()
    return {name: sorted(config[name]) if name == "target_modules" else config[name] for name in CONFIG_NAMES}


def read_adapter(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read an adapter file, or the one in a folder: its tensors without prefix, and its peft configuration."""
    file_path = path / WEIGHTS_NAME if path.is_dir() else path
    if not file_path.is_file():
        raise UsageError(f"adapter {str(path)!r}: no {WEIGHTS_NAME} there")
    try:
        with safe_open(file_path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"adapter {str(file_path)!r}: not a readable safetensors file: {error}") from error
    strangers = [name for name in state if not name.startswith(_PREFIX)]
    if strangers or not state:
        what = f"{strangers[0]!r} is no transformer tensor" if strangers else "it is empty"
        raise UsageError(f"adapter {str(file_path)!r}: {what}; is it a diffusers adapter file?")
    strip = len(_PREFIX)
    return (
        {name[strip:]: tensor for name, tensor in state.items()},
        {name.removeprefix(_PREFIX): value for name, value in metadata.items()},
    )


def load_adapter(transformer: torch.nn.Module, path: Path) -> None:
    """Load an adapter file into the transformer, injecting the adapter it describes if there is none yet.

    Strict: every tensor of the file must have its place and every place its tensor, of equal shape, else
    `UsageError` and no value is changed.
    """
    state, metadata = read_adapter(path)
    if not has_adapter(transformer):
        if not metadata:
            raise UsageError(f"adapter {str(path)!r}: has no adapter metadata, so its alpha is unknown")
        _check_targets(transformer, tuple(metadata["target_modules"]))
        _inject(transformer, PeftLoraConfig(**metadata))
    places = adapter_parameters(transformer)
    names = {_stored_name(name): parameter for name, parameter in places.items()}
    _check_names(path, state, names)
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(state[name])


def _stored_name(name: str) -> str:
    """peft stores DoRA's magnitude as the vector itself, not as the `weight` of its module."""
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _check_names(path: Path, state: Mapping[str, torch.Tensor], places: Mapping[str, torch.nn.Parameter]) -> None:
    missing, unexpected = sorted(places.keys() - state.keys()), sorted(state.keys() - places.keys())
    if missing or unexpected:
        raise UsageError(
            f"adapter {str(path)!r}: {len(unexpected)} of its tensors match nothing in the model and "
            f"{len(missing)} of the model's are missing (first: {(unexpected + missing)[0]})"
        )
    for name, parameter in places.items():
        if parameter.shape != state[name].shape:
            raise UsageError(
                f"adapter {str(path)!r}: {name} has shape {list(state[name].shape)}, "
                f"the model's is {list(parameter.shape)}"
            )
