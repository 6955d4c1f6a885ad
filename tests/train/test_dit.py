"""The faster forward is the stock forward: outputs and adapter gradients, for every kind of adapter."""

import copy

import pytest
import torch
from diffusers import CosmosTransformer3DModel

from train.adapters import add_adapter
from train.config import LoraConfig
from train.cosmos25 import DEFAULT_TARGETS
from train.dit import FastCosmosTransformer, accelerate

FP32 = 1e-5
SHAPE = (2, 16, 3, 4, 6)


@pytest.fixture(scope="module")
def stock(tiny_checkpoint):
    return CosmosTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")


def adapted(stock, method="lora", names=("default",), **lora):
    transformer = copy.deepcopy(stock)
    if method is None:
        return transformer.requires_grad_(False)
    add_adapter(transformer, method, LoraConfig(rank=4, alpha=8, **lora), DEFAULT_TARGETS)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(2)
    for name in names[1:]:
        transformer.add_adapter(copy.deepcopy(transformer.peft_config["default"]), name)
    if len(names) > 1:
        transformer.set_adapters(list(names), weights=[0.5] * len(names))
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return transformer


def inputs(per_frame=True):
    generator = torch.Generator().manual_seed(1)
    num_samples, _, frames, height, width = SHAPE
    timestep = torch.rand((num_samples, 1, frames, 1, 1) if per_frame else (num_samples,), generator=generator)
    return {
        "hidden_states": torch.randn(SHAPE, generator=generator),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(num_samples, 8, 128, generator=generator),
        "condition_mask": torch.rand((num_samples, 1, frames, height, width), generator=generator).round(),
        "padding_mask": torch.zeros(1, 1, height * 8, width * 8),
        "return_dict": False,
    }


def distance(value, reference):
    value, reference = value.detach(), reference.detach()
    return float(torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference))


def run(transformer, given):
    transformer.zero_grad()
    output = transformer(**given)[0]
    if output.requires_grad:
        output.square().mean().backward()
    trained = [p.grad.flatten() for p in transformer.parameters() if p.requires_grad]
    return output.detach(), torch.cat(trained) if trained else None


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda s: adapted(s, None), id="base"),
        pytest.param(adapted, id="lora"),
        pytest.param(lambda s: adapted(s, "dora"), id="dora"),
        pytest.param(lambda s: adapted(s, names=("default", "second")), id="two"),
        pytest.param(lambda s: adapted(s, targets=("to_q", "ff.net.2")), id="few targets"),
        pytest.param(lambda s: adapted(s, dropout=0.5).eval(), id="dropout, not training"),
    ],
)
def test_outputs_and_gradients_equal_the_stock_forward(stock, make, per_frame):
    expected, expected_gradient = run(make(stock), inputs(per_frame))
    output, gradient = run(accelerate(make(stock)), inputs(per_frame))
    assert distance(output, expected) < FP32
    if gradient is not None:
        assert distance(gradient, expected_gradient) < FP32


def test_dropout_of_the_adapter_is_peft_s_own(stock):
    given = inputs()
    slow, fast = adapted(stock, dropout=0.5).train(), accelerate(adapted(stock, dropout=0.5).train())
    torch.manual_seed(3)
    expected = slow(**given)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(fast(**given)[0], expected, rtol=1e-4, atol=1e-4)


def test_disabled_and_fused_adapters_are_respected(stock):
    given = inputs()
    base = adapted(stock, None)(**given)[0]
    fast = accelerate(adapted(stock))
    with_adapter = fast(**given)[0]
    fast.disable_adapters()
    assert distance(fast(**given)[0], base) < FP32
    fast.enable_adapters()
    fast.fuse_lora()
    assert distance(fast(**given)[0], with_adapter) < FP32
    assert distance(base, with_adapter) > 100 * FP32


def test_it_stays_a_diffusers_model(stock, tmp_path):
    fast = accelerate(copy.deepcopy(stock))
    assert isinstance(fast, CosmosTransformer3DModel)
    assert isinstance(fast, FastCosmosTransformer)
    fast.save_pretrained(tmp_path)
    again = CosmosTransformer3DModel.from_pretrained(tmp_path)
    assert again.state_dict().keys() == stock.state_dict().keys()
    assert distance(again(**inputs())[0], stock(**inputs())[0]) == 0


def test_configurations_it_does_not_cover_are_refused():
    other = CosmosTransformer3DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=12, max_size=(4, 4, 4), text_embed_dim=8
    )
    with pytest.raises(ValueError, match="learnable positions"):
        accelerate(other)
