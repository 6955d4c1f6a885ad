"""The demo, as `latentline demo` runs it: the base model cannot draw the new object, the model with the LoRA can.

LATENTLINE_DEMO names the folder of a demo that has just run, as in CI, which is then not run once more.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from infer.video import read_frames
from manifests.cache import Cache
from pipeline.demo.run import NUM_VIDEOS, questions, run_demo, training_scenes
from pipeline.recipe import load_recipe

NEW, CONTINUED, OLD = "sks from text", "sks from video", "base shapes from text"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict:
    if folder := os.environ.get("LATENTLINE_DEMO"):
        return json.loads((Path(folder) / "demo.json").read_text())
    return run_demo(tmp_path_factory.mktemp("demo") / "out", executor="local")


def test_the_base_model_does_not_draw_the_new_object_and_the_lora_does(demo: dict) -> None:
    base, lora = (demo["measured"][who][NEW] for who in ("base", "lora"))
    assert base["appears"] == 0
    assert lora["appears"] >= 0.75
    assert lora["colour"] < 35
    assert lora["place"] < 4
    assert base["place"] > 8
    assert lora["psnr"] > base["psnr"] + 5


def test_the_lora_continues_videos_of_the_new_object(demo: dict) -> None:
    base, lora = (demo["measured"][who][CONTINUED] for who in ("base", "lora"))
    assert lora["appears"] > base["appears"] + 0.3
    assert lora["place"] < base["place"] / 2
    assert lora["psnr"] > base["psnr"] + 3


def test_the_lora_leaves_the_base_domain_near_what_it_was(demo: dict) -> None:
    base, lora = (demo["measured"][who][OLD] for who in ("base", "lora"))
    assert base["appears"] >= 0.9
    assert base["place"] < 3
    assert lora["appears"] > base["appears"] - 0.25
    assert lora["place"] < 8


def test_what_is_asked_for_was_not_trained_on() -> None:
    trained = {scene.caption for scene in training_scenes()}
    assert len(trained) == NUM_VIDEOS
    assert not trained & {question.truth.scene.caption for question in questions()}


def test_everything_it_names_is_there(demo: dict) -> None:
    for name in ("recipe", "checkpoint", "data", "cache", "adapter", "contact_sheet"):
        assert Path(demo[name]).exists(), name
    for folder in demo["videos"].values():
        for question in questions():
            assert read_frames(Path(folder) / f"{question.name}.mp4").shape == (17, 64, 64, 3)
    with Image.open(demo["contact_sheet"]) as sheet:
        assert sheet.height > 3 * len(questions()) * 128


def test_each_video_became_one_sample_and_one_context(demo: dict) -> None:
    assert demo["samples"] == NUM_VIDEOS
    assert demo["encoded"] == {"latents": NUM_VIDEOS, "context": NUM_VIDEOS + 2}
    assert Cache(demo["cache"]).summary("latents").entries == NUM_VIDEOS


def test_training_learns(demo: dict) -> None:
    run = Path(demo["adapter"]).parent.parent
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert np.mean(losses[-15:]) < 0.3 * np.mean(losses[:15])


def test_a_second_run_encodes_and_trains_and_makes_nothing(demo: dict, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = load_file(demo["adapter"])
    again = run_demo(Path(demo["recipe"]).parent, executor="local")
    assert again["encoded"] == {"latents": 0, "context": 0}
    said = capsys.readouterr().err
    assert "nothing to encode: every entry is in the cache" in said
    assert "from step" in said
    trained = load_file(again["adapter"])  # not the file's bytes: safetensors writes its metadata in any order
    assert trained.keys() == adapter.keys()
    assert all(torch.equal(trained[name], adapter[name]) for name in adapter)
    assert again["measured"] == demo["measured"]


def test_the_recipe_it_leaves_runs_the_same_job(demo: dict) -> None:
    recipe = load_recipe(demo["recipe"])
    assert recipe.encode.cache == demo["cache"]
    assert recipe.model.path == demo["checkpoint"]
    assert recipe.infer.adapters["sks"].path == str(Path(demo["adapter"]).parent)
