"""Training from the cache is training online: same losses, same gradients.

The reference below knows nothing of latentline's loss, cache or projection: every step it decodes the window,
runs diffusers' VAE and the pipeline's own text encoding, and follows the published math with the whole
transformer, projection included. It shares the noise, sigmas, order and initial adapter with the trainer.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel

from encode.decode import DecodeJob, decode_window
from infer.loading import NoGuardrail
from manifests.cache import Cache
from manifests.order import Order
from manifests.shards import read_tensors
from manifests.snapshot import Snapshot, load_snapshot
from pipeline.encode_stage import encode_stage
from pipeline.recipe import Recipe
from pipeline.stages import train_stage
from tests.pipeline.recipes import make_recipe
from train import cosmos25
from train.adapters import adapter_parameters, add_adapter
from train.config import ObjectiveConfig
from train.loader import Loader

RELATIVE = 1e-6

# At 3 latent frames at most 2 can be clean.
OBJECTIVES = {
    "0.0001": ObjectiveConfig(conditioning={0: 0.4, 1: 0.3, 2: 0.3}, conditioning_timestep=0.0001, text_dropout=0.5),
    "off": ObjectiveConfig(conditioning={0: 0.4, 1: 0.3, 2: 0.3}, conditioning_timestep=-1.0, text_dropout=0.5),
}


class OnlineReference:
    """Encodes and trains on the fly, as diffusers' example does."""

    def __init__(self, recipe: Recipe, snapshot: Snapshot) -> None:
        self.recipe = recipe
        self.snapshot = snapshot
        self.objective = recipe.train.objective
        self.pipe = Cosmos2_5_PredictBasePipeline.from_pretrained(
            recipe.model.path, safety_checker=NoGuardrail(), dtype=torch.float32
        )
        self.transformer = self.pipe.transformer
        add_adapter(
            self.transformer, recipe.train.method, recipe.train.lora, cosmos25.DEFAULT_TARGETS, seed=recipe.train.seed
        )
        self.transformer.train()
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        settings = recipe.train.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        self.order = Order(snapshot.hash, recipe.train.seed, snapshot.num_samples)

    @torch.no_grad()
    def latents(self, row: dict) -> torch.Tensor:
        size = self.recipe.encode
        frames = decode_window(
            DecodeJob(
                path=row["source"],
                first=row["start"],
                num_frames=row["num_frames"],
                fps=row["fps"],
                height=size.height,
                width=size.width,
            )
        )
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        mean = torch.tensor(self.pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(self.pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
        return (self.pipe.vae.encode(video).latent_dist.mean - mean) / std

    def loss(self, position: int) -> torch.Tensor:
        epoch, index = self.order[position]
        row = self.snapshot.table.slice(index, 1).to_pylist()[0]
        x0 = self.latents(row)
        with torch.no_grad():
            text = self.pipe._get_prompt_embeds([row["caption"]], device=torch.device("cpu"))
        drawn = cosmos25.draw(self.recipe.train.seed, epoch, row["sample_id"], tuple(x0.shape[1:]), self.objective)
        text = text * (0.0 if drawn.drop_text else 1.0)
        noise, sigma = drawn.noise[None], drawn.sigma
        _, _, frames, height, width = x0.shape
        indicator = torch.zeros(1, 1, frames, 1, 1)
        indicator[:, :, : drawn.num_conditioning] = 1
        mask = indicator.expand(-1, -1, -1, height, width)
        x_t = mask * x0 + (1 - mask) * (sigma * noise + (1 - sigma) * x0)
        target = noise - x0
        clean_timestep = self.objective.conditioning_timestep
        timestep = torch.full((1, 1, frames, 1, 1), sigma)
        if clean_timestep >= 0:
            timestep = indicator * clean_timestep + (1 - indicator) * sigma
        prediction = self.transformer(
            hidden_states=x_t,
            timestep=timestep,
            encoder_hidden_states=text,
            condition_mask=mask,
            padding_mask=torch.zeros(1, 1, height * 8, width * 8),
            return_dict=False,
        )[0]
        prediction = target * mask + prediction * (1 - mask)
        return torch.nn.functional.mse_loss(prediction, target)

    def gradients(self, step: int) -> float:
        """Leave the step's gradients in the parameters; return its loss."""
        size = self.recipe.train.batch_size
        self.optimizer.zero_grad()
        losses = [self.loss(position) for position in range(step * size, (step + 1) * size)]
        loss = torch.stack(losses).mean()
        loss.backward()
        return float(loss.detach())

    def step(self, step: int) -> float:
        loss = self.gradients(step)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.train.optimizer.grad_clip)
        self.optimizer.step()
        return loss


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, demo_dataset: Path) -> Recipe:
    recipe = make_recipe(tmp_path_factory.mktemp("parity"), tiny_checkpoint, demo_dataset)
    _, code = encode_stage(recipe)
    assert code == 0
    return recipe


def _with(recipe: Recipe, tmp_path: Path, **train: object) -> Recipe:
    return replace(recipe, train=replace(recipe.train, output=str(tmp_path / "run"), **train))


def _snapshot(recipe: Recipe) -> Snapshot:
    return load_snapshot(Cache(recipe.encode.cache).store, recipe.encode.snapshot)


@pytest.mark.parametrize("timestep", OBJECTIVES)
def test_losses_of_a_run_equal_online_training(encoded: Recipe, tmp_path: Path, timestep: str) -> None:
    recipe = _with(encoded, tmp_path, objective=OBJECTIVES[timestep], steps=6)
    train_stage(recipe)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    reference = OnlineReference(recipe, _snapshot(recipe))
    expected = [reference.step(step) for step in range(6)]
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=RELATIVE)
    assert max(expected) > 1.01 * min(expected)


@pytest.mark.parametrize("timestep", OBJECTIVES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapter_gradients_equal_online_training(encoded: Recipe, tmp_path: Path, timestep: str, method: str) -> None:
    recipe = _with(encoded, tmp_path, objective=OBJECTIVES[timestep], method=method)
    snapshot = _snapshot(recipe)
    reference = OnlineReference(recipe, snapshot)
    transformer = cosmos25.load_transformer(recipe.model, torch.float32)
    add_adapter(transformer, method, recipe.train.lora, cosmos25.DEFAULT_TARGETS, seed=recipe.train.seed)
    # A fresh adapter's A has no gradient, because B is zero: move both models to the same non-zero B.
    generator = torch.Generator().manual_seed(1)
    theirs = adapter_parameters(reference.transformer)
    with torch.no_grad():
        for name, parameter in adapter_parameters(transformer).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
                theirs[name].copy_(parameter)
    expected_loss = reference.gradients(0)
    store = Cache(recipe.encode.cache).store
    with Loader(snapshot, store, recipe.train, cosmos25, rank=0, world=1, device=torch.device("cpu")) as loader:
        _, batches = next(loader.steps(0, 1))
        loss = sum(
            (cosmos25.loss(transformer, batch.inputs, recipe.train.objective) * torch.tensor(batch.slot.weights)).sum()
            for batch in batches
        )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=RELATIVE)
    scale = max(float(parameter.grad.abs().max()) for parameter in theirs.values())
    for name, parameter in adapter_parameters(transformer).items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_dropped_text_is_the_projection_of_zeros(encoded: Recipe) -> None:
    snapshot = _snapshot(encoded)
    stored = read_tensors(Cache(encoded.encode.cache).store, snapshot.null_context)["context"]
    transformer = CosmosTransformer3DModel.from_pretrained(encoded.model.path, subfolder="transformer")
    zeros = torch.zeros(1, 512, transformer.config.crossattn_proj_in_channels)
    with torch.no_grad():
        torch.testing.assert_close(stored, transformer.crossattn_proj(zeros)[0], rtol=0, atol=0)
