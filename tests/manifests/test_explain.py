import pytest

from manifests.explain import Change, explain
from manifests.keys import digest, fingerprint, latents_key
from tests.manifests.filled import PARTS, WINDOW, commit, context_row, latents_row, make_cache


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache", ["a", "b"], [0, 8])


def wanted(video: str, *, parts=PARTS, **fields):
    """A window of a video as another recipe, model or file would want it."""
    row = latents_row(video) | fields
    named = {name: row[name] for name in ("source_hash", "start", *WINDOW)}
    clip = None if row["clip_start"] is None else (row["clip_start"], row["clip_end"])
    return row | {"key": latents_key(**named, clip=clip, fingerprint=fingerprint(parts["latents"]))}


def test_what_is_there_is_cached_and_says_where(cache):
    [found] = explain(cache, [wanted("a")], PARTS)
    assert (found.status, found.changes) == ("cached", ())
    assert cache.store.exists(found.shard)


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"height": 32}, Change("height", 16, 32)),
        ({"fps": None}, Change("fps", 16.0, None)),
        ({"num_frames": 9}, Change("num_frames", 5, 9)),
        ({"start": 4}, Change("start", 0, 4)),
        ({"source_hash": digest("edited")}, Change("source_hash", latents_row("a")["source_hash"], digest("edited"))),
    ],
)
def test_a_changed_field_is_named_with_its_old_and_new_value(cache, fields, change):
    [found] = explain(cache, [wanted("a", **fields)], PARTS)
    assert found.status == "stale"
    if "start" in fields:
        assert len(found.changes) == 1
        assert found.changes[0].field == "start"
    else:
        assert found.changes == (change,)


def test_a_moved_file_is_still_cached(cache):
    [found] = explain(cache, [wanted("a", source="/elsewhere/a.mp4")], PARTS)
    assert found.status == "cached"


def test_a_moved_file_with_other_settings_is_found_by_its_bytes(cache):
    [found] = explain(cache, [wanted("a", source="/elsewhere/a.mp4", width=64)], PARTS)
    assert found.changes == (Change("width", 32, 64),)


def test_a_changed_part_of_the_fingerprint_is_named(cache):
    parts = PARTS | {"latents": PARTS["latents"] | {"vae": "9" * 40, "resize": "crop"}}
    [found] = explain(cache, [wanted("a", parts=parts)], parts)
    assert found.changes == (
        Change("fingerprint.resize", None, "crop"),
        Change("fingerprint.vae", "0" * 40, "9" * 40),
    )


def test_a_new_video_is_missing(cache):
    [found] = explain(cache, [wanted("z")], PARTS)
    assert (found.status, found.changes) == ("missing", ())


def test_a_quarantined_window_says_why(cache):
    commit(cache, "5" * 40, [latents_row("q") | {"error": "no video stream"}])
    [found] = explain(cache, [wanted("q")], PARTS)
    assert (found.status, found.error) == ("quarantined", "no video stream")


def test_an_edited_caption_is_named_with_the_old_one(cache):
    rows = [wanted("a"), context_row("a better caption of a")]
    found = explain(cache, rows, PARTS)
    assert [one.status for one in found] == ["cached", "stale"]
    assert found[1].changes == (Change("caption", "a video of a", "a better caption of a"),)


def test_another_text_encoder_is_named(cache):
    parts = PARTS | {"context": PARTS["context"] | {"text_encoder": "7" * 40}}
    row = context_row("a video of a")
    row["key"] = digest("other")
    [found] = explain(cache, [row], parts)
    assert found.changes == (Change("fingerprint.text_encoder", "1" * 40, "7" * 40),)
