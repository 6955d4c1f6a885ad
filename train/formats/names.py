"""Renaming of modules between two codes, strictly: a name without a partner is an error, not a guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from manifests.errors import UsageError


@dataclass(frozen=True)
class NameMap:
    """A one-to-one map of module names, original -> diffusers.

    blocks: (original, diffusers) name of the list of blocks. block_modules: names inside a block. modules: names of
    the rest. ignored: patterns of whole original names that are stored but are no weights.
    """

    blocks: tuple[str, str]
    block_modules: Mapping[str, str]
    modules: Mapping[str, str]
    ignored: tuple[str, ...] = ()

    def to_diffusers(self, name: str) -> str | None:
        """Rename a module's or a tensor's original name; None if nothing of the model is called that."""
        return _rename(name, self.blocks[0], self.blocks[1], self.block_modules, self.modules)

    def to_original(self, name: str) -> str | None:
        """Rename a module's or a tensor's diffusers name; None if nothing of the model is called that."""
        block_modules, modules = self._reversed
        return _rename(name, self.blocks[1], self.blocks[0], block_modules, modules)

    def is_ignored(self, name: str) -> bool:
        """Say whether an original name is one of what is stored but is no weight."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    @cached_property
    def _reversed(self) -> tuple[dict[str, str], dict[str, str]]:
        block_modules = {ours: original for original, ours in self.block_modules.items()}
        modules = {ours: original for original, ours in self.modules.items()}
        assert len(block_modules) == len(self.block_modules)
        assert len(modules) == len(self.modules)
        return block_modules, modules


def _rename(
    name: str, blocks_in: str, blocks_out: str, block_modules: Mapping[str, str], modules: Mapping[str, str]
) -> str | None:
    if match := re.fullmatch(rf"{re.escape(blocks_in)}\.(\d+)\.(.+)", name):
        inner = _renamed_module(match.group(2), block_modules)
        return None if inner is None else f"{blocks_out}.{match.group(1)}.{inner}"
    return _renamed_module(name, modules)


def _renamed_module(name: str, modules: Mapping[str, str]) -> str | None:
    """Rename the part of `name` that is a module; what follows (`.weight`, `.lora_A.weight`) stays."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        if module in modules:
            return ".".join([modules[module], *parts[count:]])
    return None


def unmatched(where: object, names: Iterable[str], what: str) -> UsageError:
    """The error for names that have no partner: how many, and the first."""
    listed = sorted(names)
    more = f" ({len(listed)} such names)" if len(listed) > 1 else ""
    return UsageError(f"{where}: {listed[0]!r} {what}{more}")
