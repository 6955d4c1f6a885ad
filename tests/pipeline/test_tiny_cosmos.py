"""The embedded model is good enough to tell right from wrong: what a change breaks shows in what it draws.

One DoRA run on the held-out object, and what LoRA must do beside what the demo's tests ask of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infer import cosmos25
from infer.request import Request
from infer.video import Frames, read_frames, write_mp4
from pipeline.demo.draw import Clip, draw_clip
from pipeline.demo.measure import measure
from pipeline.demo.run import CHECKPOINT, demo_recipe, questions, training_scenes
from pipeline.demo.videos import make_videos
from pipeline.demo.world import Scene, Thing
from pipeline.encode_stage import encode_stage
from pipeline.preview import cache_preview
from pipeline.recipe import Recipe
from pipeline.stages import infer_stage, train_stage
from tests.pipeline.test_parity import OnlineReference, _snapshot
from train.config import ScheduleConfig

MOST_BYTES = 12_000_000
VAE_DB = 30.0
STEPS = 16
RED = Scene(
    background="black",
    things=(Thing(shape="circle", size="large", motion="moves right slowly", colour="red", start="left"),),
)
BLUE = Scene(
    background="sand",
    things=(Thing(shape="square", size="large", motion="moves down slowly", colour="blue", start="top"),),
)


@dataclass(frozen=True)
class World:
    folder: Path
    recipe: Recipe

    def trained(self, name: str, **train: object) -> Path:
        """The adapter's folder of a run with these settings."""
        config = replace(self.recipe.train, output=str(self.folder / name), **train)
        return Path(train_stage(replace(self.recipe, train=config))["adapter"]).parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("tiny")
    make_videos(folder / "data", training_scenes())
    recipe = demo_recipe(folder, executor="local")
    encode_stage(recipe)
    return World(folder, recipe)


@pytest.fixture(scope="module")
def pipe() -> object:
    model = demo_recipe(Path("unused"), executor="local").model
    return cosmos25.load_pipeline(model, dtype=torch.float32, device=torch.device("cpu"), guardrail=False)


@pytest.fixture(scope="module")
def draw(pipe: object) -> Callable[..., Frames]:
    """Frames of a caption, from the base model with whatever adapters are active."""
    negative = cosmos25.encode_prompt(pipe, cosmos25.DEFAULT_NEGATIVE_PROMPT)

    def make(caption: str, *, context: torch.Tensor | None = None, **request: object) -> Frames:
        values = {"seed": 0, "guidance": 3.0, "num_steps": STEPS, "num_frames": 17, "height": 64, "width": 64}
        asked = Request(name="video", prompt=caption, **(values | request))
        own = cosmos25.encode_prompt(pipe, caption) if context is None else context
        guided = negative if asked.guidance > 1 else None
        return cosmos25.generate_frames(pipe, asked, own, guided, conditioning_timestep=0.0001, on_step=lambda: None)

    return make


def new_object() -> Clip:
    return next(question.truth for question in questions() if question.name == "sks_text_0")


def test_the_weights_are_small_enough_to_ship_and_have_a_card() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file() and path.parent.name != "controlnet"]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert "python -m pipeline.demo.pretrain" in (CHECKPOINT / "README.md").read_text()


def test_cache_preview_reaches_the_vaes_psnr(world: World) -> None:
    outcome = cache_preview(
        world.recipe.encode.cache, world.recipe, snapshot="train", count=6, output=world.folder / "preview"
    )
    assert outcome["mean_psnr"] >= VAE_DB


@pytest.mark.parametrize("scene", [RED, BLUE])
def test_the_base_model_draws_what_the_caption_says(draw: Callable[..., Frames], scene: Scene) -> None:
    truth = draw_clip(scene)
    found = measure(draw(scene.caption), truth)
    assert found.appears >= 0.8
    assert found.place < 5
    assert found.colour < 40


def test_without_its_text_the_model_draws_something_else(pipe: object, draw: Callable[..., Frames]) -> None:
    truth = draw_clip(RED)
    assert measure(draw(RED.caption, guidance=0.0), truth).appears >= 0.8
    assert measure(draw(RED.caption, context=dropped(pipe), guidance=0.0), truth).appears <= 0.2


def test_guidance_draws_what_a_faint_text_says(pipe: object, draw: Callable[..., Frames]) -> None:
    """Seven tenths of the way to no text at all, the text is lost; guidance away from none brings it back."""
    shown = []
    for scene in (RED, BLUE):
        faint = 0.7 * dropped(pipe) + 0.3 * cosmos25.encode_prompt(pipe, scene.caption)
        for guidance in (0.0, 3.0):
            shown.append(measure(draw(scene.caption, context=faint, guidance=guidance), draw_clip(scene)))
    without, guided = shown[::2], shown[1::2]
    assert np.mean([found.appears for found in guided]) >= np.mean([found.appears for found in without]) + 0.3
    assert np.mean([found.place for found in guided]) <= np.mean([found.place for found in without]) / 2


def dropped(pipe: object) -> torch.Tensor:
    """The context of dropped text: the projection of zeros."""
    bias = pipe.transformer.crossattn_proj[0].bias
    return torch.nn.functional.gelu(bias).detach().expand(1, 512, -1).contiguous()


@pytest.mark.parametrize("scene", [RED, BLUE])
def test_an_image_comes_to_move_as_the_caption_says(draw: Callable[..., Frames], scene: Scene, tmp_path: Path) -> None:
    truth = draw_clip(scene)
    Image.fromarray(truth.frames[0]).save(tmp_path / "first.png")
    found = measure(draw(scene.caption, image=tmp_path / "first.png"), truth, first=1)
    assert found.appears >= 0.9
    assert found.place < 2
    assert found.psnr > 25


def test_frames_a_video_begins_with_come_back_as_the_vae_keeps_them(
    draw: Callable[..., Frames], tmp_path: Path
) -> None:
    truth = draw_clip(RED)
    given = truth.frames[:5]
    write_mp4(tmp_path / "given.mp4", given, 16.0)
    frames = draw(RED.caption, video=tmp_path / "given.mp4", num_latent_conditional_frames=2)
    error = ((frames[:5].astype(float) - given) ** 2).mean()
    assert 10 * np.log10(255**2 / error) >= VAE_DB - 2
    after = measure(frames, truth, first=5)
    assert after.appears >= 0.8
    assert after.place < 3


@pytest.fixture(scope="module")
def adapters(world: World) -> dict[str, Path]:
    """A DoRA that has learned the object, and a LoRA that has begun to."""
    quick = replace(world.recipe.train.optimizer, lr=1.5e-3)
    return {
        "dora": world.trained("dora", method="dora", steps=120, optimizer=quick),
        "lora": world.trained("lora", steps=10, optimizer=quick),
    }


def test_a_dora_brings_the_new_object_and_keeps_the_old_ones(
    adapters: dict[str, Path], pipe: object, draw: Callable[..., Frames]
) -> None:
    new, old = new_object(), draw_clip(RED)
    before = measure(draw(new.scene.caption), new), measure(draw(old.scene.caption), old)
    pipe.load_lora_weights(str(adapters["dora"]), adapter_name="dora")
    try:
        after = measure(draw(new.scene.caption), new), measure(draw(old.scene.caption), old)
    finally:
        pipe.unload_lora_weights()
    assert before[0].appears == 0
    assert after[0].appears >= 0.6
    assert after[0].place < before[0].place / 2
    assert after[1].appears >= before[1].appears - 0.4


def test_two_adapters_switch_without_leaking(
    adapters: dict[str, Path], pipe: object, draw: Callable[..., Frames]
) -> None:
    caption = new_object().scene.caption
    base = draw(caption, num_steps=4)
    for name in ("lora", "dora"):
        pipe.load_lora_weights(str(adapters[name]), adapter_name=name)
    try:
        drawn = {}
        for turn in ("lora", "dora", "lora again", "dora again"):
            pipe.set_adapters(turn.split()[0])
            drawn[turn] = draw(caption, num_steps=4)
    finally:
        pipe.unload_lora_weights()
    assert np.array_equal(drawn["lora"], drawn["lora again"])
    assert np.array_equal(drawn["dora"], drawn["dora again"])
    assert not np.array_equal(drawn["lora"], drawn["dora"])
    assert not np.array_equal(drawn["lora"], base)
    assert np.array_equal(draw(caption, num_steps=4), base)


def test_cached_training_is_online_training(world: World) -> None:
    """The reference keeps the learning rate as it is, so the run does too."""
    config = replace(
        world.recipe.train,
        output=str(world.folder / "curve"),
        steps=4,
        batch_size=2,
        micro_batch_size=2,
        schedule=ScheduleConfig(),
    )
    recipe = replace(world.recipe, train=config)
    train_stage(recipe)
    lines = (world.folder / "curve" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    reference = OnlineReference(recipe, _snapshot(recipe))
    assert losses == pytest.approx([reference.step(step) for step in range(4)], rel=1e-4)


def test_the_command_line_draws_the_new_object(adapters: dict[str, Path], world: World) -> None:
    new = new_object()
    infer = replace(world.recipe.infer, output=str(world.folder / "videos"), num_steps=STEPS)
    made, code = infer_stage(
        replace(world.recipe, infer=infer), new.scene.caption, adapters=[str(adapters["dora"])], guardrail=False
    )
    assert code == 0
    assert measure(read_frames(made["videos"][0]), new).appears >= 0.6
