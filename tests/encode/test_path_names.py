"""Names that only the file system understands."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.pipeline.test_cli import Latentline, Place, latentline, place

__all__ = ["latentline", "place"]


@pytest.mark.parametrize("part", ["video", "folder"])
def test_a_path_that_is_not_utf8_is_one_line(latentline: Latentline, place: Place, part: str) -> None:
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
