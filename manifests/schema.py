"""The Parquet schemas of the cache, and the paths things have in it."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

Kind = Literal["latents", "context", "hint"]
KINDS: tuple[Kind, ...] = ("latents", "context", "hint")
SAMPLE_KINDS: tuple[Kind, ...] = ("latents", "context")
"""Kinds of which every sample has entries; hints are only there for models that take them."""

TASK_KINDS: tuple[Kind, ...] = ("context", "latents", "hint")
"""The order a worker does them in, so that it loads each model once."""

OK = "ok"
QUARANTINED = "quarantined"

# What identifies an entry's input: the same in plans and in manifests.
_INPUT = [
    ("key", pa.string()),
    ("kind", pa.string()),
    ("source", pa.string()),
    ("source_hash", pa.string()),
    ("clip_start", pa.float64()),
    ("clip_end", pa.float64()),
    ("start", pa.int64()),
    ("num_frames", pa.int32()),
    ("fps", pa.float64()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("caption", pa.string()),
    ("error", pa.string()),
    ("hint", pa.string()),
    ("parameters", pa.string()),
]

WANTED = pa.schema(_INPUT)
PLAN = pa.schema([*_INPUT, ("shard_id", pa.string())])

MANIFEST = pa.schema(
    [
        *_INPUT,
        ("status", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("checksum", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("dtype", pa.string()),
    ]
)

COMPACTED = pa.schema([*MANIFEST, ("shard_id", pa.string())])

SOURCES = pa.schema(
    [
        ("location", pa.string()),
        ("size", pa.int64()),
        ("modified_ns", pa.int64()),
        ("source_hash", pa.string()),
        ("source_frames", pa.int64()),
        ("source_fps", pa.float64()),
        ("frame_times", pa.list_(pa.float64())),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("error", pa.string()),
    ]
)

OPTIONAL = frozenset(
    {
        "hint", "parameters", "hints_key", "padding", "hint_names", "hint_keys", "hint_shards", "hint_offsets",
        "hint_sizes", "hint_checksums",
    }
)  # fmt: skip
"""Columns that a file leaves out where all their values are null: files of jobs without hints are as they ever were."""

_LOCATION = [("shard", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("checksum", pa.string())]

# `sample_id` to `context_key` are hashed into the snapshot's name, and weights where a row has one; where things lie is
# not. A sample with several captions is a row each, with one `sample_id`; `captions_key` stands for all of them, and
# `hints_key` for all hints, which `sample_id` covers. The lists `hint_*` have an item a hint, named "<kind>/<variant>",
# and one for an image context.
# `padding`: pixels of the frames that are not the video's: [top, bottom, left, right].
SNAPSHOT_IDENTITY = ["sample_id", "dataset", "latents_key", "context_key"]
SNAPSHOT = pa.schema(
    [
        ("sample_id", pa.string()),
        ("dataset", pa.string()),
        ("latents_key", pa.string()),
        ("context_key", pa.string()),
        ("source", pa.string()),
        ("source_hash", pa.string()),
        ("start", pa.int64()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("caption", pa.string()),
        ("caption_name", pa.string()),
        ("captions_key", pa.string()),
        ("weight", pa.float64()),
        ("latents_shape", pa.list_(pa.int32())),
        *((f"latents_{name}", kind) for name, kind in _LOCATION),
        *((f"context_{name}", kind) for name, kind in _LOCATION),
        ("hints_key", pa.string()),
        ("padding", pa.list_(pa.int32())),
        ("hint_names", pa.list_(pa.string())),
        ("hint_keys", pa.list_(pa.string())),
        *((f"hint_{name}s", pa.list_(kind)) for name, kind in _LOCATION),
    ]
)


def manifest_path(kind: str, shard_id: str) -> str:
    return f"entries/{kind}/{shard_id}.parquet"


def tar_path(kind: str, shard_id: str, attempt: str) -> str:
    return f"entries/{kind}/{shard_id}.{attempt}.tar"


def compacted_path(kind: str, tag: str, part: str) -> str:
    return f"compacted/{kind}/{tag}-{part}.parquet"


def damaged_path(kind: str, shard_id: str, found: str) -> str:
    return f"damaged/{kind}/{shard_id}.{found}.parquet"


def plan_path(plan_id: str) -> str:
    return f"plans/{plan_id}.parquet"


def snapshot_path(snapshot_hash: str) -> str:
    return f"snapshots/{snapshot_hash}.parquet"


def snapshot_name_path(name: str) -> str:
    return f"snapshots/{name}.json"
