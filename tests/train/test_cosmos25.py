import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import CosmosTransformer3DModel

from manifests.config import ModelConfig
from manifests.errors import LatentlineError, StaleCacheError, UsageError
from tests.train.caches import CONTEXT, SHAPE, make_snapshot
from train import cosmos25
from train.config import ObjectiveConfig


@pytest.fixture(scope="module")
def transformer(tiny_checkpoint):
    return cosmos25.load_transformer(ModelConfig(path=str(tiny_checkpoint)), torch.float32)


def make_batch(counts=(0, 1, 2)):
    generator = torch.Generator().manual_seed(3)
    draws = [cosmos25.draw(0, 0, f"sample{i}", SHAPE, ObjectiveConfig()) for i in range(len(counts))]
    examples = [
        cosmos25.example(
            torch.randn(SHAPE, generator=generator),
            torch.randn(CONTEXT, generator=generator),
            replace(drawn, num_conditioning=count),
        )
        for drawn, count in zip(draws, counts, strict=True)
    ]
    return {name: torch.stack([one[name] for one in examples]) for name in examples[0]}


def plain_loss(transformer, batch, index, conditioning_timestep):
    """The objective of one sample written out by frames, with pixel-sized masks."""
    clean, noise = batch["latents"][index], batch["noise"][index]
    sigma, count = batch["sigma"][index].item(), int(batch["num_conditioning"][index])
    _, frames, height, width = clean.shape
    noisy = clean.clone()
    noisy[:, count:] = (1 - sigma) * clean[:, count:] + sigma * noise[:, count:]
    mask = torch.zeros(1, 1, frames, height, width)
    mask[:, :, :count] = 1
    if conditioning_timestep >= 0:
        timestep = torch.full((1, 1, frames, 1, 1), sigma)
        timestep[:, :, :count] = conditioning_timestep
    else:
        timestep = torch.tensor([sigma])
    velocity = transformer(
        hidden_states=noisy[None],
        timestep=timestep,
        encoder_hidden_states=batch["context"][index][None],
        condition_mask=mask,
        padding_mask=torch.zeros(1, 1, 8 * height, 8 * width),
    ).sample[0]
    squares = (velocity - (noise - clean)).square()
    return squares[:, count:].sum() / clean.numel()


@pytest.mark.parametrize("timestep", [0.0001, 0.1, -1.0])
@torch.no_grad()
def test_loss_equals_the_plain_computation(transformer, timestep):
    batch = make_batch()
    objective = ObjectiveConfig(conditioning_timestep=timestep)
    losses = cosmos25.loss(transformer, batch, objective)
    for index in range(3):
        expected = plain_loss(transformer, batch, index, timestep)
        assert losses[index].item() == pytest.approx(expected.item(), rel=1e-6)


@torch.no_grad()
def test_the_conditioning_timestep_matters_only_where_frames_are_clean(transformer):
    batch = make_batch()
    off = cosmos25.loss(transformer, batch, ObjectiveConfig(conditioning_timestep=-1))
    on = cosmos25.loss(transformer, batch, ObjectiveConfig(conditioning_timestep=0.0001))
    assert off[0] == pytest.approx(on[0].item(), rel=1e-6)
    assert abs(off[1] - on[1]) > 1e-5
    assert abs(off[2] - on[2]) > 1e-5


@torch.no_grad()
def test_the_projected_null_context_equals_dropping_the_raw_text(transformer, tiny_checkpoint):
    """The reference multiplies the raw embedding by zero; the cache stores what the projection makes of that."""
    whole = CosmosTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    batch = make_batch((1,))
    raw = torch.zeros(1, CONTEXT[0], whole.config.crossattn_proj_in_channels)
    dropped = cosmos25.loss(whole, batch | {"context": raw}, ObjectiveConfig())
    null = torch.nn.functional.gelu(whole.crossattn_proj[0].bias).expand(1, *CONTEXT)
    cached = cosmos25.loss(transformer, batch | {"context": null}, ObjectiveConfig())
    torch.testing.assert_close(cached, dropped, rtol=1e-6, atol=0)


def test_a_raw_model_keeps_its_projection(tiny_checkpoint):
    raw = cosmos25.load_transformer(ModelConfig(path=str(tiny_checkpoint)), torch.float32, projected=False)
    assert isinstance(raw.crossattn_proj, torch.nn.Sequential)


def test_draw_is_a_function_of_its_arguments():
    objective = ObjectiveConfig()
    first = cosmos25.draw(1, 2, "a", SHAPE, objective)
    torch.manual_seed(99)
    again = cosmos25.draw(1, 2, "a", SHAPE, objective)
    assert torch.equal(first.noise, again.noise)
    assert (first.sigma, first.num_conditioning, first.drop_text) == (
        again.sigma,
        again.num_conditioning,
        again.drop_text,
    )
    for other in (cosmos25.draw(2, 2, "a", SHAPE, objective), cosmos25.draw(1, 3, "a", SHAPE, objective)):
        assert not torch.equal(first.noise, other.noise)
        assert first.sigma != other.sigma


def test_draws_follow_the_objective():
    objective = ObjectiveConfig(shift=5.0, conditioning={0: 0.5, 1: 0.2, 2: 0.3}, text_dropout=0.2)
    draws = [cosmos25.draw(0, 0, str(i), (1, 1, 1, 1), objective) for i in range(4000)]
    counts = [sum(d.num_conditioning == k for d in draws) / 4000 for k in range(3)]
    assert counts == pytest.approx([0.5, 0.2, 0.3], abs=0.03)
    assert sum(d.drop_text for d in draws) / 4000 == pytest.approx(0.2, abs=0.03)
    sigma = torch.tensor([d.sigma for d in draws])
    assert sigma.median().item() == pytest.approx(5 * 0.5 / (1 + 4 * 0.5), abs=0.01)
    logit = torch.logit(sigma / (5 - 4 * sigma))  # undo the shift: a standard normal
    assert logit.mean().abs() < 0.06
    assert logit.std().item() == pytest.approx(1, abs=0.05)
    noise = torch.cat([d.noise.flatten() for d in draws])
    assert noise.std().item() == pytest.approx(1, abs=0.05)


def test_normalise_uses_the_channels_own_scale():
    parts = {"latents_mean": [1.0, -2.0], "latents_std": [2.0, 4.0]}
    latents = torch.tensor([5.0, 6.0]).view(2, 1, 1, 1).to(torch.bfloat16)
    scaled = cosmos25.normalise(latents, parts)
    assert scaled.dtype == torch.float32
    assert scaled.flatten().tolist() == [2.0, 2.0]
    latents[0] = torch.nan
    with pytest.raises(LatentlineError, match="not finite"):
        cosmos25.normalise(latents, parts)


def test_check_snapshot_accepts_its_own_model(tiny_checkpoint, tmp_path):
    snapshot = make_snapshot(tmp_path, tiny_checkpoint)
    cosmos25.check_snapshot(snapshot, ModelConfig(path=str(tiny_checkpoint)))


@pytest.mark.parametrize(("part", "value"), [("vae", "f" * 40), ("projection", "e" * 40), ("latents_std", [1.0] * 16)])
def test_check_snapshot_names_what_differs(tiny_checkpoint, tmp_path, part, value):
    snapshot = make_snapshot(tmp_path, tiny_checkpoint, **{part: value})
    with pytest.raises(StaleCacheError, match=f"{part}.*latentline encode") as caught:
        cosmos25.check_snapshot(snapshot, ModelConfig(path=str(tiny_checkpoint)))
    assert "\n" not in str(caught.value)


def edited(checkpoint: Path, folder: Path, edit) -> ModelConfig:
    copy = folder / "edited"
    shutil.copytree(checkpoint, copy)
    file = next((copy / "transformer").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    edit(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return ModelConfig(path=str(copy))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda tensors: tensors.pop("proj_out.weight"), "missing keys"),
        (lambda tensors: tensors.update(stranger=torch.zeros(1)), "unexpected keys"),
    ],
)
def test_loading_is_strict(tiny_checkpoint, tmp_path, edit, problem):
    with pytest.raises(UsageError, match=problem):
        cosmos25.load_transformer(edited(tiny_checkpoint, tmp_path, edit), torch.float32)


def test_another_projection_is_refused(tiny_checkpoint, tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", tiny_checkpoint)
    model = edited(tiny_checkpoint, tmp_path, lambda tensors: tensors["crossattn_proj.0.bias"].add_(1))
    with pytest.raises(StaleCacheError, match="projection"):
        cosmos25.check_snapshot(snapshot, model)


def test_conditioning_must_leave_a_frame_to_learn():
    objective = ObjectiveConfig(conditioning={0: 0.5, 2: 0.5})
    cosmos25.check_objective(objective, [(16, 3, 4, 6)])
    with pytest.raises(UsageError, match="at most 1"):
        cosmos25.check_objective(objective, [(16, 3, 4, 6), (16, 2, 4, 6)])


@pytest.mark.parametrize("conditioning", [{0: 0.5}, {0: 1.5, 1: -0.5}, {-1: 1.0}])
def test_conditioning_must_be_a_distribution(conditioning):
    with pytest.raises(ValueError, match="must"):
        ObjectiveConfig(conditioning=conditioning)


def test_conditioning_takes_toml_keys():
    assert ObjectiveConfig(**json.loads('{"conditioning": {"0": 0.5, "1": 0.5}}')).conditioning == {0: 0.5, 1: 0.5}
