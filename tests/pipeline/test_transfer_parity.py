"""Training a controlnet from the cache is training it online: the same losses, to float32's precision.

The reference decodes each window, computes its hint, runs diffusers' VAE and text encoding, and then diffusers' own
controlnet and transformer with the zero image context of its pipeline, text projections included, every step.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Cosmos2_5_TransferPipeline, CosmosControlNetModel

from encode.config import HintsConfig
from encode.decode import DecodeJob, decode_window
from infer.loading import NoGuardrail
from manifests.cache import Cache
from manifests.errors import StaleCacheError
from manifests.hints import kind_of, make_hint
from manifests.image_context import IMAGE
from manifests.order import Order
from manifests.shards import read_tensors
from manifests.snapshot import Snapshot, load_snapshot
from pipeline.encode_stage import encode_stage
from pipeline.recipe import Recipe
from pipeline.stages import train_stage
from tests.pipeline.transfer import STEPS, losses, transfer_recipe
from train import cosmos_transfer25 as family
from train.hints import HintReader
from train.model import check

RELATIVE = 1e-6


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


def test_losses_of_control_training_equal_online_training(transfer: Recipe) -> None:
    train_stage(transfer)
    found = losses(Path(transfer.train.output))
    snapshot = load_snapshot(Cache(transfer.encode.cache).store, transfer.encode.snapshot)
    assert snapshot.sample(0).padding == (8, 8, 0, 0)
    online = Online(transfer, snapshot)
    expected = [online.step(step) for step in range(STEPS)]
    assert found == pytest.approx(expected, rel=RELATIVE)
    kinds = {
        kind_of(online.reader.name_of(snapshot.sample(index), 0, transfer.train.seed))
        for index in range(snapshot.num_samples)
    }
    assert kinds == {"edge", "vis"}, "both hints are drawn"


def test_losses_with_image_contexts_equal_online_training(with_images: Recipe) -> None:
    train_stage(with_images)
    found = losses(Path(with_images.train.output))
    online = Online(with_images, load_snapshot(Cache(with_images.encode.cache).store, "train"))
    assert found == pytest.approx([online.step(step) for step in range(STEPS)], rel=RELATIVE)


def test_projections_that_differ_are_both_in_a_context(tmp_path: Path, tiny_transfer: Path, demo_dataset: Path) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(tiny_transfer, checkpoint)
    controlnet = CosmosControlNetModel.from_pretrained(checkpoint / "controlnet")
    torch.nn.init.normal_(controlnet.crossattn_proj[0].weight, std=0.3)
    controlnet.save_pretrained(checkpoint / "controlnet")
    recipe = transfer_recipe(tmp_path, checkpoint, demo_dataset, steps=2)
    recipe = replace(recipe, encode=replace(recipe.encode, hints=HintsConfig(kinds=("edge",), variants=1)))
    recipe = replace(recipe, train=replace(recipe.train, hints=None))
    encode_stage(recipe)
    snapshot = load_snapshot(Cache(recipe.encode.cache).store, "train")
    context = read_tensors(Cache(recipe.encode.cache).store, snapshot.null_context)["context"]
    assert context.shape[1] == 128
    train_stage(recipe)
    online = Online(recipe, snapshot)
    expected = [online.step(step) for step in range(2)]
    assert losses(Path(recipe.train.output)) == pytest.approx(expected, rel=RELATIVE)
    with pytest.raises(StaleCacheError, match="another controlnet's text projection"):
        check(replace(recipe.model, controlnet=str(tiny_transfer / "controlnet")), recipe.train, snapshot)
