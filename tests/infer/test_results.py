"""What is made again and what is kept, what a failure leaves, and videos that are compared and shown together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer.compare import compare_videos, ssim
from infer.config import AdapterConfig, InferConfig
from infer.generate import generate
from infer.grid import write_grid
from infer.inputs import read_requests
from infer.request import Request
from infer.results import Result, read_fingerprint
from infer.video import read_frames, write_mp4
from manifests.config import ModelConfig
from manifests.errors import UsageError
from tests.infer.conftest import SaveAdapter


@pytest.fixture
def model(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig(path=str(tiny_checkpoint))


@pytest.fixture
def config(tmp_path: Path) -> InferConfig:
    return InferConfig(
        output=str(tmp_path / "out"), num_steps=1, num_frames=5, height=32, width=48, dtype="float32", guidance=1.0
    )


def requests_of(config: InferConfig, *names: str, **changes: object) -> list[Request]:
    (request,) = read_requests("a red circle", config)
    return [replace(request, name=name, **changes) for name in names]  # type: ignore[arg-type]


def report_of(config: InferConfig) -> dict:
    return json.loads((Path(config.output) / "results.json").read_text())


def statuses(results: list[Result]) -> list[str]:
    return [result.status for result in results]


def test_finished_videos_are_kept_and_only_what_changed_is_made_again(
    model: ModelConfig, config: InferConfig, save_adapter: SaveAdapter
) -> None:
    wanted = requests_of(config, "a", "b")
    first = generate(model, config, wanted, guardrail=False)
    assert statuses(first) == ["made", "made"]
    stamps = [result.video.stat().st_mtime_ns for result in first]
    seconds = [video["seconds"] for video in report_of(config)["videos"]]

    made: list[Result] = []
    again = generate(model, config, wanted, guardrail=False, on_video=made.append)
    assert (statuses(again), made) == (["kept", "kept"], [])
    assert [result.video.stat().st_mtime_ns for result in again] == stamps
    assert [video["seconds"] for video in report_of(config)["videos"]] == seconds
    assert [v["fingerprint"] for v in report_of(config)["videos"]] == [read_fingerprint(r.video) for r in again]

    changed = [wanted[0], replace(wanted[1], prompt="a blue square")]
    assert statuses(generate(model, config, changed, guardrail=False)) == ["kept", "made"]
    assert statuses(generate(model, replace(config, fps=8.0), wanted, guardrail=False)) == ["made", "made"]
    adapters = {"x": AdapterConfig(path=str(save_adapter()))}
    adapted = replace(config, adapters=adapters)
    assert statuses(generate(model, adapted, wanted, guardrail=False)) == ["made", "made"]
    assert statuses(generate(model, adapted, wanted, guardrail=False)) == ["kept", "kept"]
    save_adapter(seed=1)
    assert statuses(generate(model, adapted, wanted, guardrail=False)) == ["made", "made"]
    assert statuses(generate(model, adapted, wanted, guardrail=False, force=True)) == ["made", "made"]


def test_an_input_that_changed_is_noticed(model: ModelConfig, config: InferConfig, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "a.png")
    wanted = requests_of(config, "a", image=tmp_path / "a.png", num_latent_conditional_frames=1)
    assert statuses(generate(model, config, wanted, guardrail=False)) == ["made"]
    (tmp_path / "moved").mkdir()
    moved = [replace(wanted[0], image=(tmp_path / "a.png").rename(tmp_path / "moved" / "b.png"))]
    assert statuses(generate(model, config, moved, guardrail=False)) == ["kept"]
    Image.new("RGB", (48, 32), "blue").save(tmp_path / "moved" / "b.png")
    assert statuses(generate(model, config, moved, guardrail=False)) == ["made"]


def test_a_request_that_fails_does_not_stop_the_rest(
    model: ModelConfig, config: InferConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = requests_of(config, "bad", image=tmp_path / "bad.png", num_latent_conditional_frames=1)
    results = generate(model, config, bad + requests_of(config, "good"), guardrail=False)
    assert statuses(results) == ["failed", "made"]
    assert "bad.png: cannot read this image" in capsys.readouterr().err
    failed, made = report_of(config)["videos"]
    assert (failed["status"], "file" in failed) == ("failed", False)
    assert "bad.png: cannot read this image" in failed["error"]
    assert "error" not in made
    assert sorted(path.name for path in Path(config.output).iterdir()) == [
        "contact_sheet.png",
        "good.mp4",
        "results.json",
    ]

    Image.new("RGB", (48, 32), "red").save(tmp_path / "bad.png")
    assert statuses(generate(model, config, bad + requests_of(config, "good"), guardrail=False)) == ["made", "kept"]


def test_a_video_is_compared_with_its_ground_truth(model: ModelConfig, config: InferConfig, tmp_path: Path) -> None:
    (tmp_path / "truth").mkdir()
    (same,) = generate(model, config, requests_of(config, "same"), guardrail=False)
    same.video.rename(tmp_path / "truth" / "same.mp4")
    write_mp4(tmp_path / "truth" / "other.mp4", np.zeros((9, 64, 64, 3), np.uint8), 16.0)
    inputs = tmp_path / "in.json"
    inputs.write_text(json.dumps([{"name": name, "prompt": "a red circle"} for name in ("same", "other")]))
    compared = replace(config, ground_truth=str(tmp_path / "truth"), grid=True)
    same, other = generate(model, compared, read_requests(str(inputs), compared), guardrail=False)
    assert (same.psnr, same.ssim) == (None, pytest.approx(1.0))
    black = read_frames(other.video).astype(float)
    truth = np.asarray(read_frames(tmp_path / "truth" / "other.mp4")[0, 0, 0], float)
    assert other.psnr == pytest.approx(10 * np.log10(255**2 / ((black - truth) ** 2).mean()), abs=1e-6)
    assert other.ssim is not None
    assert 0 < other.ssim < 0.5
    assert report_of(compared)["videos"][1]["psnr"] == pytest.approx(other.psnr)

    grid = read_frames(Path(config.output) / "grid.mp4")
    assert grid.shape == (9, 2 * (64 + 20), 2 * 64, 3)
    cells = [grid[0, 20 : 20 + 32, :48], grid[0, 20 : 20 + 32, 64 : 64 + 48]]
    for cell in cells:
        assert np.abs(cell.astype(float) - read_frames(same.video)[0]).mean() < 6
    assert grid[0, 84 + 20 :, :64].mean() < 6  # a black ground truth

    short = requests_of(config, "same", num_frames=9, ground_truth=tmp_path / "truth" / "same.mp4")
    with pytest.raises(UsageError, match=r"same: ground truth .* has 5 frames, the video will have 9"):
        generate(model, compared, short, guardrail=False)


def test_ssim_is_scikit_images() -> None:
    """Reference: skimage.metrics.structural_similarity 0.26, gaussian_weights, sigma 1.5, no sample covariance."""
    y, x = np.mgrid[0:24, 0:40]
    one = np.stack([(x * 5 + y * 3) % 256, (x * y) % 256, (x * 7) % 256], -1).astype(np.uint8)
    other = np.stack([(x * 5 + y * 2) % 256, (x * y + 20) % 256, (x * 6) % 256], -1).astype(np.uint8)
    assert ssim(one, one) == pytest.approx(1.0)
    assert ssim(one, other) == pytest.approx(0.8494155717260371, abs=1e-9)


def test_the_ground_truth_may_have_another_size_and_more_frames(tmp_path: Path) -> None:
    grey = np.full((3, 32, 48, 3), 128, np.uint8)
    write_mp4(tmp_path / "a.mp4", grey, 16.0)
    write_mp4(tmp_path / "b.mp4", np.full((5, 64, 64, 3), 118, np.uint8), 16.0)
    psnr, similarity = compare_videos(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert psnr == pytest.approx(10 * np.log10(255**2 / 10**2), abs=1.0)
    assert similarity > 0.98


def test_cells_that_belong_together_stay_in_a_row(tmp_path: Path) -> None:
    for index in range(6):
        write_mp4(tmp_path / f"{index}.mp4", np.full((2, 32, 32, 3), 40 * index, np.uint8), 16.0)
    cells = [(str(index), tmp_path / f"{index}.mp4") for index in range(6)]
    write_grid(tmp_path / "near_square.mp4", cells, 16.0)
    write_grid(tmp_path / "pairs.mp4", cells, 16.0, together=2)
    assert read_frames(tmp_path / "near_square.mp4").shape == (2, 2 * 52, 3 * 32, 3)
    pairs = read_frames(tmp_path / "pairs.mp4")
    assert pairs.shape == (2, 2 * 52, 4 * 32, 3)
    middles = [pairs[0, row * 52 + 36, column * 32 + 16].mean() for row in range(2) for column in range(4)]
    assert middles == pytest.approx([0, 40, 80, 120, 160, 200, 0, 0], abs=6)
