"""An average of the trained weights over the steps: NVIDIA's power EMA, or plain decay. `train.ema` says which.

The average is float32 and lies as the weights do: whole where they are whole, split where FSDP splits them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.config import EmaConfig
from train.trained import split_like, to_host


def power_exponent(rate: float) -> float:
    """gamma + 1 for a relative width `rate` of the average (arXiv:2312.02696, Eq. 126): 7.937 at 0.1."""
    width = rate**-2
    return float(np.roots([1, 7, 16 - width, 12 - width]).real.max()) + 1


def kept_share(config: EmaConfig, step: int) -> float:
    """The share of itself the average keeps at a 0-based optimizer step; a power EMA starts as the first weights."""
    if config.kind == "decay":
        return config.decay
    return (1 - 1 / (step + 1)) ** power_exponent(config.rate)


class Ema:
    """The average of `parameters`, by name; it begins as a copy of them."""

    def __init__(self, config: EmaConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        self.config = config
        self.parameters = dict(parameters)
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a 0-based optimizer step."""
        share = 1 - kept_share(self.config, step)
        averages = [_local(average) for average in self.averages.values()]
        weights = [_local(parameter) for parameter in self.parameters.values()]
        torch._foreach_lerp_(averages, weights, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the averages in the model's place inside the block, the weights in theirs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def to_host(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Whole copies on the CPU; all ranks must ask, those that do not `keep` get nothing."""
        return to_host(self.averages, keep=keep)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put whole averages in place; their names must be those of the parameters, else `KeyError`."""
        for name, average in self.averages.items():
            average.copy_(split_like(tensors[name], average))

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            weight, average = _local(parameter), _local(self.averages[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
