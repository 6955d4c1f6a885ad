"""VAE encode at real size: diffusers' encoder, eager, against ours, in one process on one GPU, random weights.

    python -m benchmarks.vae [--height 432 --width 768 --num-frames 93] [--commit REV] [--output FILE]

The correctness check comes first: both in bfloat16 against diffusers in float32 (TF32 off), and ours in one chunk
against many. Times are medians by CUDA events, without and with the upload of the frames.
"""

from __future__ import annotations

import argparse
import copy

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.real_checkpoint import bfloat16_on
from benchmarks.report import add_arguments, bullets, report, table
from benchmarks.training_step import clear, milliseconds, peak_gib
from encode.wan import CHUNK_PIXELS, ChunkedEncoder, chunks


@torch.no_grad()
def stock_encode(vae: AutoencoderKLWan, frames_THWC: Tensor) -> Tensor:
    """The posterior mean [C, T', H / 8, W / 8] as diffusers computes it, from uint8 frames."""
    pixels = frames_THWC.cuda().permute(3, 0, 1, 2).unsqueeze(0)
    return vae.encode((pixels.float() / 127.5 - 1.0).to(vae.dtype)).latent_dist.mode()[0]


def check(vae: AutoencoderKLWan, frames_THWC: Tensor) -> list[str]:
    """Errors against float32; ours must not be larger than eager bfloat16's."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    exact = stock_encode(copy.deepcopy(vae).float(), frames_THWC)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    pixels = frames_THWC[0, ..., 0].numel()
    outputs = {
        "diffusers": stock_encode(vae, frames_THWC),
        "ours": ChunkedEncoder(vae).encode(frames_THWC),
        "ours in chunks of 4 frames": ChunkedEncoder(vae, chunk_pixels=4 * pixels).encode(frames_THWC),
    }
    errors = {name: float((value - exact).norm() / exact.norm()) for name, value in outputs.items()}
    if not errors["ours"] <= errors["diffusers"]:
        raise SystemExit(f"ours is less exact than eager bfloat16: {errors}")
    same = torch.equal(outputs["ours"], outputs["ours in chunks of 4 frames"])
    return [
        f"error against float32, bfloat16: {', '.join(f'{name} {error:.4f}' for name, error in errors.items())}",
        f"chunks of another length give {'the same bits' if same else 'other bits'}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=432)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--num-frames", type=int, default=93)
    add_arguments(parser)
    options = parser.parse_args()
    shape = (options.num_frames, options.height, options.width, 3)
    torch.manual_seed(0)
    with bfloat16_on("cuda"):
        vae = AutoencoderKLWan().eval().requires_grad_(False)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    notes = check(vae, frames)
    print(*notes, sep="\n", flush=True)
    fast, uploaded = ChunkedEncoder(vae), frames.cuda()
    rows = []
    for name, call in (
        ("diffusers, eager", lambda: stock_encode(vae, uploaded)),
        ("ours", lambda: fast.encode(uploaded)),
        ("ours, frames from the CPU", lambda: fast.encode(frames)),
        ("diffusers, eager, again", lambda: stock_encode(vae, uploaded)),
        ("ours, again", lambda: fast.encode(uploaded)),
    ):
        clear()
        rows.append((name, milliseconds(call, repeats=5, warm=1), peak_gib()))
        print(rows[-1], flush=True)
    stock = rows[0][1]
    cuts = list(chunks(options.num_frames, CHUNK_PIXELS // (options.height * options.width)))
    notes.append(
        f"chunks of {', '.join(str(end - begin) for begin, end in cuts)} frames; peaks hold weights and frames"
    )
    report(
        options,
        f"VAE encode at {options.height}x{options.width}x{options.num_frames}, bfloat16, random weights",
        table(
            ["encoder", "ms", "peak GiB", "diffusers / this"],
            [f"| {name} | {time:,.0f} | {peak:.1f} | {stock / time:.2f} |" for name, time, peak in rows],
        ),
        bullets(notes),
        command="python -m benchmarks.vae",
        packages=("torch", "triton", "diffusers"),
    )


if __name__ == "__main__":
    main()
