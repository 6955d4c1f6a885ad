"""Adapters that work at some sigmas only: which of them are on is set anew before each denoising step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from infer.config import AdapterConfig
from manifests.errors import LatentlineError


@contextmanager
def switched_by_sigma(pipe: Any, adapters: Mapping[str, AdapterConfig]) -> Iterator[Callable[[float], None] | None]:
    """A function of sigma that turns on the adapters of its range and turns off the others; None if none has a range.

    Where ranges overlap, updates add up. At the end all are on again. Raises LatentlineError if the steps inside
    the block left an adapter unused: its video would be one made without it.
    """
    if not any(adapter.has_range for adapter in adapters.values()):
        yield None
        return
    used: set[str] = set()
    sigmas: list[float] = []

    def switch(sigma: float) -> None:
        on = [name for name, adapter in adapters.items() if adapter.works_at(sigma)]
        used.update(on)
        sigmas.append(sigma)
        _turn_on(pipe.transformer, on)

    try:
        yield switch
    finally:
        _turn_on(pipe.transformer, list(adapters))
    if unused := [name for name in adapters if name not in used]:
        steps = f"{len(sigmas)} steps have sigmas of {min(sigmas):.3g} to {max(sigmas):.3g}"
        raise LatentlineError(f"infer.adapters.{unused[0]}: no step lies in its range; the {steps}")


def _turn_on(transformer: Any, names: list[str]) -> None:
    """Weights stay as `set_adapters` set them; a layer that an adapter lacks passes it over."""
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(bool(names))
            if names:
                module.set_adapter(names, inference_mode=True)
