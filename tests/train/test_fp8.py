"""Frozen linear layers in 8 bits: the same function as their dequantised weights, close to the exact ones."""

import copy

import pytest
import torch
import torch.nn.functional as F

from manifests.config import ModelConfig
from manifests.errors import UsageError
from tests.train.caches import distance, make_snapshot
from tests.train.test_cosmos25 import make_batch
from train import cosmos25, cosmos_transfer25
from train.activation import LEVELS, set_levels
from train.adapters import adapter_parameters, add_adapter
from train.config import LoraConfig, ObjectiveConfig, TrainConfig
from train.fp8 import Fp8Linear, check_device, fp8_linear, quantise, quantise_base
from train.linear import stacked_linear
from train.methods import count_weights
from train.model import describe

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_checkpoint):
    return ModelConfig(path=str(tiny_checkpoint))


@pytest.fixture
def transformer(model):
    return adapted(model, torch.bfloat16)


def adapted(model, dtype, method="lora"):
    transformer = cosmos25.load_transformer(model, dtype)
    add_adapter(transformer, method, LoraConfig(rank=4, alpha=8), cosmos25.DEFAULT_TARGETS)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(transformer).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return transformer.train()


def quantised(transformer):
    quantise_base(cosmos25.blocks(transformer), cosmos25.TOKEN_LINEARS, CPU)
    return transformer


def gradients(transformer):
    transformer.zero_grad()
    loss = cosmos25.loss(transformer, make_batch(), ObjectiveConfig()).mean()
    loss.backward()
    found = {name: p.grad.float().clone() for name, p in adapter_parameters(transformer).items()}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    return float(loss.detach()), found


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_rows_come_back_within_half_a_step_of_three_bits():
    x = random(7, 48) * torch.logspace(-6, 4, 7).unsqueeze(1)
    x[3] = 0
    rows, scale = quantise(x)
    assert rows.dtype == torch.float8_e4m3fn
    back = rows.float() * scale
    largest = x.float().abs().amax(1, keepdim=True)
    assert ((back - x.float()).abs() <= x.float().abs() / 16 + largest / 448 / 2**9).all()
    torch.testing.assert_close(back.abs().amax(1, keepdim=True), largest, rtol=1e-6, atol=1e-12)
    assert not torch.isfinite(quantise(x.index_fill(0, torch.tensor([2]), torch.nan))[0][2].float()).any()


@pytest.mark.parametrize("with_adapter", [True, False])
def test_products_and_gradients_are_those_of_the_dequantised_weights(with_adapter):
    layers = [Fp8Linear(random(rows, 32, seed=rows)) for rows in (48, 16)]
    x = random(2, 5, 32).requires_grad_()
    down, up = (random(4, 32, seed=2).requires_grad_(), random(64, 4, seed=3).requires_grad_())
    given = (x, down, up) if with_adapter else (x,)
    y = fp8_linear(layers, x, *((down, up) if with_adapter else (None, None)))
    grad = random(2, 5, 64, seed=4)
    found = torch.autograd.grad(y, given, grad)

    weight = torch.cat([layer.whole() for layer in layers])
    rows, scale = quantise(x.detach().flatten(0, 1))
    base = (rows.float() * scale).unflatten(0, (2, 5)) @ weight.t()
    low_rank = F.linear(x.float(), down.float())
    expected = base + F.linear(low_rank, up.float()) if with_adapter else base
    assert close(y, expected)

    # A gradient's columns take on the weight's scales, and are quantised by rows.
    scales = torch.cat([layer.scale_M for layer in layers])
    rows, scale = quantise(grad.flatten(0, 1).float() * scales)
    grad_x = (rows.float() * scale) @ (weight / scales.unsqueeze(1))
    if with_adapter:
        grad_low = grad.float() @ up.float()
        grad_x = grad_x + grad_low.flatten(0, 1) @ down.float()
        assert close(found[1], grad_low.flatten(0, 1).t() @ x.float().flatten(0, 1))
        assert close(found[2], grad.float().flatten(0, 1).t() @ low_rank.flatten(0, 1))
    assert close(found[0].flatten(0, 1), grad_x)
    exact = grad.float() @ weight + (grad_low @ down.float() if with_adapter else 0)
    assert 1e-4 < error(found[0], exact) < 0.05


def test_a_stack_is_its_layers(transformer):
    attn = quantised(transformer).transformer_blocks[0].attn1
    x = random(1, 6, 64)
    together = stacked_linear([attn.to_q, attn.to_k, attn.to_v], x)
    for module, y in zip([attn.to_q, attn.to_k, attn.to_v], together, strict=True):
        torch.testing.assert_close(y, stacked_linear([module], x)[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_losses_and_gradients_stay_close_to_bfloat16_s(model, method):
    exact_loss, exact = gradients(adapted(model, torch.float32, method))
    _, bf16 = gradients(adapted(model, torch.bfloat16, method))
    fp8_loss, fp8 = gradients(quantised(adapted(model, torch.bfloat16, method)))
    assert abs(fp8_loss - exact_loss) < 0.02 * exact_loss
    assert distance(bf16, exact) < distance(fp8, exact) < 0.15
    cosine = F.cosine_similarity(flat(fp8), flat(exact), dim=0)
    assert cosine > 0.99


def test_training_follows_bfloat16_s_losses(model):
    def losses(transformer):
        trained = list(adapter_parameters(transformer).values())
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
        for _ in range(12):
            yield gradients(transformer)[0]
            optimizer.step()

    sixteen = list(losses(adapted(model, torch.bfloat16)))
    eight = list(losses(quantised(adapted(model, torch.bfloat16))))
    assert sixteen[-1] < 0.9 * sixteen[0]
    assert eight == pytest.approx(sixteen, rel=0.02)


def test_transfer_predicts_nearly_the_same_with_its_base_and_control_branch_in_8_bits(tiny_transfer):
    transfer = ModelConfig(path=str(tiny_transfer), family="cosmos-transfer2.5")

    def trained(dtype, eight_bits=False):
        transformer = cosmos_transfer25.load_transformer(transfer, dtype)
        add_adapter(transformer, "lora", LoraConfig(rank=4, alpha=8), cosmos_transfer25.DEFAULT_TARGETS)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapter_parameters(transformer).items():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=generator)
        if eight_bits:
            quantise_base(cosmos_transfer25.blocks(transformer), cosmos_transfer25.TOKEN_LINEARS, CPU)
        batch = make_batch()
        batch["hint"] = random(*batch["latents"].shape, seed=5, dtype=torch.float32)
        loss = cosmos_transfer25.loss(transformer.train(), batch, ObjectiveConfig()).mean()
        loss.backward()
        return loss.item(), {name: p.grad.float() for name, p in adapter_parameters(transformer).items()}

    exact_loss, exact = trained(torch.float32)
    _, sixteen = trained(torch.bfloat16)
    eight_loss, eight = trained(torch.bfloat16, eight_bits=True)
    assert any("controlnet." in name and gradient.any() for name, gradient in eight.items())
    assert abs(eight_loss - exact_loss) < 0.02 * exact_loss
    assert distance(sixteen, exact) < distance(eight, exact) < 0.15


def test_only_layers_of_tokens_change_and_nothing_is_counted_twice(transformer):
    before = count_weights(transformer)
    bytes_before = sum(t.nbytes for t in (*transformer.parameters(), *transformer.buffers()))
    quantised(transformer)
    assert count_weights(transformer) == before
    changed = {name for name, module in transformer.named_modules() if isinstance(module, Fp8Linear)}
    assert len(changed) == 2 * len(cosmos25.TOKEN_LINEARS)
    assert not any("attn2.to_k" in name or "norm" in name for name in changed)
    # Two layouts of a byte take what bfloat16 took; the scales are a few bytes a row.
    bytes_after = sum(t.nbytes for t in (*transformer.parameters(), *transformer.buffers()))
    rows = sum(transformer.get_submodule(name).out_features for name in changed)
    assert bytes_after == bytes_before + 4 * rows


def test_dropout_goes_through_peft_s_own_forward(model):
    transformer = cosmos25.load_transformer(model, torch.bfloat16)
    add_adapter(transformer, "lora", LoraConfig(rank=4, dropout=0.5), cosmos25.DEFAULT_TARGETS)
    _, found = gradients(quantised(transformer.train()))
    assert any(gradient.abs().max() > 0 for gradient in found.values())


def test_recomputing_gives_the_same_gradients(transformer):
    quantised(transformer)
    _, expected = gradients(transformer)
    for level in LEVELS:
        again = copy.deepcopy(transformer)
        set_levels(cosmos25.blocks(again), [level] * 2, compiled=False)
        assert distance(gradients(again)[1], expected) < 1e-6


def test_what_cannot_work_is_refused_in_one_line(model, tiny_checkpoint, tmp_path):
    snapshot = make_snapshot(tmp_path, tiny_checkpoint)

    def refusal(**changes):
        with pytest.raises(UsageError, match=r"train\.base_linears = fp8") as caught:
            describe(model, TrainConfig(**{"lora": LoraConfig(rank=4), "base_linears": "fp8"} | changes), snapshot)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "frozen base" in refusal(method="full")
    assert "frozen base" in refusal(trainable=("proj_out.*",))
    assert "train.dtype" in refusal(dtype="float32")
    assert "replicate" in refusal(parallel="shard")
    with pytest.raises(UsageError, match=r"8\.9 or later .*, this is a CPU; set it to dtype"):
        check_device(CPU)
    narrow = torch.nn.ModuleDict({"a": torch.nn.Linear(24, 16, bias=False)})
    with pytest.raises(UsageError, match="a is 24 x 16"):
        quantise_base([narrow], ["a"], CPU)


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def error(value, exact):
    return float((value.detach().float() - exact.detach()).norm() / exact.detach().norm())


def close(value, exact):
    return error(value, exact) < 0.005
