"""The denoising loop computes what diffusers' pipeline computes, float32, for every mode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Cosmos2_5_PredictBasePipeline
from PIL import Image

from infer import cosmos25
from infer import denoise as loop
from infer.adapters import load_adapters
from infer.config import AdapterConfig
from infer.loading import NoGuardrail
from tests.infer.conftest import SaveAdapter

FP32 = 1e-5
SIZE = {"height": 32, "width": 48, "num_frames": 13}


@pytest.fixture
def stock(tiny_checkpoint: Path) -> Cosmos2_5_PredictBasePipeline:
    pipe = Cosmos2_5_PredictBasePipeline.from_pretrained(tiny_checkpoint, safety_checker=NoGuardrail())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(mode: str) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    count = {"text": 0, "image": 1, "video1": 1, "video2": 5}[mode]
    return [Image.fromarray(generator.integers(0, 256, (32, 48, 3), dtype=np.uint8)) for _ in range(count)]


def stock_latents(
    pipe: Cosmos2_5_PredictBasePipeline, mode: str, guidance: float, conditioning_timestep: float
) -> torch.Tensor:
    given = pictures(mode)
    return pipe(
        image=given[0] if mode == "image" else None,
        video=given if mode.startswith("video") else None,
        prompt="a red circle",
        negative_prompt="blurry",
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(0),
        num_latent_conditional_frames=1 if mode == "video1" else 2,
        conditional_frame_timestep=conditioning_timestep,
        output_type="latent",
        **SIZE,
    ).frames


def our_latents(
    pipe: Cosmos2_5_PredictBasePipeline, mode: str, guidance: float, conditioning_timestep: float
) -> torch.Tensor:
    prompts = ["a red circle", "blurry"] if guidance > 1 else ["a red circle"]
    contexts = [cosmos25.encode_prompt(pipe, prompt) for prompt in prompts]
    given = pictures(mode)
    return loop.denoise(
        pipe,
        contexts,
        condition_BCTHW=pipe.video_processor.preprocess_video(given, 32, 48) if given else None,
        num_steps=3,
        guidance=guidance,
        generator=torch.Generator("cpu").manual_seed(0),
        conditioning_timestep=conditioning_timestep,
        on_step=lambda: None,
        **SIZE,
    )


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    ("mode", "guidance", "adapter"),
    [
        *((mode, guidance, None) for mode in ("text", "image", "video1", "video2") for guidance in (1.0, 7.0)),
        ("text", 7.0, "dora"),
        ("image", 1.0, "lora"),
        ("image", 7.0, "lora"),
        ("video2", 7.0, "lora"),
    ],
)
def test_latents_are_those_of_the_stock_pipeline(
    pipe: Cosmos2_5_PredictBasePipeline,
    stock: Cosmos2_5_PredictBasePipeline,
    save_adapter: SaveAdapter,
    mode: str,
    guidance: float,
    adapter: str | None,
) -> None:
    if adapter is not None:
        for each in (pipe, stock):
            load_adapters(each, {"a": AdapterConfig(path=str(save_adapter(dora=adapter == "dora")), weight=0.5)})
    expected = stock_latents(stock, mode, guidance, 0.0001)
    assert distance(our_latents(pipe, mode, guidance, 0.0001), expected) < FP32


def test_clean_frames_may_have_the_others_timestep(
    pipe: Cosmos2_5_PredictBasePipeline, stock: Cosmos2_5_PredictBasePipeline
) -> None:
    assert distance(our_latents(pipe, "video2", 7.0, -1.0), stock_latents(stock, "video2", 7.0, -1.0)) < FP32


def test_predictions_one_by_one_are_those_of_a_batch(
    pipe: Cosmos2_5_PredictBasePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = our_latents(pipe, "image", 7.0, 0.0001)
    monkeypatch.setattr(loop, "_fits", lambda *args: False)
    assert distance(our_latents(pipe, "image", 7.0, 0.0001), together) < FP32


def test_frames_are_those_of_the_stock_pipeline(
    pipe: Cosmos2_5_PredictBasePipeline, stock: Cosmos2_5_PredictBasePipeline
) -> None:
    latents = torch.randn(1, 16, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    stock.vae.requires_grad_(False)
    expected = stock.vae.decode(latents / stock.latents_std + stock.latents_mean, return_dict=False)[0]
    expected = stock.video_processor.postprocess_video(expected, output_type="np")[0]
    np.testing.assert_array_equal(loop.decode(pipe, latents, 13), expected)
    assert loop.decode(pipe, latents, 9).shape == (9, 32, 48, 3)


def test_videos_are_made_without_what_only_text_needs(pipe: Cosmos2_5_PredictBasePipeline) -> None:
    contexts = [cosmos25.encode_prompt(pipe, prompt) for prompt in ("a red circle", "blurry")]
    assert contexts[0].shape == (1, 512, pipe.transformer.config.encoder_hidden_states_channels)
    before = our_latents(pipe, "text", 7.0, 0.0001)
    cosmos25.release_text(pipe)
    assert pipe.text_encoder is None
    assert not list(pipe.transformer.crossattn_proj.parameters())
    after = loop.denoise(
        pipe,
        contexts,
        condition_BCTHW=None,
        num_steps=3,
        guidance=7.0,
        generator=torch.Generator("cpu").manual_seed(0),
        conditioning_timestep=0.0001,
        on_step=lambda: None,
        **SIZE,
    )
    torch.testing.assert_close(after, before, rtol=0, atol=0)
