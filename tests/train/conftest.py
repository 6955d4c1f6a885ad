"""The tiny checkpoint's transformer and weights, an adapter of it, and conversions."""

import pytest
import safetensors.torch
import torch

from manifests.config import ModelConfig
from tests.train.weights import adapted, losses, randomise
from train import cosmos25
from train.adapters import save_adapter
from train.weights import load_weights, save_weights

NAMES = {"diffusers": "folder", "peft": "folder", "nvidia": "weights.pt", "comfyui": "weights.safetensors"}


@pytest.fixture
def fresh(tiny_checkpoint):
    return lambda dtype=torch.float32: cosmos25.load_transformer(ModelConfig(path=str(tiny_checkpoint)), dtype)


@pytest.fixture(params=["lora", "dora"])
def adapter(request, fresh, tmp_path):
    """The folder of a trained adapter whose alpha is not its rank, and the losses of the model that has it."""
    transformer = adapted(fresh(), request.param, alpha=7.0)
    randomise(transformer)
    save_adapter(tmp_path / "adapter", transformer)
    return tmp_path / "adapter", losses(transformer)


@pytest.fixture
def convert(tmp_path):
    """Write a source in a format and return where it lies."""
    made = []

    def run(source, form, *, alpha=None, ema=False, **options):
        made.append(source)
        output = tmp_path / f"{len(made)}_{form}" / NAMES.get(form, "model")
        save_weights(load_weights(source, alpha=alpha, ema=ema), form, output, **options)
        return output

    return run


@pytest.fixture
def base(tiny_checkpoint):
    return ModelConfig(path=str(tiny_checkpoint))


@pytest.fixture
def tensors(tiny_checkpoint):
    return safetensors.torch.load_file(tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
