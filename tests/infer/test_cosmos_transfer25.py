"""Transfer at inference: what the Transfer pipeline of diffusers makes, and what it cannot."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos2_5_TransferPipeline
from PIL import Image

from infer import cosmos_transfer25 as family
from infer.chunks import split_request
from infer.config import ControlnetConfig
from infer.controls import hint_frames, patch_weights
from infer.generate import generate
from infer.loading import NoGuardrail
from infer.request import Control as RequestedControl
from infer.request import Request
from infer.video import read_frames, write_mp4
from manifests.hints import make_hint, preset_parameters
from tests.infer.transfer import requests_of, small_config, transfer_model
from train.transfer_dit import Control, add_controlnet

CPU = torch.device("cpu")


class PassAll(NoGuardrail):
    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, tiny_transfer: Path) -> Path:
    """The tiny checkpoint with a VAE of next to no variance: diffusers' pipeline samples hints, we take their mean."""
    folder = tmp_path_factory.mktemp("exact") / "model"
    shutil.copytree(tiny_transfer, folder)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    with torch.no_grad():
        vae.quant_conv.weight[16:] = 0
        vae.quant_conv.bias[16:] = -60
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize(("guidance", "with_image"), [(1.0, False), (3.0, False), (3.0, True)])
def test_a_video_is_what_diffusers_transfer_pipeline_makes(
    exact: Path, video: Path, tmp_path: Path, guidance: float, with_image: bool
) -> None:
    image = np.random.default_rng(0).normal(scale=4, size=(4, 24)).astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    request = Request(
        name="a", prompt="a square", seed=3, guidance=guidance, num_steps=3, num_frames=9, height=32, width=48,
        controls=(RequestedControl(kind="edge"),), source=video,
        image_context=tmp_path / "image.npy" if with_image else None,
    )  # fmt: skip
    pipe = family.load_pipeline(transfer_model(exact), dtype=torch.float32, device=CPU, guardrail=False)
    context, negative = (family.encode_prompt(pipe, text) for text in ("a square", "blurred"))
    family.release_text(pipe)
    made = family.generate_frames(
        pipe, request, context, negative if guidance > 1 else None, conditioning_timestep=0.1, on_step=lambda: None
    )
    stock = Cosmos2_5_TransferPipeline.from_pretrained(str(exact), safety_checker=PassAll())
    stock.set_progress_bar_config(disable=True)
    if with_image:
        _show_image(stock, torch.from_numpy(image))
    hints = hint_frames(request, request.controls[0], 0, 9)
    expected = stock(
        controls=[Image.fromarray(frame) for frame in hints], prompt="a square", negative_prompt="blurred",
        height=32, width=48, num_frames=9, num_frames_per_chunk=9, num_inference_steps=3, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(3), output_type="np",
    ).frames[0]  # fmt: skip
    assert made is not None
    assert made.shape == (9, 32, 48, 3)
    # diffusers cuts to uint8 where we round.
    difference = np.abs(made.astype(int) - np.rint(expected * 255).astype(int))
    assert difference.max() <= 1
    assert np.unique(made).size > 20


def _show_image(stock: Cosmos2_5_TransferPipeline, image_MC: torch.Tensor) -> None:
    """Give diffusers' pipeline an image context where it has zeros; NVIDIA's negative prompt goes without."""
    negative_BLD = stock.encode_prompt("blurred", do_classifier_free_guidance=False)[0]

    def show(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        text, zeros = kwargs["encoder_hidden_states"]
        image = zeros if torch.equal(text, negative_BLD) else image_MC.unsqueeze(0)
        return args, kwargs | {"encoder_hidden_states": (text, image)}

    for model in (stock.transformer, stock.controlnet):
        model.register_forward_pre_hook(show, with_kwargs=True)


def test_an_image_context_changes_the_video_and_its_fingerprint(
    tiny_transfer: Path, video: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path / "out")
    rng = np.random.default_rng(0)
    entry = {"video_path": str(video), "edge": {}, "max_frames": 5}
    made = []
    for given in ({}, {"image_context": "image.npy"}, {"image_context": "image.npy"}):
        np.save(tmp_path / "image.npy", rng.normal(scale=4, size=(4, 24)).astype(np.float16))
        [result] = generate(
            transfer_model(tiny_transfer), config, requests_of(tmp_path, config, entry | given), guardrail=False
        )
        assert result.status == "made", result.error
        made.append(read_frames(tmp_path / "out" / "a.mp4").astype(int))
    assert np.abs(made[0] - made[1]).max() > 2
    assert np.abs(made[1] - made[2]).max() > 2


def test_edges_are_those_of_the_preset_at_the_size_that_is_made(video: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, height=64, width=96)
    [request] = requests_of(
        tmp_path, config, {"video_path": str(video), "edge": {"preset_edge_threshold": "low"}, "max_frames": 5}
    )
    assert request.num_frames == 5
    frames = hint_frames(request, request.controls[0], 2, 4)
    parameters = preset_parameters("edge", "low")
    assert (frames == np.stack([make_hint("edge", parameters, frame) for frame in read_frames(video)[2:6]])).all()


def test_weights_are_clamped_to_one_and_masks_place_them() -> None:
    assert patch_weights([0.5], [None], (2, 2, 3), 4) == [0.5]
    assert patch_weights([2.0, 2.0], [None, None], (2, 2, 3), 4) == [0.5, 0.5]
    mask = np.zeros((5, 32, 48), np.float32)
    mask[:, :16] = 1
    mask[1:3, 16:, :16] = 1
    first, second = patch_weights([1.0, 0.5], [mask, None], (2, 2, 3), 4)
    assert isinstance(first, np.ndarray)
    assert isinstance(second, np.ndarray)
    np.testing.assert_allclose(first[0], [[2 / 3] * 3, [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(second[0], [[1 / 3] * 3, [0.5] * 3], atol=1e-6)
    # Half of the second latent frame's four frames, in one patch: 0.5 and 0.5 sum to 1.
    np.testing.assert_allclose([first[1, 1, 0], second[1, 1, 0]], [0.5, 0.5], atol=1e-6)


def test_controls_add_up_by_weight_and_place(tiny_transfer: Path) -> None:
    pipe = family.load_pipeline(transfer_model(tiny_transfer), dtype=torch.float32, device=CPU, guardrail=False)
    family.release_text(pipe)
    generator = torch.Generator().manual_seed(0)
    x, hint, other = (torch.randn(1, 16, 2, 4, 6, generator=generator) for _ in range(3))
    context = torch.randn(1, 8, 64, generator=generator)

    @torch.no_grad()
    def predict(*steering: Control) -> torch.Tensor:
        with pipe.transformer.controlled_by(steering):
            return pipe.transformer(
                x, torch.full((1, 1, 2, 1, 1), 0.5), context, torch.zeros(1, 1, 2, 4, 6), torch.zeros(1, 1, 4, 6),
                return_dict=False,
            )[0]  # fmt: skip

    whole = predict(Control(hint))
    torch.testing.assert_close(predict(Control(hint, weight=0.25), Control(hint, weight=0.75)), whole)
    everywhere = torch.ones(1, 2, 2, 3)
    torch.testing.assert_close(predict(Control(hint, weight=everywhere)), whole)
    torch.testing.assert_close(predict(Control(hint), Control(other, weight=0 * everywhere)), whole)
    assert (predict(Control(hint, weight=0.5)) - whole).abs().max() > 1e-3
    assert (predict() - whole).abs().max() > 1e-3

    net = copy.deepcopy(pipe.transformer.controlnet)
    with torch.no_grad():
        for block in net.control_blocks:
            block.after_proj.weight.mul_(-2)
    add_controlnet(pipe.transformer, "vis", net)
    by_kind = predict(Control(hint, kind="vis"))
    torch.testing.assert_close(predict(Control(hint, kind="edge")), whole)
    pipe.transformer.controlnet = net
    torch.testing.assert_close(by_kind, predict(Control(hint)))
    assert (by_kind - whole).abs().max() > 1e-3


def test_a_long_video_is_made_in_chunks_with_its_hints_beside_it(
    tiny_transfer: Path, video: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "mask.mp4"
    write_mp4(mask, np.full((17, 32, 32, 3), 255, np.uint8), 12.0)
    config = small_config(
        tmp_path / "out", side_by_side=True,
        controlnets={kind: ControlnetConfig(path=str(tiny_transfer / "controlnet")) for kind in ("edge", "vis")},
    )  # fmt: skip
    entry = {
        "video_path": str(video), "edge": {"control_weight": 0.6, "mask_path": "mask.mp4"},
        "vis": {"control_weight": 0.9, "preset_blur_strength": "very_high"},
    }  # fmt: skip
    requests = requests_of(tmp_path, config, entry)
    pieces = split_request(requests[0], family.latent_frames_of)
    assert [(piece.first_frame, piece.num_frames) for piece in pieces] == [(0, 9), (8, 9)]
    [result] = generate(transfer_model(tiny_transfer), config, requests, guardrail=False)
    assert result.error is None
    made = read_frames(tmp_path / "out" / "a.mp4")
    assert made.shape == (17, 32, 48, 3)
    assert read_frames(tmp_path / "out" / "controls" / "a-edge.mp4").shape == (17, 32, 48, 3)
    assert read_frames(tmp_path / "out" / "side_by_side" / "a.mp4").shape[0] == 17
    [again] = generate(transfer_model(tiny_transfer), config, requests, guardrail=False)
    assert again.status == "kept"
    other = replace(requests[0], controls=(replace(requests[0].controls[0], preset="low"), requests[0].controls[1]))
    [changed] = generate(transfer_model(tiny_transfer), config, [other], guardrail=False)
    assert changed.status == "made"


def test_each_chunk_has_the_hints_of_its_own_frames(tiny_transfer: Path, tmp_path: Path) -> None:
    """Two inputs that differ from the tenth frame on, where the second chunk begins but for its first frame."""
    made = []
    for name in ("flat", "late"):
        frames = np.full((17, 32, 48, 3), 60, np.uint8)
        if name == "late":
            frames[9:, 8:24, 8:40] = 220
        write_mp4(tmp_path / f"{name}.mp4", frames, 12.0)
        config = small_config(tmp_path / name, guidance=1.0)
        requests = requests_of(tmp_path, config, {"video_path": str(tmp_path / f"{name}.mp4"), "edge": {}})
        first = hint_frames(requests[0], requests[0].controls[0], 0, 9)
        assert not first.any(), "one whose edges are black has a zero latent"
        [result] = generate(transfer_model(tiny_transfer), config, requests, guardrail=False)
        assert result.error is None
        made.append(read_frames(tmp_path / name / "a.mp4").astype(int))
    difference = np.abs(made[0] - made[1]).max((1, 2, 3))
    assert difference[:9].max() <= 4, "but for the MP4's rounding"
    assert difference[9:].min() > 4


def test_a_black_hint_is_a_zero_latent(tiny_transfer: Path) -> None:
    pipe = family.load_pipeline(transfer_model(tiny_transfer), dtype=torch.float32, device=CPU, guardrail=False)
    black = np.zeros((5, 32, 48, 3), np.uint8)
    assert not family._hint_latents(pipe, black).any()
    black[4, 0, 0] = 1
    assert family._hint_latents(pipe, black).any()


def test_a_length_that_is_not_4k1_is_made_longer_and_cut(tiny_transfer: Path, video: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path / "out", guidance=1.0)
    requests = requests_of(tmp_path, config, {"video_path": str(video), "edge": {}, "max_frames": 6})
    [result] = generate(transfer_model(tiny_transfer), config, requests, guardrail=False)
    assert result.error is None
    assert len(read_frames(tmp_path / "out" / "a.mp4")) == 6
    [kept] = generate(transfer_model(tiny_transfer), replace(config, side_by_side=True), requests, guardrail=False)
    assert kept.status == "kept"
    # Edges, input and result, of one size and length though the input is larger and longer; a line for the labels.
    assert read_frames(tmp_path / "out" / "side_by_side" / "a.mp4").shape == (6, 32 + 20, 3 * 48, 3)
    shown = read_frames(tmp_path / "out" / "controls" / "a-input.mp4").astype(int)
    assert np.abs(shown - read_frames(video)[:6, ::2, ::2].astype(int)).mean() < 4
