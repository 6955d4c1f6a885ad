import pytest
import torch
from peft import LoraConfig as PeftLora
from peft.tuners.lora import Linear as LoraLinear

from manifests.config import ModelConfig
from tests.train.test_cosmos25 import make_batch
from train import cosmos25
from train.activation import LEVELS, choose_levels, estimate, set_levels
from train.adapters import adapter_parameters, add_adapter
from train.config import LoraConfig, ObjectiveConfig
from train.linear import linear


@pytest.fixture
def transformer(tiny_checkpoint):
    transformer = cosmos25.load_transformer(ModelConfig(path=str(tiny_checkpoint)), torch.float32)
    add_adapter(transformer, "lora", LoraConfig(rank=4), cosmos25.DEFAULT_TARGETS)
    return transformer.train()


def kept_and_gradients(transformer, policy):
    """Bytes the forward pass keeps for the backward pass, and the gradients."""
    blocks = cosmos25.blocks(transformer)
    set_levels(blocks, [policy] * len(blocks), compiled=False)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cosmos25.loss(transformer, make_batch(), ObjectiveConfig()).mean()
    transformer.zero_grad()
    loss.backward()
    return sum(kept.values()), {name: p.grad.clone() for name, p in adapter_parameters(transformer).items()}


def test_poorer_levels_keep_less_and_give_the_same_gradients(transformer):
    kept, gradients = {}, {}
    for level in LEVELS:
        kept[level], gradients[level] = kept_and_gradients(transformer, level)
    assert kept["full"] < 0.5 * kept["none"]
    assert kept["full"] <= kept["attention"] < kept["none"]
    for level in LEVELS:
        for name, gradient in gradients[level].items():
            torch.testing.assert_close(gradient, gradients["none"][name], rtol=1e-5, atol=1e-9)


def test_auto_saves_attention_first_then_products_then_everything():
    kept = {"full": 10, "attention": 30, "products": 130, "none": 250}
    sizes = {"resident": 1000, "kept": kept, "working": dict.fromkeys(kept, 200)}

    def levels(limit):
        plan = choose_levels(4, limit=limit, **sizes)
        assert plan.levels == ("full",) * 4 or plan.peak <= limit
        return plan.levels

    assert levels(1000 + 200 + 4 * 250) == ("none",) * 4
    assert levels(1000 + 200 + 4 * 130 + 2 * 120) == ("products", "products", "none", "none")
    assert levels(1000 + 200 + 4 * 30 + 100) == ("attention", "attention", "attention", "products")
    assert levels(1000 + 200 + 4 * 10 + 59) == ("full", "full", "attention", "attention")
    assert levels(100) == ("full",) * 4


def test_the_estimate_is_near_what_was_measured_at_real_size():
    """Of benchmarks: 18.1, 50.0 and 90.5 GiB at 31,104 tokens of the 2B model with rank 32."""
    resident = 2 * 1_958_000_000 + 16 * 45_880_000
    size = {"num_blocks": 28, "hidden_size": 2048, "itemsize": 2, "tokens": 31_104, "resident": resident}
    for level, measured in (("attention", 18.1), ("products", 50.0), ("none", 90.5)):
        assert abs(estimate(level, **size).peak / 2**30 / measured - 1) < 0.1


class Adapted(torch.nn.Module):
    """A linear layer with LoRA, alpha equal to its rank, as a block."""

    def __init__(self):
        super().__init__()
        base = torch.nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.layer = LoraLinear(base, "default", PeftLora(r=4, lora_alpha=4), r=4, lora_alpha=4)
        torch.nn.init.normal_(self.layer.lora_B["default"].weight)

    def forward(self, x):
        return linear(self.layer, x).tanh()


@pytest.mark.parametrize("level", ["full", "products"])
def test_a_recomputed_block_compiles_and_has_the_same_gradients(level):
    torch.manual_seed(0)
    block = Adapted()
    x = torch.randn(1, 8, 16, requires_grad=True)

    def gradients():
        output = block(x)
        found = torch.autograd.grad(output.sum(), [x, *(p for p in block.parameters() if p.requires_grad)])
        return [output.detach(), *found]

    expected = gradients()
    set_levels([block], [level], compiled=True)
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
