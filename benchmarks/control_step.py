"""One control-training step of Cosmos-Transfer2.5 at real size: on the fly against from the cache, random weights.

    python -m benchmarks.control_step [--height 704 --width 1280] [--linears dtype,fp8] [--commit REV] [--output FILE]
    python -m benchmarks.control_step --tiny            the same code on a CPU, in seconds: no number to state

On the fly, every step: Canny of the window, the VAE for the video and for the hint, the text encoder, then diffusers'
own controlnet and transformer under autocast with gradient checkpointing. From the cache: `train.model`'s own parts,
with latents, hint and projected context given; the blocks of the frozen base in 8 bits where asked. All train the
control blocks and the hint's embedder with AdamW; the first step's losses are compared before any number is stated.
Decoding is in neither.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, CosmosControlNetModel, CosmosTransformer3DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.real_checkpoint import TEXT_7B, TRANSFORMER_2B, bfloat16_on
from benchmarks.report import add_arguments, bullets, report, table
from manifests.hints import make_hint
from train import cosmos_transfer25 as family
from train.activation import measured_plan, set_levels
from train.attention import choose_kernel, use_kernel
from train.config import ObjectiveConfig
from train.fp8 import quantise_base
from train.transfer_dit import attach_controlnet

LENGTH = 512
TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "text_embed_dim": 64, "adaln_lora_dim": 16}
REAL_CONTROL = {"img_context_dim_in": 1152, "img_context_dim_out": 2048}


TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}


class Models:
    """Frozen base and controlnet, the control branch trainable; VAE and text encoder."""

    def __init__(self, tiny: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.tiny, self.device = tiny, device
        self.dtype = torch.float32 if tiny else torch.bfloat16
        base: dict[str, Any] = {**TRANSFORMER_2B, **REAL_CONTROL, "controlnet_block_every_n": 7}
        if tiny:
            wide = {"crossattn_proj_in_channels": 128, "encoder_hidden_states_channels": 64, "num_layers": 4}
            base |= TINY | wide | {"img_context_dim_in": 24, "img_context_dim_out": 64, "controlnet_block_every_n": 2}
        width = base["num_attention_heads"] * base["attention_head_dim"]
        shared = (
            "num_attention_heads", "attention_head_dim", "mlp_ratio", "text_embed_dim", "adaln_lora_dim", "max_size",
            "patch_size", "rope_scale", "extra_pos_embed_type", "use_crossattn_projection",
            "crossattn_proj_in_channels", "encoder_hidden_states_channels", "img_context_dim_in", "img_context_dim_out",
        )  # fmt: skip
        with torch.device(device) if tiny else bfloat16_on("cuda"):
            self.base = CosmosTransformer3DModel(**base).to(self.dtype)
            self.net = CosmosControlNetModel(
                **{name: base[name] for name in shared if name in base},
                n_controlnet_blocks=-(-base["num_layers"] // base["controlnet_block_every_n"]),
                model_channels=width,
                in_channels=130,
                latent_channels=18,
            ).to(self.dtype)
            text = TINY_TEXT if tiny else TEXT_7B
            vae = {"base_dim": 8, "num_res_blocks": 1} if tiny else {}
            self.vae = AutoencoderKLWan(**vae).to(self.dtype)
            self.text = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text)).to(self.dtype)
        self.net.crossattn_proj.load_state_dict(self.base.crossattn_proj.state_dict())
        for model in (self.base, self.net, self.vae, self.text):
            model.requires_grad_(False)
        self.trained = [*self.net.control_blocks.parameters(), *self.net.patch_embed.parameters()]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=not self.tiny)

    @torch.no_grad()
    def latents(self, frames_THWC: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(frames_THWC).to(self.device).permute(3, 0, 1, 2).unsqueeze(0)
        mean, std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        video = (pixels.float() / 127.5 - 1).to(self.dtype)
        return (self.vae.encode(video).latent_dist.mode().float() - mean) / std

    @torch.no_grad()
    def context(self) -> torch.Tensor:
        ids = torch.ones(1, LENGTH, dtype=torch.long, device=self.device)
        states = self.text(ids, output_hidden_states=True).hidden_states[1:]
        parts = [(s - s.mean(-1, keepdim=True)) / (s.std(-1, keepdim=True) + 1e-8) for s in states]
        return torch.cat(parts, -1)


def hint_of(frames_THWC: np.ndarray) -> np.ndarray:
    return np.stack([make_hint("edge", {"low": 60, "high": 160}, frame) for frame in frames_THWC])


def drawn(shape: torch.Size, device: torch.device) -> dict[str, torch.Tensor]:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    sigma, clean = torch.tensor([0.7], device=device), torch.tensor([1], device=device)
    return {"noise": noise, "sigma": sigma, "num_conditioning": clean}


def online_loss(models: Models, frames: np.ndarray) -> torch.Tensor:
    """Everything from pixels and text, by stock modules."""
    latents, hint, text = models.latents(frames), models.latents(hint_of(frames)), models.context()
    given = drawn(latents.shape, models.device)
    image = torch.zeros(
        1, models.base.config.img_context_num_tokens, models.base.config.img_context_dim_in, device=models.device
    )

    def stock(hidden_states: torch.Tensor, hint: torch.Tensor, return_dict: bool, **rest: Any) -> Any:
        rest["encoder_hidden_states"] = (rest["encoder_hidden_states"], image.to(text.dtype))
        rest = {name: value.to(models.dtype) if torch.is_tensor(value) else value for name, value in rest.items()}
        inputs = hidden_states.to(models.dtype)
        residuals = models.net(controls_latents=hint.to(models.dtype), latents=inputs, return_dict=False, **rest)[0]
        return models.base(hidden_states=inputs, block_controlnet_hidden_states=residuals, return_dict=False, **rest)

    batch = given | {"latents": latents, "hint": hint, "context": text}
    with models.autocast():
        return family.loss(stock, batch, ObjectiveConfig(conditioning_timestep=0.1))


def steps(call: Callable[[], torch.Tensor], models: Models, repeats: int, lr: float) -> tuple[float, float, float]:
    """(median seconds of an optimizer step, peak GiB, loss of the first step)."""
    optimizer = torch.optim.AdamW(models.trained, lr=lr, fused=models.device.type == "cuda")
    seconds, losses = [], []
    for repeat in range(repeats + 1):
        if models.device.type == "cuda":
            torch.cuda.synchronize()
            if repeat == 1:  # the first step compiles, and tries out kernels
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        loss = call().sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - begin)
        print(f"{losses[-1]:.5f} in {seconds[-1]:.3f} s", flush=True)
    return statistics.median(seconds[1:]), peak_gib(models.device), losses[0]


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


class Cached:
    """Training from the cache: what is cached, the joined model, and how its blocks keep their activations."""

    def __init__(self, models: Models, frames: np.ndarray, memory_gib: float) -> None:
        self.models, self.memory_gib = models, memory_gib
        latents, hint, text = models.latents(frames), models.latents(hint_of(frames)), models.context()
        with torch.no_grad():
            context = models.base.crossattn_proj(text)
        self.batch = drawn(latents.shape, models.device) | {"latents": latents, "hint": hint, "context": context}
        del models.vae, models.text, text
        self.joined = attach_controlnet(models.base, models.net)
        family.drop_projections(self.joined)
        self.joined.train()
        shape = family.attention_shape(self.joined, tuple(latents.shape[1:]))
        self.kernel = choose_kernel(shape, models.dtype, models.device)

    def plan(self) -> str:
        """Plan the memory of all blocks as `train.model` does; its description."""
        blocks, device = family.blocks(self.joined), self.models.device
        if self.models.tiny:
            return "none (CPU)"
        gc.collect()
        torch.cuda.empty_cache()
        # Gradients, two moments, and the copy of trained weights that autocast makes.
        resident = torch.cuda.memory_allocated() + 14 * sum(p.numel() for p in self.models.trained)
        inputs = family.block_inputs(self.joined, tuple(self.batch["latents"].shape), LENGTH, device)
        with use_kernel(self.kernel), self.models.autocast():
            chosen = measured_plan(
                blocks[1],
                inputs,
                num_blocks=len(blocks),
                resident=resident,
                limit=int(self.memory_gib * 2**30),
            )
        set_levels(blocks, chosen.levels, compiled=True)
        return chosen.describe()

    def loss(self) -> torch.Tensor:
        with use_kernel(self.kernel), self.models.autocast():
            return family.loss(self.joined, self.batch, ObjectiveConfig(conditioning_timestep=0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=704)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--num-frames", type=int, default=93)
    parser.add_argument("--memory-gib", type=float, default=72.0)
    parser.add_argument("--linears", default="dtype", help="of the frozen base: dtype, or dtype,fp8 to time both")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps; on the fly one step takes half a minute")
    parser.add_argument("--lr", type=float, default=1e-6)
    add_arguments(parser)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.height, options.width, options.num_frames, options.repeats = 32, 48, 9, 1
    device = torch.device("cpu" if options.tiny else "cuda")
    models = Models(options.tiny, device)
    shape = (options.num_frames, options.height, options.width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if not options.tiny:
        models.base.enable_gradient_checkpointing()
        models.net.enable_gradient_checkpointing()
    before = [parameter.detach().clone() for parameter in models.trained]
    seconds, peak, expected = steps(lambda: online_loss(models, frames), models, options.repeats, options.lr)
    rows = [f"| on the fly | {seconds:.3f} | {peak:.1f} | 1.00 | {expected:.5f} |"]
    print(rows[-1], flush=True)
    models.base.disable_gradient_checkpointing()
    models.net.disable_gradient_checkpointing()
    cached = Cached(models, frames, options.memory_gib)
    notes = [f"attention: {cached.kernel}"]
    for linears in options.linears.split(","):
        for parameter, value in zip(models.trained, before, strict=True):
            parameter.data.copy_(value)
        if linears == "fp8":
            quantise_base(list(cached.joined.transformer_blocks), family.TOKEN_LINEARS, device)
        plan = cached.plan()
        ours, peak, loss = steps(cached.loss, models, options.repeats, options.lr)
        difference = abs(loss - expected) / abs(expected)
        name = "from the cache" + (", fp8 linears in the base" if linears == "fp8" else "")
        rows.append(f"| {name} | {ours:.3f} | {peak:.1f} | {seconds / ours:.2f} | {loss:.5f} |")
        notes.append(f"{name}: {plan}; measured {peak:.1f} GiB; first loss {difference:.1e} from on the fly's")
        print(notes[-1], rows[-1], sep="\n", flush=True)
        if difference > (1e-5 if options.tiny else 2e-2):
            raise SystemExit("the losses differ: not the same training")
    report(
        options,
        f"Control training step at {options.height}x{options.width}x{options.num_frames}, batch 1, bfloat16, random "
        "weights",
        table(["step", "s", "peak GiB", "on the fly / this", "loss"], rows),
        bullets(notes),
        command=f"python -m benchmarks.control_step --linears {options.linears} --repeats {options.repeats}",
        packages=("torch", "diffusers"),
    )


if __name__ == "__main__":
    main()
