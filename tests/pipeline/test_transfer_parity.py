"""Training a controlnet from the cache is training it online: the same losses, to float32's precision.

The reference decodes each window, computes its hint, runs diffusers' VAE and text encoding, and then diffusers' own
controlnet and transformer with the zero image context of its pipeline, text projections included, every step.
"""

from __future__ import annotations

import json
import os
import shutil
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
from diffusers import Cosmos2_5_TransferPipeline, CosmosControlNetModel

from encode.config import HintsConfig
from encode.decode import DecodeJob, decode_window
from infer.loading import NoGuardrail
from infer.video import read_frames
from manifests.cache import Cache
from manifests.config import ModelConfig
from manifests.errors import StaleCacheError, UsageError
from manifests.hints import kind_of, make_hint, read_kinds
from manifests.image_context import IMAGE
from manifests.order import Order
from manifests.schema import SNAPSHOT
from manifests.shards import read_tensors
from manifests.snapshot import Snapshot, load_snapshot
from pipeline.cache_commands import cache_explain, cache_status
from pipeline.encode_stage import encode_stage
from pipeline.preview import cache_preview
from pipeline.recipe import Recipe, resolved, validate
from pipeline.stages import infer_stage, train_stage
from tests.pipeline.recipes import recipe_values, write_recipe
from tests.train.caches import distance
from train import cosmos_transfer25 as family
from train.config import EmaConfig, SamplesConfig, ValidationConfig
from train.hints import HintReader
from train.methods import apply_methods
from train.model import check
from train.trained import trained_parameters
from train.weights import load_weights

RELATIVE = 1e-6
STEPS = 4


class Online:
    """Encodes and trains on the fly."""

    def __init__(self, recipe: Recipe, snapshot: Snapshot) -> None:
        self.recipe, self.snapshot = recipe, snapshot
        self.store = Cache(recipe.encode.cache).store
        self.pipe = Cosmos2_5_TransferPipeline.from_pretrained(recipe.model.path, safety_checker=NoGuardrail())
        self.base, self.net = self.pipe.transformer.requires_grad_(False), self.pipe.controlnet.requires_grad_(False)
        self.parameters = [*self.net.control_blocks.parameters(), *self.net.patch_embed.parameters()]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        given = recipe.train.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=given.lr, betas=given.betas, eps=given.eps, weight_decay=given.weight_decay
        )
        self.order = Order(snapshot.hash, recipe.train.seed, snapshot.num_samples)
        self.reader = HintReader(snapshot, self.store, recipe.train, family)
        self.parameters_of = {
            row["key"]: row["parameters"] for row in Cache(recipe.encode.cache).rows("hint").to_pylist()
        }

    @torch.no_grad()
    def latents(self, frames: np.ndarray) -> torch.Tensor:
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        mean, std = self.pipe.latents_mean, self.pipe.latents_std
        return (self.pipe.vae.encode(video).latent_dist.mean - mean) / std

    def window(self, row: dict[str, Any]) -> np.ndarray:
        size = self.recipe.encode
        return decode_window(
            DecodeJob(
                path=row["source"],
                first=row["start"],
                num_frames=row["num_frames"],
                fps=row["fps"],
                height=size.height,
                width=size.width,
                resize=size.resize,
                interpolation="bicubic" if size.resize == "pad" else "bilinear",
            )
        )

    def padding_mask(self, row: dict[str, Any]) -> torch.Tensor:
        size = self.recipe.encode
        mask = torch.ones(1, 1, size.height, size.width)
        top, bottom, left, right = row["padding"] or (0, 0, 0, 0)
        mask[:, :, top : size.height - bottom, left : size.width - right] = 0
        return mask

    def loss(self, position: int) -> torch.Tensor:
        epoch, index = self.order[position]
        row = self.snapshot.table.slice(index, 1).to_pylist()[0]
        frames = self.window(row)
        x0 = self.latents(frames)
        sample = self.snapshot.sample(index)
        name = self.reader.name_of(sample, epoch, self.recipe.train.seed)
        drawn_parameters = json.loads(self.parameters_of[row["hint_keys"][row["hint_names"].index(name)]])
        hint = self.latents(np.stack([make_hint(kind_of(name), drawn_parameters, frame) for frame in frames]))
        with torch.no_grad():
            text = self.pipe._get_prompt_embeds([row["caption"]], device=torch.device("cpu"))
        objective = self.recipe.train.objective
        drawn = family.draw(self.recipe.train.seed, epoch, row["sample_id"], tuple(x0.shape[1:]), objective)
        text = text * (0.0 if drawn.drop_text else 1.0)
        noise, sigma = drawn.noise[None], drawn.sigma
        _, _, latent_frames, height, width = x0.shape
        indicator = torch.zeros(1, 1, latent_frames, 1, 1)
        indicator[:, :, : drawn.num_conditioning] = 1
        mask = indicator.expand(-1, -1, -1, height, width)
        noisy = mask * x0 + (1 - mask) * (sigma * noise + (1 - sigma) * x0)
        target = noise - x0
        timestep = indicator * objective.conditioning_timestep + (1 - indicator) * sigma
        image = torch.zeros(1, self.base.config.img_context_num_tokens, self.base.config.img_context_dim_in)
        if IMAGE in sample.hints:  # dropped text leaves it
            [given] = Path(self.recipe.data.datasets["shapes"].hints_path or "").glob(
                f"*/{Path(row['source']).stem}.npy"
            )
            image = torch.from_numpy(np.load(given))[None]
        shared = {
            "timestep": timestep, "encoder_hidden_states": (text, image), "condition_mask": mask,
            "padding_mask": self.padding_mask(row), "return_dict": False,
        }  # fmt: skip
        residuals = self.net(controls_latents=hint, latents=noisy, **shared)[0]
        prediction = self.base(hidden_states=noisy, block_controlnet_hidden_states=residuals, **shared)[0]
        return torch.nn.functional.mse_loss(target * mask + prediction * (1 - mask), target)

    def step(self, step: int) -> float:
        size = self.recipe.train.batch_size
        self.optimizer.zero_grad()
        loss = torch.stack([self.loss(position) for position in range(step * size, (step + 1) * size)]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.train.optimizer.grad_clip)
        self.optimizer.step()
        return float(loss.detach())


def _recipe(folder: Path, checkpoint: Path, dataset: Path, **train: Any) -> Recipe:
    values = recipe_values(folder, checkpoint, dataset)
    values["model"]["family"] = "cosmos-transfer2.5"
    values["encode"] |= {"resize": "pad", "hints": {"kinds": ["edge", "vis"], "variants": 2}, "height": 48}
    values["train"] |= {
        "method": "control", "steps": STEPS, "hints": {"edge": 1, "vis": 2}, "optimizer": {"lr": 1e-3},
        "objective": {
            "conditioning": {"0": 0.4, "1": 0.4, "2": 0.2}, "conditioning_timestep": 0.1, "text_dropout": 0.5,
        },
        **train,
    }  # fmt: skip
    return validate(values, "test")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, tiny_transfer: Path, demo_dataset: Path) -> Recipe:
    recipe = _recipe(tmp_path_factory.mktemp("transfer-parity"), tiny_transfer, demo_dataset)
    _, code = encode_stage(recipe)
    assert code == 0
    return recipe


@pytest.fixture(scope="module")
def with_images(encoded: Recipe, tmp_path_factory: pytest.TempPathFactory, demo_dataset: Path) -> Recipe:
    """The same, with an image context of each video."""
    folder = tmp_path_factory.mktemp("images")
    shutil.copytree(encoded.encode.cache, folder / "cache")
    (folder / IMAGE).mkdir()
    rng = np.random.default_rng(0)
    for video in (demo_dataset / "videos").glob("*.mp4"):
        np.save(folder / IMAGE / f"{video.stem}.npy", rng.normal(scale=4, size=(4, 24)).astype(np.float32))
    dataset = replace(encoded.data.datasets["shapes"], hints_path=str(folder))
    recipe = replace(
        encoded,
        data=replace(encoded.data, datasets={"shapes": dataset}),
        encode=replace(
            encoded.encode, cache=str(folder / "cache"), hints=replace(encoded.encode.hints, image_context="given")
        ),
        train=replace(encoded.train, output=str(folder / "run")),
    )
    result, code = encode_stage(recipe)
    assert code == 0
    assert result["encoded"]["hint"] == 4
    return recipe


def _losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_losses_of_control_training_equal_online_training(encoded: Recipe) -> None:
    train_stage(encoded)
    found = _losses(Path(encoded.train.output))
    snapshot = load_snapshot(Cache(encoded.encode.cache).store, encoded.encode.snapshot)
    assert snapshot.sample(0).padding == (8, 8, 0, 0)
    online = Online(encoded, snapshot)
    expected = [online.step(step) for step in range(STEPS)]
    assert found == pytest.approx(expected, rel=RELATIVE)
    kinds = {
        kind_of(online.reader.name_of(snapshot.sample(index), 0, encoded.train.seed))
        for index in range(snapshot.num_samples)
    }
    assert kinds == {"edge", "vis"}, "both hints are drawn"


def test_losses_with_image_contexts_equal_online_training(with_images: Recipe) -> None:
    train_stage(with_images)
    found = _losses(Path(with_images.train.output))
    online = Online(with_images, load_snapshot(Cache(with_images.encode.cache).store, "train"))
    assert found == pytest.approx([online.step(step) for step in range(STEPS)], rel=RELATIVE)


def test_ranks_that_share_samples_and_weights_train_as_one(with_images: Recipe, tmp_path: Path) -> None:
    """3 ranks: 27 tokens a sample divided by them, and FSDP's weights of base and control branch split over them."""
    encoded = with_images
    steps = {"steps": 3, "checkpoint_every": 3}
    alone = replace(encoded, train=replace(encoded.train, output=str(tmp_path / "alone"), **steps))
    train_stage(alone)
    shared = replace(alone.train, output=str(tmp_path / "shared"), context_parallel=3, parallel="shard")
    file = write_recipe(tmp_path, resolved(replace(encoded, train=shared)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*command, "-m", "pipeline.cli", "train", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert _losses(tmp_path / "shared") == pytest.approx(_losses(tmp_path / "alone"), rel=1e-5)
    first, second = (
        safetensors.torch.load_file(tmp_path / run / "adapter" / "trained_weights.safetensors")
        for run in ("alone", "shared")
    )
    assert distance(second, first) < 1e-4


@pytest.mark.parametrize("branch", ["base", "control", "both"])
def test_lora_trains_where_it_is_asked_to(encoded: Recipe, branch: str) -> None:
    transformer = family.load_transformer(ModelConfig(path=encoded.model.path), torch.float32)
    config = replace(encoded.train, method="lora", lora=replace(encoded.train.lora, branch=branch))
    apply_methods(transformer, config, family)
    names = trained_parameters(transformer)
    control = [name for name in names if name.startswith("controlnet.")]
    assert all(".lora_" in name for name in names)
    # Six layers of attention 1 and 2 each have four targets, the MLP two; two matrices a target.
    per_block = (4 + 4 + 2) * 2
    assert len(control) == (0 if branch == "base" else 2 * per_block)
    assert len(names) - len(control) == (0 if branch == "control" else 4 * per_block)


def test_the_controlnet_of_a_run_is_what_stock_diffusers_loads(encoded: Recipe, tmp_path: Path) -> None:
    ema = EmaConfig(kind="decay", decay=0.5)
    recipe = replace(encoded, train=replace(encoded.train, output=str(tmp_path / "run"), steps=2, ema=ema))
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
    before = CosmosControlNetModel.from_pretrained(f"{encoded.model.path}/controlnet").state_dict()
    for name, tensor in stored.state_dict().items():
        mine = trained.get(f"controlnet.{name}")
        assert torch.equal(tensor, before[name] if mine is None else mine), name
    assert any(not torch.equal(stored.state_dict()[name], before[name]) for name in before)
    assert read_kinds(Path(told["controlnet"])) == ["edge", "vis"]


def test_a_run_resumes_as_if_it_had_not_stopped(encoded: Recipe, tmp_path: Path) -> None:
    ema = EmaConfig(kind="decay", decay=0.5)
    whole = replace(encoded.train, output=str(tmp_path / "whole"), steps=4, checkpoint_every=2, ema=ema)
    whole = replace(whole, method=("control", "lora"), lora=replace(whole.lora, branch="base"))
    train_stage(replace(encoded, train=whole))
    parted = replace(whole, output=str(tmp_path / "parted"), steps=2)
    train_stage(replace(encoded, train=parted))
    train_stage(replace(encoded, train=replace(parted, steps=4)))
    for name in ("trained_weights.safetensors", "pytorch_lora_weights.safetensors"):
        for folder in ("adapter", "adapter-ema"):
            first, second = (safetensors.torch.load_file(tmp_path / run / folder / name) for run in ("whole", "parted"))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)


def test_validation_sees_hints_and_says_the_same_twice(encoded: Recipe, tmp_path: Path) -> None:
    validation = ValidationConfig(every=1, fraction=0.7, samples=2, sigmas=(0.3, 0.7))
    found = []
    for run in ("first", "second"):
        config = replace(encoded.train, output=str(tmp_path / run), steps=1, validation=validation)
        train_stage(replace(encoded, train=config))
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        found.append([record["validation/loss"] for record in map(json.loads, lines) if "validation/loss" in record])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_what_a_run_cannot_train_on_is_one_line(encoded: Recipe, tmp_path: Path) -> None:
    store = Cache(encoded.encode.cache).store
    snapshot = load_snapshot(store, encoded.encode.snapshot)

    def refused(**train: Any) -> str:
        with pytest.raises(UsageError) as error:
            check(encoded.model, replace(encoded.train, **train), snapshot)
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


def test_projections_that_differ_are_both_in_a_context(tmp_path: Path, tiny_transfer: Path, demo_dataset: Path) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(tiny_transfer, checkpoint)
    controlnet = CosmosControlNetModel.from_pretrained(checkpoint / "controlnet")
    torch.nn.init.normal_(controlnet.crossattn_proj[0].weight, std=0.3)
    controlnet.save_pretrained(checkpoint / "controlnet")
    recipe = _recipe(tmp_path, checkpoint, demo_dataset, steps=2)
    recipe = replace(recipe, encode=replace(recipe.encode, hints=HintsConfig(kinds=("edge",), variants=1)))
    recipe = replace(recipe, train=replace(recipe.train, hints=None))
    encode_stage(recipe)
    snapshot = load_snapshot(Cache(recipe.encode.cache).store, "train")
    context = read_tensors(Cache(recipe.encode.cache).store, snapshot.null_context)["context"]
    assert context.shape[1] == 128
    train_stage(recipe)
    online = Online(recipe, snapshot)
    expected = [online.step(step) for step in range(2)]
    assert _losses(Path(recipe.train.output)) == pytest.approx(expected, rel=RELATIVE)
    with pytest.raises(StaleCacheError, match="another controlnet's text projection"):
        check(replace(recipe.model, controlnet=str(tiny_transfer / "controlnet")), recipe.train, snapshot)


def test_hints_are_previewed_and_explained(encoded: Recipe, tmp_path: Path) -> None:
    shown = cache_preview(encoded.encode.cache, None, snapshot="train", count=1, output=tmp_path / "preview")
    assert shown["videos"][0]["problem"] is None
    made = {path.name.split(".")[-2] for path in (tmp_path / "preview").glob("*.*.mp4")}
    assert made == {"edge", "vis"}
    other = replace(encoded, encode=replace(encoded.encode, hints=HintsConfig(kinds=("edge",), edge_preset="low")))
    source = load_snapshot(Cache(encoded.encode.cache).store, "train").sample(0).source
    explained = cache_explain(other, source, as_json=True)
    hints = [entry for entry in explained["entries"] if entry["kind"] == "hint"]
    assert {entry["status"] for entry in hints} == {"stale"}
    assert {change["field"] for entry in hints for change in entry["changes"]} == {"parameters"}
    status = cache_status(encoded.encode.cache)
    assert status["entries"]["hint"]["entries"] == 32


def test_an_image_context_is_explained_and_not_previewed(with_images: Recipe, tmp_path: Path) -> None:
    shown = cache_preview(with_images.encode.cache, None, snapshot="train", count=1, output=tmp_path / "preview")
    assert {path.name.split(".")[-2] for path in (tmp_path / "preview").glob("*.*.mp4")} == {"edge", "vis"}
    explained = cache_explain(with_images, shown["videos"][0]["source"], as_json=True)
    assert [entry["status"] for entry in explained["entries"] if entry["what"] == "image context"] == ["cached"]


def test_two_ranks_with_a_prompt_each_make_what_one_makes(
    with_images: Recipe, tmp_path: Path, demo_dataset: Path
) -> None:
    """The image context is the prompt's; the rank of the negative prompt has zeros."""
    np.save(tmp_path / "image.npy", np.random.default_rng(0).normal(scale=4, size=(4, 24)).astype(np.float32))
    video = str(sorted((demo_dataset / "videos").glob("*.mp4"))[0])
    entry = {"name": "a", "prompt": "a", "video_path": video, "edge": {}, "max_frames": 9, "image_context": "image.npy"}
    (tmp_path / "in.json").write_text(json.dumps(entry))
    made = []
    for ranks, parallel in ((1, "auto"), (2, "cfg")):
        infer = replace(with_images.infer, output=str(tmp_path / parallel), parallel=parallel)
        file = write_recipe(tmp_path / f"{ranks}", resolved(replace(with_images, infer=infer)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*command, "-m", "pipeline.cli", "infer", str(file), str(tmp_path / "in.json"), "--no-guardrail"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        made.append(read_frames(tmp_path / parallel / "a.mp4").astype(int))
    assert np.abs(made[0] - made[1]).max() <= 4


def test_sample_videos_are_shown_the_image_context(with_images: Recipe, encoded: Recipe, tmp_path: Path) -> None:
    made = {}
    for name, recipe in (("with", with_images), ("without", encoded)):
        samples = SamplesConfig(every=1, count=1, num_steps=2, guidance=3.0)
        config = replace(recipe.train, output=str(tmp_path / name), steps=1, samples=samples)
        train_stage(replace(recipe, train=replace(config, optimizer=replace(config.optimizer, lr=1e-12))))
        [video] = (tmp_path / name / "samples" / "step_00000001").glob("*.mp4")
        made[name] = read_frames(video).astype(int)
    assert np.abs(made["with"] - made["without"]).max() > 2


def test_lora_in_both_branches_shows_in_samples_and_in_inference(
    encoded: Recipe, tmp_path: Path, demo_dataset: Path
) -> None:
    """In bfloat16, where masters are float32 and computing is cast."""
    samples = SamplesConfig(every=1, count=1, num_steps=2, guidance=3.0)
    config = replace(encoded.train, output=str(tmp_path / "run"), steps=1, samples=samples, dtype="bfloat16")
    config = replace(config, method=("control", "lora"), lora=replace(config.lora, branch="both"))
    recipe = replace(encoded, train=replace(config, optimizer=replace(config.optimizer, lr=0.3)))
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


def test_a_dry_run_says_what_would_train(encoded: Recipe) -> None:
    described = train_stage(encoded, dry_run=True)
    assert described["method"].startswith("training control: 226,368 of 640,064 parameters")
    assert described["trainable_parameters"] == 226_368
    assert described["tokens_per_sample"] == {"16x3x6x6": 27}
