"""Runs of Transfer through the stages and under torchrun: what trains, what it leaves, what is told of hints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from diffusers import CosmosControlNetModel

from encode.config import HintsConfig
from infer.video import read_frames
from manifests.cache import Cache
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.hints import read_kinds
from manifests.image_context import IMAGE
from manifests.schema import SNAPSHOT
from manifests.snapshot import load_snapshot
from pipeline.cache_commands import cache_explain, cache_status
from pipeline.preview import cache_preview
from pipeline.recipe import Recipe, resolved
from pipeline.stages import infer_stage, train_stage
from tests.pipeline.recipes import write_recipe
from tests.pipeline.transfer import losses
from tests.train.caches import distance
from train import cosmos_transfer25 as family
from train.config import EmaConfig, SamplesConfig, ValidationConfig
from train.methods import apply_methods
from train.model import check
from train.trained import trained_parameters
from train.weights import load_weights


@pytest.mark.parametrize("branch", ["base", "control", "both"])
def test_lora_trains_where_it_is_asked_to(transfer: Recipe, branch: str) -> None:
    transformer = family.load_transformer(ModelConfig(path=transfer.model.path), torch.float32)
    config = replace(transfer.train, method="lora", lora=replace(transfer.train.lora, branch=branch))
    apply_methods(transformer, config, family)
    names = trained_parameters(transformer)
    control = [name for name in names if name.startswith("controlnet.")]
    assert all(".lora_" in name for name in names)
    # Six layers of attention 1 and 2 each have four targets, the MLP two; two matrices a target.
    per_block = (4 + 4 + 2) * 2
    assert len(control) == (0 if branch == "base" else 2 * per_block)
    assert len(names) - len(control) == (0 if branch == "control" else 4 * per_block)


def test_the_controlnet_of_a_run_is_what_stock_diffusers_loads(transfer: Recipe, tmp_path: Path) -> None:
    ema = EmaConfig(kind="decay", decay=0.5)
    recipe = replace(transfer, train=replace(transfer.train, output=str(tmp_path / "run"), steps=2, ema=ema))
    told = train_stage(recipe)
    averaged = CosmosControlNetModel.from_pretrained(tmp_path / "run" / "controlnet-ema").state_dict()
    expected = safetensors.torch.load_file(tmp_path / "run" / "adapter-ema" / "trained_weights.safetensors")
    last = "control_blocks.1.after_proj.weight"
    assert torch.equal(averaged[last], expected[f"controlnet.{last}"])
    assert read_kinds(tmp_path / "run" / "controlnet-ema") == read_kinds(tmp_path / "run" / "adapter-ema")
    with pytest.raises(UsageError, match="a control branch has no other format than the run's folder `controlnet`"):
        load_weights(tmp_path / "run" / "adapter", family="cosmos-transfer2.5")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "latentline infer recipe.toml inputs.json --adapter FOLDER" in card
    assert "| hints | edge, vis |" in card
    assert told["hints"] == ["edge", "vis"]
    trained = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "trained_weights.safetensors")
    stored = CosmosControlNetModel.from_pretrained(told["controlnet"])
    before = CosmosControlNetModel.from_pretrained(f"{transfer.model.path}/controlnet").state_dict()
    for name, tensor in stored.state_dict().items():
        mine = trained.get(f"controlnet.{name}")
        assert torch.equal(tensor, before[name] if mine is None else mine), name
    assert any(not torch.equal(stored.state_dict()[name], before[name]) for name in before)
    assert read_kinds(Path(told["controlnet"])) == ["edge", "vis"]


def test_a_run_resumes_as_if_it_had_not_stopped(transfer: Recipe, tmp_path: Path) -> None:
    ema = EmaConfig(kind="decay", decay=0.5)
    whole = replace(transfer.train, output=str(tmp_path / "whole"), steps=4, checkpoint_every=2, ema=ema)
    whole = replace(whole, method=("control", "lora"), lora=replace(whole.lora, branch="base"))
    train_stage(replace(transfer, train=whole))
    parted = replace(whole, output=str(tmp_path / "parted"), steps=2)
    train_stage(replace(transfer, train=parted))
    train_stage(replace(transfer, train=replace(parted, steps=4)))
    for name in ("trained_weights.safetensors", "pytorch_lora_weights.safetensors"):
        for folder in ("adapter", "adapter-ema"):
            first, second = (safetensors.torch.load_file(tmp_path / run / folder / name) for run in ("whole", "parted"))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)


def test_validation_sees_hints_and_says_the_same_twice(transfer: Recipe, tmp_path: Path) -> None:
    validation = ValidationConfig(every=1, fraction=0.7, samples=2, sigmas=(0.3, 0.7))
    found = []
    for run in ("first", "second"):
        config = replace(transfer.train, output=str(tmp_path / run), steps=1, validation=validation)
        train_stage(replace(transfer, train=config))
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        found.append([record["validation/loss"] for record in map(json.loads, lines) if "validation/loss" in record])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_what_a_run_cannot_train_on_is_one_line(transfer: Recipe, tmp_path: Path) -> None:
    store = Cache(transfer.encode.cache).store
    snapshot = load_snapshot(store, transfer.encode.snapshot)

    def refused(**train: Any) -> str:
        with pytest.raises(UsageError) as error:
            check(transfer.model, replace(transfer.train, **train), snapshot)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "name what to train on, with weights" in refused(hints=None)
    assert "the snapshot has no depth hints, it has edge, vis" in refused(hints={"depth": 1.0})
    names = snapshot.table["hint_names"].to_pylist()
    names[0] = ["vis/0", "vis/1", "vis/2", "vis/3"]
    place = snapshot.table.schema.get_field_index("hint_names")
    snapshot.table = snapshot.table.set_column(place, SNAPSHOT.field("hint_names"), pa.array([names[0], *names[1:]]))
    first = snapshot.sample(0).source
    assert refused(hints={"edge": 1.0}).endswith(f"1 of 8 samples have no edge hint (first: {first})")
    names[0] = ["edge/0", IMAGE]
    snapshot.table = snapshot.table.set_column(place, SNAPSHOT.field("hint_names"), pa.array(names))
    assert "7 of 8 samples have no image_context hint" in refused(hints={"edge": 1.0})


def test_hints_are_previewed_and_explained(transfer: Recipe, tmp_path: Path) -> None:
    shown = cache_preview(transfer.encode.cache, None, snapshot="train", count=1, output=tmp_path / "preview")
    assert shown["videos"][0]["problem"] is None
    made = {path.name.split(".")[-2] for path in (tmp_path / "preview").glob("*.*.mp4")}
    assert made == {"edge", "vis"}
    other = replace(transfer, encode=replace(transfer.encode, hints=HintsConfig(kinds=("edge",), edge_preset="low")))
    source = load_snapshot(Cache(transfer.encode.cache).store, "train").sample(0).source
    explained = cache_explain(other, source, as_json=True)
    hints = [entry for entry in explained["entries"] if entry["kind"] == "hint"]
    assert {entry["status"] for entry in hints} == {"stale"}
    assert {change["field"] for entry in hints for change in entry["changes"]} == {"parameters"}
    status = cache_status(transfer.encode.cache)
    assert status["entries"]["hint"]["entries"] == 32


def test_an_image_context_is_explained_and_not_previewed(with_images: Recipe, tmp_path: Path) -> None:
    shown = cache_preview(with_images.encode.cache, None, snapshot="train", count=1, output=tmp_path / "preview")
    assert {path.name.split(".")[-2] for path in (tmp_path / "preview").glob("*.*.mp4")} == {"edge", "vis"}
    explained = cache_explain(with_images, shown["videos"][0]["source"], as_json=True)
    assert [entry["status"] for entry in explained["entries"] if entry["what"] == "image context"] == ["cached"]


def test_sample_videos_are_shown_the_image_context(with_images: Recipe, transfer: Recipe, tmp_path: Path) -> None:
    made = {}
    for name, recipe in (("with", with_images), ("without", transfer)):
        samples = SamplesConfig(every=1, count=1, num_steps=2, guidance=3.0)
        config = replace(recipe.train, output=str(tmp_path / name), steps=1, samples=samples)
        train_stage(replace(recipe, train=replace(config, optimizer=replace(config.optimizer, lr=1e-12))))
        [video] = (tmp_path / name / "samples" / "step_00000001").glob("*.mp4")
        made[name] = read_frames(video).astype(int)
    assert np.abs(made["with"] - made["without"]).max() > 2


def test_lora_in_both_branches_shows_in_samples_and_in_inference(
    transfer: Recipe, tmp_path: Path, demo_dataset: Path
) -> None:
    """In bfloat16, where masters are float32 and computing is cast."""
    samples = SamplesConfig(every=1, count=1, num_steps=2, guidance=3.0)
    config = replace(transfer.train, output=str(tmp_path / "run"), steps=1, samples=samples, dtype="bfloat16")
    config = replace(config, method=("control", "lora"), lora=replace(config.lora, branch="both"))
    recipe = replace(transfer, train=replace(config, optimizer=replace(config.optimizer, lr=0.3)))
    told = train_stage(recipe)
    assert "controlnet" not in told, "its LoRA has no place in a stock controlnet"
    [sample] = (tmp_path / "run" / "samples" / "step_00000001").glob("*.mp4")
    assert read_frames(sample).shape == (9, 48, 48, 3)
    video = str(sorted((demo_dataset / "videos").glob("*.mp4"))[0])
    (tmp_path / "in.json").write_text(json.dumps({"name": "a", "prompt": "a", "video_path": video, "edge": {}}))
    made = {}
    for name, adapters in (("plain", []), ("tuned", [str(tmp_path / "run" / "adapter")])):
        infer = replace(recipe.infer, output=str(tmp_path / name), guidance=1.0, num_steps=1, chunk_frames=17)
        _, code = infer_stage(
            replace(recipe, infer=infer), str(tmp_path / "in.json"), adapters=adapters, guardrail=False
        )
        assert code == 0
        made[name] = read_frames(tmp_path / name / "a.mp4").astype(int)
    assert np.abs(made["plain"] - made["tuned"]).max() > 2


def test_a_dry_run_says_what_would_train(transfer: Recipe) -> None:
    described = train_stage(transfer, dry_run=True)
    assert described["method"].startswith("training control: 226,368 of 640,064 parameters")
    assert described["trainable_parameters"] == 226_368
    assert described["tokens_per_sample"] == {"16x3x6x6": 27}


def torchrun(ranks: int, *arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", "pipeline.cli", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_ranks_that_share_samples_and_weights_train_as_one(with_images: Recipe, tmp_path: Path) -> None:
    """3 ranks: 27 tokens a sample divided by them, and FSDP's weights of base and control branch split over them."""
    steps = {"steps": 3, "checkpoint_every": 3}
    alone = replace(with_images, train=replace(with_images.train, output=str(tmp_path / "alone"), **steps))
    train_stage(alone)
    shared = replace(alone.train, output=str(tmp_path / "shared"), context_parallel=3, parallel="shard")
    torchrun(3, "train", write_recipe(tmp_path, resolved(replace(with_images, train=shared))))
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    first, second = (
        safetensors.torch.load_file(tmp_path / run / "adapter" / "trained_weights.safetensors")
        for run in ("alone", "shared")
    )
    assert distance(second, first) < 1e-4


def test_two_ranks_with_a_prompt_each_make_what_one_makes(
    with_images: Recipe, tmp_path: Path, demo_dataset: Path
) -> None:
    """The image context is the prompt's; the rank of the negative prompt has zeros."""
    np.save(tmp_path / "image.npy", np.random.default_rng(0).normal(scale=4, size=(4, 24)).astype(np.float32))
    video = str(sorted((demo_dataset / "videos").glob("*.mp4"))[0])
    entry = {"name": "a", "prompt": "a", "video_path": video, "edge": {}, "max_frames": 9, "image_context": "image.npy"}
    (tmp_path / "in.json").write_text(json.dumps(entry))
    alone = replace(with_images, infer=replace(with_images.infer, output=str(tmp_path / "one")))
    _, code = infer_stage(alone, str(tmp_path / "in.json"), guardrail=False)
    assert code == 0
    shared = replace(with_images, infer=replace(with_images.infer, output=str(tmp_path / "two"), parallel="cfg"))
    torchrun(2, "infer", write_recipe(tmp_path, resolved(shared)), tmp_path / "in.json", "--no-guardrail")
    made = [read_frames(tmp_path / ranks / "a.mp4").astype(int) for ranks in ("one", "two")]
    assert np.abs(made[0] - made[1]).max() <= 4
