"""`latentline encode --make`: control videos by transformers' classes, with tiny random weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encode.config import ExtractConfig, HintsConfig
from encode.extract import load_extractor, palette
from encode.probe import probe
from infer.video import read_frames
from manifests.errors import UsageError
from pipeline.encode_stage import encode_stage
from pipeline.make_hints import make_stage
from pipeline.recipe import Recipe, validate
from tests.encode.extractors import tiny_depth, tiny_segments
from tests.pipeline.recipes import recipe_values


@pytest.fixture
def recipe(tmp_path: Path, tiny_transfer: Path, demo_dataset: Path) -> Recipe:
    data = tmp_path / "data"
    shutil.copytree(demo_dataset, data)
    values = recipe_values(tmp_path, tiny_transfer, data)
    values["model"]["family"] = "cosmos-transfer2.5"
    values["encode"] |= {"decode_workers": 1, "windows": {"mode": "head"}}
    values["data"]["datasets"]["shapes"]["filters"] = {"first": 2}
    return validate(values, "test")


def _with(recipe: Recipe, **extract: Any) -> Recipe:
    return replace(recipe, encode=replace(recipe.encode, extract=ExtractConfig(**extract)))


def test_depth_is_made_once_and_encoded(recipe: Recipe, tmp_path: Path) -> None:
    recipe = _with(recipe, depth=str(tiny_depth(tmp_path / "depth-model")))
    result, code = make_stage(recipe, "depth")
    assert (result["made"], result["kept"], code) == (2, 0, 0)
    videos = sorted((tmp_path / "data" / "videos").glob("*.mp4"))[:2]
    for video in videos:
        made = tmp_path / "data" / "depth" / video.name
        theirs, ours = probe(video), probe(made)
        assert (ours.num_frames, ours.height, ours.width) == (theirs.num_frames, theirs.height, theirs.width)
        assert ours.fps == pytest.approx(theirs.fps)
        frames = read_frames(made).astype(int)
        assert np.abs(frames[..., 0] - frames[..., 1]).max() <= 2, "grey"
        assert frames.max() > frames.min()
    result, _ = make_stage(recipe, "depth")
    assert (result["made"], result["kept"]) == (0, 2)
    encoded, code = encode_stage(replace(recipe, encode=replace(recipe.encode, hints=HintsConfig(kinds=("depth",)))))
    assert code == 0
    assert encoded["encoded"]["hint"] == 2
    assert encoded["left_out"] == {"shapes": {"first": 2}}


def test_segments_keep_their_colours(recipe: Recipe, tmp_path: Path) -> None:
    config = ExtractConfig(seg=str(tiny_segments(tmp_path / "seg-model")), seg_points=2)
    extractor = load_extractor("seg", config, torch.device("cpu"))
    source = read_frames(sorted((tmp_path / "data" / "videos").glob("*.mp4"))[0])[:5]
    frames = np.concatenate(list(extractor.video([source[:3], source[3:]])))
    assert frames.shape == source.shape
    colours = {tuple(colour) for colour in frames.reshape(-1, 3)}
    assert colours <= {tuple(colour) for colour in palette(4)}
    assert len(colours) > 1
    result, code = make_stage(_with(recipe, seg=config.seg, seg_points=2), "seg")
    assert (result["made"], code) == (2, 0)


def test_without_weights_it_says_what_to_do(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        make_stage(_with(recipe, depth=str(tmp_path / "none")), "depth")
    assert str(error.value) == f"encode.extract.depth {str(tmp_path / 'none')!r}: no such folder"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"encode\.extract\.seg .*: cannot be loaded: "):
        make_stage(_with(recipe, seg=str(tmp_path / "empty")), "seg")
    assert not (tmp_path / "data" / "depth").exists()
