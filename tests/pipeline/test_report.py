"""Results: exact for machines, readable for people, and never changed by what they hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import emit, human_bytes, log, quiet_libraries, track


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Any:
    def show(result: dict[str, Any], **options: Any) -> str:
        emit(result, **{"as_json": False, **options})
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return show


def test_json_is_strict_whatever_is_in_it(shown: Any) -> None:
    result = {"path": Path("a/b"), "loss": math.nan, "by": {1: math.inf, 2: (1, None)}, "bytes": 1048576, "zero": 0}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads(shown(result, as_json=True, hide_zero=("zero",)), parse_constant=refuse)
    assert read == {"path": "a/b", "loss": None, "by": {"1": None, "2": [1, None]}, "bytes": 1048576, "zero": 0}


def test_text_is_a_line_a_value(shown: Any) -> None:
    text = shown(
        {
            "num_samples": 12345,
            "lr": 0.000123456,
            "loss": math.nan,
            "size_bytes": 1536,
            "memory_bytes": {"base": 1024, "total": 5 << 30},
            "videos": ["a.mp4", Path("b.mp4")],
            "failed": [],
            "encoded": {},
            "lost": None,
            "ok": True,
        }
    )
    assert text.splitlines() == [
        "num samples   12,345",
        "lr            0.0001235",
        "loss          -",
        "size bytes    1.5 KiB",
        "memory bytes  base: 1.0 KiB, total: 5.0 GiB",
        "videos        a.mp4",
        "              b.mp4",
        "failed        none",
        "encoded       none",
        "lost          -",
        "ok            True",
    ]


def test_mappings_of_mappings_are_indented_and_names_of_users_kept(shown: Any) -> None:
    result = {"snapshots": {"my_train": {"samples": 8, "datasets": {"gr_1": 8}, "note": None}, "b": {"samples": 1}}}
    assert shown(result).splitlines() == [
        "snapshots",
        "  my_train  samples: 8, datasets: (gr_1: 8)",
        "  b         samples: 1",
    ]


def test_paths_are_neither_cut_nor_read_as_markup(shown: Any) -> None:
    path = "/data/[red]x[/red]/" + "long/" * 60 + "end.mp4"
    assert shown({"video": path}) == f"video  {path}\n"


def test_what_is_zero_can_be_left_out(shown: Any) -> None:
    result = {"samples": 0, "duplicates": 0, "cut": 2}
    assert shown(result, hide_zero=("duplicates", "cut")).splitlines() == ["samples  0", "cut      2"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        (3 << 40, "3.0 TiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_bytes_in_units(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_a_log_line_goes_to_stderr_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    line = "quarantined: [bold]x.mp4[/bold]: " + "word " * 40 + "end"
    log(line)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line + "\n")


def test_tracking_a_loop_passes_its_items_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("reading")(iter("abc"), 3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_libraries_are_quiet_in_a_log(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    quiet_libraries()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, subfolder="text_encoder")
    model.save_pretrained(tmp_path)
    assert "it/s" not in capsys.readouterr().err
