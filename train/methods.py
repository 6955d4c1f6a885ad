"""What trains: `train.method`, `train.trainable` and `train.frozen` applied to a transformer.

Every parameter that trains is a float32 master. LoRA, DoRA and temporal adapters cast theirs down where they use them;
weights of the base are cast by autocast, or by FSDP as it gathers them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import ModuleType

import torch
from torch import nn

from manifests.errors import UsageError
from train.adapters import add_adapter
from train.config import TrainConfig
from train.formats.names import NameMap
from train.names import matching, resolve_targets
from train.parallel import Ranks
from train.temporal import ADAPTER, add_temporal_adapters
from train.trained import is_added, parameter_names, trained_parameters

# float32: the weight, its gradient, AdamW's two moments; and the average.
_BYTES_PER_TRAINED = 16
_BYTES_PER_AVERAGE = 4


def apply_methods(transformer: nn.Module, config: TrainConfig, family: ModuleType) -> None:
    """Add what the methods add, equal on every rank, and let train what is to train, in float32; freeze the rest.

    Raises `UsageError` for a target or pattern that matches nothing, or if nothing is left to train.
    """
    transformer.requires_grad_(False)
    name_map = family.ORIGINAL_NAMES
    blocks = family.blocks(transformer)
    for method in config.methods:
        if method in ("lora", "dora"):
            targets = resolve_targets(config.lora.targets, transformer, name_map)
            targets = _in_branch(transformer, config.lora.branch, targets or family.DEFAULT_TARGETS, family)
            lora = replace(config.lora, targets=targets)
            add_adapter(transformer, method, lora, family.DEFAULT_TARGETS, seed=config.seed)
    if "adapters" in config.methods:
        add_temporal_adapters(blocks, family.hidden_size(transformer), config.adapters, seed=config.seed)
    if "full" in config.methods:
        transformer.requires_grad_(True)
    by_name = parameter_names(transformer)
    if "control" in config.methods:
        for parameter in _control_parameters(by_name, family):
            parameter.requires_grad_(True)
    for parameter in _chosen("trainable", config.trainable, {n: p for n, p in by_name.items() if not p.requires_grad},
                             name_map, "is frozen"):  # fmt: skip
        parameter.requires_grad_(True)
    for parameter in _chosen("frozen", config.frozen, trained_parameters(transformer), name_map, "would train"):
        parameter.requires_grad_(False)
    trained = trained_parameters(transformer)
    if not trained:
        raise UsageError("train.frozen: nothing is left to train")
    for parameter in trained.values():
        parameter.data = parameter.data.float()


def _in_branch(transformer: nn.Module, branch: str, targets: tuple[str, ...], family: ModuleType) -> tuple[str, ...]:
    """LoRA's targets in one branch of a model that has two; whole names then."""
    control = getattr(family, "CONTROL", None)
    if branch == "both":
        return targets
    if control is None:
        raise UsageError(f"train.lora.branch: {branch!r}, but this model has no control branch; leave it out")
    wanted = branch == "control"
    return tuple(
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith("controlnet.") == wanted
        and any(f".{name}".endswith(f".{target}") for target in targets)
    )


def _control_parameters(by_name: dict[str, nn.Parameter], family: ModuleType) -> Iterator[nn.Parameter]:
    patterns = getattr(family, "CONTROL", ())
    found = [
        parameter
        for name, parameter in by_name.items()
        if not is_added(name) and any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if not found:
        raise UsageError("train.method: control trains a controlnet, and this model has none; use lora, or another")
    yield from found


def trains_base(config: TrainConfig) -> bool:
    """Say whether weights of the base train, so that it is loaded in float32."""
    return "full" in config.methods or "control" in config.methods or bool(config.trainable)


def computing(config: TrainConfig, dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Compute in `dtype` whatever the weights' is; nothing to do where only adapters train."""
    if dtype == torch.float32 or not trains_base(config):
        return nullcontext()
    return torch.autocast(device.type, dtype)


def seed_dropout(config: TrainConfig, position: int, ranks: Ranks) -> None:
    """Make adapter dropout a function of the position in the order, so that it survives a resume.

    Ranks that share the sample draw for tokens of their own.
    """
    if config.lora.dropout > 0:
        part = ranks.context.rank if ranks.context else 0
        name = hashlib.sha256(f"dropout/{config.seed}/{position}/{part}".encode()).digest()
        torch.manual_seed(int.from_bytes(name[:8], "little", signed=True))


@dataclass(frozen=True)
class Weights:
    """Counts of parameters. frozen; added: adapters', which are whole on every rank; base: of the base that train."""

    frozen: int
    added: int
    base: int

    @property
    def total(self) -> int:
        return self.frozen + self.added + self.base

    @property
    def trained(self) -> int:
        return self.added + self.base

    def frozen_bytes(self, itemsize: int) -> int:
        return self.frozen * itemsize

    def trained_bytes(self, config: TrainConfig, itemsize: int, *, shards: int = 1) -> int:
        """Bytes of what trains on one rank: master, gradient, moments, average, and a copy to compute with.

        shards: ranks that split the base. The copy is of all weights, or, where they are split, of two blocks' at most
        (not counted).
        """
        each = bytes_per_trained(config)
        copy = itemsize if itemsize < 4 and shards == 1 else 0
        return self.added * each + self.base * (each + copy) // shards


def bytes_per_trained(config: TrainConfig) -> int:
    return _BYTES_PER_TRAINED + (_BYTES_PER_AVERAGE if config.ema.kind != "none" else 0)


def count_weights(transformer: nn.Module) -> Weights:
    counts = {"frozen": 0, "added": 0, "base": 0}
    for name, parameter in transformer.named_parameters():
        kind = "frozen" if not parameter.requires_grad else "added" if is_added(name) else "base"
        counts[kind] += parameter.numel()
    return Weights(**counts)


def describe_methods(config: TrainConfig, transformer: nn.Module, *, projected: bool) -> str:
    """One line for people: what trains."""
    weights = count_weights(transformer)
    text = f"training {' + '.join(config.methods)}: {weights.trained:,} of {weights.total:,} parameters"
    if weights.base:
        text += f", {weights.base:,} of them the base's"
    if "full" in config.methods and projected:
        text += "; the text projection stays as it is, contexts have passed it"
    if "adapters" in config.methods:
        text += f"; temporal adapters after {sum(1 for _ in _adapters(transformer))} blocks"
    return text


def _adapters(transformer: nn.Module) -> Iterator[nn.Module]:
    return (module for name, module in transformer.named_modules() if name.endswith(f".{ADAPTER}"))


def _chosen(
    setting: str,
    patterns: tuple[str, ...],
    candidates: dict[str, nn.Parameter],
    name_map: NameMap,
    state: str,
) -> Iterator[nn.Parameter]:
    names = list(candidates)
    for pattern in patterns:
        found = matching(pattern, names, name_map)
        if not found:
            raise UsageError(
                f"train.{setting}: {pattern!r} matches no parameter that {state}, in diffusers' naming or NVIDIA's"
                + (f"; one is {names[-1]}" if names else "")
            )
        for name in found:
            yield candidates[name]
