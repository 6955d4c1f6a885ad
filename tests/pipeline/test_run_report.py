"""The page about a run, seen by a real browser."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infer.video import write_mp4
from pipeline.charts import smoothed
from pipeline.recipe import load_recipe, write_resolved
from pipeline.run_report import write_report
from tests.command import latentline
from tests.services import browse, photograph

HOURS_AGO = 3 * 3600
SIGMAS = ("0.1", "0.25", "0.5", "0.75", "0.95")


def records(steps: int) -> list[dict[str, Any]]:
    made = []
    for step in range(1, steps + 1):
        made.append(
            {"step": step, "loss": 0.1 + 1 / step, "lr": 1e-6 * step, "grad_norm": 0.3, "samples_per_second": 0.5,
             "seconds_per_step": 2.0, "data_wait_share": 0.01, "peak_memory_bytes": 3 * 2**30}
        )  # fmt: skip
        if step % 20 == 0:
            made.append(
                {"step": step, "validation/loss": 0.2} | {f"validation/loss_sigma_{s}": float(s) for s in SIGMAS}
            )
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 1,000 steps that is at step 60, with a picture and a video of samples, and hostile names."""
    folder = tmp_path / "a <b>run</b>"
    write_resolved(load_recipe("gr1-lora"), folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(60)))
    facts = {"snapshot": "abc123", "samples": 92, "videos": 90, "captions": 1, "datasets": {"<script>alert(1)": 92}}
    size = {"height": 432, "width": 768, "frames": 93, "fps": 16.0, "samples": 92}
    (folder / "dataset.json").write_text(json.dumps(facts | {"sizes": [size]}))
    for step in ("20", "40"):
        (folder / "samples" / f"step_{step}").mkdir(parents=True)
    Image.new("RGB", (64, 32), "red").save(folder / "samples" / "step_40" / "arm.png")
    write_mp4(folder / "samples" / "step_20" / "cup.mp4", np.zeros((5, 32, 48, 3), np.uint8), 16)
    return folder


def text_of(run: Path) -> str:
    return (run / "report.html").read_text()


def test_a_browser_shows_every_part_and_asks_for_nothing_else(run: Path, tmp_path: Path) -> None:
    write_report(run)
    seen = browse(run / "report.html", tmp_path)
    assert seen.console == []
    assert seen.requests == []
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", seen.dom)
    assert captions == [
        "Loss", "Validation loss by sigma", "Learning rate", "Throughput, samples/s", "Peak GPU memory, GiB",
        "Gradient norm", "Time waiting for data, %", "step 40: arm", "step 20: cup",
    ]  # fmt: skip
    assert seen.dom.count("<svg") == 7
    assert seen.dom.count('<polyline class="line"') == 2 + len(SIGMAS) + 5
    for title in ("validation, step 60: 0.2", "sigma 0.25, step 40: 0.25", "throughput, step 60: 0.5 samples/s",
                  "peak gpu memory, step 60: 3 GiB"):  # fmt: skip
        assert f"<title>{title}</title>" in seen.dom
    for words in ("432x768, 93 frames at 16 fps: 92 samples", "abc123", "60 / 1,000", "rank = 32"):
        assert words in seen.dom
    assert "<script" not in seen.dom
    assert "a &lt;b&gt;run&lt;/b&gt;" in seen.dom


def test_the_browser_would_tell_of_requests_and_errors(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://elsewhere.invalid/a.png"><script>console.error("wrong")</script>')
    seen = browse(page, tmp_path)
    assert seen.requests == ["http://elsewhere.invalid/a.png"]
    assert any("wrong" in line for line in seen.console)


@pytest.mark.parametrize(
    ("dark", "ground", "line"), [(False, (246, 246, 244), (40, 103, 199)), (True, (20, 21, 23), (110, 166, 245))]
)
def test_charts_are_visible_in_both_colour_schemes(
    run: Path, tmp_path: Path, dark: bool, ground: tuple[int, ...], line: tuple[int, ...]
) -> None:
    write_report(run)
    photograph(run / "report.html", tmp_path / "page.png", width=1000, height=1400, dark=dark)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert tuple(pixels[2, 2]) == ground
    drawn = (np.abs(pixels - np.array(line)).sum(-1) < 12).nonzero()
    assert len(drawn[0]) > 500
    assert np.ptp(drawn[1]) > 700, "lines in both columns of charts"


def test_states_of_a_run(run: Path, tmp_path: Path) -> None:
    assert write_report(run)["state"] == "Running"
    assert "Step 60 of 1,000" in text_of(run)
    metrics = run / "metrics.jsonl"
    old = metrics.stat().st_mtime - HOURS_AGO
    os.utime(metrics, (old, old))
    (run / "checkpoints" / "step_00000050").mkdir(parents=True)
    assert write_report(run)["state"] == "Stopped"
    assert "The same command continues from step_00000050" in text_of(run)
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records(1000)))
    (run / "adapter").mkdir()
    (run / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    outcome = latentline("report", run, "--output", tmp_path / "out" / "page.html", "--json")
    assert outcome.json == {
        "report": str(tmp_path / "out" / "page.html"), "state": "Finished", "steps": 1000, "records": 1050,
    }  # fmt: skip


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    write_resolved(load_recipe("gr1-lora"), tmp_path / "run")
    assert write_report(tmp_path / "run")["state"] == "Not begun"
    text = text_of(tmp_path / "run")
    for words in ("Nothing is recorded yet", "No sample pictures", "does not say what it trains on"):
        assert words in text
    assert "<svg" not in text


def test_a_record_cut_short_or_not_finite_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "loss": NaN}\n{"step": 62, "lo')
    said = write_report(run)
    assert said["steps"] == 61
    assert "nan" not in text_of(run).lower().replace("nano", "")


def test_losses_by_quantile_of_sigma_are_told_as_such(tmp_path: Path) -> None:
    record = {"step": 1, "validation/loss": 0.3, "validation/loss_q0.9": 0.5, "validation/loss_q0.1": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    write_report(tmp_path)
    assert re.findall(r"<title>(quantile [^<]*)", text_of(tmp_path)) == [
        "quantile 0.1, step 1: 0.1", "quantile 0.9, step 1: 0.5",
    ]  # fmt: skip


def test_one_record_is_a_point(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    write_report(tmp_path)
    assert "training, step 1: 0.5" in text_of(tmp_path)
    assert "There is no recipe.toml" in text_of(tmp_path)


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "none", "no such folder"), (tmp_path, "neither recipe.toml nor metrics.jsonl")):
        outcome = latentline("report", folder)
        assert outcome.code == 2
        assert message in outcome.error()
    assert not list(tmp_path.iterdir())
    (tmp_path / "metrics.jsonl").write_text("{}}\n{}\n")
    outcome = latentline("report", tmp_path)
    assert outcome.code == 1
    assert "line 1 is not JSON" in outcome.error()


def test_a_damaged_picture_does_not_stop_the_page(run: Path) -> None:
    (run / "samples" / "step_40" / "arm.png").write_bytes(b"half")
    write_report(run)
    assert "arm.png cannot be read" in text_of(run)


def test_a_smoothed_line_keeps_a_straight_one_straight() -> None:
    points = [(float(x), 2.0 * x) for x in range(20)]
    assert smoothed(points, 5)[2:-2] == points[2:-2]
    assert smoothed(points, 1) == points
