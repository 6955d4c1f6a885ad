"""Methods on several ranks, over gloo: the curve, the weights and the average must be those of one rank."""

import pytest
import torch
from safetensors.torch import load_file

from manifests.config import ModelConfig
from manifests.store import Store
from tests.ranks import run_jobs
from tests.train.caches import distance, make_snapshot
from train.config import TrainConfig
from train.metrics import read_metrics
from train.trainer import train

FRAMES_OF_6 = (16, 4, 4, 6)  # 24 tokens
FRAMES_OF_8 = (16, 3, 4, 8)  # 24 tokens

SETTINGS = {
    "steps": 4,
    "batch_size": 4,
    "micro_batch_size": 2,
    "dtype": "float32",
    "lora": {"rank": 4},
    "optimizer": {"lr": 1e-2, "grad_clip": 0.5},
    "checkpoint_every": 2,
    "validation": {"every": 2, "fraction": 0.4, "samples": 3, "sigmas": [0.2, 0.8]},
    "track": {"tensorboard": False},
}
FULL = {"method": "full", "ema": {"kind": "power"}}
BOTH = {"method": ["lora", "adapters"], "trainable": ["final_layer.linear.*"], "ema": {"kind": "decay", "decay": 0.5}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_checkpoint):
    """Folders of runs: alone; on 3 ranks, replicated, split and sharing samples; and one that went on alone."""
    folder = tmp_path_factory.mktemp("methods")
    cache = folder / "cache"
    snapshot = make_snapshot(cache, tiny_checkpoint, shapes=(FRAMES_OF_6, FRAMES_OF_8, *[FRAMES_OF_6] * 6))
    model = ModelConfig(path=str(tiny_checkpoint))

    def job(name, world=1, **changes):
        settings = {**SETTINGS, **changes, "output": str(folder / name)}
        return {"world": world, "model": model.path, "cache": str(cache), "train": settings}

    def alone(name, **changes):
        train(model, TrainConfig(**job(name, **changes)["train"]), snapshot, Store(str(cache)))

    alone("full1", **FULL)
    alone("both1", **BOTH)
    run_jobs(
        "tests.train.ranks",
        [job("full3", 3, **FULL), job("full-shard3", 3, **FULL, parallel="shard"),
         job("both-shard3", 3, **BOTH, parallel="shard"), job("both-context3", 3, **BOTH, context_parallel=3),
         job("moving", 3, **FULL, context_parallel=3, parallel="shard") | {"stop_at": 2}],
        folder,
    )  # fmt: skip
    assert (folder / "moving" / "outcomes").read_text() == "preempted\n"
    alone("moving", **FULL, async_save=True)
    return folder


@pytest.mark.parametrize(
    ("name", "single"),
    [
        ("full3", "full1"),
        ("full-shard3", "full1"),
        ("moving", "full1"),
        ("both-shard3", "both1"),
        ("both-context3", "both1"),
    ],
)
def test_one_curve_and_one_result_on_any_ranks(runs, name, single):
    records, expected = read_metrics(runs / name), read_metrics(runs / single)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    for step in range(5):
        for key in expected[step].keys() & {"loss", "grad_norm", "lr"} | {
            key for key in expected[step] if key.startswith("validation/")
        }:
            assert records[step][key] == pytest.approx(expected[step][key], rel=1e-5), (step, key)
    for part in ("adapter", "adapter-ema"):
        files = sorted(path.name for path in (runs / single / part).iterdir())
        assert sorted(path.name for path in (runs / name / part).iterdir()) == files
        for file in files:
            found, wanted = load_file(runs / name / part / file), load_file(runs / single / part / file)
            assert distance(found, wanted) < 1e-5
            assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_the_run_moved_from_three_ranks_to_one(runs):
    steps = sorted(path.name for path in (runs / "moving" / "checkpoints").iterdir())
    assert steps == ["step_00000002", "step_00000003", "step_00000004"]


def test_full_fine_tuning_splits_what_trains(runs):
    """Masters, and so gradients and moments, are a share of the whole on each rank."""
    tensors = load_file(runs / "full1" / "adapter" / "trained_weights.safetensors")
    whole = sum(tensor.numel() for tensor in tensors.values())
    held = {name: int((runs / name / "trained").read_text()) for name in ("full3", "full-shard3")}
    assert held["full3"] == whole
    assert held["full-shard3"] / whole == pytest.approx(1 / 3, rel=0.05)
