import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer.config import AdapterConfig, InferConfig
from infer.generate import check_requests, generate
from infer.inputs import read_requests
from infer.request import Request
from infer.results import Result
from infer.video import read_frames
from manifests.config import ModelConfig
from manifests.errors import UsageError
from tests.infer.conftest import SaveAdapter


@pytest.fixture
def model(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig(path=str(tiny_checkpoint))


@pytest.fixture
def config(tmp_path: Path) -> InferConfig:
    return InferConfig(
        output=str(tmp_path / "out"), num_steps=2, num_frames=9, height=32, width=48, dtype="float32", fps=8.0
    )


def one(config: InferConfig, **changes: object) -> list[Request]:
    return [replace(request, **changes) for request in read_requests("a red circle", config)]  # type: ignore[arg-type]


def test_text_image_and_video_requests_become_videos(
    model: ModelConfig, config: InferConfig, demo_dataset: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    video = sorted((demo_dataset / "videos").iterdir())[0]
    entries = [
        {"name": "text", "prompt": "a red circle", "seed": 5},
        {"name": "image", "prompt": "a red circle", "input_path": "a.png", "resolution": "48,32"},
        {"name": "video", "prompt": "a square", "input_path": str(video), "num_output_frames": 13},
    ]
    (tmp_path / "inputs.json").write_text(json.dumps(entries))
    seen: list[Result] = []
    results = generate(
        model,
        config,
        read_requests(str(tmp_path / "inputs.json"), config),
        guardrail=False,
        on_video=seen.append,
    )
    output = Path(config.output)
    assert seen == results
    assert sorted(p.name for p in output.iterdir()) == [
        "contact_sheet.png",
        "image.mp4",
        "results.json",
        "text.mp4",
        "video.mp4",
    ]
    shapes = {result.request.name: read_frames(result.video).shape for result in results}
    assert shapes == {"text": (9, 32, 48, 3), "image": (9, 48, 32, 3), "video": (13, 32, 48, 3)}
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.height > 32 + 48 + 32

    report = json.loads((output / "results.json").read_text())
    assert report["model"] == {"path": model.path, "revision": None, "family": "cosmos2.5"}
    assert (report["guardrail"], report["device"], report["fps"]) == (False, "cpu", 8.0)
    text, image, _ = report["videos"]
    assert (text["file"], text["prompt"], text["seed"]) == ("text.mp4", "a red circle", 5)
    assert (text["height"], text["width"], text["num_frames"], text["num_steps"]) == (32, 48, 9, 2)
    assert text["negative_prompt"].startswith("The video captures")
    assert text["seconds"] > 0
    assert image["image"] == str(tmp_path / "a.png")


def test_a_video_does_not_depend_on_its_neighbours(model: ModelConfig, config: InferConfig) -> None:
    (alone,) = generate(model, config, one(config), guardrail=False)
    before = alone.video.read_bytes()
    frames = read_frames(alone.video)
    both = one(config, name="first", prompt="another", seed=9) + one(config)
    after = generate(model, config, both, guardrail=False)[1]
    assert after.video == alone.video
    assert after.video.read_bytes() == before
    assert (read_frames(after.video.with_name("first.mp4")) != frames).mean() > 0.5


@pytest.mark.parametrize("fuse", [False, True])
def test_an_adapter_changes_the_video_and_is_reported(
    model: ModelConfig, config: InferConfig, save_adapter: SaveAdapter, fuse: bool
) -> None:
    base = read_frames(generate(model, config, one(config), guardrail=False)[0].video)
    adapters = {"shapes": AdapterConfig(path=str(save_adapter()), weight=0.5)}
    adapted = generate(model, replace(config, adapters=adapters, fuse=fuse), one(config), guardrail=False)
    assert np.abs(read_frames(adapted[0].video).astype(int) - base).max() > 20
    report = json.loads((Path(config.output) / "results.json").read_text())
    assert report["adapters"]["shapes"]["weight"] == 0.5
    assert report["fused"] is fuse


def test_bfloat16_works(model: ModelConfig, config: InferConfig) -> None:
    (result,) = generate(model, replace(config, dtype="bfloat16"), one(config), guardrail=False)
    assert read_frames(result.video).std() > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 33}, "a_red_circle: height = 33 is not divisible by 16"),
        ({"num_frames": 10}, r"a_red_circle: num_frames = 10 is not 4k\+1; near: 9 or 13"),
    ],
)
def test_a_bad_request_stops_before_anything_is_written(
    model: ModelConfig, config: InferConfig, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_requests(model, one(config, **changes))
    with pytest.raises(UsageError, match=message):
        generate(model, config, one(config, name="good") + one(config, **changes), guardrail=False)
    assert not Path(config.output).exists()


def test_no_requests_and_equal_names_are_refused(model: ModelConfig, config: InferConfig) -> None:
    with pytest.raises(UsageError, match="nothing to generate"):
        generate(model, config, [], guardrail=False)
    with pytest.raises(UsageError, match="'a_red_circle' is used 2 times"):
        generate(model, config, one(config) * 2, guardrail=False)


def test_the_guardrail_is_asked_for_before_anything_is_written(model: ModelConfig, config: InferConfig) -> None:
    with pytest.raises(UsageError, match="cosmos_guardrail is not installed"):
        generate(model, config, one(config), guardrail=True)
    assert not Path(config.output).exists()


def test_an_output_that_cannot_be_a_folder_is_named(model: ModelConfig, config: InferConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"infer\.output: .*file.*: .*file is a file"):
            generate(model, replace(config, output=str(output)), one(config), guardrail=False)


def test_an_unknown_family_is_named(model: ModelConfig, config: InferConfig) -> None:
    with pytest.raises(UsageError, match=r"model\.family 'cosmos9'"):
        generate(replace(model, family="cosmos9"), config, one(config), guardrail=False)
