"""Real small caches without a model: entries of random values under keys their rows really have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from manifests.cache import Cache
from manifests.commit import commit_shard
from manifests.keys import context_key, digest, fingerprint, latents_key
from manifests.plan import adopt_plan, missing_entries
from manifests.schema import SNAPSHOT, WANTED
from manifests.shards import Entry
from manifests.snapshot import Snapshot, SnapshotCounts, build_snapshot

PARTS: dict[str, dict[str, Any]] = {
    "latents": {"family": "test", "vae": "0" * 40, "dtype": "bfloat16"},
    "context": {"family": "test", "text_encoder": "1" * 40, "dtype": "bfloat16"},
}
SHAPES = {"latents": (4, 2, 3, 5), "context": (6, 8)}
WINDOW = {"num_frames": 5, "fps": 16.0, "height": 16, "width": 32}
SAMPLE_COLUMNS = SNAPSHOT.names[1 : SNAPSHOT.names.index("latents_shape")]


def latents_row(video: str, start: int = 0, **other: Any) -> dict[str, Any]:
    source_hash = digest(["bytes of", video])
    key = latents_key(source_hash=source_hash, start=start, fingerprint=fingerprint(PARTS["latents"]), **WINDOW)
    row = {"key": key, "kind": "latents", "source": f"/videos/{video}.mp4", "source_hash": source_hash}
    return dict.fromkeys(WANTED.names) | row | {"start": start} | WINDOW | other


def context_row(caption: str | None) -> dict[str, Any]:
    key = context_key(caption=caption, fingerprint=fingerprint(PARTS["context"]))
    return dict.fromkeys(WANTED.names) | {"key": key, "kind": "context", "caption": caption}


def wanted_table(videos: Sequence[str], starts: Sequence[int] = (0,)) -> pa.Table:
    """Entries of every window of every video, a caption a video ("a video of <name>"), and the null context."""
    rows = [latents_row(video, start) for video in videos for start in starts]
    rows += [context_row(f"a video of {video}") for video in videos] + [context_row(None)]
    return pa.Table.from_pylist(rows, schema=WANTED)


def samples_table(videos: Sequence[str], starts: Sequence[int] = (0,), *, dataset: str = "test") -> pa.Table:
    rows = []
    for video in videos:
        caption = f"a video of {video}"
        for start in starts:
            row = latents_row(video, start)
            row |= {"dataset": dataset, "latents_key": row["key"], "caption": caption}
            row |= {"context_key": context_row(caption)["key"]}
            rows.append({name: row.get(name) for name in SAMPLE_COLUMNS})
    return pa.Table.from_pylist(rows, schema=pa.schema([SNAPSHOT.field(name) for name in SAMPLE_COLUMNS]))


def entry(row: dict[str, Any]) -> Entry:
    """Values that depend on the row's key alone."""
    generator = torch.Generator().manual_seed(int(row["key"][:15], 16))
    values = torch.randn(SHAPES[row["kind"]], generator=generator).to(torch.bfloat16)
    return Entry(row["key"], {row["kind"]: values}, {"start": row["start"]})


def commit(cache: Cache, shard_id: str, rows: Sequence[dict[str, Any]], **changes: Any) -> bool:
    """Commit rows of one kind, each with its `entry`, unless its `error` says why not."""
    kind = rows[0]["kind"]
    options: dict[str, Any] = {
        "kind": kind,
        "shard_id": shard_id,
        "inputs": rows,
        "entries": {row["key"]: entry(row) for row in rows if not row["error"]},
        "errors": {row["key"]: row["error"] for row in rows if row["error"]},
        "footer": {"fingerprint": PARTS[kind]},
    }
    return commit_shard(cache.store, **(options | changes))


def fill(cache: Cache, wanted: pa.Table, *, entries_per_shard: int = 2) -> list[str]:
    """Plan and commit what the cache lacks, as an encode does; return the ids of the shards committed."""
    missing = missing_entries(cache, wanted)
    if not len(missing):
        return []
    sizes = {"latents": entries_per_shard, "context": entries_per_shard}
    plan = adopt_plan(cache, wanted, missing, sizes, {"fingerprints": PARTS})
    return [task.shard_id for task in plan.tasks() if commit(cache, task.shard_id, task.rows)]


def freeze(cache: Cache, samples: pa.Table, name: str = "train") -> tuple[Snapshot, SnapshotCounts]:
    null_key = context_row(None)["key"]
    return build_snapshot(cache, samples, name=name, fingerprints=PARTS, null_key=null_key, negative_keys={})


def make_cache(url: Path | str, videos: Sequence[str] = ("a", "b", "c"), starts: Sequence[int] = (0, 8)) -> Cache:
    """A filled cache with a snapshot `train`."""
    cache = Cache(str(url), create=True)
    fill(cache, wanted_table(videos, starts))
    freeze(cache, samples_table(videos, starts))
    return cache


def flip_bit(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
