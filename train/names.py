"""Names of layers and parameters, in diffusers' naming or NVIDIA's, and the patterns and targets users write in either.

A family's `NVIDIA_NAMES` lists what differs: pairs of diffusers' and NVIDIA's runs of name parts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from manifests.errors import UsageError

Pairs = Sequence[tuple[str, str]]
"""(diffusers' parts, NVIDIA's parts), dotted."""


def to_nvidia(name: str, pairs: Pairs) -> str:
    """Translate a diffusers name, or a part of one, to NVIDIA's; parts without a translation stay."""
    return _translate(name, pairs)


def from_nvidia(name: str, pairs: Pairs) -> str:
    """Translate an NVIDIA name, or a part of one, to diffusers'; parts without a translation stay."""
    return _translate(name, [(nvidia, diffusers) for diffusers, nvidia in pairs])


def matching(pattern: str, names: Iterable[str], pairs: Pairs) -> list[str]:
    """Return the diffusers names that a shell-style pattern matches whole, in either naming.

    NVIDIA's may begin with `net.`, as in its checkpoints.
    """
    nvidia = pattern.removeprefix("net.")
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(to_nvidia(name, pairs), nvidia)]


def resolve_targets(targets: Sequence[str], model: nn.Module, pairs: Pairs) -> tuple[str, ...]:
    """Translate LoRA targets in either naming to diffusers'.

    A target that means the same layers in both stays; one of NVIDIA's becomes its translation. Raises `UsageError` for
    a target that ends no linear layer's name, or means different layers in the two namings.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(_resolve(target, linears, pairs) for target in targets)


def _resolve(target: str, linears: Sequence[str], pairs: Pairs) -> str:
    in_diffusers = _ending(target, linears, lambda name: name)
    in_nvidia = _ending(target, linears, lambda name: to_nvidia(name, pairs))
    if in_diffusers and in_nvidia and in_diffusers != in_nvidia:
        raise UsageError(
            f"train.lora.targets: {target!r} is ambiguous: it is {in_diffusers[0]} in diffusers' naming and "
            f"{in_nvidia[0]} in NVIDIA's; write more of the name"
        )
    if in_diffusers:
        return target
    translated = from_nvidia(target, pairs)
    if in_nvidia and _ending(translated, linears, lambda name: name) == in_nvidia:
        return translated
    known = {
        ".".join(parts[-count:])
        for name in linears
        for parts in (name.split("."), to_nvidia(name, pairs).split("."))
        for count in (1, 2, 3)
    }
    near = difflib.get_close_matches(target, sorted(known), n=3, cutoff=0.0)
    raise UsageError(f"train.lora.targets: {target!r} matches no linear layer of the model; near: {', '.join(near)}")


def _ending(target: str, names: Sequence[str], naming: Callable[[str], str]) -> list[str]:
    return [name for name in names if f".{naming(name)}".endswith(f".{target}")]


def _translate(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name
