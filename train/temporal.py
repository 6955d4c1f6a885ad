"""Temporal adapters: a residual bottleneck over the time axis after a transformer block.

    x + up(GELU(mix(down(norm(x)))))

norm is LayerNorm without parameters, `down` and `up` are linear layers to hidden / reduction channels and back, and
`mix` weighs each channel of a frame with the same place in the frames before and after (3 taps, zeros past the ends).
`up` starts at zero, so a fresh adapter changes nothing. Parameters are float32; products run in x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests.errors import UsageError
from train.config import AdaptersConfig
from train.context_parallel import all_tokens, own_tokens

ADAPTER = "temporal_adapter"
"""The name of a block's adapter, when it has one."""

_EPSILON = 1e-6


class TemporalAdapter(nn.Module):
    """hidden: channels of x. width: of the bottleneck."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width)
        self.taps = nn.Parameter(torch.tensor([0.0, 1.0, 0.0]).unsqueeze(1).repeat(1, width))
        self.up = nn.Linear(width, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x_BNC: Tensor, latent_frames: int) -> Tensor:
        """x: [B, T S, C] with S tokens a latent frame; where ranks share a sample, this rank's run of them."""
        dtype = x_BNC.dtype
        normed = F.layer_norm(x_BNC.float(), x_BNC.shape[-1:], eps=_EPSILON).to(dtype)
        low = F.linear(normed, self.down.weight.to(dtype), self.down.bias.to(dtype))
        (low,) = all_tokens(low)
        low_BTSR = low.unflatten(1, (latent_frames, -1))
        before = F.pad(low_BTSR, (0, 0, 0, 0, 1, 0))[:, :-1]
        after = F.pad(low_BTSR, (0, 0, 0, 0, 0, 1))[:, 1:]
        first, middle, last = self.taps.to(dtype)
        mixed = own_tokens((first * before + middle * low_BTSR + last * after).flatten(1, 2), 1)
        return x_BNC + F.linear(F.gelu(mixed), self.up.weight.to(dtype), self.up.bias.to(dtype))


def add_temporal_adapters(blocks: list[nn.Module], hidden_size: int, config: AdaptersConfig, *, seed: int = 0) -> None:
    """Give every `config.every`-th block a fresh, trainable adapter, with initial values by `seed` alone.

    Raises `UsageError` if the reduction does not divide the model's width, or there are fewer blocks than `every`.
    """
    if hidden_size % config.reduction:
        raise UsageError(
            f"train.adapters.reduction: {config.reduction} does not divide the model's width of {hidden_size}"
        )
    if config.every > len(blocks):
        raise UsageError(f"train.adapters.every: {config.every} is more than the model's {len(blocks)} blocks")
    device = next(blocks[0].parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in blocks[config.every - 1 :: config.every]:
            with torch.device(device):
                setattr(block, ADAPTER, TemporalAdapter(hidden_size, hidden_size // config.reduction))
