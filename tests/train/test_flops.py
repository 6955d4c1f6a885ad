import torch
from diffusers import CosmosTransformer3DModel

from benchmarks.real_checkpoint import TRANSFORMER_2B
from train import cosmos25
from train.flops import throughput


def test_a_step_of_the_real_model_is_what_was_counted_by_hand():
    """994 TFLOP at 31,104 tokens and 6,320 at 84,480, attention 78% and 91% of them (cross-attention aside)."""
    with torch.device("meta"):
        transformer = CosmosTransformer3DModel(**TRANSFORMER_2B).requires_grad_(False)
    for shape, teraflop in (((16, 24, 54, 96), 994), ((16, 24, 88, 160), 6320)):
        assert abs(cosmos25.flops_per_sample(transformer, shape, 512) / 1e12 / teraflop - 1) < 0.02


def test_throughput_is_per_device():
    speed = throughput(2e12, samples_per_second=4.0, world=2, device=torch.device("cpu"))
    assert speed == {"tflops_per_device": 4.0, "device_seconds_per_sample": 0.5}


def test_weights_that_train_cost_half_as_much_again():
    with torch.device("meta"):
        transformer = CosmosTransformer3DModel(**TRANSFORMER_2B).requires_grad_(False)
    shape, hidden, layers = (16, 24, 54, 96), 2048, 28
    frozen = cosmos25.flops_per_sample(transformer, shape, 512)
    trained = cosmos25.flops_per_sample(transformer.requires_grad_(True), shape, 512)
    rows, context = 24 * 27 * 48, 512
    gradient = 2 * layers * (rows * (6 * hidden**2 + 8 * hidden**2) + context * 2 * hidden * 1024)
    assert trained - frozen == gradient
