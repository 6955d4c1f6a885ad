"""The `latentline cache` commands on a real cache: tiny model, real videos, the real command line."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest
from typer.testing import CliRunner

from manifests.cache import Cache
from manifests.snapshot import load_snapshot
from pipeline.cli import app
from tests.manifests.filled import flip_bit
from tests.pipeline.recipes import recipe_values, write_recipe

MODEL_LIBRARIES = {"torch", "diffusers", "transformers", "peft", "webdataset", "ray"}
LIGHT = """
import json, sys
from pipeline.cli import app
for arguments in json.loads(sys.argv[1]):
    code = app(arguments, standalone_mode=False)
    print(json.dumps([arguments, code, sorted({name.split(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


def run(*arguments: Any, code: int = 0) -> dict[str, Any]:
    """Run a command with --json; its result."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def text(*arguments: Any) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, tiny_checkpoint, demo_dataset) -> Path:
    """Folder with `recipe.toml`, `data/` and an encoded `cache/`, one video of which is no video. Read-only."""
    folder = tmp_path_factory.mktemp("encoded")
    data = folder / "data"
    shutil.copytree(demo_dataset, data)
    video = sorted((data / "videos").iterdir())[0]
    (data / "videos" / "broken.mp4").write_bytes(b"not a video")
    (data / "metas" / "broken.txt").write_text("broken")
    assert video.exists()
    values = recipe_values(folder, tiny_checkpoint, data)
    values["encode"] |= {"max_failed": 0.5, "shard_mb": 0.01}
    recipe = write_recipe(folder, values)
    run("encode", recipe, code=3)
    return folder


@pytest.fixture
def folder(encoded, tmp_path) -> Path:
    """A copy to change. Times of change are kept, so what is known of the videos stays known."""
    copy = tmp_path / "copy"
    shutil.copytree(encoded, copy)
    recipe = copy / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(encoded), str(copy)))
    return copy


def first_latents(folder: Path) -> tuple[Cache, dict[str, Any]]:
    cache = Cache(str(folder / "cache"))
    rows = [row for row in cache.rows("latents").to_pylist() if row["status"] == "ok"]
    return cache, rows[0]


def test_status_counts_entries_samples_and_quarantine(encoded):
    result = run("cache", "status", encoded / "cache")
    assert result["entries"]["latents"]["entries"] == 8
    assert result["entries"]["latents"]["quarantined"] == 1
    assert result["entries"]["context"]["entries"] >= 5
    assert result["snapshots"]["train"]["samples"] == 8
    assert result["snapshots"]["train"]["datasets"] == {"shapes": 8}
    assert len(result["quarantined"]) == 1
    assert "broken.mp4" in result["quarantined"][0]
    assert run("cache", "status", encoded / "recipe.toml") | {"newest_job": 0} == result | {"newest_job": 0}
    assert "broken.mp4" in text("cache", "status", encoded / "recipe.toml")


def test_status_shows_how_far_a_job_is(folder):
    done = run("cache", "status", folder / "cache")["newest_job"]
    assert (done["latents"], done["running"], done["remaining_seconds"]) == ("9 of 9", 0, None)
    assert done["entries_per_hour"] > 0
    cache, row = first_latents(folder)
    shard_id = row["shard"].rsplit("/", 1)[1].split(".")[0]
    lost = len(cache.manifest("latents", shard_id)[0])
    cache.store.delete(f"entries/latents/{shard_id}.parquet")
    events = next(cache.store.root.glob("events/*/*.jsonl"))
    lines = [line for line in events.read_text().splitlines() if '"finished"' not in line]
    events.write_text("\n".join(lines) + "\n")
    midway = run("cache", "status", folder / "cache")["newest_job"]
    assert (midway["latents"], midway["running"]) == (f"{9 - lost} of 9", 1)
    assert midway["remaining_seconds"] is not None


def test_verify_repair_and_encode_make_a_damaged_cache_whole(folder):
    assert run("cache", "verify", folder / "cache")["damage"] == []
    cache, row = first_latents(folder)
    snapshot = load_snapshot(cache.store, "train")
    flip_bit(folder / "cache" / row["shard"], row["offset"] + row["size"] - 4)
    damage = run("cache", "verify", folder / "cache", code=1)["damage"]
    assert any(row["key"] in finding["where"] and "checksum" in finding["what"] for finding in damage)
    repaired = run("cache", "verify", folder / "recipe.toml", "--repair")
    assert len(repaired["set_aside"]) == 1
    assert run("encode", folder / "recipe.toml", code=3)["encoded"]["latents"] >= 1
    assert run("cache", "verify", folder / "cache")["damage"] == []
    assert load_snapshot(cache.store, "train").hash == snapshot.hash


def test_explain_says_cached_or_which_field_changed(folder):
    recipe = folder / "recipe.toml"
    videos = sorted((folder / "data/videos").glob("*.mp4"))
    good = next(video for video in videos if video.name != "broken.mp4")
    assert run("cache", "explain", recipe, good)["counts"] == {"cached": 3, "stale": 0, "missing": 0, "quarantined": 0}
    assert run("cache", "explain", recipe, "broken.mp4")["counts"]["quarantined"] == 1

    def changes(*options: str) -> dict[str, tuple[Any, Any]]:
        entries = run("cache", "explain", recipe, good.name, *options)["entries"]
        return {c["field"]: (c["old"], c["new"]) for one in entries if one["kind"] == "latents" for c in one["changes"]}

    assert changes("--set", "encode.height=48") == {"height": (32, 48)}
    assert changes("--set", "encode.fps=8") == {"fps": (16.0, 8.0)}
    assert changes("--set", "encode.dtype=bfloat16") == {"fingerprint.dtype": ("float32", "bfloat16")}
    caption = folder / "data/metas" / f"{good.stem}.txt"
    old = caption.read_text().strip()
    caption.write_text("an edited caption")
    entries = run("cache", "explain", recipe, good)["entries"]
    [context] = [one for one in entries if one["kind"] == "context"]
    assert context["changes"] == [{"field": "caption", "old": old, "new": "an edited caption"}]
    other = next(video for video in videos if video not in (good, folder / "data/videos/broken.mp4"))
    shutil.copy(other, good)
    entries = run("cache", "explain", recipe, good)["entries"]
    assert "an edited caption" in text("cache", "explain", recipe, good)
    assert {one["status"] for one in entries if one["kind"] == "latents"} == {"cached"}, "the same bytes are elsewhere"


def test_explain_of_a_video_the_recipe_lacks_says_so(encoded):
    done = CliRunner().invoke(app, ["cache", "explain", str(encoded / "recipe.toml"), "nope.mp4"])
    assert done.exit_code != 0
    assert "not a video of the recipe" in str(done.exception)


def test_plan_says_what_would_be_done_and_what_it_costs(folder):
    recipe = folder / "recipe.toml"
    nothing = run("cache", "plan", recipe, "--price", "3")
    assert nothing["to_encode"] == {"latents": 0, "context": 0}
    assert nothing["reused"]["latents"] == 9
    assert nothing["cost"] == 0
    stride = run("cache", "plan", recipe, "--price", "3", "--set", "encode.windows.count=4")
    assert stride["to_encode"]["latents"] == 8
    assert stride["to_encode_bytes"]["latents"] == 8 * 16 * 3 * 4 * 6 * 4
    assert stride["cost"] == pytest.approx(3 * stride["gpu_hours"])
    assert 0 < stride["gpu_hours"] < 1
    other = run("cache", "plan", recipe, "--set", "encode.height=48")
    assert other["gpu_hours"] is None
    assert "no throughput yet" in other["measured"]
    assert other["orphaned"]["latents"]["entries"] == 0
    (folder / "cache/snapshots/train.json").unlink()
    for path in (folder / "cache/snapshots").glob("*.parquet"):
        path.unlink()
    assert run("cache", "plan", recipe, "--set", "encode.height=48")["orphaned"]["latents"]["entries"] == 8


def test_plan_needs_no_cache(folder):
    shutil.rmtree(folder / "cache")
    result = run("cache", "plan", folder / "recipe.toml")
    assert result["to_encode"]["latents"] == 9
    assert not (folder / "cache").exists()


def test_gc_lists_first_and_removes_only_when_told(folder):
    cache, row = first_latents(folder)
    orphan = folder / "cache" / "entries/latents" / f"{'9' * 40}.dead.tar"
    shutil.copy(folder / "cache" / row["shard"], orphan)
    assert run("cache", "gc", folder / "cache")["objects"] == 0
    os.utime(orphan, (time.time() - 3 * 86400,) * 2)
    listed = run("cache", "gc", folder / "cache", "--older-than", "2d")
    assert (listed["objects"], listed["deleted"]) == (1, False)
    assert orphan.exists()
    assert run("cache", "gc", folder / "cache", "--delete")["objects"] == 1
    assert not orphan.exists()
    assert run("cache", "verify", cache.url)["damage"] == []


def test_snapshot_filters_and_splits(folder):
    result = run("cache", "snapshot", folder / "recipe.toml", "--name", "first", "--where", "start = 0")
    assert result["snapshots"]["first"]["samples"] == 4
    result = run("cache", "snapshot", folder / "cache", "--from", "train", "--name", "half", "--split", "val=0.75")
    assert result["snapshots"]["half"]["samples"] + result["snapshots"]["half-val"]["samples"] == 8
    status = run("cache", "status", folder / "cache")
    assert set(status["snapshots"]) == {"train", "first", "half", "half-val"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --where, --split or both"),
        (["--split", "val"], "write it as NAME=SHARE"),
        (["--where", "fps ="], "expected a value"),
    ],
)
def test_snapshot_options_that_make_no_sense_are_one_line(encoded, options, message):
    done = CliRunner().invoke(app, ["cache", "snapshot", str(encoded / "cache"), "--name", "x", *options])
    assert message in str(done.exception)


def test_preview_decodes_videos_beside_their_source(folder, tmp_path):
    result = run("cache", "preview", folder / "recipe.toml", "--count", "3", "--output", tmp_path / "preview")
    assert len(result["videos"]) == 3
    for video in result["videos"]:
        with av.open(video["video"]) as container:
            stream = container.streams.video[0]
            assert (stream.height, stream.width, stream.frames) == (32, 48, 9)
        assert 3 < video["psnr"] < 60
    assert Path(result["contact_sheet"]).stat().st_size > 1000
    again = run("cache", "preview", folder / "cache", "--count", "1", "--output", tmp_path / "again")
    assert again["mean_psnr"] == pytest.approx(result["videos"][0]["psnr"], rel=1e-6)


def test_preview_without_the_source_says_so(folder, tmp_path):
    shutil.rmtree(folder / "data")
    encoded_from = run("cache", "preview", folder / "cache", "--count", "1", "--output", tmp_path / "preview")
    assert len(encoded_from["videos"]) == 1


def test_preview_with_another_model_is_refused(folder, tmp_path, tiny_checkpoint):
    other = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, other)
    config = other / "vae/config.json"
    values = json.loads(config.read_text())
    values["latents_mean"] = [value + 1 for value in values["latents_mean"]]
    config.write_text(json.dumps(values))
    arguments = ["cache", "preview", str(folder / "recipe.toml"), "--set", f"model.path={other}"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "preview")])
    assert "made with another" in str(done.exception)
    assert "latents_mean" in str(done.exception)


def test_what_needs_no_model_imports_no_model_library(folder, demo_dataset):
    recipe, video = str(folder / "recipe.toml"), sorted((folder / "data" / "videos").iterdir())[1]
    commands = [["recipe", "list"], ["recipe", "show", recipe], ["encode", recipe, "--dry-run"], ["encode", recipe]]
    commands += [["cache", verb, recipe] for verb in ("status", "plan", "gc")]
    commands += [
        ["cache", "explain", recipe, str(video)],
        ["cache", "snapshot", recipe, "--name", "part", "--where", "start = 0"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[[")]
    assert [arguments for arguments, _, _ in told] == commands
    for arguments, code, modules in told:
        assert code in (None, 0, 3), arguments
        assert not MODEL_LIBRARIES & set(modules), arguments
    assert "manifests" in told[-1][2]
