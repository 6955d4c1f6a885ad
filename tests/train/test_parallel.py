"""Several ranks on this machine, over gloo: the curve must be that of one rank."""

import pytest
import torch

from manifests.config import ModelConfig
from manifests.store import Store
from tests.ranks import run_jobs
from tests.train.caches import distance, make_snapshot
from train.adapters import read_adapter
from train.config import TrainConfig
from train.metrics import read_metrics
from train.parallel import Ranks, choose_mode
from train.trainer import train

FRAMES_OF_6 = (16, 4, 4, 6)  # 24 tokens
FRAMES_OF_8 = (16, 3, 4, 8)  # 24 tokens

SETTINGS = {
    "steps": 6,
    "batch_size": 4,
    "micro_batch_size": 2,
    "dtype": "float32",
    "lora": {"rank": 4},
    "optimizer": {"lr": 1e-2},
    "checkpoint_every": 2,
    "track": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_checkpoint):
    """Folders of runs: alone; on 2, 3 and 4 ranks, replicated, sharded, sharing samples; and one that moved between.

    The 4 ranks are those of two machines. Shares of a sample end on frames or inside them.
    """
    folder = tmp_path_factory.mktemp("parallel")
    cache = folder / "cache"
    snapshot = make_snapshot(cache, tiny_checkpoint, shapes=(FRAMES_OF_6, FRAMES_OF_8, *[FRAMES_OF_6] * 3))
    model = ModelConfig(path=str(tiny_checkpoint))

    def job(name, world=1, **changes):
        settings = {**SETTINGS, **changes, "output": str(folder / name)}
        return {"world": world, "model": model.path, "cache": str(cache), "train": settings}

    def alone(name, **changes):
        train(model, TrainConfig(**job(name, **changes)["train"]), snapshot, Store(str(cache)))

    alone("lora1")
    alone("dora1", method="dora")
    two = [
        job("lora2", 2), job("shard2", 2, parallel="shard"), job("dora2", 2, parallel="shard", method="dora"),
        job("context2", 2, context_parallel=2) | {"compile": True},
        job("context-dora2", 2, context_parallel=2, method="dora"),
    ]  # fmt: skip
    three = [
        job("lora3", 3), job("shard3", 3, parallel="shard"),
        job("context3", 3, context_parallel=3, activation="selective"),
    ]  # fmt: skip
    four = [
        job("lora4", 4), job("hybrid4", 4, parallel="hybrid"), job("context4", 4, context_parallel=4),
        job("context-shard2x2", 4, context_parallel=2, parallel="shard"),
    ]  # fmt: skip
    moving = [
        job("moving", 2, context_parallel=2) | {"stop_at": 2}, job("moving", steps=4),
        job("moving", 3, context_parallel=3, parallel="shard", activation="full"),
    ]  # fmt: skip
    run_jobs("tests.train.ranks", [*two, *three, *({**one, "machine": 2} for one in four), *moving], folder)
    return folder


@pytest.mark.parametrize(
    ("name", "single"),
    [
        ("lora2", "lora1"),
        ("lora3", "lora1"),
        ("lora4", "lora1"),
        ("shard2", "lora1"),
        ("shard3", "lora1"),
        ("hybrid4", "lora1"),
        ("dora2", "dora1"),
        ("context2", "lora1"),
        ("context3", "lora1"),
        ("context4", "lora1"),
        ("context-shard2x2", "lora1"),
        ("context-dora2", "dora1"),
        ("moving", "lora1"),
    ],
)
def test_one_curve_and_one_adapter_on_any_ranks(runs, name, single):
    records, expected = read_metrics(runs / name), read_metrics(runs / single)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr"):
        assert [record[key] for record in records] == pytest.approx([record[key] for record in expected], rel=1e-5)
    state, reference = read_adapter(runs / name / "adapter")[0], read_adapter(runs / single / "adapter")[0]
    assert distance(state, reference) < 1e-5


def test_the_run_was_stopped_on_two_ranks_went_on_alone_and_was_finished_on_three(runs):
    states = sorted(path.name for path in (runs / "moving" / "checkpoints").iterdir())
    assert states == ["step_00000003", "step_00000004", "step_00000006"]
    assert (runs / "moving" / "outcomes").read_text().split() == ["preempted", "done", "done"]


def test_auto_replicates_what_a_cpu_holds():
    ranks = Ranks(0, 2, 0, 2, torch.device("cpu"))
    assert choose_mode("auto", ranks, 10**12) == "replicate"
    assert choose_mode("shard", ranks, 1) == "shard"


def test_sharding_divides_the_base_among_the_ranks(runs):
    names = ("lora2", "shard2", "shard3", "hybrid4", "context-shard2x2")
    held = {name: int((runs / name / "held").read_text()) for name in names}
    assert held["shard2"] / held["lora2"] == pytest.approx(1 / 2, rel=0.02)
    assert held["shard3"] / held["lora2"] == pytest.approx(1 / 3, rel=0.05)
    assert held["hybrid4"] == held["shard2"]  # inside each machine of two ranks
    assert held["context-shard2x2"] / held["lora2"] == pytest.approx(1 / 4, rel=0.02)


def test_a_block_that_shares_samples_compiles_as_one_graph(runs):
    assert float((runs / "context2" / "compiled").read_text()) < 1e-6
