"""Rows of a snapshot as samples: a sample with several captions is a row a caption, side by side, under one id."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from manifests.cache import is_first
from manifests.keys import sample_id

_PIECE = 65_536


def sample_ids(rows: pa.Table) -> pa.ChunkedArray:
    """The id of the sample each row belongs to."""
    contexts = pc.coalesce(rows["captions_key"], rows["context_key"])
    columns = [pieces(column) for column in (rows["dataset"], rows["latents_key"], contexts, rows["hints_key"])]
    ids = [
        [
            sample_id(dataset=dataset, latents=a, context=b, hints=c)
            for dataset, a, b, c in zip(*(part.to_pylist() for part in piece), strict=True)
        ]
        for piece in zip(*columns, strict=True)
    ]
    return pa.chunked_array([pa.array(part, pa.string()) for part in ids], pa.string())


def first_names(samples: pa.Table) -> pa.ChunkedArray:
    """The first caption's name among those of each row's window; "" where it has but one, which has no name."""
    named = samples.filter(pc.is_valid(samples["captions_key"])).select(["captions_key", "caption_name"])
    firsts = named.group_by("captions_key").aggregate([("caption_name", "min")])
    rows = pc.index_in(samples["captions_key"], value_set=firsts["captions_key"])
    names = firsts["caption_name_min"].combine_chunks().take(rows.combine_chunks())
    return pc.if_else(pc.is_valid(samples["captions_key"]), names, pa.scalar("", pa.string()))


def is_new(ids: pa.ChunkedArray, names: pa.ChunkedArray) -> pa.Array:
    """True where a row differs from the one before in id or caption name."""
    new_name = is_first(names.fill_null("").combine_chunks())
    return pc.or_(is_first(ids.combine_chunks()), new_name)


def pieces(column: pa.ChunkedArray) -> Iterator[pa.ChunkedArray]:
    """A column in parts that are small as Python objects."""
    for begin in range(0, len(column), _PIECE):
        yield column.slice(begin, _PIECE)


def flat_hints(rows: pa.Table, column: str) -> pa.ChunkedArray:
    """The items of a list column of all rows, one after the other."""
    return pc.list_flatten(rows[column])


def hint_rows(rows: pa.Table) -> pa.Table:
    """The rows, each as often as it has hints."""
    return rows.take(pc.list_parent_indices(rows["hint_keys"].combine_chunks()))
