"""Several datasets, captions and filters through the command line's stages: what is said, encoded and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import UsageError
from pipeline.cache_commands import cache_explain
from pipeline.encode_stage import encode_stage
from pipeline.preview import cache_preview
from pipeline.recipe import Recipe, load_recipe, validate
from pipeline.stages import train_stage
from tests.encode.layouts import write_files, write_tar
from tests.encode.video_files import write_video
from tests.pipeline.recipes import recipe_values, write_recipe

LONG = "A very long caption of a circle that goes round and round and round and does not end in one line [red]."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos with three captions each in folders, and a tar of three, one of them short, with scores."""
    root = tmp_path_factory.mktemp("data")
    for number in range(6):
        name = f"clip{number}"
        (root / "normal" / "videos").mkdir(parents=True, exist_ok=True)
        write_video(root / "normal" / "videos" / f"{name}.mp4", 16 + number, fps=16)
        texts = {"long": f"{LONG} {number}", "short": f"circle {number}"}
        write_files(root, {f"normal/captions/{name}.json": json.dumps({"m": texts})})
    members: dict[str, Any] = {}
    for number, frames in enumerate((30, 31, 8)):
        path = write_video(root / f"{number}.mp4", frames, fps=16)
        members |= {f"{number}.mp4": path.read_bytes(), f"{number}.txt": f"crash {number}"}
        members |= {f"{number}.json": json.dumps({"score": number})}
    write_tar(root / "accident" / "a.tar", members)
    return root


def recipe_of(folder: Path, checkpoint: Path, data: Path, **accident: Any) -> Recipe:
    values = recipe_values(folder, checkpoint, data)
    values["encode"]["windows"] = {"mode": "uniform", "count": 2}
    values["data"] = {
        "datasets": {
            "normal": {"layout": "folder", "path": str(data / "normal"), "weight": 0.7},
            "accident": {"layout": "webdataset", "path": str(data / "accident"), "weight": 0.3} | accident,
        }
    }
    return load_recipe(str(write_recipe(folder, values)))


def test_a_dry_run_shows_ten_samples_on_stderr(
    tmp_path: Path, tiny_checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, tiny_checkpoint, data, filters={"min_frames": 9, "where": "score != 1"})
    result, code = encode_stage(recipe, dry_run=True)
    said = capsys.readouterr()
    assert code == 0
    assert said.out == ""
    assert (result["videos"], result["windows"]) == (7, 14)
    assert result["left_out"] == {"accident": {"where": 1, "min_frames": 1}}
    assert "10 of 14 samples" in said.err
    words = said.err.replace("│", " ").replace("┃", " ").split()
    assert [words.count(f"clip{number}.mp4") for number in range(6)].count(0) == 0
    assert words.count("0.mp4") >= 1
    assert {"dataset", "video", "window", "fps", "size", "caption", "48x32", "16", "long:", "short:"} <= set(words)
    assert "[red]" not in said.err
    assert not (tmp_path / "cache").exists()


def test_markup_in_captions_is_shown_as_it_is(
    tmp_path: Path, tiny_checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, tiny_checkpoint, data, prompt="[bold]x[/] y")
    encode_stage(recipe, dry_run=True)
    assert "[bold]x[/] y" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_weights_reach_the_trainer_without_encoding_again(
    tmp_path: Path, tiny_checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, tiny_checkpoint, data, filters={"min_frames": 9})
    result, _ = encode_stage(recipe)
    assert (result["samples"], result["left_out"]) == (16, {"accident": {"min_frames": 1}})
    assert "left out of accident: 1 by min_frames" in capsys.readouterr().err
    trained = train_stage(recipe)
    assert trained["samples_consumed"] == 8

    other = recipe_of(tmp_path, tiny_checkpoint, data, filters={"min_frames": 9}, weight=0.1)
    again, _ = encode_stage(other)
    assert again["encoded"] == {"latents": 0, "context": 0}
    assert again["snapshot"] == result["snapshot"]
    with pytest.raises(UsageError, match=r"data\.datasets\.accident\.weight \(was 0\.3, now 0\.1\)"):
        train_stage(other)

    one = recipe_of(tmp_path, tiny_checkpoint, data, filters={"min_frames": 9}, captions={"short": 1})
    with pytest.raises(UsageError, match=r"data\.datasets\.accident\.captions names short, snapshot .* without a name"):
        train_stage(one, dry_run=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1}, "data.datasets.accident.weight = -1: "),
        ({"weight": float("nan")}, "data.datasets.accident.weight = nan: "),
        ({"captions": {}}, "data.datasets.accident.captions"),
        ({"captions": {"long": 0}}, "data.datasets.accident.captions.long"),
        ({"layout": "gr2"}, "data.datasets.accident.layout = 'gr2': "),
        ({"filters": {"min_frame": 3}}, "unknown key 'data.datasets.accident.filters.min_frame'"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    accident = {"layout": "folder", "path": "x"} | settings
    values = {"model": {"path": "m"}, "encode": {"cache": "c"}, "data": {"datasets": {"accident": accident}}}
    with pytest.raises(UsageError) as caught:
        validate(values, "here")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_video_in_a_tar_is_explained_by_name_and_previewed(tmp_path: Path, tiny_checkpoint: Path, data: Path) -> None:
    values = recipe_values(tmp_path, tiny_checkpoint, data)
    tar = {"layout": "webdataset", "path": str(data / "accident"), "filters": {"min_frames": 9}}
    values["data"] = {"datasets": {"accident": tar}}
    recipe = load_recipe(str(write_recipe(tmp_path, values)))
    encode_stage(recipe)
    explained = cache_explain(recipe, "1.mp4", as_json=True)
    assert explained["counts"] == {"cached": 3, "stale": 0, "missing": 0, "quarantined": 0}
    with pytest.raises(UsageError, match=r"no video is left of those the recipe names; .*1 by min_frames"):
        cache_explain(recipe, "a/2", as_json=True)
    shown = cache_preview(recipe.encode.cache, recipe, snapshot="train", count=2, output=tmp_path / "preview")
    assert [video["problem"] for video in shown["videos"]] == [None, None]
    assert all("a.tar::" in video["source"] and Path(video["video"]).is_file() for video in shown["videos"])
