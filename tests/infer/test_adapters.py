from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import Cosmos2_5_PredictBasePipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from infer.adapters import WEIGHT_NAME, load_adapters
from infer.config import AdapterConfig
from manifests.errors import LatentlineError, UsageError
from tests.infer.conftest import SaveAdapter


@torch.no_grad()
def velocity(pipe: Cosmos2_5_PredictBasePipeline) -> Tensor:
    """The transformer's output for one fixed input."""
    generator = torch.Generator().manual_seed(0)
    width = pipe.transformer.config.crossattn_proj_in_channels
    return pipe.transformer(
        hidden_states=torch.randn(1, 16, 2, 4, 4, generator=generator),
        condition_mask=torch.zeros(1, 1, 2, 4, 4),
        timestep=torch.full((1, 1, 2, 1, 1), 0.5),
        encoder_hidden_states=torch.randn(1, 8, width, generator=generator),
        padding_mask=torch.zeros(1, 1, 32, 32),
        return_dict=False,
    )[0]


def apply_by_hand(pipe: Cosmos2_5_PredictBasePipeline, folder: Path, scale: float) -> None:
    """W + scale * B A, written into the weights without peft."""
    state = load_file(folder / WEIGHT_NAME)
    for key in state:
        if key.endswith("lora_A.weight"):
            linear = pipe.transformer.get_submodule(key.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            linear.weight.data += scale * state[key.replace("lora_A", "lora_B")] @ state[key]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    with safe_open(folder / WEIGHT_NAME, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(folder / WEIGHT_NAME)), folder / WEIGHT_NAME, metadata)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_alpha_and_weight_scale_the_update(
    pipe: Cosmos2_5_PredictBasePipeline,
    tiny_checkpoint: Path,
    save_adapter: SaveAdapter,
    fuse: bool,
    weight: float,
) -> None:
    folder = save_adapter(rank=4, alpha=10.0)
    base = velocity(pipe)
    by_hand = Cosmos2_5_PredictBasePipeline.from_pretrained(tiny_checkpoint, safety_checker=pipe.safety_checker)
    apply_by_hand(by_hand, folder, weight * 10.0 / 4)
    load_adapters(pipe, {"a": AdapterConfig(path=str(folder), weight=weight)}, fuse=fuse)
    torch.testing.assert_close(velocity(pipe), velocity(by_hand), rtol=1e-4, atol=1e-5)
    assert (velocity(pipe) - base).abs().max() > 1e-2
    assert fuse != any("lora" in name for name, _ in pipe.transformer.named_parameters())


def test_adapters_add_up(pipe: Cosmos2_5_PredictBasePipeline, tiny_checkpoint: Path, save_adapter: SaveAdapter) -> None:
    one, two = save_adapter("one", alpha=8.0), save_adapter("two", rank=2, alpha=1.0, seed=1)
    by_hand = Cosmos2_5_PredictBasePipeline.from_pretrained(tiny_checkpoint, safety_checker=pipe.safety_checker)
    apply_by_hand(by_hand, one, 0.5 * 8.0 / 4)
    apply_by_hand(by_hand, two, 2.0 * 1.0 / 2)
    load_adapters(
        pipe,
        {
            "one": AdapterConfig(path=str(one), weight=0.5),
            "two": AdapterConfig(path=str(two / WEIGHT_NAME), weight=2.0),
        },
    )
    torch.testing.assert_close(velocity(pipe), velocity(by_hand), rtol=1e-4, atol=1e-5)


def test_dora_loads_and_its_magnitudes_count(
    pipe: Cosmos2_5_PredictBasePipeline, tiny_checkpoint: Path, save_adapter: SaveAdapter
) -> None:
    folder = save_adapter(rank=4, alpha=8.0, dora=True)
    by_hand = Cosmos2_5_PredictBasePipeline.from_pretrained(tiny_checkpoint, safety_checker=pipe.safety_checker)
    apply_by_hand(by_hand, folder, 8.0 / 4)
    magnitudes = {k: v for k, v in load_file(folder / WEIGHT_NAME).items() if "magnitude" in k}
    assert magnitudes
    for key, magnitude in magnitudes.items():
        linear = by_hand.transformer.get_submodule(key.removeprefix("transformer.").rpartition(".lora_")[0])
        linear.weight.data *= (magnitude / linear.weight.data.norm(dim=1))[:, None]
    load_adapters(pipe, {"a": AdapterConfig(path=str(folder))})
    torch.testing.assert_close(velocity(pipe), velocity(by_hand), rtol=1e-4, atol=1e-5)


def test_dora_fuses(pipe: Cosmos2_5_PredictBasePipeline, save_adapter: SaveAdapter) -> None:
    folder = save_adapter(dora=True)
    load_adapters(pipe, {"a": AdapterConfig(path=str(folder))})
    active = velocity(pipe)
    pipe.unload_lora_weights()
    load_adapters(pipe, {"a": AdapterConfig(path=str(folder))}, fuse=True)
    torch.testing.assert_close(velocity(pipe), active, rtol=1e-4, atol=1e-5)


def test_without_metadata_alpha_is_the_rank(
    pipe: Cosmos2_5_PredictBasePipeline, tiny_checkpoint: Path, save_adapter: SaveAdapter
) -> None:
    folder = save_adapter(rank=4, alpha=10.0)
    save_file(load_file(folder / WEIGHT_NAME), folder / WEIGHT_NAME)
    by_hand = Cosmos2_5_PredictBasePipeline.from_pretrained(tiny_checkpoint, safety_checker=pipe.safety_checker)
    apply_by_hand(by_hand, folder, 1.0)
    load_adapters(pipe, {"a": AdapterConfig(path=str(folder))})
    torch.testing.assert_close(velocity(pipe), velocity(by_hand), rtol=1e-4, atol=1e-5)


Q = "transformer.transformer_blocks.0.attn1.to_q"


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key.replace(old, new): tensor for key, tensor in state.items()}


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


def replaced(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, key: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("transformer.", "net."), r"key 'net\..*' is not in diffusers' format"),
        (renamed("transformer_blocks", "blocks"), "matches nothing in this model"),
        (renamed("transformer_blocks.1", "transformer_blocks.7"), "matches nothing in this model"),
        (renamed("lora_B", "lora_up"), r"lora_up.* matches nothing in this model"),
        (replaced(f"{Q}.alpha", torch.tensor(4.0)), r"to_q\.alpha' matches nothing"),
        (replaced("transformer.norm_out.lora_A.weight", torch.zeros(4, 64)), "not a linear layer"),
        (without(f"{Q}.lora_B.weight"), r"attn1\.to_q has no lora_B"),
        (replaced(f"{Q}.lora_A.weight", torch.zeros(4, 2048)), r"\[4, 2048\], the model needs \[4, 64\]"),
        (lambda state: {}, "this adapter is empty"),
        (replaced(f"{Q}.lora_B.weight", torch.full((64, 4), torch.nan)), "is not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_loading(
    pipe: Cosmos2_5_PredictBasePipeline,
    save_adapter: SaveAdapter,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    folder = save_adapter()
    rewrite(folder, change)
    with pytest.raises(LatentlineError, match=message) as caught:
        load_adapters(pipe, {"a": AdapterConfig(path=str(folder))})
    assert WEIGHT_NAME in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())


def test_keys_the_model_does_not_take_are_an_error(
    pipe: Cosmos2_5_PredictBasePipeline, save_adapter: SaveAdapter
) -> None:
    folder = save_adapter()
    magnitude = {f"{Q}.lora_magnitude_vector": torch.ones(64)}
    rewrite(folder, lambda state: {**state, **magnitude})
    with pytest.raises(LatentlineError, match="was not taken by the model"):
        load_adapters(pipe, {"a": AdapterConfig(path=str(folder))})


def test_missing_files_are_named(pipe: Cosmos2_5_PredictBasePipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"gone: no such adapter; give a folder with {WEIGHT_NAME}"):
        load_adapters(pipe, {"a": AdapterConfig(path=str(tmp_path / "gone"))})
    with pytest.raises(UsageError, match=rf"{WEIGHT_NAME}: no such adapter"):
        load_adapters(pipe, {"a": AdapterConfig(path=str(tmp_path))})
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="only"):
        load_adapters(pipe, {"a": AdapterConfig(path=str(tmp_path / "x.bin"))})
    (tmp_path / "x.safetensors").write_bytes(b"not this")
    with pytest.raises(UsageError, match="not a safetensors file"):
        load_adapters(pipe, {"a": AdapterConfig(path=str(tmp_path / "x.safetensors"))})


def test_names_peft_cannot_hold_are_refused(pipe: Cosmos2_5_PredictBasePipeline, save_adapter: SaveAdapter) -> None:
    with pytest.raises(UsageError, match=r"infer\.adapters\.v1\.0"):
        load_adapters(pipe, {"v1.0": AdapterConfig(path=str(save_adapter()))})
