"""The scripts that made the embedded model: what they compute is what the real parts compute, and they learn."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import Cosmos2_5_PredictBasePipeline
from safetensors.torch import load_file

from encode.config import EncodeConfig
from encode.cosmos25_models import TextEncoder
from infer.loading import NoGuardrail
from manifests.config import ModelConfig
from manifests.hints import read_kinds
from pipeline.demo.pretrain.__main__ import Sizes, pretrain
from pipeline.demo.pretrain.data import base_scenes, drawn, halved_colour
from pipeline.demo.pretrain.loop import Loop
from pipeline.demo.pretrain.text import contexts_of, tokens_of
from pipeline.demo.pretrain.vae import Phase, build_vae, latents_of
from pipeline.demo.pretrain.whole import WholeClips

CPU = torch.device("cpu")


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_a_whole_clip_is_encoded_and_decoded_as_its_chunks_are(num_frames: int) -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    video = torch.randn(2, 3, num_frames, 16, 16)
    latents = vae.encode(video).latent_dist.mode()
    made = vae.decode(latents).sample
    with WholeClips(vae, compiled=False) as whole:
        mean, _ = whole.encode(video)
        decoded = whole.decode(latents)
    torch.testing.assert_close(mean, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded.clamp(-1, 1), made, rtol=0, atol=1e-5)
    assert torch.equal(vae.encode(video).latent_dist.mode(), latents)  # and after it the VAE is as it was


def test_halved_colour_keeps_brightness_and_flat_areas() -> None:
    frames = drawn(base_scenes(0, 2), CPU)
    halved = halved_colour(frames)
    weights = torch.tensor([0.2126, 0.7152, 0.0722])
    assert (halved.float() @ weights - frames.float() @ weights).abs().mean() < 0.5
    assert torch.equal(halved[:, :, :4, :4], frames[:, :, :4, :4])
    assert not torch.equal(halved, frames)


def test_wild_clips_have_colours_of_their_own() -> None:
    found = base_scenes(0, 4)
    tame, wild = drawn(found, CPU), drawn(found, CPU, wild=1)
    assert wild.shape == tame.shape
    assert len(wild[:, 0, 0, 0].unique(dim=0)) == 4
    assert torch.equal(wild, drawn(found, CPU, wild=1))


def test_the_loop_minimises_and_decays_its_rate_to_nothing() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(4))
    target = torch.arange(4.0)
    loop = Loop("test", [weight], steps=600, lr=0.1, device=CPU)
    index = torch.empty(1, dtype=torch.long)
    records = list(loop.run(lambda index: {"loss": (weight - target).square().mean()}, index, 10, every=300))
    assert [record["step"] for record in records] == [300, 600]
    assert records[1]["loss"] < 0.1 * records[0]["loss"]
    assert float(loop._lr) < 1e-3


def test_one_command_writes_a_checkpoint_that_the_real_code_loads(tmp_path: Path) -> None:
    sizes = Sizes(
        vae=(Phase(2, 2, 5), Phase(1, 2, 17)), text_steps=3, dit_steps=3, batch_size=2, clips=12, length=64,
        control_videos=2, control_steps=2,
    )  # fmt: skip
    pretrain(tmp_path / "model", sizes, device=CPU)
    pipe = Cosmos2_5_PredictBasePipeline.from_pretrained(
        str(tmp_path / "model"), safety_checker=NoGuardrail(), dtype=torch.float32
    )
    assert pipe.transformer.config.use_crossattn_projection
    assert str(tmp_path) not in (tmp_path / "model" / "vae" / "config.json").read_text()
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    scaled = (latents_of(pipe.vae, drawn(base_scenes(50, 8), CPU)) - mean) / std
    assert scaled.std() == pytest.approx(1, abs=0.3)
    assert scaled.mean() == pytest.approx(0, abs=0.3)
    written = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file())
    assert written < 15e6
    assert read_kinds(tmp_path / "model" / "controlnet") == ["edge"]
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    before = load_file(weights)
    shutil.rmtree(tmp_path / "model" / "transformer")
    pretrain(tmp_path / "model", sizes, device=CPU)  # what is there is not trained again
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(weights).items())
    assert (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    captions = ["A red circle.", "Anything else, é."]
    config = EncodeConfig(cache=str(tmp_path), dtype="float32", text="raw")
    expected = TextEncoder(ModelConfig(path=str(tmp_path / "model")), config, CPU).encode(captions)
    ids, ends = tokens_of(pipe.tokenizer, captions, 512)
    assert (ends < 60).all()
    torch.testing.assert_close(contexts_of(pipe.text_encoder, ids, CPU), expected, rtol=1e-4, atol=1e-4)
