"""Training with the frozen base's linear layers in 8 bits against bfloat16: the same losses, how far gradients move.

    python -m benchmarks.fp8_parity [--steps 20] [--lr 1e-3] [--commit REV] [--output FILE]

The same four samples, noise and noise levels, the same adapter of rank 32, real shapes, random weights. First the
adapter's gradients of one step against float32, by precision of the base (8 layers, 4 latent frames: float32 is slow).
Then both train for `--steps` steps at 432x768x93, and their losses are compared step by step.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
from diffusers import CosmosTransformer3DModel

from benchmarks.report import add_arguments, report, table
from benchmarks.training_step import DEVICE, RANK, batch, clear, random_context, transformer
from train import cosmos25, fp8
from train.activation import set_levels
from train.adapters import adapter_parameters
from train.attention import choose_kernel, use_kernel
from train.config import ObjectiveConfig
from train.dit import accelerate
from train.fp8 import quantise_base

SMALL = (16, 4, 54, 96)
WHOLE = (16, 24, 54, 96)
SAMPLES = 4


def gradient(model: CosmosTransformer3DModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    cosmos25.loss(model, given, ObjectiveConfig()).sum().backward()
    return torch.cat([p.grad.float().flatten() for p in adapter_parameters(model).values()])


def gradient_errors() -> list[str]:
    """Rows of a table: error and cosine of the adapter's gradients against float32."""
    base = transformer(projected=True, num_layers=8)
    given = batch(SMALL, random_context())
    exact = gradient(accelerate(copy.deepcopy(base).float()), given | {"context": given["context"].float()})
    rows = []
    for name, gradients in (("bfloat16", None), ("fp8, gradients e4m3", "e4m3"), ("fp8, gradients e5m2", "e5m2")):
        model = accelerate(copy.deepcopy(base))
        before = fp8.GRADIENTS
        if gradients:
            fp8.GRADIENTS = fp8.FORMATS[gradients]
            quantise_base(cosmos25.blocks(model), cosmos25.TOKEN_LINEARS, DEVICE)
        found = gradient(model, given)
        fp8.GRADIENTS = before
        error = float((found - exact).norm() / exact.norm())
        cosine = float(torch.nn.functional.cosine_similarity(found, exact, dim=0))
        rows.append(f"| {name} | {error:.4f} | {cosine:.5f} |")
        print(rows[-1], flush=True)
    return rows


def losses(steps: int, lr: float, linears: str) -> Iterator[float]:
    """Train a fresh adapter; the loss of each step."""
    clear()
    model = accelerate(transformer(projected=True))
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            parameter.data.zero_()
    if linears == "fp8":
        quantise_base(cosmos25.blocks(model), cosmos25.TOKEN_LINEARS, DEVICE)
    blocks = cosmos25.blocks(model)
    set_levels(blocks, ["attention"] * len(blocks), compiled=True)
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    with use_kernel(choose_kernel(cosmos25.attention_shape(model, WHOLE), torch.bfloat16, DEVICE)):
        for step in range(steps):
            generator = torch.Generator(DEVICE).manual_seed(step % SAMPLES)
            given = batch(WHOLE, random_context())
            given["latents"] = torch.randn(given["latents"].shape, device=DEVICE, generator=generator)
            given["sigma"] = torch.rand(1, device=DEVICE, generator=generator)
            loss = cosmos25.loss(model, given, ObjectiveConfig()).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    add_arguments(parser)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    errors = gradient_errors()
    curves = {}
    for linears in ("dtype", "fp8"):
        curves[linears] = list(losses(options.steps, options.lr, linears))
        print(linears, [f"{loss:.4f}" for loss in curves[linears]], flush=True)
    pairs = list(zip(curves["dtype"], curves["fp8"], strict=True))
    apart = [abs(eight - sixteen) / sixteen for sixteen, eight in pairs]
    if max(apart) > 0.02:
        raise SystemExit(f"losses are {max(apart):.1%} apart: {pairs}")
    shown = sorted({*range(0, options.steps, max(1, options.steps // 10)), options.steps - 1})
    report(
        options,
        f"Frozen linear layers in 8 bits against bfloat16, LoRA r{RANK}, random weights",
        table(["base", "error of LoRA gradients against float32", "cosine"], errors),
        table(
            ["step", "loss, bfloat16", "loss, fp8", "apart"],
            [f"| {i + 1} | {pairs[i][0]:.5f} | {pairs[i][1]:.5f} | {apart[i]:.3%} |" for i in shown],
        ),
        f"Largest difference of {options.steps} steps {max(apart):.3%}, mean {sum(apart) / len(apart):.3%}; "
        f"learning rate {options.lr:g}, {SAMPLES} samples in turn. Gradients: 8 layers, 4 latent frames; losses: "
        "28 layers, 432x768x93.",
        command=f"python -m benchmarks.fp8_parity --steps {options.steps}",
    )


if __name__ == "__main__":
    main()
