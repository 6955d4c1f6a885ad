"""The embedded controlnet steers: what is drawn under control has the edges of the hint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import CosmosControlNetModel

from infer.video import read_frames, write_mp4
from manifests.hints import read_kinds
from pipeline.demo.draw import draw_clip
from pipeline.demo.measure import edge_agreement
from pipeline.demo.run import CHECKPOINT
from pipeline.demo.transfer_checkpoint import assemble_transfer
from pipeline.demo.world import scenes
from pipeline.recipe import load_recipe
from pipeline.stages import infer_stage

MOST_BYTES = 3_000_000
SCENES = [s for s, _ in zip(scenes(5), range(12), strict=False) if len(s.things) == 1 and s.pillar is None][:6]


def test_the_controlnet_is_small_enough_to_ship_and_says_what_it_was_trained_for() -> None:
    files = [path for path in (CHECKPOINT / "controlnet").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert read_kinds(CHECKPOINT / "controlnet") == ["edge"]


@pytest.fixture(scope="module")
def agreement(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], list[float]]:
    """F1 of each scene's edges in what is drawn from a caption with its hint at a weight."""
    folder = tmp_path_factory.mktemp("control")
    controlnet = CosmosControlNetModel.from_pretrained(CHECKPOINT, subfolder="controlnet")
    model = assemble_transfer(CHECKPOINT, controlnet, folder / "checkpoint")
    recipe = load_recipe("demo", [f"model.path={model}", "model.family=cosmos-transfer2.5", "infer.guidance=0"])
    truths = [draw_clip(scene).frames for scene in SCENES]
    for number, frames in enumerate(truths):
        write_mp4(folder / f"{number}.mp4", frames, 16.0)

    def draw(caption: str, weight: float) -> list[float]:
        entries = [
            {
                "name": str(number),
                "prompt": scene.caption if caption == "whole" else f"The background is {scene.background}.",
                "video_path": f"{number}.mp4",
                "edge": {"control_weight": weight},
                "max_frames": 17,
                "num_steps": 12,
            }
            for number, scene in enumerate(SCENES)
        ]
        (folder / "asked.json").write_text(json.dumps(entries))
        infer = replace(recipe.infer, adapters={}, output=str(folder / f"{caption}-{weight}"))
        made, code = infer_stage(replace(recipe, infer=infer), str(folder / "asked.json"), guardrail=False)
        assert code == 0, made
        videos = [read_frames(Path(video)) for video in made["videos"]]
        return [edge_agreement(video, truth) for video, truth in zip(videos, truths, strict=True)]

    return draw


def test_edges_follow_the_hint_where_the_caption_says_nothing_of_them(
    agreement: Callable[[str, float], list[float]],
) -> None:
    assert np.mean(agreement("background", 0.0)) <= 0.15
    assert np.mean(agreement("background", 1.0)) >= 0.45


def test_edges_are_nearer_to_the_hint_where_the_caption_says_all(
    agreement: Callable[[str, float], list[float]],
) -> None:
    without, with_control = (np.mean(agreement("whole", weight)) for weight in (0.0, 1.0))
    assert with_control >= 0.8
    assert with_control >= without + 0.1
