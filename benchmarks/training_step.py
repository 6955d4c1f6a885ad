"""One LoRA training step at real size: diffusers' recipe against ours, in one process on one GPU, random weights.

    python -m benchmarks.training_step [--height 432 --width 768] [--linears dtype,fp8] [--commit REV] [--output FILE]

The baseline is diffusers' own modules run as its Cosmos LoRA example runs them: VAE and text encoder every step,
gradient checkpointing, autocast. Ours trains from cached latents and contexts through `train.model`'s own parts. A
correctness check comes before every timing: outputs and adapter gradients of both in bfloat16, against float32; and of
ours with the base's linear layers in 8 bits, whose error is larger and reported.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import statistics
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.real_checkpoint import TEXT_7B, TRANSFORMER_2B, bfloat16_on
from benchmarks.report import add_arguments, bullets, report, table
from train import cosmos25
from train.activation import MemoryPlan, estimate, measured_plan, set_levels
from train.adapters import adapter_parameters, add_adapter
from train.attention import Kernel, attend, choose_kernel, use_kernel
from train.config import LoraConfig, ObjectiveConfig
from train.dit import accelerate, block_inputs
from train.fp8 import quantise_base

DEVICE = torch.device("cuda")
NUM_FRAMES = 93
RANK = 32
CONTEXT_LENGTH, CONTEXT_WIDTH = 512, 1024


def milliseconds(call: Callable[[], object], *, repeats: int = 5, warm: int = 2) -> float:
    """Median time of a call by CUDA events."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def sustained(call: Callable[[], object], *, warm_ms: float = 1500) -> float:
    """Mean time of a call, milliseconds, on a GPU that has been as busy for a second and a half, as in training."""
    count = max(3, int(warm_ms / milliseconds(call, repeats=1, warm=1)))

    def repeatedly() -> None:
        for _ in range(count):
            call()

    return milliseconds(repeatedly, repeats=1, warm=1) / count


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def transformer(*, projected: bool, **changes: object) -> CosmosTransformer3DModel:
    """A frozen transformer in the real shapes with a rank-32 adapter whose B is not zero."""
    torch.manual_seed(0)
    with bfloat16_on("cuda"):
        model = CosmosTransformer3DModel(**TRANSFORMER_2B | {"use_crossattn_projection": not projected} | changes)
    add_adapter(model, "lora", LoraConfig(rank=RANK, alpha=RANK), cosmos25.DEFAULT_TARGETS)
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model.train()


def batch(shape: tuple[int, ...], context: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    latents, noise = (torch.randn((1, *shape), device=DEVICE, generator=generator) for _ in range(2))
    sigma, clean = torch.tensor([0.7], device=DEVICE), torch.tensor([2], device=DEVICE)
    return {"latents": latents, "noise": noise, "context": context, "sigma": sigma, "num_conditioning": clean}


def random_context(width: int = CONTEXT_WIDTH) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(2)
    return torch.randn(1, CONTEXT_LENGTH, width, device=DEVICE, generator=generator).bfloat16()


def check() -> list[str]:
    """Errors against float32 of the stock forward under autocast and of ours; ours must not be larger."""
    shape = (16, 4, 54, 96)
    given = batch(shape, random_context())
    stock = transformer(projected=True, num_layers=8)
    exact = copy.deepcopy(stock).float()
    fast = accelerate(copy.deepcopy(stock))
    results = {}
    eight_bits = copy.deepcopy(fast)
    quantise_base(cosmos25.blocks(eight_bits), cosmos25.TOKEN_LINEARS, DEVICE)
    for name, model in (("exact", exact), ("stock", stock), ("ours", fast), ("fp8", eight_bits)):
        with torch.autocast("cuda", torch.bfloat16, enabled=name == "stock"):
            loss = cosmos25.loss(model, given | {"context": given["context"].float()}, ObjectiveConfig())
        loss.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()])
        results[name] = loss.detach(), gradient
    truth = results["exact"][1]
    errors = {name: float((results[name][1] - truth).norm() / truth.norm()) for name in ("stock", "ours", "fp8")}
    if errors["ours"] > errors["stock"] * 1.02 or not errors["fp8"] < 0.2:
        raise SystemExit(f"gradients are worse than stock bfloat16's, or far off in 8 bits: {errors}")
    return [
        f"LoRA gradient error against float32 (8 layers, 4 latent frames): stock bfloat16 {errors['stock']:.4f}, "
        f"ours {errors['ours']:.4f}, ours with fp8 linears {errors['fp8']:.4f}"
    ]


def floor(
    tokens: int, kernel: Kernel, clock: Callable[[Callable[[], object]], float] = milliseconds
) -> tuple[float, list[str]]:
    """Milliseconds of a step's attention at the best kernel's rate and of its linears at the GEMM rate.

    The model FLOP of `train.flops`: attention to the video and to the text, and the base's linears over the tokens.
    clock: `milliseconds` times a kernel that runs a few times on an idle GPU, `sustained` on one that is as busy as in
    training, whose clocks are lower.
    """
    shape = (1, tokens, 16, 128)
    query, key, value = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    with use_kernel(kernel):
        with torch.no_grad():
            forward = clock(lambda: attend(query, key, value))
        output = attend(query, key, value)
        backward = clock(lambda: torch.autograd.grad(output, (query, key, value), grad, retain_graph=True))
    x = torch.randn(tokens, 2048, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(8192, 2048, device=DEVICE, dtype=torch.bfloat16)
    gemm = clock(lambda: x @ weight.t())
    rate = 2 * tokens * 2048 * 8192 / gemm / 1e9
    width, layers = 2048, 28
    linear = 2 * tokens * (4 + 2 + 8) * width**2 * layers / 1e9  # GFLOP, q k v out, cross q out, mlp; and again for dx
    total = layers * (forward + backward) * (1 + CONTEXT_LENGTH / tokens) + 2 * linear / rate
    flops = 4 * tokens**2 * width / 1e9
    return total, [
        f"attention {kernel}: forward {flops / forward:.0f}, backward {2.5 * flops / backward:.0f} TFLOP/s; "
        f"GEMM {rate:.0f} TFLOP/s; floor {total:.0f} ms"
    ]


def baseline(height: int, width: int, shape: tuple[int, ...]) -> list[tuple[str, float, float]]:
    """diffusers' recipe: VAE, text encoder, transformer with full checkpointing under autocast."""
    clear()
    with bfloat16_on("cuda"):
        vae = AutoencoderKLWan().eval().requires_grad_(False)
        text = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT_7B)).eval().requires_grad_(False)
    ids = torch.randint(0, 150_000, (1, CONTEXT_LENGTH), device=DEVICE)
    video = torch.rand(1, 3, NUM_FRAMES, height, width, device=DEVICE, dtype=torch.bfloat16) * 2 - 1
    model = transformer(projected=False)
    model.enable_gradient_checkpointing()
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    @torch.no_grad()
    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        latents = vae.encode(video).latent_dist.mean
        states = text(ids, output_hidden_states=True).hidden_states[1:]
        parts = [(h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-8) for h in states]
        return latents.float(), torch.cat(parts, -1)

    def step() -> None:
        latents, context = encode()
        torch.cuda.empty_cache()
        given = batch(shape, context) | {"latents": latents}
        with torch.autocast("cuda", torch.bfloat16):
            loss = cosmos25.loss(model, given, ObjectiveConfig())
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    large = height > 500
    vae_time = milliseconds(lambda: encode(), repeats=3, warm=1)
    clear()
    whole = milliseconds(step, repeats=1 if large else 3, warm=1)
    return [
        ("diffusers recipe, VAE and text encoder alone", vae_time, 0.0),
        ("diffusers recipe, step", whole, peak_gib()),
    ]


def ours(
    shape: tuple[int, ...], kernel: Kernel, memory_gib: float, level: str, linears: str
) -> tuple[float, float, MemoryPlan]:
    """Our step from cached inputs: time, measured peak and the memory plan."""
    clear()
    model = accelerate(transformer(projected=True))
    if linears == "fp8":
        quantise_base(cosmos25.blocks(model), cosmos25.TOKEN_LINEARS, DEVICE)
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    given = batch(shape, random_context())
    blocks = cosmos25.blocks(model)
    resident = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + 12 * sum(p.numel() for p in parameters)
    with use_kernel(kernel):
        if level == "auto":
            inputs = block_inputs(model, (1, *shape), CONTEXT_LENGTH, DEVICE)
            limit = int(memory_gib * 2**30)
            plan = measured_plan(blocks[1], inputs, num_blocks=len(blocks), resident=resident, limit=limit)
            del inputs
        else:
            tokens = cosmos25.num_tokens(model, shape)
            plan = estimate(level, num_blocks=28, resident=resident, tokens=tokens, hidden_size=2048, itemsize=2)
        set_levels(blocks, plan.levels, compiled=True)

        def step() -> None:
            cosmos25.loss(model, given, ObjectiveConfig()).sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        clear()
        time = milliseconds(step, repeats=2 if shape[2] > 60 else 4, warm=1)
    return time, peak_gib(), plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=432)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--memory-gib", type=float, default=72.0, help="what the auto policy may fill")
    parser.add_argument(
        "--levels", default="auto,attention", help="activation levels to time; of a second kind of linears, the first"
    )
    parser.add_argument("--linears", default="dtype", help="how the base's linear layers compute: dtype, fp8 or both")
    parser.add_argument("--kernels", default="", help="attention kernels to time; default: the measured best")
    add_arguments(parser)
    options = parser.parse_args()
    shape = (16, (NUM_FRAMES - 1) // 4 + 1, options.height // 8, options.width // 8)
    tokens = shape[1] * (shape[2] // 2) * (shape[3] // 2)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    notes = check()
    print(*notes, sep="\n", flush=True)
    best = choose_kernel((1, tokens, 16, 128), torch.bfloat16, DEVICE)
    rows = baseline(options.height, options.width, shape)
    whole = rows[-1][1]
    lines = [f"| {name} | {time:,.0f} | {peak:.1f} | | | |" for name, time, peak in rows]
    print(*lines, sep="\n", flush=True)
    linears, levels = options.linears.split(","), options.levels.split(",")
    pairs = [*itertools.product(linears[:1], levels), *itertools.product(linears[1:], levels[:1])]
    for kernel in options.kernels.split(",") if options.kernels else [best]:
        least, more = floor(tokens, kernel)
        loaded, more_loaded = floor(tokens, kernel, sustained)
        notes += more + [f"under load: {note}" for note in more_loaded]
        for linears, level in pairs:
            time, peak, plan = ours(shape, kernel, options.memory_gib, level, linears)
            name = ", ".join(["ours", kernel, level, *(["fp8 linears"] if linears == "fp8" else [])])
            notes.append(f"{name}: {plan.describe()}; measured {peak:.1f} GiB")
            lines.append(
                f"| {name} | {time:,.0f} | {peak:.1f} | {whole / time:.2f} | {least / time:.3f} | {loaded / time:.3f} |"
            )
            print(notes[-1], lines[-1], sep="\n", flush=True)
    columns = ["step", "ms", "peak GiB", "recipe / ours", "of the kernel floor", "of the floor under load"]
    report(
        options,
        f"LoRA r{RANK} step at {options.height}x{options.width}x{NUM_FRAMES}, {tokens:,} tokens, batch 1, bfloat16",
        table(columns, lines),
        bullets(notes),
        command=f"python -m benchmarks.training_step --height {options.height} --width {options.width} --linears "
        f"{options.linears} --levels {options.levels}",
        packages=("torch", "diffusers", "transformers", "peft"),
    )


if __name__ == "__main__":
    main()
