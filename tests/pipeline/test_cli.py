"""The command line as a user meets it: exit codes, what goes to stdout, and one line for each mistake.

`train` and `infer` are in test_cli_training.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.command import Outcome, latentline
from tests.encode.video_files import write_video
from tests.jobs import LATENTLINE
from tests.pipeline.places import Place


def test_encode_tells_what_it_did_and_a_second_run_that_it_did_nothing(place: Place) -> None:
    first = latentline("encode", place.recipe, "--json")
    assert first.code == 0
    assert first.json["samples"] == 8
    assert first.json["encoded"] == {"latents": 8, "context": 6}
    assert first.json["reused"] == {"latents": 0, "context": 0}
    assert "to encode: 8 of 8 latents, 6 of 6 context" in first.err
    second = latentline("encode", place.recipe)
    assert second.code == 0
    assert "nothing to encode: every entry is in the cache" in second.err
    assert "encoded" in second.out
    assert "latents: 0, context: 0" in second.out
    assert "quarantined" not in second.out


def test_encode_with_a_bad_video_exits_3_and_names_it_in_one_line(place: Place) -> None:
    (place.data / "videos" / "00_bad.mp4").write_bytes(b"this is no video")
    (place.data / "metas" / "00_bad.txt").write_text("bad")
    outcome = latentline("encode", place.recipe, "--json", "--set", "encode.max_failed=0.5")
    assert outcome.code == 3
    assert (outcome.json["samples"], outcome.json["quarantined_videos"]) == (8, 1)
    (line,) = [line for line in outcome.err.splitlines() if "00_bad.mp4" in line]
    assert line.startswith("quarantined: ")
    again = latentline("encode", place.recipe, "--set", "encode.max_failed=0.5")
    assert again.code == 3
    assert "00_bad.mp4" in again.err


def test_encode_with_a_short_video_exits_3_with_both_numbers(place: Place) -> None:
    write_video(place.data / "videos" / "00_short.mp4", 5, fps=16)
    (place.data / "metas" / "00_short.txt").write_text("short")
    outcome = latentline("encode", place.recipe, "--set", "encode.max_failed=0.5")
    assert outcome.code == 3
    assert "00_short.mp4: too short: 5 frames at 16 fps, a window needs 9" in outcome.err
    assert "quarantined videos" in outcome.out


def test_too_many_bad_videos_exit_1_without_a_snapshot(place: Place) -> None:
    for video in sorted((place.data / "videos").iterdir())[:2]:
        video.write_bytes(b"this is no video" + video.name.encode())
    outcome = latentline("encode", place.recipe)
    assert outcome.code == 1
    assert "2 of 4 videos cannot be used, more than encode.max_failed = 0.1 allows" in outcome.error()
    assert not (place.root / "cache" / "snapshots").exists()


def test_a_missing_caption_exits_2_before_a_cache_is_made(place: Place) -> None:
    next((place.data / "metas").iterdir()).unlink()
    outcome = latentline("encode", place.recipe)
    assert outcome.code == 2
    assert "1 videos without a caption" in outcome.error()
    assert not place.made


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encode.hight=32", "unknown key 'encode.hight', did you mean 'encode.height'?"),
        ("encode.height=40", "encode.height = 40 is not divisible by 16; near: 32, 48"),
        ("encode.width=41", "encode.width = 41 is not divisible by 16; near: 32, 48"),
        ("encode.num_frames=12", "near values: 9, 13"),
        ("encode.executor=slurm", "encode.executor = 'slurm': input should be 'ray' or 'local'"),
        ("data.datasets.shapes.path=nowhere", "there is no folder nowhere/videos"),
        ("data.datasets.shapes.layout=zip", "data.datasets.shapes.layout = 'zip': "),
        ("model.path=/no/where", "no such folder"),
        ("model.family=cosmos9", "model.family 'cosmos9': latentline has no encode/cosmos9.py"),
        ("encode.snapshot=a/b", "snapshot name 'a/b'"),
        ("encode", "--set 'encode': write it as section.key=value"),
    ],
)
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_a_wrong_encode_exits_2_and_makes_nothing(
    place: Place, override: str, message: str, dry_run: tuple[str, ...]
) -> None:
    outcome = latentline("encode", place.recipe, "--set", override, *dry_run)
    assert outcome.code == 2
    assert message in outcome.error()
    assert not place.made


@pytest.mark.parametrize("task", ["3/3", "x", "1/0", "-1/2", "1/2/3", ""])
def test_a_wrong_task_exits_2(place: Place, task: str) -> None:
    outcome = latentline("encode", place.recipe, f"--task={task}")
    assert outcome.code == 2
    assert f"--task {task!r}: write it as I/N" in outcome.error()
    assert not place.made


def test_a_wrong_recipe_exits_2(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[encode\n")
    for verb in ("encode", "train", "infer"):
        outcome = latentline(verb, tmp_path / "bad.toml")
        assert outcome.code == 2
        assert "bad.toml: not valid TOML" in outcome.error()
        assert "did you mean 'gr1-lora'?" in latentline(verb, "gr1-lor").error()


def test_encode_dry_run_counts_and_writes_nothing(place: Place) -> None:
    outcome = latentline("encode", place.recipe, "--dry-run", "--json")
    assert outcome.code == 0
    said = outcome.json
    assert (said["videos"], said["windows"], said["shards"]) == (4, 8, 2)
    assert said["entries_missing"] == said["entries_wanted"] == {"latents": 8, "context": 6}
    assert said["entries_present"] == {"latents": 0, "context": 0}
    assert said["missing_bytes"] == sum(
        said["entry_bytes"][kind] * said["entries_missing"][kind] for kind in said["entry_bytes"]
    )
    assert not place.made
    text = latentline("encode", place.recipe, "--dry-run").out.splitlines()
    assert "entries missing  latents: 8, context: 6" in text
    assert any(line.startswith("missing bytes") and line.endswith("KiB") for line in text)
    assert not place.made


def test_a_command_it_does_not_know_exits_2() -> None:
    for arguments in (["enkode"], ["encode"], ["encode", "demo", "--nope"], ["cache", "stats", "x"]):
        outcome = latentline(*arguments)
        assert outcome.code == 2
        assert outcome.out == ""
        assert "Usage" in outcome.err


def test_cache_status_counts_entries_and_snapshots(encoded: Place) -> None:
    by_path = latentline("cache", "status", encoded.values["encode"]["cache"], "--json")
    by_recipe = latentline("cache", "status", encoded.recipe, "--json")
    assert by_path.code == by_recipe.code == 0
    statuses = [by_path.json, by_recipe.json]
    for status in statuses:
        assert status["newest_job"].pop("last_event_seconds") >= 0  # grows from one call to the next
    assert statuses[0] == statuses[1]
    assert by_path.json["entries"]["latents"]["entries"] == 8
    assert by_path.json["snapshots"]["train"]["samples"] == 8
    text = latentline("cache", "status", encoded.recipe).out
    assert "  train" in text
    assert "samples: 8" in text


def test_cache_status_of_what_is_no_cache_exits_2(tmp_path: Path) -> None:
    assert latentline("cache", "status", tmp_path / "none").code == 2
    outcome = latentline("cache", "status", tmp_path)
    assert outcome.code == 2
    assert "not a latentline cache" in outcome.error()
    assert not list(tmp_path.iterdir())


def test_recipes_are_listed_and_shown() -> None:
    assert set(latentline("recipe", "list", "--json").json) >= {"demo", "gr1-lora"}
    assert latentline("recipe", "list").out.splitlines()[0].startswith("demo ")
    shown = latentline("recipe", "show", "gr1-lora", "--set", "train.lora.rank=7")
    assert shown.code == 0
    assert "rank = 7" in shown.out
    assert latentline("recipe", "show", "gr1-lora", "--json").json["train"]["lora"]["rank"] == 32
    assert latentline("recipe", "show", "nope").code == 2


def installed(*arguments: object, **options: Any) -> Outcome:
    done = subprocess.run([LATENTLINE, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_the_installed_command_keeps_stdout_for_the_result(place: Place) -> None:
    outcome = installed("encode", place.recipe, "--json", "--executor", "local")
    assert outcome.code == 0
    assert outcome.json["samples"] == 8
    assert "to encode" in outcome.err
    assert "it/s]" not in outcome.err, "no progress bars of libraries in a log"
    wrong = installed("encode", place.recipe, "--set", "encode.height=7", cwd=place.root)
    assert wrong.code == 2
    assert wrong.error() == "encode.height = 7 is not divisible by 16; near: 16, 32"
