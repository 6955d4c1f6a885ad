"""The tiny pipeline, a video, and adapters made with peft and saved by diffusers, as a trainer does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict

from infer.cosmos25 import load_pipeline
from infer.video import write_mp4
from manifests.config import ModelConfig

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]

SaveAdapter = Callable[..., Path]


@pytest.fixture
def pipe(tiny_checkpoint: Path) -> Cosmos2_5_PredictBasePipeline:
    return load_pipeline(
        ModelConfig(path=str(tiny_checkpoint)),
        dtype=torch.float32,
        device=torch.device("cpu"),
        guardrail=False,
    )


@pytest.fixture
def save_adapter(tiny_checkpoint: Path, tmp_path: Path) -> SaveAdapter:
    """A function that writes a random adapter and returns its folder."""

    def save(name: str = "adapter", *, rank: int = 4, alpha: float = 4.0, dora: bool = False, seed: int = 0) -> Path:
        transformer = CosmosTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, use_dora=dora)
        transformer.add_adapter(config)
        state = get_peft_model_state_dict(transformer)
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in state.items():
            noise = torch.randn(tensor.shape, generator=generator)
            state[key] = tensor * (1 + 0.1 * noise) if "magnitude" in key else 0.2 * noise
        metadata = config.to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])
        Cosmos2_5_PredictBasePipeline.save_lora_weights(
            tmp_path / name,
            transformer_lora_layers=state,
            transformer_lora_adapter_metadata={
                key: metadata[key] for key in ("r", "lora_alpha", "target_modules", "use_dora")
            },
        )
        return tmp_path / name

    return save


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 frames of 64 x 96, 12 fps: a bright square that moves."""
    frames = np.zeros((17, 64, 96, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[20:44, 10 + 3 * index : 34 + 3 * index] = (220, 90, 30)
    path = tmp_path_factory.mktemp("video") / "in.mp4"
    write_mp4(path, frames, 12.0)
    return path
