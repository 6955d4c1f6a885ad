"""Frozen linear layers in 8-bit floating point, forward and input gradient, with a LoRA branch in bfloat16.

Values are e4m3 with one float32 scale a row: a row of the weight is an output channel, a row of an activation or of a
gradient is a token, and the row's largest magnitude becomes 448. Weights are quantised once and kept in two layouts,
since the GPU's 8-bit products want both operands along the summed dimension: together they take what bfloat16 took.
Both hold the same values, so the gradient is that of the forward pass. To sum over output channels the gradient's
columns take on the weight's scales before they are quantised. `torch.compile` fuses quantising into what comes before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from manifests.errors import UsageError

E4M3 = torch.float8_e4m3fn
FORMATS = {"e4m3": E4M3, "e5m2": torch.float8_e5m2}
GRADIENTS = E4M3
"""Format of gradients: with a scale a row e4m3's range suffices, and it is the more exact one (benchmarks/results)."""

FIRST_CAPABILITY = (8, 9)

MATMUL = "latentline.fp8_matmul.default"


class Fp8Linear(nn.Module):
    """A frozen `nn.Linear` without bias, on the weight's device.

    weight_MK: [out, in] as a plain layer has it; kept as `weight`, e4m3, with `scale_M`, and as `transposed_KM`.
    """

    def __init__(self, weight_MK: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_MK.shape
        self.bias = None
        rows, scale_M1 = quantise(weight_MK)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("scale_M", scale_M1.flatten(), persistent=False)
        self.register_buffer("transposed_KM", rows.view(torch.uint8).t().contiguous().view(E4M3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], bfloat16, without an adapter."""
        return fp8_linear([self], x, None, None)

    def whole(self) -> Tensor:
        """The weight that this layer multiplies by, [out, in] float32."""
        return self.weight.float() * self.scale_M.unsqueeze(1)


def quantise_base(blocks: Sequence[nn.Module], names: Sequence[str], device: torch.device) -> None:
    """Replace the named linear layers of each block, wrapped by peft or not, by `Fp8Linear`s on `device`."""
    for block in blocks:
        for name in names:
            module = block.get_submodule(name)
            plain = module.base_layer if isinstance(module, LoraLinear) else module
            if any(size % 16 for size in plain.weight.shape):
                raise UsageError(
                    f"base_linears = fp8: {name} is {plain.in_features} x {plain.out_features}, and 8-bit "
                    "products want multiples of 16; set it to dtype"
                )
            quantised = Fp8Linear(plain.weight.detach().to(device))
            if module is plain:
                block.set_submodule(name, quantised)
            else:
                module.base_layer = quantised


def check_device(device: torch.device, section: str = "train") -> None:
    """Raise `UsageError` unless the device multiplies 8-bit floating point. section: of the recipe, to name in it."""
    found = "a CPU"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= FIRST_CAPABILITY:
            return
        found = f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}"
    first = ".".join(map(str, FIRST_CAPABILITY))
    raise UsageError(
        f"{section}.base_linears = fp8 needs an NVIDIA GPU of compute capability {first} or later (Ada, Hopper, "
        f"Blackwell), this is {found}; set it to dtype"
    )


def fp8_linear(layers: Sequence[Fp8Linear], x: Tensor, down: Tensor | None, up: Tensor | None) -> Tensor:
    """Apply layers that share an input, with one product for all: [..., in] -> [..., sum of outs], bfloat16.

    down [rank, in], up [sum of outs, rank]: the stacked adapter in x's dtype, bfloat16; None for no adapter.
    """
    if len(layers) == 1:
        weight, scale, transposed = layers[0].weight, layers[0].scale_M, layers[0].transposed_KM
    else:
        weight = _joined([layer.weight for layer in layers], 0)
        scale = torch.cat([layer.scale_M for layer in layers])
        transposed = _joined([layer.transposed_KM for layer in layers], 1)
    return _Fp8Linear.apply(x.flatten(0, -2), weight, scale, transposed, down, up).unflatten(0, x.shape[:-1])


def quantise(x_NK: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits, [N, K], and the float32 scale [N, 1] that gives their values back."""
    top = torch.finfo(dtype).max
    largest_N1 = x_NK.abs().amax(1, keepdim=True).float().clamp(min=1e-12)
    return (x_NK.float() * (top / largest_N1)).to(dtype), largest_N1 / top


class _Fp8Linear(torch.autograd.Function):
    """y = x W^T + (x A^T) B^T: the base in 8 bits, the adapter and its gradients in x's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NK: Tensor,
        weight_MK: Tensor,
        scale_M: Tensor,
        transposed_KM: Tensor,
        down: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        rows, scale_N1 = quantise(x_NK)
        low_rank = None if down is None else x_NK @ down.t()
        # The adapter's gradients need x; the base's does not.
        ctx.save_for_backward(None if down is None else x_NK, low_rank, scale_M, transposed_KM, down, up)
        return torch.ops.latentline.fp8_matmul(rows, scale_N1, weight_MK, scale_M, low_rank, up)

    @staticmethod
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, ...]:
        x_NK, low_rank, scale_M, transposed_KM, down, up = ctx.saved_tensors
        grad_low_rank = None if down is None else grad_NM @ up
        grad_x = None
        if ctx.needs_input_grad[0]:
            rows, scale_N1 = quantise(grad_NM.float() * scale_M, GRADIENTS)
            ones_K = scale_M.new_ones(transposed_KM.shape[0])
            up_KR = None if down is None else down.t()
            grad_x = torch.ops.latentline.fp8_matmul(rows, scale_N1, transposed_KM, ones_K, grad_low_rank, up_KR)
        if down is None or grad_low_rank is None:
            return grad_x, None, None, None, None, None
        return grad_x, None, None, None, grad_low_rank.t() @ x_NK, grad_NM.t() @ low_rank


@torch.library.custom_op("latentline::fp8_matmul", mutates_args=())
def _fp8_matmul(
    x_NK: Tensor, scale_N1: Tensor, weight_MK: Tensor, scale_M: Tensor, low_NR: Tensor | None, up_MR: Tensor | None
) -> Tensor:
    """(x scale_N1) (weight scale_M)^T + low up^T, bfloat16 [N, M].

    One operator, so that the low-rank product is added in place: as two, the compiler would copy the wide one first.
    """
    y_NM = torch._scaled_mm(
        x_NK,
        weight_MK.t(),
        scale_a=scale_N1,
        scale_b=scale_M.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # adds a tenth to a product's rounding error, which quantising exceeds tenfold
    )
    if low_NR is not None and up_MR is not None:
        if y_NM.is_cuda:
            from train.kernels import add_low_rank

            add_low_rank(y_NM, low_NR, up_MR)
        else:
            y_NM.addmm_(low_NR, up_MR.t())
    return y_NM


@_fp8_matmul.register_fake
def _(
    x_NK: Tensor, scale_N1: Tensor, weight_MK: Tensor, scale_M: Tensor, low_NR: Tensor | None, up_MR: Tensor | None
) -> Tensor:
    return x_NK.new_empty(x_NK.shape[0], weight_MK.shape[0], dtype=torch.bfloat16)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat([part.view(torch.uint8) for part in parts], dim).view(E4M3)
