"""Weights between formats: bits kept, stock loaders convinced, and nothing unmatched let through."""

import io
import json

import pytest
import safetensors.torch
import torch
from diffusers import Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel
from peft import PeftModel
from torch.distributed.checkpoint import save as save_distributed

from manifests.config import ModelConfig
from manifests.errors import UsageError
from tests.train.weights import adapted, losses, randomise, same, stored
from train import cosmos25
from train.adapters import WEIGHTS_NAME, load_adapter, save_adapter
from train.formats.adapter import Adapter
from train.weights import load_weights, save_weights

ADAPTER_NAMES = {
    "peft": "base_model.model.transformer_blocks.1.attn1.to_out.0.lora_A.weight",
    "nvidia": "net.blocks.1.self_attn.output_proj.lora_A.default.weight",
    "comfyui": "diffusion_model.blocks.1.self_attn.output_proj.lora_A.weight",
}


def test_every_weight_has_an_original_name_and_no_two_share_it(tensors):
    originals = {name: cosmos25.ORIGINAL_NAMES.to_original(name) for name in tensors}
    assert None not in originals.values()
    assert len(set(originals.values())) == len(tensors)
    assert all(cosmos25.ORIGINAL_NAMES.to_diffusers(original) == name for name, original in originals.items())
    assert originals["transformer_blocks.1.norm2.linear_1.weight"] == "blocks.1.adaln_modulation_cross_attn.1.weight"


def test_names_are_those_of_diffusers_own_conversion(tensors):
    from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers

    original = {f"net.{cosmos25.ORIGINAL_NAMES.to_original(name)}": tensor for name, tensor in tensors.items()}
    assert same(convert_cosmos_transformer_checkpoint_to_diffusers(original), tensors)


@pytest.mark.parametrize("form", ["peft", "nvidia", "comfyui"])
def test_an_adapter_comes_back_bit_for_bit(adapter, convert, base, fresh, form):
    folder, expected = adapter
    there = convert(folder, form, base=base)
    assert ADAPTER_NAMES[form] in stored(there)
    back = convert(there, "diffusers", alpha=7.0 if form == "nvidia" else None)
    assert same(stored(back), stored(folder))
    loaded = fresh()
    load_adapter(loaded, back)
    assert torch.equal(losses(loaded), expected)


def test_stock_peft_loads_the_folder(adapter, convert, tiny_checkpoint, base):
    folder, expected = adapter
    there = convert(folder, "peft", base=base)
    stock = CosmosTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    model = PeftModel.from_pretrained(stock, there)
    stock.crossattn_proj = torch.nn.Identity()
    assert torch.allclose(losses(model), expected, rtol=1e-5)
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == base.path


@pytest.mark.parametrize("source", ["nvidia", "comfyui"])
def test_stock_diffusers_loads_what_was_foreign(adapter, convert, tiny_checkpoint, source):
    folder, expected = adapter
    back = convert(convert(folder, source), "diffusers", alpha=7.0 if source == "nvidia" else None)
    stock = CosmosTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    state, metadata = Cosmos2_5_PredictBasePipeline.lora_state_dict(back, return_lora_metadata=True)
    Cosmos2_5_PredictBasePipeline.load_lora_into_transformer(state, transformer=stock, metadata=metadata)
    stock.crossattn_proj = torch.nn.Identity()
    assert torch.allclose(losses(stock), expected, rtol=1e-5)


def test_a_folded_alpha_is_one_that_needs_no_saying(adapter, convert, fresh):
    folder, expected = adapter
    folded = convert(convert(folder, "nvidia", fold=True), "diffusers", alpha=4.0)
    loaded = fresh()
    load_adapter(loaded, folded)
    assert torch.allclose(losses(loaded), expected, rtol=1e-5)
    assert not same(stored(folded), stored(folder))


def test_a_fused_model_is_the_base_with_the_adapter(adapter, convert, base, tiny_checkpoint):
    folder, expected = adapter
    model = convert(folder, "model", base=base)
    stock = CosmosTransformer3DModel.from_pretrained(model, subfolder="transformer")
    stock.crossattn_proj = torch.nn.Identity()
    assert torch.allclose(losses(stock), expected, rtol=1e-5)
    names = {path.relative_to(tiny_checkpoint) for path in tiny_checkpoint.rglob("*")}
    assert {path.relative_to(model) for path in model.rglob("*")} == names
    assert json.loads((model / "transformer" / "config.json").read_text())["_class_name"] == "CosmosTransformer3DModel"


def test_fusing_into_a_bfloat16_base_touches_only_what_is_adapted(convert, tmp_path, tiny_checkpoint, tensors, fresh):
    transformer = adapted(fresh(), targets=("attn2.to_k",), alpha=7.0)
    randomise(transformer)
    folder = save_adapter(tmp_path / "some", transformer).parent
    half = convert(tiny_checkpoint, "model", base=ModelConfig(path=str(tiny_checkpoint)), dtype=torch.bfloat16)
    fused = convert(folder, "model", base=ModelConfig(path=str(half)))
    name = "diffusion_pytorch_model.safetensors"
    after = safetensors.torch.load_file(fused / "transformer" / name)
    state = stored(folder)
    for weight, tensor in tensors.items():
        expected = tensor.bfloat16()
        if weight.endswith("attn2.to_k.weight"):
            stem = f"transformer.{weight.removesuffix('.weight')}"
            update = 7 / 4 * state[f"{stem}.lora_B.weight"] @ state[f"{stem}.lora_A.weight"]
            expected = (expected.float() + update).bfloat16()
            assert not torch.equal(after[weight], tensor.bfloat16())
        assert after[weight].dtype == torch.bfloat16
        assert torch.allclose(
            after[weight].float(), expected.float(), rtol=1e-2 if "attn2.to_k" in weight else 0, atol=0
        )


def test_a_full_model_comes_back_bit_for_bit(convert, base, tensors, tiny_checkpoint):
    there = convert(tiny_checkpoint, "nvidia")
    assert "net.blocks.0.adaln_modulation_mlp.2.weight" in stored(there)
    back = convert(there, "diffusers", base=base)
    assert same(safetensors.torch.load_file(back / "diffusion_pytorch_model.safetensors"), tensors)
    assert CosmosTransformer3DModel.from_pretrained(back).config.num_layers == 2
    whole = convert(there, "model", base=base)
    assert same(safetensors.torch.load_file(whole / "transformer" / "diffusion_pytorch_model.safetensors"), tensors)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_moving_average_is_taken_when_asked(convert, tmp_path, tiny_checkpoint, dtype):
    raw = stored(convert(tiny_checkpoint, "nvidia"))
    ema = {name.replace("net.", "net_ema."): tensor + 1 for name, tensor in raw.items()}
    extras = {"net.accum_iteration": torch.tensor(3), "net_ema.pos_embedder.seq": torch.arange(4)}
    extras["net.blocks.0.self_attn.q_norm._extra_state"] = io.BytesIO(b"state")
    torch.save(raw | ema | extras, tmp_path / "model.pt")
    taken = stored(convert(tmp_path / "model.pt", "nvidia", ema=True, dtype=dtype))
    expected = {name: (tensor + 1).to(dtype or tensor.dtype) for name, tensor in raw.items()}
    assert same(taken, expected)
    assert same(stored(convert(tmp_path / "model.pt", "nvidia")), raw)
    with pytest.raises(UsageError, match="leave --ema out"):
        convert(convert(tiny_checkpoint, "nvidia"), "nvidia", ema=True)


def test_an_adapter_beside_its_base_in_one_file(adapter, convert, tmp_path, tiny_checkpoint):
    folder, _ = adapter
    part = stored(convert(folder, "nvidia"))
    adapted_layers = {name.split(".lora_")[0] for name in part}
    whole = {}
    for name, tensor in stored(convert(tiny_checkpoint, "nvidia")).items():
        stem = name.removesuffix(".weight")
        whole[f"{stem}.base_layer.weight" if stem in adapted_layers else name] = tensor
    torch.save({"model": whole | part}, tmp_path / "both.pt")
    loaded = load_weights(tmp_path / "both.pt", alpha=7.0)
    assert isinstance(loaded.weights, Adapter)
    assert "base weights" in loaded.weights.notes[0]
    assert same(stored(convert(tmp_path / "both.pt", "diffusers", alpha=7.0)), stored(folder))


def test_a_distributed_checkpoint_becomes_one_file(convert, tmp_path, tiny_checkpoint, base, tensors):
    raw = stored(convert(tiny_checkpoint, "nvidia"))
    save_distributed(raw, checkpoint_id=tmp_path / "dcp", no_dist=True)
    loaded = load_weights(tmp_path / "dcp")
    assert loaded.source == "dcp"
    assert any("pickle" in note for note in save_weights(loaded, "nvidia", tmp_path / "one.pt"))
    assert same(stored(tmp_path / "one.pt"), raw)
    back = convert(tmp_path / "dcp", "diffusers", base=base)
    assert same(safetensors.torch.load_file(back / "diffusion_pytorch_model.safetensors"), tensors)
    assert not list(tmp_path.glob(".gathering*"))


def test_modules_may_differ_in_alpha_and_rank(fresh, convert, tmp_path):
    transformer = fresh()
    from peft import LoraConfig as Peft

    transformer.add_adapter(
        Peft(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 3}, rank_pattern={"to_k": 2})
    )
    randomise(transformer)
    folder = save_adapter(tmp_path / "mixed", transformer).parent
    back = convert(convert(folder, "comfyui"), "diffusers")
    loaded = fresh()
    load_adapter(loaded, back)
    assert same(stored(back), stored(folder))
    assert torch.equal(losses(loaded), losses(transformer))


def test_weights_of_a_fine_tuned_base_are_completed_by_it(convert, tmp_path, base, tensors, tiny_checkpoint):
    half = convert(tiny_checkpoint, "model", base=base, dtype=torch.bfloat16)
    run = tmp_path / "run"
    run.mkdir()
    name = "transformer_blocks.0.ff.net.2.weight"
    safetensors.torch.save_file({name: tensors[name] + 1}, run / "trained_weights.safetensors")
    with pytest.raises(UsageError, match="pass --base"):
        convert(run, "nvidia")
    there = convert(run, "nvidia", base=ModelConfig(path=str(half)))
    expected = {weight: tensor.bfloat16().float() for weight, tensor in tensors.items()} | {name: tensors[name] + 1}
    back = convert(there, "diffusers", base=base)
    assert same(safetensors.torch.load_file(back / "diffusion_pytorch_model.safetensors"), expected)
    safetensors.torch.save_file(
        {"transformer_blocks.0.temporal_adapter.up.weight": torch.ones(1)}, run / "trained_weights.safetensors"
    )
    with pytest.raises(UsageError, match="matches nothing in the model"):
        convert(run, "nvidia", base=base)
    safetensors.torch.save_file({}, run / WEIGHTS_NAME)
    with pytest.raises(UsageError, match="beside a LoRA"):
        load_weights(run)
