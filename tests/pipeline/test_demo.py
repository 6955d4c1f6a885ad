"""The demo, as `latentline demo` runs it: everything lies where it says, and a second run reuses it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file

from infer.video import read_frames
from manifests.cache import Cache
from pipeline.demo.run import NUM_VIDEOS, PROMPTS, run_demo
from pipeline.recipe import load_recipe


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", executor="local")


def test_everything_it_names_is_there(demo: dict) -> None:
    for name in ("recipe", "checkpoint", "data", "cache", "adapter", "contact_sheet"):
        assert Path(demo[name]).exists(), name
    assert len(demo["videos"]) == PROMPTS
    for video in demo["videos"]:
        assert read_frames(video).shape == (17, 64, 96, 3)
    with Image.open(demo["contact_sheet"]) as sheet:
        assert sheet.height > 2 * 64


def test_each_video_became_two_samples_and_one_context(demo: dict) -> None:
    assert demo["samples"] == 2 * NUM_VIDEOS
    assert demo["encoded"] == {"latents": 2 * NUM_VIDEOS, "context": NUM_VIDEOS + 2}
    assert Cache(demo["cache"]).summary("latents").entries == 2 * NUM_VIDEOS


def test_training_learns_and_its_adapter_changes_the_video(demo: dict) -> None:
    run = Path(demo["adapter"]).parent.parent
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 60
    assert np.mean(losses[-15:]) < 0.97 * np.mean(losses[:15])
    state = safetensors.torch.load_file(demo["adapter"])
    assert all(tensor.abs().max() > 0 for key, tensor in state.items() if "lora_B" in key)


def test_a_second_run_encodes_and_trains_nothing(demo: dict, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = load_file(demo["adapter"])
    videos = [read_frames(video) for video in demo["videos"]]
    again = run_demo(Path(demo["recipe"]).parent, executor="local")
    assert again["encoded"] == {"latents": 0, "context": 0}
    said = capsys.readouterr().err
    assert "nothing to encode: every entry is in the cache" in said
    assert "from step 60" in said
    trained = load_file(again["adapter"])  # not the file's bytes: safetensors writes its metadata in any order
    assert trained.keys() == adapter.keys()
    assert all(torch.equal(trained[name], adapter[name]) for name in adapter)
    for video, frames in zip(again["videos"], videos, strict=True):
        np.testing.assert_array_equal(read_frames(video), frames)


def test_the_recipe_it_leaves_runs_the_same_job(demo: dict) -> None:
    recipe = load_recipe(demo["recipe"])
    assert recipe.encode.cache == demo["cache"]
    assert recipe.model.path == demo["checkpoint"]
    assert recipe.infer.adapters["shapes"].path == str(Path(demo["adapter"]).parent)
