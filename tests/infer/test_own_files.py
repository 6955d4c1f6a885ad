"""What `infer` may write over: its own videos, and nothing of the user's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from infer.config import InferConfig
from infer.entries import check_name
from infer.generate import generate
from infer.inputs import read_requests
from infer.request import Control, Request
from infer.results import comment_of
from infer.video import shorten, write_mp4
from manifests.config import ModelConfig
from manifests.errors import UsageError


@pytest.fixture
def config(tmp_path: Path) -> InferConfig:
    (tmp_path / "out").mkdir()
    return InferConfig(
        output=str(tmp_path / "out"), num_steps=1, num_frames=5, height=32, width=48, dtype="float32", guidance=1.0
    )


def request_of(config: InferConfig, **changes: object) -> Request:
    (request,) = read_requests("a red circle", config)
    return replace(request, name="a", **changes)  # type: ignore[arg-type]


def write(path: Path, comment: str | None = None) -> bytes:
    write_mp4(path, np.zeros((9, 32, 48, 3), np.uint8), 16.0, comment=comment)
    return path.read_bytes()


def test_a_video_of_the_users_stays_unless_forced(tiny_checkpoint: Path, config: InferConfig) -> None:
    model, path = ModelConfig(path=str(tiny_checkpoint)), Path(config.output) / "a.mp4"
    before = write(path)
    with pytest.raises(UsageError, match=r"a\.mp4 was not made by `latentline infer`.*--force"):
        generate(model, config, [request_of(config)], guardrail=False)
    assert path.read_bytes() == before
    write(path, comment_of("of another request"))
    assert generate(model, config, [request_of(config)], guardrail=False)[0].status == "made"
    write(path)
    assert generate(model, config, [request_of(config)], guardrail=False, force=True)[0].status == "made"


@pytest.mark.parametrize("name", ["video", "ground_truth", "source", "control"])
def test_an_input_stays_even_if_forced(tiny_checkpoint: Path, config: InferConfig, name: str) -> None:
    path = Path(config.output) / "a.mp4"
    before = write(path, comment_of("of an earlier request"))
    link = path.with_name("b.mp4")
    link.symlink_to(path)
    changes: dict[str, object] = {name: link}
    if name == "control":
        changes = {"controls": (Control(kind="edge", path=link),)}
    elif name == "video":
        changes["num_latent_conditional_frames"] = 1
    with pytest.raises(UsageError, match=r"a\.mp4 is an input of 'a'"):
        generate(
            ModelConfig(path=str(tiny_checkpoint)), config, [request_of(config, **changes)], guardrail=False, force=True
        )
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a/b", ".a"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="becomes a file name"):
        check_name("in.json", name)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("A red cup!", "a_red_cup"), ("日本語 の", "日本語_の"), ("!!!", "video"), ("é" * 60, "é" * 32)],
)
def test_prompts_of_any_script_name_their_video(prompt: str, name: str) -> None:
    assert read_requests(prompt, InferConfig())[0].name == name


def test_a_long_label_is_cut_to_what_fits() -> None:
    font = ImageFont.load_default(size=13)
    cut = shorten("word " * 100_000, font, 200)
    assert cut.endswith("...")
    assert 180 < font.getlength(cut) <= 200
    assert shorten("short", font, 200) == "short"


@pytest.mark.parametrize("fps", [0.0001, 1e9])
def test_a_rate_no_file_can_hold_is_refused(fps: float) -> None:
    with pytest.raises(ValueError, match="fps"):
        InferConfig(fps=fps)
