import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from diffusers import Cosmos2_5_PredictBasePipeline
from PIL import Image

from infer import cosmos25
from infer.config import InferConfig
from infer.inputs import read_requests
from infer.loading import NoGuardrail
from infer.request import Request
from infer.video import Frames, read_frames, write_mp4
from manifests.config import ModelConfig
from manifests.errors import LatentlineError, UsageError

CONFIG = InferConfig(num_steps=2, num_frames=9, height=32, width=48, negative_prompt="blurry", guidance=2.0)


def request(**changes: object) -> Request:
    (text,) = read_requests("a red circle", CONFIG)
    return replace(text, **changes)  # type: ignore[arg-type]


def make(pipe: Cosmos2_5_PredictBasePipeline, wanted: Request, *, conditioning_timestep: float = 0.0001) -> Frames:
    return cosmos25.generate_frames(
        pipe,
        wanted,
        cosmos25.encode_prompt(pipe, wanted.prompt),
        cosmos25.encode_prompt(pipe, "blurry") if wanted.guidance > 1 else None,
        conditioning_timestep=conditioning_timestep,
        on_step=lambda: None,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 100}, "height = 100 is not divisible by 16; near: 96 or 112"),
        ({"width": 456}, "width = 456 is not divisible by 16; near: 448 or 464"),
        ({"height": 0}, "height = 0 is not divisible by 16; near: 16"),
        ({"num_frames": 64}, r"num_frames = 64 is not 4k\+1; near: 61 or 65"),
        ({"num_frames": 0}, r"num_frames = 0 is not 4k\+1; near: 1"),
        ({"num_latent_conditional_frames": 1}, "text alone gives 0 conditioning latent frames, not 1"),
        ({"image": Path("x.png")}, "an image gives 1 conditioning latent frames, not 0"),
        (
            {"image": Path("x.png"), "num_latent_conditional_frames": 1, "num_frames": 1},
            "all of them conditioning; the least is 5",
        ),
        (
            {"video": Path("x.mp4"), "num_latent_conditional_frames": 2, "num_frames": 5},
            "all of them conditioning; the least is 9",
        ),
    ],
)
def test_videos_the_model_cannot_make_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cosmos25.check_request(request(**changes))


def test_sizes_of_the_released_models_pass() -> None:
    for frames in (1, 29, 61, 77, 93):
        cosmos25.check_request(request(height=704, width=1280, num_frames=frames))


def test_same_seed_same_frames_and_another_seed_others(pipe: Cosmos2_5_PredictBasePipeline) -> None:
    first = make(pipe, request(seed=3))
    assert first.shape == (9, 32, 48, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, make(pipe, request(seed=3)))
    assert (first != make(pipe, request(seed=4))).mean() > 0.5


def assert_same_frames(made: Frames, stock: np.ndarray) -> None:
    """Equal in float32, but for values that lie between two of uint8."""
    difference = np.abs(made.astype(int) - (stock * 255).round())
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.fixture
def stock_pipe(tiny_checkpoint: Path) -> Cosmos2_5_PredictBasePipeline:
    """diffusers' own pipeline, with its own forward of the transformer."""
    return Cosmos2_5_PredictBasePipeline.from_pretrained(tiny_checkpoint, safety_checker=NoGuardrail())


def test_the_frames_are_those_of_the_stock_call(
    pipe: Cosmos2_5_PredictBasePipeline, stock_pipe: Cosmos2_5_PredictBasePipeline
) -> None:
    stock = stock_pipe(
        prompt="a red circle",
        negative_prompt="blurry",
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).frames[0]
    assert_same_frames(make(pipe, request(seed=3)), stock)


def test_guidance_of_one_or_less_ignores_the_negative_prompt(pipe: Cosmos2_5_PredictBasePipeline) -> None:
    off = make(pipe, request(guidance=1.0))
    np.testing.assert_array_equal(off, make(pipe, request(guidance=0.0)))
    assert (off != make(pipe, request(guidance=2.0))).any()


def test_an_image_is_the_first_frame(pipe: Cosmos2_5_PredictBasePipeline, tmp_path: Path) -> None:
    bright = np.full((32, 48, 3), 250, np.uint8)
    Image.fromarray(bright).save(tmp_path / "a.png")
    Image.fromarray(255 - bright).resize((100, 70)).save(tmp_path / "b.png")
    frames = {
        name: make(pipe, request(image=tmp_path / f"{name}.png", num_latent_conditional_frames=1)) for name in "ab"
    }
    # The first frame is the VAE's own reconstruction of the image, untouched by denoising.
    for name, value in (("a", 250), ("b", 5)):
        pixels = torch.full((1, 3, 1, 32, 48), value / 127.5 - 1)
        with torch.no_grad():
            rebuilt = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample[0, :, 0]
        expected = ((rebuilt.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(frames[name][0], expected, atol=5)
    assert (frames["a"] != frames["b"]).any()


@pytest.mark.parametrize("clean", [1, 2])
def test_a_video_conditions_on_its_last_frames(
    pipe: Cosmos2_5_PredictBasePipeline, stock_pipe: Cosmos2_5_PredictBasePipeline, demo_dataset: Path, clean: int
) -> None:
    video = sorted((demo_dataset / "videos").iterdir())[0]
    made = make(pipe, request(video=video, num_latent_conditional_frames=clean))
    needed = 4 * clean - 3
    stock = stock_pipe(
        video=[Image.fromarray(frame) for frame in read_frames(video)],
        prompt="a red circle",
        negative_prompt="blurry",
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=2.0,
        num_latent_conditional_frames=clean,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="np",
    ).frames[0]
    assert_same_frames(made, stock)
    assert len(read_frames(video)) > needed


def test_the_conditioning_timestep_matters_and_can_be_off(
    pipe: Cosmos2_5_PredictBasePipeline, demo_dataset: Path
) -> None:
    video = sorted((demo_dataset / "videos").iterdir())[0]
    wanted = request(video=video, num_latent_conditional_frames=2)
    on = make(pipe, wanted)
    off = make(pipe, wanted, conditioning_timestep=-1.0)
    assert (on != off).any()


def test_a_video_too_short_and_a_broken_image_are_named(pipe: Cosmos2_5_PredictBasePipeline, tmp_path: Path) -> None:
    write_mp4(tmp_path / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8), 16.0)
    with pytest.raises(LatentlineError, match=r"short\.mp4: 3 frames, conditioning needs 5"):
        make(pipe, request(video=tmp_path / "short.mp4", num_latent_conditional_frames=2))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(LatentlineError, match=r"bad\.png: cannot read this image"):
        make(pipe, request(image=tmp_path / "bad.png", num_latent_conditional_frames=1))


def test_a_prompt_longer_than_the_encoder_reads_is_warned_of(
    pipe: Cosmos2_5_PredictBasePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="infer.cosmos25"):
        cosmos25.encode_prompt(pipe, "a red circle")
        cosmos25.encode_prompt(pipe, cosmos25.DEFAULT_NEGATIVE_PROMPT)
        assert not caplog.messages
        assert cosmos25.encode_prompt(pipe, "zebra " * 600).shape[1] == 512
    assert "prompt cut to 512 of its" in caplog.text


def test_without_the_guardrail_package_the_error_names_it_and_the_way_out(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"pip install cosmos_guardrail.*--no-guardrail.*License requires"):
        cosmos25.load_pipeline(
            ModelConfig(path=str(tiny_checkpoint)),
            dtype=torch.float32,
            device=torch.device("cpu"),
            guardrail=True,
        )


GUARDRAIL_PACKAGE = """
import torch

class CosmosSafetyChecker(torch.nn.Module):
    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt):
        return "unsafe" not in prompt

    def check_video_safety(self, frames):
        return None if frames.shape[0] == 5 else 255 * (frames > 127).astype("uint8")
"""

USE_GUARDRAIL = """
import sys, torch, numpy as np
from dataclasses import replace
from infer import cosmos25
from infer.loading import NoGuardrail
from infer.config import InferConfig
from infer.inputs import read_requests
from manifests.config import ModelConfig
from manifests.errors import LatentlineError

config = InferConfig(num_steps=1, num_frames=9, height=32, width=32, guidance=1.0)
pipe = cosmos25.load_pipeline(
    ModelConfig(path=sys.argv[1]), dtype=torch.float32, device=torch.device("cpu"), guardrail=True
)
cosmos25.check_prompt(pipe, "fine")
try:
    cosmos25.check_prompt(pipe, "unsafe")
except LatentlineError as error:
    print("prompt:", error)
(request,) = read_requests("fine", config)
embeds = cosmos25.encode_prompt(pipe, "fine")
make = lambda r: cosmos25.generate_frames(pipe, r, embeds, None, conditioning_timestep=0.0, on_step=lambda: None)
print("values:", set(np.unique(make(request)).tolist()) <= {0, 255})
try:
    make(replace(request, num_frames=5))
except LatentlineError as error:
    print("video:", error)
"""


def test_an_installed_guardrail_checks_prompts_and_videos(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A stand-in package with the real one's interface: the real one needs gigabytes of weights."""
    (tmp_path / "cosmos_guardrail.py").write_text(GUARDRAIL_PACKAGE)
    (tmp_path / "cosmos_guardrail-1.0.dist-info").mkdir()
    (tmp_path / "cosmos_guardrail-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: cosmos_guardrail\nVersion: 1.0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", USE_GUARDRAIL, str(tiny_checkpoint)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(cosmos25.__file__).parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("prompt: the guardrail rejects this prompt")
    assert lines[1] == "values: True"
    assert lines[2].startswith("video: the guardrail rejects the generated video")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}", "has no model_index.json; give a diffusers folder or a hub id"),
        ("{tmp}/gone", "has no model_index.json"),
        ("./gone", "has no model_index.json"),
        ("gone", "has no model_index.json"),
    ],
)
def test_a_path_without_a_model_is_named(tmp_path: Path, path: str, message: str) -> None:
    model = ModelConfig(path=path.format(tmp=tmp_path))
    with pytest.raises(UsageError, match=message):
        cosmos25.load_pipeline(model, dtype=torch.float32, device=torch.device("cpu"), guardrail=False)


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = ModelConfig(path="latentline-tests/none", revision="diffusers/base/post-trained")
    with pytest.raises(UsageError, match=r"cannot load latentline-tests/none at revision diff") as caught:
        cosmos25.load_pipeline(model, dtype=torch.float32, device=torch.device("cpu"), guardrail=False)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_pipeline_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copytree(tiny_checkpoint, tmp_path / "other")
    index = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(index.replace("PredictBase", "Transfer"))
    with pytest.raises(UsageError, match="is a Cosmos2_5_TransferPipeline, not a Cosmos2_5_PredictBase"):
        cosmos25.load_pipeline(
            ModelConfig(path=str(folder)),
            dtype=torch.float32,
            device=torch.device("cpu"),
            guardrail=False,
        )
