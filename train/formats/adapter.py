"""Weights in memory, whatever file they came from: an adapter or a full model, with diffusers' names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from manifests.errors import UsageError

LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
PARTS = (LORA_A, LORA_B, MAGNITUDE)


@dataclass(frozen=True)
class FullModel:
    """Weights of the transformer, by diffusers' names: all of them, or those a run trained, which the base completes.

    notes: what a user should know of the file.
    """

    tensors: dict[str, Tensor]
    is_part: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """A LoRA or DoRA.

    tensors: `<module>.lora_A.weight` [rank, in], `<module>.lora_B.weight` [out, rank] and, for DoRA,
    `<module>.lora_magnitude_vector` [out]. config: peft's fields that describe it, `lora_alpha` among them: the update
    is scaled by alpha / rank. notes: what a user should know of the file.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> list[str]:
        return sorted({split(name)[0] for name in self.tensors})

    @property
    def is_dora(self) -> bool:
        return bool(self.config["use_dora"])

    def rank(self, module: str) -> int:
        return self.tensors[f"{module}.{LORA_A}"].shape[0]

    def alpha(self, module: str) -> float:
        pattern = self.config["alpha_pattern"]
        return float(pattern.get(get_pattern_key(pattern.keys(), module), self.config["lora_alpha"]))


def split(name: str) -> tuple[str, str]:
    """Split a canonical name into (module, part); part is "" if it is none of LoRA's or DoRA's."""
    for part in PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    return name, ""


def make_adapter(where: object, tensors: Mapping[str, Tensor], alphas: Mapping[str, float] | float) -> Adapter:
    """Describe the tensors of a file that carries no configuration; alphas: one for all, or by module.

    Targets are whole module names: which shorter patterns its maker wrote cannot be known.
    """
    ranks = _check_tensors(where, tensors)
    if not isinstance(alphas, Mapping):
        alphas = dict.fromkeys(ranks, alphas)
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return Adapter(
        dict(sorted(tensors.items())),
        {
            "r": rank,
            "lora_alpha": plain(alpha),
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "target_modules": sorted(ranks),
            "use_dora": any(split(name)[1] == MAGNITUDE for name in tensors),
            "rank_pattern": {name: value for name, value in sorted(ranks.items()) if value != rank},
            "alpha_pattern": {name: plain(value) for name, value in sorted(alphas.items()) if value != alpha},
            "bias": "none",
        },
    )


def described_adapter(where: object, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Adapter:
    """Put together tensors and the configuration their file carries, which must agree."""
    ranks = _check_tensors(where, tensors)
    if not config.get("r") or config.get("lora_alpha") is None:
        raise UsageError(f"{where}: its configuration gives no r and lora_alpha; pass --alpha")
    whole = make_adapter(where, tensors, config["lora_alpha"]).config | dict(config)
    has_magnitudes = any(split(name)[1] == MAGNITUDE for name in tensors)
    if bool(whole["use_dora"]) != has_magnitudes:
        raise UsageError(
            f"{where}: use_dora is {whole['use_dora']} but there are {'' if has_magnitudes else 'no '}magnitudes"
        )
    for module, rank in ranks.items():
        pattern = whole["rank_pattern"]
        said = pattern.get(get_pattern_key(pattern.keys(), module), whole["r"])
        if said != rank:
            raise UsageError(f"{where}: {module} has rank {rank}, its configuration says {said}")
    return Adapter(dict(sorted(tensors.items())), whole)


def fold_alpha(adapter: Adapter) -> Adapter:
    """Scale each B (float32 product, stored dtype kept) so that alpha = rank says the same update."""
    tensors = dict(adapter.tensors)
    for module in adapter.modules:
        name = f"{module}.{LORA_B}"
        scale = adapter.alpha(module) / adapter.rank(module)
        tensors[name] = (tensors[name].float() * scale).to(tensors[name].dtype)
    pattern = adapter.config["rank_pattern"]
    folded = {"lora_alpha": adapter.config["r"], "alpha_pattern": dict(pattern)}
    return replace(adapter, tensors=tensors, config=adapter.config | folded)


def cast(weights: Adapter | FullModel, dtype: torch.dtype) -> Adapter | FullModel:
    return replace(weights, tensors={name: tensor.to(dtype) for name, tensor in weights.tensors.items()})


def plain(number: float) -> float | int:
    """Write 32.0 as 32: loaders of older files want an integer alpha."""
    return int(number) if number == int(number) else float(number)


def check_finite(where: object, tensors: Mapping[str, Tensor]) -> None:
    """Raise `UsageError` naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UsageError(f"{where}: {name} holds values that are not finite")


def _check_tensors(where: object, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Check that each module has the parts it needs in shapes that fit; return the rank of each."""
    if not tensors:
        raise UsageError(f"{where}: holds no adapter")
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, part = split(name)
        if not part:
            raise UsageError(f"{where}: {name!r} is no part of a LoRA or DoRA")
        found[module][part] = tensor
    dora = any(MAGNITUDE in parts for parts in found.values())
    ranks = {}
    for module, parts in sorted(found.items()):
        for part in PARTS if dora else PARTS[:2]:
            if part not in parts:
                raise UsageError(f"{where}: {module} has no {part}; the adapter is incomplete")
        down, up = parts[LORA_A], parts[LORA_B]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise UsageError(f"{where}: {module}: A {list(down.shape)} and B {list(up.shape)} do not fit together")
        if dora and parts[MAGNITUDE].shape != (up.shape[0],):
            raise UsageError(
                f"{where}: {module}: magnitudes of shape {list(parts[MAGNITUDE].shape)}, B has {up.shape[0]} rows"
            )
        ranks[module] = down.shape[0]
    check_finite(where, tensors)
    return ranks


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
