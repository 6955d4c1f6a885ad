"""Names that only the file system understands."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.command import latentline
from tests.pipeline.conftest import place
from tests.pipeline.places import Place

__all__ = ["place"]


@pytest.mark.parametrize("part", ["video", "folder"])
def test_a_path_that_is_not_utf8_is_one_line(place: Place, part: str) -> None:
    if part == "video":
        for file in (*(place.data / "videos").glob("00_*"), *(place.data / "metas").glob("00_*")):
            stem = os.fsencode(file.parent) + b"/caf\xe9"
            os.rename(file, stem + os.fsencode(file.suffix))
    else:
        real = os.fsencode(place.root) + b"/donn\xe9es"
        shutil.move(place.data, os.fsdecode(real))
        os.symlink(real, place.data)
    outcome = latentline("encode", place.recipe, "--dry-run")
    assert outcome.code == 2
    assert "not UTF-8" in outcome.error()
    assert "\\udce9" in outcome.error()


def test_a_caption_with_half_a_character_is_one_line(place: Place) -> None:
    for file in (place.data / "metas").iterdir():
        (place.data / "captions").mkdir(exist_ok=True)
        (place.data / "captions" / f"{file.stem}.json").write_text('{"caption": "a cup \\ud83d"}')
    shutil.rmtree(place.data / "metas")
    outcome = latentline("encode", place.recipe, "--dry-run")
    assert outcome.code == 2
    assert "4 captions with half a character" in outcome.error()


def test_a_prompt_with_half_a_character_is_one_line(place: Place) -> None:
    requests = place.root / "in.json"
    requests.write_text('[{"name": "a", "prompt": "a cup \\ud83d"}]')
    outcome = latentline("infer", place.recipe, requests, "--no-guardrail")
    assert outcome.code == 2
    assert "'a': name or prompt has half a character" in outcome.error()
