import json

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from safetensors.torch import load_file

from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.store import Store
from tests.train.caches import CONTEXT, SHAPE, make_snapshot
from tests.train.test_cosmos25 import make_batch
from train import cosmos25
from train.activation import set_levels
from train.adapters import WEIGHTS_NAME, adapter_parameters
from train.config import AdaptersConfig, LoraConfig, ObjectiveConfig, TrainConfig
from train.dit import FastCosmosTransformer
from train.formats.names import NameMap
from train.methods import apply_methods, computing, count_weights
from train.metrics import read_metrics
from train.model import describe
from train.names import resolve_targets
from train.temporal import TemporalAdapter
from train.trained import TRAINED_NAME, install_trained, load_trained, parameter_names, save_trained, trained_parameters
from train.trainer import train

CPU = torch.device("cpu")


def config(method="lora", **changes):
    return TrainConfig(
        **{"output": "unused", "method": method, "dtype": "float32", "lora": LoraConfig(rank=4)} | changes
    )


@pytest.fixture
def trained_with(fresh):
    def make(*arguments, **changes):
        transformer = fresh()
        apply_methods(transformer, config(*arguments, **changes), cosmos25)
        return transformer

    return make


def losses(transformer):
    return cosmos25.loss(transformer, make_batch(), ObjectiveConfig())


def scatter(transformer):
    """Move what trains off its initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(transformer).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("method", ["adapters", ["lora", "adapters"], ["dora", "adapters"], "full"])
def test_a_fresh_method_changes_nothing_and_trains_what_it_names(fresh, trained_with, method):
    transformer = trained_with(method)
    assert torch.allclose(losses(transformer), losses(fresh()), rtol=1e-6)
    names = trained_parameters(transformer)
    if method == "full":
        assert set(names) == set(parameter_names(transformer))
    else:
        assert any("temporal_adapter" in name for name in names)
        assert all(".lora_" in name or ".temporal_adapter." in name for name in names)
        assert any(".lora_" in name for name in names) is (method != "adapters")
    scatter(transformer)
    losses(transformer).sum().backward()
    assert [name for name, parameter in names.items() if not parameter.grad.abs().max() > 0] == []


@pytest.mark.parametrize("method", [["lora", "dora"], ["full", "lora"], [], ["lora", "lora"], "all"])
def test_methods_that_do_not_go_together_are_refused(method):
    with pytest.raises(ValueError, match="method"):
        config(method)


def test_temporal_adapters_see_the_frames_beside_and_no_others():
    adapter = TemporalAdapter(16, 4)
    torch.nn.init.normal_(adapter.taps)
    torch.nn.init.normal_(adapter.up.weight)
    x_BTSC = torch.randn(1, 5, 3, 16)
    before = adapter(x_BTSC.flatten(1, 2), 5).unflatten(1, (5, 3))
    x_BTSC[0, 2, 1] += torch.randn(16)
    moved = (adapter(x_BTSC.flatten(1, 2), 5).unflatten(1, (5, 3)) - before).abs().amax(-1)[0] > 1e-6
    assert [tuple(place) for place in moved.nonzero().tolist()] == [(1, 1), (2, 1), (3, 1)]


def test_temporal_adapters_lie_where_they_are_asked_for(fresh, trained_with):
    transformer = trained_with("adapters", adapters=AdaptersConfig(reduction=4, every=2))
    names = trained_parameters(transformer)
    assert {name.split(".temporal_adapter")[0] for name in names} == {"transformer_blocks.1"}
    assert names["transformer_blocks.1.temporal_adapter.down.weight"].shape == (64 // 4, 64)
    with pytest.raises(UsageError, match=r"train\.adapters\.reduction: 7 does not divide"):
        trained_with("adapters", adapters=AdaptersConfig(reduction=7))
    with pytest.raises(UsageError, match=r"train\.adapters\.every: 3 is more than the model's 2 blocks"):
        trained_with("adapters", adapters=AdaptersConfig(every=3))


@pytest.mark.parametrize("level", ["none", "full", "attention"])
def test_a_block_with_a_temporal_adapter_compiles_as_one_graph(trained_with, level):
    transformer = trained_with(["lora", "adapters"])
    scatter(transformer)
    block = cosmos25.blocks(transformer)[1]
    inputs = cosmos25.block_inputs(transformer, (2, *SHAPE), 8, CPU)
    expected = block(*inputs)
    set_levels([block], [level], compiled=False)
    run = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(*inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("nvidia", "diffusers"),
    [
        ("q_proj", "to_q"),
        ("cross_attn.q_proj", "attn2.to_q"),
        ("output_proj", "to_out.0"),
        ("mlp.layer1", "ff.net.0.proj"),
        ("blocks.1.mlp.layer2", "transformer_blocks.1.ff.net.2"),
        ("adaln_modulation_mlp.2", "norm3.linear_2"),
        ("attn1.to_k", "attn1.to_k"),
    ],
)
def test_targets_in_either_naming_adapt_the_same_layers(fresh, trained_with, nvidia, diffusers):
    assert resolve_targets([nvidia], fresh(), cosmos25.ORIGINAL_NAMES) == (diffusers,)
    ours, theirs = (trained_with(lora=LoraConfig(rank=2, targets=(name,))) for name in (diffusers, nvidia))
    assert list(adapter_parameters(ours)) == list(adapter_parameters(theirs)) != []


def test_a_target_whose_layers_share_no_end_becomes_their_names(fresh):
    resolved = resolve_targets(["1"], fresh(), cosmos25.ORIGINAL_NAMES)
    assert {"transformer_blocks.0.norm1.linear_1", "norm_out.linear_1"} <= set(resolved)
    assert all((cosmos25.ORIGINAL_NAMES.to_original(name) or name).endswith(".1") for name in resolved)


@pytest.mark.parametrize("target", ["layer9", "to_q.weight"])
def test_targets_that_mean_nothing_are_refused(trained_with, target):
    with pytest.raises(UsageError, match=f"'{target}' matches no linear layer"):
        trained_with(lora=LoraConfig(rank=2, targets=("to_q", target)))


def test_a_target_that_means_two_things_is_refused(fresh):
    swapped = NameMap(
        blocks=("transformer_blocks", "transformer_blocks"),
        block_modules={"attn1.to_k": "attn1.to_q", "attn1.to_q": "attn1.to_k"},
        modules={},
    )
    with pytest.raises(UsageError, match=r"'attn1.to_q' is ambiguous: .* in diffusers' naming and .* in NVIDIA's"):
        resolve_targets(["attn1.to_q"], fresh(), swapped)


@pytest.mark.parametrize("pattern", ["proj_out.*", "final_layer.linear.*", "net.final_layer.linear.weight"])
def test_patterns_train_more_in_either_naming(trained_with, pattern):
    names = trained_parameters(trained_with("adapters", trainable=(pattern,)))
    assert [name for name in names if ".temporal_adapter." not in name] == ["proj_out.weight"]


def test_patterns_freeze_what_would_train(trained_with):
    names = trained_parameters(trained_with("full", frozen=("blocks.*.self_attn.*", "patch_embed.*")))
    assert names
    assert not [name for name in names if "attn1" in name or "patch_embed" in name]
    assert any("attn2" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ("proj_outt.*",)}, r"train\.trainable: 'proj_outt\.\*' matches no parameter that is frozen"),
        ({"frozen": ("proj_out.*",)}, r"train\.frozen: 'proj_out\.\*' matches no parameter that would train"),
        ({"frozen": ("*",)}, "nothing is left to train"),
    ],
)
def test_patterns_that_change_nothing_are_refused(trained_with, changes, message):
    with pytest.raises(UsageError, match=message):
        trained_with(**changes)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bfloat16_computes_with_float32_masters(tiny_checkpoint, fresh, method):
    """Under autocast the masters compute what a bfloat16 model of the same weights does, and keep float32 gradients."""
    settings = config(
        method, dtype="bfloat16", trainable=("proj_out.*", "*.attn1.to_q.weight") if method == "lora" else ()
    )
    transformer = fresh()
    apply_methods(transformer, settings, cosmos25)
    assert isinstance(transformer, FastCosmosTransformer)
    for parameter in transformer.parameters():
        assert parameter.dtype == torch.float32 or not parameter.requires_grad
    with computing(settings, torch.bfloat16, CPU):
        found = losses(transformer)
    found.sum().backward()
    assert {p.grad.dtype for p in trained_parameters(transformer).values()} == {torch.float32}
    torch.testing.assert_close(found, losses(fresh(torch.bfloat16)), rtol=2e-2, atol=0)
    exact = losses(fresh())
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=0)


def test_trained_weights_come_back_for_training_and_for_inference(fresh, trained_with, tmp_path):
    changes = {"method": ["adapters"], "trainable": ("proj_out.*",)}
    transformer = trained_with(**changes)
    scatter(transformer)
    path = tmp_path / TRAINED_NAME
    save_trained(path, {name: p.detach() for name, p in trained_parameters(transformer).items()})
    again, alone = trained_with(**changes), fresh()
    load_trained(again, path)
    install_trained(alone, path)
    for other in (again, alone):
        assert torch.equal(losses(other), losses(transformer))
    with pytest.raises(UsageError, match="none that train"):
        load_trained(trained_with("adapters"), path)
    save_trained(path, {"elsewhere.weight": torch.zeros(2)})
    with pytest.raises(UsageError, match="no place in this model"):
        install_trained(fresh(), path)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("cache")
    return ModelConfig(path=str(tiny_checkpoint)), make_snapshot(folder, tiny_checkpoint), Store(str(folder))


def run_config(output, **changes):
    settings = {"steps": 3, "batch_size": 2, "checkpoint_every": 2, "track": {"tensorboard": False}}
    return config(**{**settings, "output": str(output), "optimizer": {"lr": 1e-2}, **changes})


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({"method": "full"}, {TRAINED_NAME}),
        ({"method": ["lora", "adapters"], "trainable": ("proj_out.*",)}, {TRAINED_NAME, WEIGHTS_NAME}),
        ({"method": ["dora", "adapters"], "dtype": "bfloat16"}, {TRAINED_NAME, WEIGHTS_NAME}),
        ({"method": "full", "dtype": "bfloat16", "activation": "full"}, {TRAINED_NAME}),
    ],
)
def test_a_run_of_any_method_resumes_bit_by_bit(world, tmp_path, changes, files):
    class Killed(Exception):
        pass

    def kill(step, folder):
        raise Killed

    whole = train(world[0], run_config(tmp_path / "whole", **changes), *world[1:])
    settings = run_config(tmp_path / "killed", **changes)
    with pytest.raises(Killed):
        train(world[0], settings, *world[1:], on_checkpoint=kill)
    again = train(world[0], settings, *world[1:])
    assert again.resumed_from == 2
    found, expected = ({path.name: load_file(path) for path in r.adapter.parent.iterdir()} for r in (again, whole))
    assert set(found) == set(expected) == files
    for name, tensors in found.items():
        assert tensors.keys() == expected[name].keys()
        assert all(torch.equal(tensor, expected[name][key]) for key, tensor in tensors.items())
    ends = [[record["loss"] for record in read_metrics(tmp_path / name)] for name in ("whole", "killed")]
    assert ends[0] == ends[1]


def test_full_learns(world, tmp_path):
    settings = run_config(tmp_path, method="full", steps=12, batch_size=4, objective={"text_dropout": 0.0})
    train(world[0], settings, *world[1:])
    found = [record["loss"] for record in read_metrics(tmp_path)]
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


def test_raw_contexts_train_the_projection(tiny_checkpoint, tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", tiny_checkpoint, projection=None, context=(CONTEXT[0], 128))
    model = ModelConfig(path=str(tiny_checkpoint))
    result = train(model, run_config(tmp_path / "run", method="full"), snapshot, Store(str(tmp_path / "cache")))
    before = CosmosTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer").state_dict()
    after = load_file(result.adapter)
    assert set(after) == set(before)
    assert not torch.equal(after["crossattn_proj.0.weight"], before["crossattn_proj.0.weight"])


def test_the_dry_run_tells_what_each_method_takes(world):
    model, snapshot, _ = world
    lora = describe(model, config(), snapshot)
    full = describe(model, config("full", dtype="bfloat16"), snapshot)
    assert full["trainable_parameters"] == full["parameters"]
    assert full["memory"]["base"] == 0
    assert full["memory"]["trained"] == full["parameters"] * 18  # float32 master, gradient, moments; a bfloat16 copy
    assert "text projection stays as it is" in full["method"]
    averaged = describe(model, config("full", dtype="bfloat16", ema={"kind": "power"}), snapshot)
    assert averaged["memory"]["trained"] == full["parameters"] * 22
    assert full["tflop_per_sample"] > lora["tflop_per_sample"]
    both = describe(model, config(["lora", "adapters"]), snapshot)
    width, hidden = 8, 64
    assert both["trainable_parameters"] - lora["trainable_parameters"] == 2 * (
        2 * hidden * width + width + hidden + 3 * width
    )
    assert "temporal adapters after 2 blocks" in both["method"]
    assert json.dumps(both)


def test_weights_are_counted_by_kind(trained_with):
    weights = count_weights(trained_with(["lora", "adapters"], trainable=("proj_out.*",)))
    assert weights.base == 64 * 64
    assert weights.total == weights.frozen + weights.trained
