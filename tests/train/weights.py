"""Transformers with adapters, and weights as they lie in files of any format."""

import safetensors.torch
import torch

from tests.train.test_cosmos25 import make_batch
from train import cosmos25
from train.adapters import WEIGHTS_NAME, adapter_parameters, add_adapter
from train.config import LoraConfig, ObjectiveConfig


def adapted(transformer, method="lora", **config):
    add_adapter(transformer, method, LoraConfig(rank=4, **config), cosmos25.DEFAULT_TARGETS, seed=5)
    return transformer


def randomise(transformer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(transformer).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def losses(transformer):
    return cosmos25.loss(transformer, make_batch(), ObjectiveConfig())


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def stored(path):
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    name = "adapter_model.safetensors" if (path / "adapter_config.json").is_file() else WEIGHTS_NAME
    return safetensors.torch.load_file(path / name if path.is_dir() else path)
