import json

import pytest
import safetensors.torch
import torch
from diffusers import Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel
from safetensors import safe_open

from manifests.errors import UsageError
from tests.train.test_cosmos25 import make_batch
from tests.train.weights import adapted, losses, randomise
from train import cosmos25
from train.adapters import (
    WEIGHTS_NAME,
    adapter_parameters,
    add_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)
from train.config import LoraConfig, ObjectiveConfig
from train.methods import count_weights

PREDICT_2B = {
    "in_channels": 17,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 28,
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_fresh_adapter_changes_nothing_and_alone_trains(fresh, method, init):
    base = losses(fresh())
    transformer = adapted(fresh(), method, init=init)
    assert torch.allclose(losses(transformer), base, rtol=1e-6)
    cosmos25.loss(transformer, make_batch(), ObjectiveConfig()).sum().backward()
    with_gradient = {name for name, p in transformer.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in transformer.named_parameters() if ".lora_" in name}


def test_a_fresh_dora_on_a_bfloat16_base_has_exact_magnitudes(fresh):
    transformer = adapted(fresh(torch.bfloat16), "dora")
    assert {p.dtype for p in adapter_parameters(transformer).values()} == {torch.float32}
    layer = transformer.transformer_blocks[0].attn1.to_q
    norms = layer.get_base_layer().weight.float().norm(dim=1)
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, norms, rtol=1e-6)


def test_initial_values_depend_on_the_seed_alone(fresh):
    torch.manual_seed(1)
    first = adapter_parameters(adapted(fresh()))
    torch.manual_seed(2)
    second = adapter_parameters(adapted(fresh()))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_stock_diffusers_loads_the_file_and_computes_the_same(fresh, tiny_checkpoint, tmp_path, method):
    transformer = adapted(fresh(), method, alpha=12.0)
    randomise(transformer)
    path = save_adapter(tmp_path, transformer)
    stock = CosmosTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    state, metadata = Cosmos2_5_PredictBasePipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    Cosmos2_5_PredictBasePipeline.load_lora_into_transformer(state, transformer=stock, metadata=metadata)
    stock.crossattn_proj = torch.nn.Identity()
    base, trained = losses(fresh()), losses(transformer)
    assert not torch.allclose(base, trained, rtol=1e-3)
    assert torch.allclose(losses(stock), trained, rtol=1e-5)
    with safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (stored["transformer.lora_alpha"], stored["transformer.r"]) == (12, 4)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_load_restores_every_bit(fresh, tmp_path, method):
    transformer = adapted(fresh(), method, alpha=12.0)
    randomise(transformer)
    path = save_adapter(tmp_path / "a", transformer)
    injected, existing = fresh(), adapted(fresh(), method, alpha=12.0)
    for other in (injected, existing):
        load_adapter(other, path)
        assert torch.equal(losses(other), losses(transformer))
        again = read_adapter(save_adapter(tmp_path / "b", other))
        assert again[1] == read_adapter(path)[1]
        assert all(torch.equal(tensor, again[0][name]) for name, tensor in read_adapter(path)[0].items())
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == [WEIGHTS_NAME]


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: {name.replace("attn1", "attn9"): tensor for name, tensor in state.items()},
        lambda state: dict(list(state.items())[1:]),
        lambda state: {name: tensor[:, :2] for name, tensor in state.items()},
        lambda state: {f"unet.{name}": tensor for name, tensor in state.items()},
        lambda state: {},
    ],
    ids=["matches nothing", "one missing", "other shapes", "other model", "empty"],
)
def test_loading_what_does_not_fit_is_an_error_and_changes_nothing(fresh, tmp_path, edit):
    transformer = adapted(fresh())
    path = save_adapter(tmp_path, transformer)
    randomise(transformer)
    before = losses(transformer)
    state = edit(safetensors.torch.load_file(path))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    with pytest.raises(UsageError, match="adapter"):
        load_adapter(transformer, path)
    assert torch.equal(losses(transformer), before)


def test_a_target_that_matches_nothing_names_its_neighbours(fresh):
    with pytest.raises(UsageError, match=r"'to_qq' matches no linear layer.*to_q"):
        adapted(fresh(), targets=("to_k", "to_qq"))
    with pytest.raises(UsageError, match="attn1"):
        adapted(fresh(), targets=("attn1",))


def test_chosen_targets_alone_are_adapted(fresh):
    names = adapter_parameters(adapted(fresh(), targets=("attn2.to_k",)))
    assert len(names) == 4
    assert all(".attn2.to_k.lora_" in name for name in names)


@pytest.mark.parametrize(("rank", "millions"), [(8, 11.47), (16, 22.94), (32, 45.88), (64, 91.75)])
def test_trainable_parameters_of_the_real_model(rank, millions):
    with torch.device("meta"):
        transformer = CosmosTransformer3DModel(**PREDICT_2B)
    add_adapter(transformer, "lora", LoraConfig(rank=rank), cosmos25.DEFAULT_TARGETS)
    assert count_weights(transformer).trained / 1e6 == pytest.approx(millions, abs=0.01)
