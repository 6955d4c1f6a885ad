"""Linear layers with LoRA or DoRA, computed from peft's parameters without peft's detours.

peft's own forward casts the layer's input to the adapter's float32 and multiplies each projection on its own. Here
the adapter's float32 masters are cast down to the activation's dtype at use (as autocast would), and projections
that share an input share one base GEMM and one stacked A. Layers whose base is in 8 bits go to `train.fp8`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from train.fp8 import Fp8Linear, fp8_linear


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """Apply an `nn.Linear` or peft's wrapper of one: [..., in] -> [..., out], in x's dtype."""
    return stacked_linear([module], x)[0]


def stacked_linear(modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Apply several linear layers without bias to one input, with one GEMM for all of them.

    Wrapped layers contribute every active adapter; a layer whose adapter drops inputs or is merged, disabled or of a
    variant other than DoRA goes through peft's own forward.
    """
    if not all(_is_plain(module) for module in modules):
        return tuple(module(x) for module in modules)
    bases = [_base(module) for module in modules]
    widths = [base.out_features for base in bases]
    adapters = [_adapters(module) for module in modules]
    downs = [down for pairs in adapters for _, down, _ in pairs]
    down = torch.cat(downs).to(x.dtype) if downs else None
    up = _block_diagonal(adapters, widths).to(x.dtype) if downs else None
    if isinstance(bases[0], Fp8Linear):
        y = fp8_linear(bases, x, down, up)
    else:
        y = _plain_linear(bases, x, down, up)
    outputs = y.split(widths, -1)
    return tuple(_with_magnitude(module, output) for module, output in zip(modules, outputs, strict=True))


def _plain_linear(bases: Sequence[nn.Module], x: Tensor, down: Tensor | None, up: Tensor | None) -> Tensor:
    weights = [base.weight for base in bases]
    trained = any(weight.requires_grad for weight in weights)
    weights = [weight.to(x.dtype) for weight in weights]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if down is None or up is None:
        return F.linear(x, weight)
    if trained:
        return F.linear(x, weight) + F.linear(F.linear(x, down), up)
    return _AdaptedLinear.apply(x.flatten(0, -2), weight, down, up).unflatten(0, x.shape[:-1])


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + (x A^T) B^T, and its input's gradient, as one GEMM each.

    x [N, in], weight W [out, in] (frozen), down A [rank, in], up B [out, rank], one dtype. The adapter widens the
    GEMMs' inner dimension: y = [x, x A^T] [W, B]^T and dx = [dy, dy B] [W; A]. A second pass over y or dx costs more
    than a few more columns of K.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        widened = torch.cat([x, x @ down.t()], 1)
        ctx.save_for_backward(widened, weight, down, up)
        return widened @ torch.cat([weight, up], 1).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        widened, weight, down, up = ctx.saved_tensors
        x, low_rank = widened.split([weight.shape[1], down.shape[0]], 1)
        grad_low_rank = grad @ up
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.cat([grad, grad_low_rank], 1) @ torch.cat([weight, down])
        return grad_x, None, grad_low_rank.t() @ x, grad.t() @ low_rank


def _base(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, LoraLinear) else module


def _is_plain(module: nn.Module) -> bool:
    if _base(module).bias is not None:
        return False
    if not isinstance(module, LoraLinear):
        return type(module) in (nn.Linear, Fp8Linear)
    names = _names(module)
    drops = any(module.training and not isinstance(module.lora_dropout[name], nn.Identity) for name in names)
    variants = any(name in module.lora_variant and not module.use_dora[name] for name in names)
    several_dora = len(names) > 1 and any(module.use_dora[name] for name in names)
    return not (module.disable_adapters or module.merged or drops or variants or several_dora)


def _names(module: LoraLinear) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def _adapters(module: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """(name, A [rank, in], alpha / rank * B [out, rank]) of each active adapter."""
    if not isinstance(module, LoraLinear):
        return []
    return [(name, module.lora_A[name].weight, _up(module, name)) for name in _names(module)]


def _up(module: LoraLinear, name: str) -> Tensor:
    """alpha / rank * B. No product with 1: PyTorch 2.15 fails to compile a recomputed block that has one."""
    weight, scaling = module.lora_B[name].weight, module.scaling[name]
    return weight if scaling == 1 else weight * scaling


def _block_diagonal(adapters: Sequence[Sequence[tuple[str, Tensor, Tensor]]], widths: Sequence[int]) -> Tensor:
    """The stacked B [sum of out, sum of ranks]: each layer's outputs see its own adapters' ranks only."""
    ups = [[up for _, _, up in pairs] for pairs in adapters]
    if len(ups) == 1:
        return torch.cat(ups[0], 1) if len(ups[0]) > 1 else ups[0][0]
    blocks = [torch.cat(own, 1) if own else None for own in ups]
    rows = []
    for index, (own, width) in enumerate(zip(blocks, widths, strict=True)):
        template = next(block for block in blocks if block is not None)
        row = []
        for other_index, other in enumerate(blocks):
            if other is None:
                continue
            row.append(own if other_index == index and own is not None else template.new_zeros(width, other.shape[1]))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def _with_magnitude(module: nn.Module, y: Tensor) -> Tensor:
    """DoRA (arXiv:2402.09353): rescale each output to its learned magnitude; the norm is a constant in backward."""
    if not isinstance(module, LoraLinear):
        return y
    for name, down, up in _adapters(module):
        if not module.use_dora[name]:
            continue
        magnitude = module.lora_magnitude_vector[name].weight
        with torch.no_grad():
            base = _base(module)
            weight = base.whole() if isinstance(base, Fp8Linear) else base.weight.float()
            norm = torch.linalg.vector_norm(weight + up.float() @ down.float(), dim=1)
        y = y * (magnitude / norm).to(y.dtype)
    return y
