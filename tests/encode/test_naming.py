from pathlib import Path

import pyarrow.compute as pc
import pytest

from encode import naming
from encode.config import EncodeConfig, WindowsConfig
from encode.naming import SAMPLE_COLUMNS, Names
from encode.sources import SourceItem
from manifests.keys import context_key, digest, latents_key
from manifests.schema import WANTED
from manifests.sources import SourceFacts

FINGERPRINTS = {"latents": "a" * 40, "context": "b" * 40}
CONFIG = EncodeConfig(
    cache="x", height=32, width=48, num_frames=9, fps=16.0, windows=WindowsConfig(mode="slide", stride=4)
)


def item(name: str, caption: str = "a caption", **clip: float) -> SourceItem:
    return SourceItem(dataset="d", name=name, video=Path(f"/v/{name}.mp4"), captions={"": caption}, **clip)


def facts(name: str, frames: int = 17, **other) -> SourceFacts:
    known = {"location": f"/v/{name}.mp4", "size": 1, "modified_ns": 1, "source_hash": digest(name)}
    return SourceFacts(**(known | {"source_frames": frames, "source_fps": 16.0} | other))


def names_of(*pairs, config=CONFIG) -> Names:
    names = Names(config, FINGERPRINTS)
    for one, known in pairs:
        names.windows(one, known)
    return names


def latents_of(wanted):
    return wanted.filter(pc.equal(wanted["kind"], "latents")).to_pylist()


def test_every_window_has_the_key_it_would_have_alone():
    wanted, samples = names_of((item("a"), facts("a")), (item("b"), facts("b", 21))).tables()
    rows = latents_of(wanted)
    assert [(row["source"], row["start"]) for row in rows] == [("/v/a.mp4", s) for s in (0, 4, 8)] + [
        ("/v/b.mp4", s) for s in (0, 4, 8, 12)
    ]
    for row in rows:
        window = {name: row[name] for name in ("source_hash", "start", "num_frames", "fps", "height", "width")}
        assert row["key"] == latents_key(**window, fingerprint=FINGERPRINTS["latents"])
    assert samples["latents_key"].to_pylist() == [row["key"] for row in rows]
    assert set(samples["context_key"].to_pylist()) == {context_key(caption="a caption", fingerprint="b" * 40)}


def test_tables_have_their_schemas():
    wanted, samples = names_of((item("a"), facts("a"))).tables()
    assert wanted.schema == WANTED
    assert tuple(samples.column_names) == SAMPLE_COLUMNS
    for empty in Names(CONFIG, FINGERPRINTS).tables():
        assert len(empty) == 0


def test_equal_captions_and_equal_files_are_wanted_once_and_sampled_as_often_as_named():
    copy = facts("a", location="/v/copy.mp4")
    wanted, samples = names_of((item("a"), facts("a")), (item("copy"), copy), (item("b"), facts("b"))).tables()
    assert len(latents_of(wanted)) == 6
    assert {row["source"] for row in latents_of(wanted)} == {"/v/a.mp4", "/v/b.mp4"}
    assert wanted["kind"].to_pylist().count("context") == 1
    assert len(samples) == 9


def test_clips_have_keys_of_their_own():
    wanted, _ = names_of((item("a"), facts("a", 40)), (item("a", start=0.5, end=1.5), facts("a", 40))).tables()
    rows = latents_of(wanted)
    assert {(row["clip_start"], row["clip_end"]) for row in rows} == {(None, None), (0.5, 1.5)}
    assert len({row["key"] for row in rows}) == len(rows)


def test_a_video_that_is_too_short_or_broken_is_one_row_with_its_error():
    names = Names(CONFIG, FINGERPRINTS)
    assert "too short" in names.windows(item("a"), facts("a", 8))
    assert names.windows(item("b"), facts("b", error="no video stream")) == "no video stream"
    wanted, samples = names.tables()
    assert [(row["start"], row["error"] is not None) for row in latents_of(wanted)] == [(0, True), (0, True)]
    assert len(samples) == 2


def test_a_video_of_varying_rate_is_cut_by_its_frame_times():
    times = [i / 8 for i in range(9)] + [1.125]
    wanted, _ = names_of((item("a"), facts("a", frame_times=times))).tables()
    assert [row["start"] for row in latents_of(wanted)] == [0, 4, 8]


@pytest.mark.parametrize("piece", [1, 2, 1000])
def test_collecting_in_pieces_changes_nothing(monkeypatch, piece):
    pairs = [(item(str(i), f"caption {i % 3}"), facts(str(i % 5), 17 + i)) for i in range(12)]
    expected = names_of(*pairs).tables()
    monkeypatch.setattr(naming, "_PIECE", piece)
    found = names_of(*pairs).tables()
    assert [table.to_pylist() for table in found] == [table.to_pylist() for table in expected]
