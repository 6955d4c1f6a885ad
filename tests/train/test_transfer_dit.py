"""The base and its controlnet as one module compute what diffusers' two models do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CosmosControlNetModel, CosmosTransformer3DModel

from manifests.config import ModelConfig
from manifests.errors import UsageError
from train import cosmos25
from train import cosmos_transfer25 as family
from train.config import TrainConfig
from train.methods import apply_methods
from train.transfer_dit import attach_controlnet

FRAMES, HEIGHT, WIDTH = 3, 4, 6


def _inputs(num_samples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(num_samples, *shape, generator=generator)

    clean = torch.zeros(num_samples, 1, FRAMES, HEIGHT, WIDTH)
    clean[:, :, 0] = 1
    return {
        "hidden_states": random(16, FRAMES, HEIGHT, WIDTH),
        "hint": random(16, FRAMES, HEIGHT, WIDTH),
        "timestep": torch.rand(num_samples, 1, FRAMES, 1, 1, generator=generator),
        "encoder_hidden_states": random(8, 128),
        "condition_mask": clean,
        "image": random(4, 24),
    }


@torch.no_grad()
def _stock(checkpoint: Path, given: dict[str, torch.Tensor], mask: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    base = CosmosTransformer3DModel.from_pretrained(checkpoint / "transformer")
    net = CosmosControlNetModel.from_pretrained(checkpoint / "controlnet")
    shared = {name: given[name] for name in ("timestep", "condition_mask")}
    shared |= {"encoder_hidden_states": (given["encoder_hidden_states"], image), "padding_mask": mask}
    residuals = net(controls_latents=given["hint"], latents=given["hidden_states"], return_dict=False, **shared)[0]
    return base(
        hidden_states=given["hidden_states"], block_controlnet_hidden_states=residuals, return_dict=False, **shared
    )[0]


@pytest.mark.parametrize("with_image", [False, True])
def test_the_forward_is_diffusers_with_and_without_an_image(tiny_transfer: Path, with_image: bool) -> None:
    given = _inputs(1)
    mask = torch.zeros(1, 1, 8 * HEIGHT, 8 * WIDTH)
    mask[:, :, :11] = 1
    image = given.pop("image") if with_image else torch.zeros_like(given.pop("image"))
    expected = _stock(tiny_transfer, given, mask, image)
    model = family.load_transformer(ModelConfig(path=str(tiny_transfer)), torch.float32, projected=False)
    with torch.no_grad():
        found = model(**given, padding_mask=mask, image_context=image if with_image else None, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_each_sample_of_a_batch_has_its_own_padding(tiny_transfer: Path) -> None:
    given = _inputs(2)
    del given["image"]
    masks = torch.zeros(2, 1, HEIGHT, WIDTH)
    masks[0, :, :1] = 1
    model = family.load_transformer(ModelConfig(path=str(tiny_transfer)), torch.float32, projected=False)
    with torch.no_grad():
        together = model(**given, padding_mask=masks, return_dict=False)[0]
        for index in range(2):
            one = {name: value[index : index + 1] for name, value in given.items()}
            alone = model(**one, padding_mask=masks[index : index + 1], return_dict=False)[0]
            torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-5, atol=1e-6)
        unpadded = model(**given, padding_mask=torch.zeros_like(masks), return_dict=False)[0]
    assert (unpadded[0] - together[0]).abs().max() > 1e-3
    assert torch.equal(unpadded[1], together[1])


def test_control_trains_the_control_blocks_and_the_embedder_of_hints(tiny_transfer: Path) -> None:
    model = family.load_transformer(ModelConfig(path=str(tiny_transfer)), torch.float32)
    apply_methods(model, TrainConfig(method="control"), family)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {".".join(name.split(".")[:2]) for name in trained}
    assert parts == {"controlnet.control_blocks", "controlnet.patch_embed"}
    assert all(name in trained for name, _ in model.named_parameters() if name.startswith("controlnet.control_blocks."))


def test_what_does_not_belong_together_is_refused(tiny_transfer: Path, tiny_checkpoint: Path) -> None:
    net = CosmosControlNetModel.from_pretrained(tiny_transfer / "controlnet")
    with pytest.raises(ValueError, match="takes no control"):
        attach_controlnet(CosmosTransformer3DModel.from_pretrained(tiny_checkpoint / "transformer"), net)
    model = ModelConfig(path=str(tiny_checkpoint), family="cosmos-transfer2.5")
    with pytest.raises(UsageError, match=r"has no 'controlnet' folder; set model\.controlnet"):
        family.load_transformer(model, torch.float32)
    with pytest.raises(UsageError, match=r"no image context; is model\.family 'cosmos2\.5' its own\?"):
        cosmos25.load_transformer(ModelConfig(path=str(tiny_transfer)), torch.float32)
    with pytest.raises(UsageError, match="takes no control"):
        family.load_transformer(replace(model, controlnet=str(tiny_transfer / "controlnet")), torch.float32)


def test_an_empty_model_counts_both_branches(tiny_transfer: Path) -> None:
    model = family.empty_transformer(ModelConfig(path=str(tiny_transfer)))
    apply_methods(model, TrainConfig(method="control"), family)
    shape = (16, FRAMES, HEIGHT, WIDTH)
    trained = family.flops_per_sample(model, shape, 8)
    model.requires_grad_(False)
    frozen = family.flops_per_sample(model, shape, 8)
    tokens, hidden, blocks = FRAMES * HEIGHT * WIDTH // 4, 64, 2
    # Weights' gradients of the control blocks: 2 x rows x weights for each linear layer.
    weights = 6 * hidden**2 + 8 * hidden**2
    assert trained - frozen == pytest.approx(blocks * 2 * (tokens * weights + 8 * 2 * hidden * 64))
    assert len(family.blocks(model)) == 4 + blocks
