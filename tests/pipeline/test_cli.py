"""The command line as a user meets it: exit codes, what goes to stdout, and one line for each mistake."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.demo.checkpoint import build_tiny_checkpoint
from tests.encode.video_files import write_video
from tests.pipeline.recipes import recipe_values, write_recipe

COMMAND = str(Path(sys.executable).with_name("latentline"))


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit status and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def error(self) -> str:
        """The one line on stderr that says what is wrong; nothing else is an error, nothing is on stdout."""
        assert self.out == ""
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.err.splitlines()[-1] == line
        return line.removeprefix("error: ")


Latentline = Callable[..., Outcome]


@pytest.fixture
def latentline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Latentline:
    """Run the command line in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["latentline", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
        captured = capsys.readouterr()
        return Outcome(int(code), captured.out, captured.err)

    return run


@dataclass
class Place:
    """A folder with a recipe, videos of its own and the shared checkpoint."""

    root: Path
    values: dict[str, Any]

    @property
    def recipe(self) -> Path:
        return write_recipe(self.root, self.values)

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def made(self) -> set[str]:
        """Names of the outputs that exist."""
        return {path.name for path in self.root.iterdir()} & {"cache", "run", "videos"}


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Path, demo_dataset: Path) -> Place:
    shutil.copytree(demo_dataset, tmp_path / "data")
    return Place(tmp_path, recipe_values(tmp_path, tiny_checkpoint, tmp_path / "data"))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, demo_dataset: Path) -> Place:
    """A place where `encode` has run. Read-only: give `train.output` and the like elsewhere."""
    from pipeline.encode_stage import encode_stage
    from pipeline.recipe import load_recipe

    root = tmp_path_factory.mktemp("encoded")
    place = Place(root, recipe_values(root, tiny_checkpoint, demo_dataset))
    encode_stage(load_recipe(str(place.recipe)))
    return place


def test_encode_tells_what_it_did_and_a_second_run_that_it_did_nothing(latentline: Latentline, place: Place) -> None:
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


def test_encode_with_a_bad_video_exits_3_and_names_it_in_one_line(latentline: Latentline, place: Place) -> None:
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


def test_encode_with_a_short_video_exits_3_with_both_numbers(latentline: Latentline, place: Place) -> None:
    write_video(place.data / "videos" / "00_short.mp4", 5, fps=16)
    (place.data / "metas" / "00_short.txt").write_text("short")
    outcome = latentline("encode", place.recipe, "--set", "encode.max_failed=0.5")
    assert outcome.code == 3
    assert "00_short.mp4: too short: 5 frames at 16 fps, a window needs 9" in outcome.err
    assert "quarantined videos" in outcome.out


def test_too_many_bad_videos_exit_1_without_a_snapshot(latentline: Latentline, place: Place) -> None:
    for video in sorted((place.data / "videos").iterdir())[:2]:
        video.write_bytes(b"this is no video" + video.name.encode())
    outcome = latentline("encode", place.recipe)
    assert outcome.code == 1
    assert "2 of 4 videos cannot be used, more than encode.max_failed = 0.1 allows" in outcome.error()
    assert not (place.root / "cache" / "snapshots").exists()


def test_a_missing_caption_exits_2_before_a_cache_is_made(latentline: Latentline, place: Place) -> None:
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
    latentline: Latentline, place: Place, override: str, message: str, dry_run: tuple[str, ...]
) -> None:
    outcome = latentline("encode", place.recipe, "--set", override, *dry_run)
    assert outcome.code == 2
    assert message in outcome.error()
    assert not place.made


@pytest.mark.parametrize("task", ["3/3", "x", "1/0", "-1/2", "1/2/3", ""])
def test_a_wrong_task_exits_2(latentline: Latentline, place: Place, task: str) -> None:
    outcome = latentline("encode", place.recipe, f"--task={task}")
    assert outcome.code == 2
    assert f"--task {task!r}: write it as I/N" in outcome.error()
    assert not place.made


def test_a_wrong_recipe_exits_2(latentline: Latentline, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[encode\n")
    for verb in ("encode", "train", "infer"):
        outcome = latentline(verb, tmp_path / "bad.toml")
        assert outcome.code == 2
        assert "bad.toml: not valid TOML" in outcome.error()
        assert "did you mean 'gr1-lora'?" in latentline(verb, "gr1-lor").error()


def test_encode_dry_run_counts_and_writes_nothing(latentline: Latentline, place: Place) -> None:
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


def test_a_command_it_does_not_know_exits_2(latentline: Latentline) -> None:
    for arguments in (["enkode"], ["encode"], ["encode", "demo", "--nope"], ["cache", "stats", "x"]):
        outcome = latentline(*arguments)
        assert outcome.code == 2
        assert outcome.out == ""
        assert "Usage" in outcome.err


def test_train_needs_a_cache_and_a_snapshot(latentline: Latentline, place: Place, encoded: Place) -> None:
    outcome = latentline("train", place.recipe)
    assert outcome.code == 2
    assert "no such folder; `latentline encode` makes it" in outcome.error()
    outcome = latentline(
        "train", encoded.recipe, "--set", "train.snapshot=tain", "--set", f"train.output={place.root}/run"
    )
    assert outcome.code == 2
    assert "no snapshot 'tain'; it has train" in outcome.error()
    assert not place.made


def test_train_dry_run_describes_and_writes_nothing(latentline: Latentline, encoded: Place) -> None:
    outcome = latentline("train", encoded.recipe, "--dry-run", "--json")
    assert outcome.code == 0
    said = outcome.json
    assert said["samples"] == 8
    assert said["parameters"] > said["trainable_parameters"] > 0
    assert said["tokens_per_sample"] == {"16x3x4x6": 18}
    assert said["lr"]["0"] == 0.01
    memory = said["memory_bytes"]
    assert memory["total"] == memory["base"] + memory["trained"] + memory["activations"]
    text = latentline("train", encoded.recipe, "--dry-run").out
    assert any(line.startswith("memory bytes") and "total: " in line and "KiB" in line for line in text.splitlines())
    assert encoded.made == {"cache"}


def test_train_refuses_a_snapshot_of_another_model(latentline: Latentline, encoded: Place, tmp_path: Path) -> None:
    other = build_tiny_checkpoint(tmp_path / "other", seed=5)
    outcome = latentline(
        "train", encoded.recipe, "--set", f"model.path={other}", "--set", f"train.output={tmp_path}/run"
    )
    assert outcome.code == 2
    assert "run `latentline encode` with this model" in outcome.error()
    assert not (tmp_path / "run").exists()


def test_train_then_infer_with_its_adapter(latentline: Latentline, encoded: Place, tmp_path: Path) -> None:
    trained = latentline("train", encoded.recipe, "--json", "--set", f"train.output={tmp_path}/run")
    assert trained.code == 0
    assert trained.json["steps"] == 4
    assert "step 4/4" in trained.err
    again = latentline("train", encoded.recipe, "--json", "--set", f"train.output={tmp_path}/run")
    assert again.json["loss"] is None
    assert "from step 4" in again.err
    infer = ("infer", encoded.recipe, "a red circle", "--no-guardrail", "--set", f"infer.output={tmp_path}/videos")
    made = latentline(*infer, "--adapter", trained.json["adapter"], "--json")
    assert made.code == 0
    assert made.json["videos"] == [f"{tmp_path}/videos/a_red_circle.mp4"]
    assert Path(made.json["videos"][0]).is_file()
    report = json.loads((tmp_path / "videos" / "results.json").read_text())
    assert report["adapters"]["default"]["path"] == trained.json["adapter"]
    assert latentline(*infer).out.splitlines()[-1] == f"videos  {tmp_path}/videos/a_red_circle.mp4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "infer has no inputs: give a prompt"),
        (("missing.json",), "missing.json: no such file or folder"),
        (("a circle", "--set", "infer.height=40"), "height = 40 is not divisible by 16; near: 32 or 48"),
        (("a circle", "--set", "infer.num_frames=12"), "num_frames = 12 is not 4k+1; near: 9 or 13"),
        (("a circle", "--adapter", "nowhere"), "nowhere: no such adapter"),
        (("a circle", "--set", "infer.adapters.a-b.path=x"), "infer.adapters.a-b: name an adapter with letters"),
    ],
)
@pytest.mark.parametrize("mode", ["--no-guardrail", "--dry-run"])
def test_a_wrong_infer_exits_2_and_makes_nothing(
    latentline: Latentline, place: Place, arguments: tuple[str, ...], message: str, mode: str
) -> None:
    outcome = latentline("infer", place.recipe, *arguments, mode)
    assert outcome.code == 2
    assert message in outcome.error()
    assert not place.made


def test_infer_without_guardrail_names_package_flag_and_licence(latentline: Latentline, place: Place) -> None:
    outcome = latentline("infer", place.recipe, "a circle")
    assert outcome.code == 2
    message = outcome.error()
    assert "cosmos_guardrail" in message
    assert "--no-guardrail" in message
    assert "Open Model License" in message
    assert not place.made


def test_infer_dry_run_lists_requests_and_writes_nothing(latentline: Latentline, place: Place) -> None:
    (place.root / "in.jsonl").write_text('{"name": "x", "prompt": "a"}\n{"name": "y", "prompt": "b", "seed": 3}\n')
    outcome = latentline("infer", place.recipe, place.root / "in.jsonl", "--dry-run", "--json")
    assert outcome.code == 0
    assert [(video["name"], video["seed"], video["image"]) for video in outcome.json["videos"]] == [
        ("x", 0, None),
        ("y", 3, None),
    ]
    assert "name: x, prompt: a" in latentline("infer", place.recipe, place.root / "in.jsonl", "--dry-run").out
    assert not place.made


def test_infer_takes_its_inputs_from_the_recipe(latentline: Latentline, place: Place, demo_dataset: Path) -> None:
    outcome = latentline("infer", place.recipe, "--set", "infer.inputs=a blue square", "--dry-run", "--json")
    assert outcome.json["videos"][0]["prompt"] == "a blue square"


def test_cache_status_counts_entries_and_snapshots(latentline: Latentline, encoded: Place) -> None:
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


def test_cache_status_of_what_is_no_cache_exits_2(latentline: Latentline, tmp_path: Path) -> None:
    assert latentline("cache", "status", tmp_path / "none").code == 2
    outcome = latentline("cache", "status", tmp_path)
    assert outcome.code == 2
    assert "not a latentline cache" in outcome.error()
    assert not list(tmp_path.iterdir())


def test_recipes_are_listed_and_shown(latentline: Latentline) -> None:
    assert set(latentline("recipe", "list", "--json").json) >= {"demo", "gr1-lora"}
    assert latentline("recipe", "list").out.splitlines()[0].startswith("demo ")
    shown = latentline("recipe", "show", "gr1-lora", "--set", "train.lora.rank=7")
    assert shown.code == 0
    assert "rank = 7" in shown.out
    assert latentline("recipe", "show", "gr1-lora", "--json").json["train"]["lora"]["rank"] == 32
    assert latentline("recipe", "show", "nope").code == 2


def installed(*arguments: object, **options: Any) -> Outcome:
    done = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)
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


def test_a_training_that_is_told_to_stop_exits_75_and_continues(encoded: Place, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ["train", encoded.recipe, "--json", "--set", f"train.output={output}", "--set", "train.steps=100000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([COMMAND, *map(str, command)], stdout=pipe, stderr=pipe, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert out == ""
    assert "run the same command to continue" in err
    assert "Traceback" not in err
    assert list((output / "checkpoints").iterdir())
    assert not (output / "adapter").exists() or not list((output / "adapter").iterdir())
