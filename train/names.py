"""The patterns and targets users write for parameters and layers, in diffusers' naming or in NVIDIA's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from manifests.errors import UsageError
from train.formats.names import NameMap


def matching(pattern: str, names: Iterable[str], name_map: NameMap) -> list[str]:
    """Return the diffusers names that a shell-style pattern matches whole, in either naming.

    NVIDIA's may begin with `net.`, as in its checkpoints.
    """
    nvidia = pattern.removeprefix("net.")
    return [
        name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name_map.to_original(name) or name, nvidia)
    ]


def resolve_targets(targets: Sequence[str], model: nn.Module, name_map: NameMap) -> tuple[str, ...]:
    """Translate LoRA targets, which are ends of layers' names in either naming, to diffusers'.

    A target that means the same layers in both stays. Raises `UsageError` for one that ends no linear layer's name, or
    means different layers in the two namings.
    """
    linears = {
        name: name_map.to_original(name) or name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return tuple(resolved for target in targets for resolved in _resolve(target, linears))


def _resolve(target: str, linears: Mapping[str, str]) -> list[str]:
    in_diffusers = [name for name in linears if _ends(name, target)]
    in_nvidia = [name for name, nvidia in linears.items() if _ends(nvidia, target)]
    if in_diffusers and in_nvidia and in_diffusers != in_nvidia:
        raise UsageError(
            f"train.lora.targets: {target!r} is ambiguous: it is {in_diffusers[0]} in diffusers' naming and "
            f"{in_nvidia[0]} in NVIDIA's; write more of the name"
        )
    if in_diffusers:
        return [target]
    if in_nvidia:
        shared = _shared_end(in_nvidia)
        alike = shared and [name for name in linears if _ends(name, shared)] == in_nvidia
        return [shared] if alike else in_nvidia
    known = {
        ".".join(parts[-count:])
        for pair in linears.items()
        for parts in (name.split(".") for name in pair)
        for count in (1, 2, 3)
    }
    near = difflib.get_close_matches(target, sorted(known), n=3, cutoff=0.0)
    raise UsageError(f"train.lora.targets: {target!r} matches no linear layer of the model; near: {', '.join(near)}")


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _shared_end(names: Sequence[str]) -> str:
    """The longest run of parts that all names end in."""
    columns = zip(*(reversed(name.split(".")) for name in names), strict=False)
    shared = []
    for column in columns:
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(reversed(shared))
