"""Training's methods through the stages: sample videos, the overfit check, and what infer makes of the weights."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infer.config import AdapterConfig
from infer.video import read_frames
from manifests.errors import UsageError
from manifests.snapshot import Snapshot, load_snapshot
from manifests.store import Store
from manifests.subset import hold_out
from pipeline.encode_stage import encode_stage
from pipeline.overfit import PASSING_SHARE, chart_lines, few_samples, has_learnt, overfit_stage
from pipeline.recipe import Recipe, validate
from pipeline.stages import infer_stage, train_stage
from tests.command import latentline
from tests.pipeline.recipes import recipe_values, write_recipe
from train.metrics import read_metrics
from train.trained import TRAINED_NAME


class World:
    """A cache, and recipes that train from it."""

    def __init__(self, folder: Path, checkpoint: Path, dataset: Path) -> None:
        self.folder = folder
        self.values = recipe_values(folder, checkpoint, dataset)
        encode_stage(validate(self.values, "test"))
        snapshot = load_snapshot(Store(self.values["encode"]["cache"]), "train")
        self.fraction = next(share / 10 for share in range(1, 10) if _splits(snapshot, share / 10))

    def recipe(self, name: str, **train: Any) -> Recipe:
        return validate(self.with_train(name, **train), "test")

    def with_train(self, name: str, **train: Any) -> dict[str, Any]:
        return self.values | {"train": self.values["train"] | {"output": str(self.folder / name)} | train}


def _splits(snapshot: Snapshot, share: float) -> bool:
    with contextlib.suppress(UsageError):
        hold_out(snapshot, share)
        return True
    return False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, demo_dataset: Path) -> World:
    return World(tmp_path_factory.mktemp("methods"), tiny_checkpoint, demo_dataset)


@pytest.mark.parametrize("image", [True, False])
def test_sample_videos_come_every_so_many_steps(world: World, image: bool) -> None:
    samples = {"every": 2, "count": 2, "num_steps": 2, "guidance": 3, "image": image}
    recipe = world.recipe(
        f"sampled-{image}",
        samples=samples,
        method=["lora", "adapters"],
        validation={"every": 2, "fraction": world.fraction},
        ema={"kind": "power"},
        track={"tensorboard": True},
        optimizer={"lr": 0.05},
    )
    train_stage(recipe)
    output = Path(recipe.train.output)
    assert sorted(path.name for path in (output / "samples").iterdir()) == ["step_00000002", "step_00000004"]
    videos = [sorted((output / "samples" / step).glob("*.mp4")) for step in ("step_00000002", "step_00000004")]
    assert [path.name for path in videos[0]] == [path.name for path in videos[1]]
    first, last = (np.stack([read_frames(path) for path in step]) for step in videos)
    assert first.shape == last.shape == (2, 9, 32, 48, 3)
    assert np.abs(first.astype(int) - last).max() > 3  # the same seeds, other weights
    with Image.open(output / "samples" / "step_00000004" / "contact_sheet.png") as sheet:
        assert sheet.height > 4 * 32
    pictures = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0}).Reload().Images("samples")
    assert [picture.step for picture in pictures] == [2, 4]


def test_sample_videos_change_no_training(world: World) -> None:
    train_stage(world.recipe("plain"))
    train_stage(world.recipe("shown", samples={"every": 1, "count": 1, "num_steps": 1}))
    losses = [[record["loss"] for record in read_metrics(world.folder / name)] for name in ("plain", "shown")]
    assert losses[0] == losses[1]


def test_samples_need_a_negative_prompt_the_cache_has(world: World) -> None:
    recipe = world.recipe("negative", samples={"every": 1})
    recipe = replace(recipe, infer=replace(recipe.infer, negative_prompt="Never seen."))
    with pytest.raises(UsageError, match=r"train\.samples\.guidance: the cache has no context of the negative prompt"):
        train_stage(recipe)
    assert not (world.folder / "negative").exists()


@pytest.mark.parametrize("method", ["full", ["lora", "adapters"]])
def test_infer_uses_every_trained_weight(world: World, method: Any, tmp_path: Path) -> None:
    name = "infer-full" if method == "full" else "infer-both"
    recipe = world.recipe(name, method=method, optimizer={"lr": 0.05})
    folder = str(Path(train_stage(recipe)["adapter"]).parent)

    def video(part: str, **options: Any) -> np.ndarray:
        changed = replace(recipe, infer=replace(recipe.infer, output=str(tmp_path / part)))
        result, _ = infer_stage(changed, "A red circle.", guardrail=False, **options)
        return read_frames(result["videos"][0]).astype(int)

    base, trained = video("base"), video("trained", adapters=[folder])
    assert np.abs(trained - base).max() > 5
    if method != "full":
        lora_alone = video("lora", adapters=[f"{folder}/pytorch_lora_weights.safetensors"])
        assert np.abs(trained - lora_alone).max() > 1
    else:
        scaled = replace(recipe, infer=replace(recipe.infer, adapters={"a": AdapterConfig(path=folder, weight=0.5)}))
        with pytest.raises(UsageError, match=r"infer\.adapters\.a\.weight: .* cannot be scaled"):
            infer_stage(scaled, "A red circle.", guardrail=False)
        ranged = replace(recipe, infer=replace(recipe.infer, adapters={"a": AdapterConfig(path=folder, sigma_min=0.5)}))
        with pytest.raises(UsageError, match=r"infer\.adapters\.a: .* works at every sigma"):
            infer_stage(ranged, "A red circle.", guardrail=False)


@pytest.mark.parametrize("method", ["full", ["lora", "adapters"]])
def test_a_video_is_made_anew_when_trained_weights_change(world: World, method: Any, tmp_path: Path) -> None:
    recipe = world.recipe("full" if method == "full" else "both", method=method, steps=1)
    folder = Path(train_stage(recipe)["adapter"]).parent
    recipe = replace(recipe, infer=replace(recipe.infer, output=str(tmp_path / "videos")))

    def status() -> str:
        infer_stage(recipe, "A red circle.", adapters=[str(folder)], guardrail=False)
        return json.loads((tmp_path / "videos" / "results.json").read_text())["videos"][0]["status"]

    assert [status(), status()] == ["made", "kept"]
    weights = load_file(folder / TRAINED_NAME)
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, folder / TRAINED_NAME)
    assert status() == "made"


def test_the_overfit_check_passes_and_says_so(world: World) -> None:
    """Through the command: four samples, a file that says what was measured, and exit code 0."""
    values = world.with_train(
        "check", steps=30, method="full", optimizer={"lr": 3e-3}, schedule={"kind": "lambda_linear"}
    )
    done = latentline("train", write_recipe(world.folder / "recipe", values), "--overfit", "4", "--json")
    assert done.code == 0, done.err
    verdict = done.json
    assert verdict["passed"] is True
    assert verdict["share"] <= PASSING_SHARE
    assert "75% of where it began" in verdict["criterion"]
    folder = world.folder / "check" / "overfit-4"
    document = json.loads((folder / "overfit.json").read_text())
    assert [document["curve"][0][0], document["curve"][-1][0]] == [0, 30]
    with Image.open(folder / "overfit.png") as picture:
        assert len(picture.getcolors(1 << 16)) > 3
    assert "step     30  loss" in done.err
    assert not (world.folder / "check" / "checkpoints").exists()


def test_the_overfit_check_fails_with_exit_code_1(world: World) -> None:
    verdict, code = overfit_stage(world.recipe("check-fails", steps=2, optimizer={"lr": 1e-9}), 2)
    assert code == 1
    assert verdict["passed"] is False


def test_the_few_samples_are_the_first_of_the_order(world: World) -> None:
    snapshot = load_snapshot(Store(world.values["encode"]["cache"]), "train")
    few = {count: set(few_samples(snapshot, 0, count).table["sample_id"].to_pylist()) for count in (1, 3, 8)}
    assert few[1] < few[3] < few[8]
    with pytest.raises(UsageError, match="--overfit 9: the snapshot has 8 samples"):
        few_samples(snapshot, 0, 9)


def test_the_chart_marks_the_criterion() -> None:
    lines = chart_lines([(0, 2.0), (10, 1.0)])
    assert lines[0].count("|") == lines[1].count("|") == 1
    assert lines[0].index("|") == lines[1].index("|")
    assert lines[0].count("#") == 2 * lines[1].count("#") - 1 or lines[0].count("#") == 39
    assert has_learnt([(0, 2.0), (1, 1.5)])
    assert not has_learnt([(0, 2.0), (1, 1.51)])


def test_the_dry_run_counts_what_is_held_out(world: World) -> None:
    told = train_stage(world.recipe("dry", validation={"every": 1, "fraction": world.fraction}), dry_run=True)
    assert told["samples"] + told["held_out"] == 8
    assert told["held_out"] > 0
