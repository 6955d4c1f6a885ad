"""`latentline train` and `infer` as a user meets them: exit codes, results on stdout, and one line for each mistake."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.demo.checkpoint import build_tiny_checkpoint
from tests.command import latentline
from tests.jobs import LATENTLINE
from tests.pipeline.places import Place


def test_train_needs_a_cache_and_a_snapshot(place: Place, encoded: Place) -> None:
    outcome = latentline("train", place.recipe)
    assert outcome.code == 2
    assert "no such folder; `latentline encode` makes it" in outcome.error()
    outcome = latentline(
        "train", encoded.recipe, "--set", "train.snapshot=tain", "--set", f"train.output={place.root}/run"
    )
    assert outcome.code == 2
    assert "no snapshot 'tain'; it has train" in outcome.error()
    assert not place.made


def test_train_dry_run_describes_and_writes_nothing(encoded: Place) -> None:
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


def test_train_refuses_a_snapshot_of_another_model(encoded: Place, tmp_path: Path) -> None:
    other = build_tiny_checkpoint(tmp_path / "other", seed=5)
    outcome = latentline(
        "train", encoded.recipe, "--set", f"model.path={other}", "--set", f"train.output={tmp_path}/run"
    )
    assert outcome.code == 2
    assert "run `latentline encode` with this model" in outcome.error()
    assert not (tmp_path / "run").exists()


def test_train_then_infer_with_its_adapter(encoded: Place, tmp_path: Path) -> None:
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
    place: Place, arguments: tuple[str, ...], message: str, mode: str
) -> None:
    outcome = latentline("infer", place.recipe, *arguments, mode)
    assert outcome.code == 2
    assert message in outcome.error()
    assert not place.made


def test_infer_without_guardrail_names_package_flag_and_licence(place: Place) -> None:
    outcome = latentline("infer", place.recipe, "a circle")
    assert outcome.code == 2
    message = outcome.error()
    assert "cosmos_guardrail" in message
    assert "--no-guardrail" in message
    assert "Open Model License" in message
    assert not place.made


def test_infer_dry_run_lists_requests_and_writes_nothing(place: Place) -> None:
    (place.root / "in.jsonl").write_text('{"name": "x", "prompt": "a"}\n{"name": "y", "prompt": "b", "seed": 3}\n')
    outcome = latentline("infer", place.recipe, place.root / "in.jsonl", "--dry-run", "--json")
    assert outcome.code == 0
    assert [(video["name"], video["seed"], video["image"]) for video in outcome.json["videos"]] == [
        ("x", 0, None),
        ("y", 3, None),
    ]
    assert "name: x, prompt: a" in latentline("infer", place.recipe, place.root / "in.jsonl", "--dry-run").out
    assert not place.made


def test_infer_takes_its_inputs_from_the_recipe(place: Place, demo_dataset: Path) -> None:
    outcome = latentline("infer", place.recipe, "--set", "infer.inputs=a blue square", "--dry-run", "--json")
    assert outcome.json["videos"][0]["prompt"] == "a blue square"


def test_a_training_that_is_told_to_stop_exits_75_and_continues(encoded: Place, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ["train", encoded.recipe, "--json", "--set", f"train.output={output}", "--set", "train.steps=100000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([LATENTLINE, *map(str, command)], stdout=pipe, stderr=pipe, text=True)
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
