import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests import keys

HEX = st.text("0123456789abcdef", min_size=40, max_size=40)
SECONDS = st.floats(0, 1e6)
WINDOWS = st.fixed_dictionaries(
    {
        "source_hash": HEX,
        "start": st.integers(0, 10**7),
        "num_frames": st.integers(1, 1000),
        "fps": st.none() | st.floats(1, 240),
        "height": st.integers(16, 8192),
        "width": st.integers(16, 8192),
        "fingerprint": HEX,
        "clip": st.none() | st.tuples(SECONDS, st.none() | SECONDS),
    }
)
FIELDS = ["source_hash", "start", "num_frames", "fps", "height", "width", "fingerprint", "clip"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(first=WINDOWS, second=WINDOWS)
def test_latents_keys_are_equal_exactly_when_every_field_is(first, second):
    assert (keys.latents_key(**first) == keys.latents_key(**second)) == (first == second)


@given(window=WINDOWS, other=WINDOWS, field=st.sampled_from(FIELDS))
def test_changing_any_one_field_changes_the_key_and_changing_it_back_restores_it(window, other, field):
    changed = window | {field: other[field]}
    assert (keys.latents_key(**changed) == keys.latents_key(**window)) == (other[field] == window[field])
    assert keys.latents_key(**(changed | {field: window[field]})) == keys.latents_key(**window)


@given(window=WINDOWS, starts=st.lists(st.integers(0, 10**7), max_size=5))
def test_naming_many_windows_at_once_names_each_as_alone(window, starts):
    rest = {name: value for name, value in window.items() if name != "start"}
    assert keys.latents_keys(starts=starts, **rest) == [keys.latents_key(start=start, **rest) for start in starts]


def test_a_key_is_the_documented_hash():
    window = {"source_hash": "ab" * 20, "start": 7, "num_frames": 93, "fps": 16, "height": 704, "width": 1280}
    fields = {"kind": "latents", "source": "ab" * 20, "clip": None, "start": 7, "num_frames": 93, "fps": 16.0}
    fields |= {"size": [704, 1280], "fingerprint": "f" * 40, "format": keys.FORMAT_VERSION}
    assert keys.latents_key(**window, fingerprint="f" * 40) == keys.digest(fields)


@given(first=st.none() | st.text(), second=st.none() | st.text(), one=HEX, two=HEX)
def test_context_keys_are_equal_exactly_when_caption_and_fingerprint_are(first, second, one, two):
    same = keys.context_key(caption=first, fingerprint=one) == keys.context_key(caption=second, fingerprint=two)
    assert same == ((first, one) == (second, two))


@given(parts=st.dictionaries(st.text(), JSON, max_size=5))
def test_a_fingerprint_does_not_depend_on_the_order_of_its_parts(parts):
    backwards = dict(reversed(parts.items()))
    assert keys.fingerprint(parts) == keys.fingerprint(backwards)


@given(value=JSON)
def test_a_digest_survives_json(value):
    assert keys.digest(json.loads(json.dumps(value))) == keys.digest(value)


@given(head=JSON, columns=st.lists(st.lists(st.lists(JSON, max_size=3), max_size=3), max_size=3))
def test_a_table_hashed_in_pieces_is_hashed_as_a_whole(head, columns):
    whole = [[value for piece in column for value in piece] for column in columns]
    assert keys.table_digest(head, columns) == keys.digest([head, whole])


@given(first=st.tuples(st.text(), HEX, HEX), second=st.tuples(st.text(), HEX, HEX))
def test_sample_ids_are_equal_exactly_when_their_parts_are(first, second):
    def of(parts):
        return keys.sample_id(dataset=parts[0], latents=parts[1], context=parts[2])

    assert (of(first) == of(second)) == (first == second)


@given(dataset=st.text(), latents=st.text(), context=st.text(), hints=st.none() | st.text())
def test_a_sample_id_is_the_digest_of_its_parts(dataset, latents, context, hints):
    parts = {"dataset": dataset, "latents": latents, "context": context} | ({} if hints is None else {"hints": hints})
    assert keys.sample_id(dataset=dataset, latents=latents, context=context, hints=hints) == keys.digest(parts)


def test_keys_are_safe_names_and_nan_has_none():
    assert len(keys.digest({})) == keys.KEY_DIGITS
    assert set(keys.digest({})) <= set("0123456789abcdef")
    with pytest.raises(ValueError, match="Out of range"):
        keys.digest(math.nan)


def test_a_file_is_hashed_by_its_bytes_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 3_000_000)
    (tmp_path / "c").write_bytes(b"x" * 2_999_999 + b"y")
    assert keys.file_digest(tmp_path / "a") == keys.file_digest(tmp_path / "b")
    assert keys.file_digest(tmp_path / "a") != keys.file_digest(tmp_path / "c")
