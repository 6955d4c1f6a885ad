import pytest
import torch

from manifests.config import ModelConfig
from manifests.errors import StaleCacheError, UsageError
from tests.train.caches import SHAPE, make_snapshot
from train.activation import estimate
from train.config import LoraConfig, ScheduleConfig, TrackConfig, TrainConfig
from train.model import Built, describe


@pytest.fixture
def model(tiny_checkpoint):
    return ModelConfig(path=str(tiny_checkpoint))


def config(**changes):
    return TrainConfig(**{"output": "unused", "steps": 100, "lora": LoraConfig(rank=4)} | changes)


def test_describe_counts_what_would_train(model, tiny_checkpoint, tmp_path):
    snapshot = make_snapshot(tmp_path, tiny_checkpoint, shapes=(SHAPE, SHAPE, (16, 4, 8, 8)))
    schedule = ScheduleConfig(kind="lambda_linear", warmup=2000)
    told = describe(model, config(batch_size=3, schedule=schedule), snapshot)
    hidden, rank, layers = 64, 4, 2
    per_layer = rank * (2 * hidden * 8 + (hidden + 4 * hidden) * 2)
    assert told["trainable_parameters"] == layers * per_layer
    assert told["tokens_per_sample"] == {"16x3x4x6": 3 * 2 * 3, "16x4x8x8": 4 * 4 * 4}
    assert told["epochs"] == 100
    assert max(told["lr"].values()) < 0.03 * 4.316e-5
    memory = told["memory"]
    assert memory["total"] == memory["base"] + memory["trained"] + memory["activations"]
    assert memory["base"] == 2 * (told["parameters"] - told["trainable_parameters"])
    assert memory["trained"] == 16 * told["trainable_parameters"]


def test_dora_adds_a_magnitude_an_output_row(model, tiny_checkpoint, tmp_path):
    snapshot = make_snapshot(tmp_path, tiny_checkpoint)
    lora = describe(model, config(), snapshot)["trainable_parameters"]
    dora = describe(model, config(method="dora"), snapshot)["trainable_parameters"]
    assert dora - lora == 2 * (64 * 8 + 4 * 64 + 64)


def test_keeping_activations_costs_more(model, tiny_checkpoint, tmp_path):
    snapshot = make_snapshot(tmp_path, tiny_checkpoint)
    full = describe(model, config(activation="full"), snapshot)["memory"]["activations"]
    none = describe(model, config(activation="none"), snapshot)["memory"]["activations"]
    assert none > full


def test_describe_makes_the_checks_of_a_run(model, tiny_checkpoint, tmp_path):
    with pytest.raises(StaleCacheError):
        describe(model, config(), make_snapshot(tmp_path / "a", tiny_checkpoint, vae="f" * 40))
    snapshot = make_snapshot(tmp_path / "b", tiny_checkpoint)
    with pytest.raises(UsageError, match=r"train\.lora\.targets"):
        describe(model, config(lora=LoraConfig(targets=("nothing",))), snapshot)
    with pytest.raises(UsageError, match="wandb"):
        describe(model, config(track=TrackConfig(wandb=True)), snapshot)


def out_of_memory(limit_gib, level="attention", halves=True, **changes):
    """The message of a run of the 2B model's size at 31,104 tokens."""
    resident, micro_batches = 5 * 2**30, changes.get("micro_batch_size", 1)
    tokens = 31_104 * micro_batches
    plan = estimate(level, num_blocks=28, resident=resident, tokens=tokens, hidden_size=2048, itemsize=2)
    built = Built(torch.nn.Module(), "sdpa", plan, 1.0, "", int(limit_gib * 2**30), halves)
    message = built.out_of_memory(config(**changes))
    assert "\n" not in message
    return message.split("would fit: ")[1]


def test_out_of_memory_names_three_settings_that_fit():
    told = out_of_memory(20, micro_batch_size=2)
    assert told.startswith("train.activation=full (predicted ")
    assert "train.micro_batch_size=1" in told
    assert "train.context_parallel=2 on 2 GPUs a sample" in told
    assert told.endswith("; each with train.activation=full")
    assert told.count("predicted") == 3


def test_out_of_memory_names_only_what_helps_and_fits():
    assert "activation=full (" not in out_of_memory(20, level="full")
    assert "context_parallel" not in out_of_memory(20, halves=False)
    assert "context_parallel=4" in out_of_memory(20, context_parallel=2)
    told = out_of_memory(9, level="full")
    sizes = [float(part.split(" GiB")[0]) for part in told.split("predicted ")[1:]]
    assert sizes
    assert all(size <= 9 for size in sizes)
    assert out_of_memory(4).startswith("nothing; the weights take 5.")
