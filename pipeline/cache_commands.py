"""What the `latentline cache` commands do: a cache or a recipe in, a result to print out."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from encode.files import name_of
from encode.job import plan_encode
from encode.sources import SourceItem
from encode.survey import check, survey
from manifests.cache import Cache
from manifests.errors import EXIT_DONE, EXIT_FAILURE, UsageError
from manifests.explain import Change, explain
from manifests.gc import find_garbage, remove
from manifests.progress import newest_job, throughput_of
from manifests.repair import repair
from manifests.sample_rows import flat_hints
from manifests.schema import KINDS, OK, QUARANTINED, SAMPLE_KINDS, SNAPSHOT, Kind
from manifests.snapshot import load_snapshot
from manifests.subset import make_subsets
from manifests.tables import read_table
from pipeline.recipe import Recipe, resolved
from pipeline.report import quiet_downloads, track

if TYPE_CHECKING:
    from manifests.verify import Finding

_SHOWN = 10


def cache_status(url: str, *, shown: int | None = _SHOWN) -> dict[str, Any]:
    """Count what a cache holds, and say how far its newest job is. shown: quarantined entries listed; None is all."""
    cache = Cache(url)
    kinds = {kind: asdict(cache.summary(kind)) for kind in kinds_in(cache)}
    for summary in kinds.values():
        del summary["kind"]
    names = snapshot_names(cache)
    snapshots = {}
    for name in names:
        snapshot = load_snapshot(cache.store, name)
        datasets = pc.value_counts(snapshot.column("dataset").combine_chunks()).to_pylist()
        counts = {item["values"]: item["counts"] for item in sorted(datasets, key=lambda item: item["values"])}
        snapshots[name] = {"samples": snapshot.num_samples, "datasets": counts, "hash": snapshot.hash}
    lines = []
    for kind in KINDS:
        index = cache.index(kind, ["source", "start", "caption", "status", "error"])
        for row in index.filter(pc.equal(index["status"], QUARANTINED)).to_pylist():
            what = f"{row['source']} from frame {row['start']}" if row["source"] else f"caption {row['caption']!r}"
            lines.append(f"{what}: {row['error']}")
    return {
        "cache": url,
        "entries": kinds,
        "snapshots": snapshots,
        "quarantined": _first(sorted(lines), shown),
        "newest_job": newest_job(cache),
    }


def cache_verify(url: str, *, repair_damage: bool, as_json: bool) -> tuple[dict[str, Any], int]:
    """Check every promise of a cache; with `repair_damage`, set aside what is broken.

    The exit code is 1 if there is damage that was not repaired.
    """
    from manifests.verify import verify

    cache = Cache(url)
    found = verify(cache, track=track("reading shards"))
    result: dict[str, Any] = {
        "cache": url,
        "shards": found.shards,
        "entries": found.entries,
        "bytes": found.bytes,
        "snapshots": found.snapshots,
        "damage": _findings(found.damaged, as_json),
        "notes": _findings([finding for finding in found.findings if not finding.damage], as_json),
    }
    if not repair_damage:
        return result, EXIT_FAILURE if found.damaged else EXIT_DONE
    done = repair(cache, found.findings)
    result |= {"set_aside": list(done.set_aside), "mended_snapshots": list(done.mended)}
    result["left"] = _findings(done.left, as_json)
    if done.set_aside:
        result["next"] = "run `latentline encode` to make again what was set aside"
    return result, EXIT_FAILURE if done.left and not done.set_aside else EXIT_DONE


def cache_explain(recipe: Recipe, video: str, *, as_json: bool) -> dict[str, Any]:
    """Say for each window and caption of a video whether the cache has it, and if not, what of its key differs."""
    quiet_downloads()
    cache = Cache(recipe.encode.cache)
    request = check(recipe.model, recipe.data, recipe.encode)
    request = replace(request, items=_items_of(request.items, video))
    found = survey(request, cache, remember=False)
    fixed = {found.null_key, *found.negative_keys.values()} - set(found.samples["context_key"].to_pylist())
    wanted = [row for row in found.wanted.to_pylist() if row["key"] not in fixed]
    explained = explain(cache, wanted, found.fingerprints)
    counts = {status: sum(one.status == status for one in explained) for status in ("cached", "stale", "missing")}
    counts["quarantined"] = sum(one.status == "quarantined" for one in explained)
    if as_json:
        return {"video": video, "counts": counts, "entries": [asdict(one) for one in explained]}
    lines = []
    for one in explained:
        why = "; ".join(_change(change) for change in one.changes) or one.error or ""
        lines.append(f"{one.what}: {one.status}{f': {why}' if why else ''}")
    return {"video": video, **counts, "entries": lines}


def cache_plan(recipe: Recipe, *, price: float | None) -> dict[str, Any]:
    """Say what `encode` would do, what it would reuse, what nothing uses any more, and what it would cost."""
    quiet_downloads()
    planned = plan_encode(
        recipe.model, recipe.data, recipe.encode, resolved(recipe), create=False, track=track("reading videos")
    )
    result: dict[str, Any] = {
        "cache": recipe.encode.cache,
        "videos": planned.survey.num_items,
        "windows": planned.survey.num_windows,
        "left_out": planned.survey.left_out,
        "to_encode": planned.missing,
        "to_encode_bytes": {kind: planned.missing[kind] * planned.entry_bytes[kind] for kind in planned.kinds},
        "shards": planned.num_shards,
        "reused": {kind: planned.wanted[kind] - planned.missing[kind] for kind in planned.kinds},
        "unusable_videos": len(planned.survey.failed),
        "orphaned": _orphaned(planned.cache, planned.survey.wanted["key"]) if planned.cache else {},
    }
    seconds = {}
    for kind in planned.kinds if planned.cache else ():
        shape = planned.survey.wanted.filter(pc.equal(planned.survey.wanted["kind"], kind)).slice(0, 1).to_pylist()
        measured = throughput_of(planned.cache, kind, shape[0]) if planned.cache and shape else None
        if measured:
            seconds[kind] = (planned.missing[kind] * measured.seconds_per_entry, measured)
    if any(planned.missing[kind] and kind not in seconds for kind in planned.kinds):
        result["gpu_hours"] = None
        result["measured"] = "no throughput yet for entries like these: encode a few shards, then ask again"
        return result
    hours = sum(total for total, _ in seconds.values()) / 3600
    result["gpu_hours"] = hours
    result["measured"] = {
        kind: f"{measured.seconds_per_entry:.3g} s an entry on {measured.device}, {measured.entries} entries"
        for kind, (_, measured) in seconds.items()
    }
    if price is not None:
        result["cost"] = hours * price
    return result


def cache_gc(url: str, *, older_than: float, delete: bool, as_json: bool) -> dict[str, Any]:
    """List what no manifest and no snapshot names and is older than `older_than` seconds; with `delete`, remove it."""
    cache = Cache(url)
    garbage = find_garbage(cache, older_than=older_than)
    if delete:
        remove(cache, garbage)
    by_why: dict[str, int] = {}
    for item in garbage:
        by_why[item.why] = by_why.get(item.why, 0) + 1
    objects: list[Any] = [asdict(item) for item in garbage]
    if not as_json:
        objects = _first([f"{item.path}: {item.why}, {item.age / 3600:.0f} h old" for item in garbage], _SHOWN)
    return {
        "cache": url,
        "objects": len(garbage),
        "bytes": sum(item.size for item in garbage),
        "why": by_why,
        "garbage": objects,
        "deleted": delete,
    }


def cache_snapshot(
    url: str, *, base: str | None, name: str, where: str | None, split: Sequence[str] | None
) -> dict[str, Any]:
    """Name a new snapshot: the samples of `base` that `where` holds for, split into parts by video."""
    cache = Cache(url)
    if base is None:
        names = snapshot_names(cache)
        if len(names) != 1:
            known = f"it has {', '.join(names)}" if names else "it has none; run `latentline encode`"
            raise UsageError(f"cache {url!r}: say with --from which snapshot to start from; {known}")
        base = names[0]
    subsets = make_subsets(cache, base, name, where=where, split=_shares(split or ()))
    return {"cache": url, "from": base, "snapshots": {made.name: _without_name(asdict(made)) for made in subsets}}


def kinds_in(cache: Cache) -> list[Kind]:
    """The kinds of entries a cache has; those every sample has, in any case."""
    return [kind for kind in KINDS if kind in SAMPLE_KINDS or len(cache.shard_ids(kind))]


def snapshot_names(cache: Cache) -> list[str]:
    """Names of a cache's snapshots, sorted."""
    return sorted(name.removesuffix(".json") for name in cache.store.names("snapshots") if name.endswith(".json"))


def _orphaned(cache: Cache, wanted: pa.ChunkedArray) -> dict[str, Any]:
    """Entries that neither the recipe nor any snapshot uses, by kind; nothing removes them."""
    used: dict[str, list[pa.ChunkedArray]] = {kind: [wanted] for kind in KINDS}
    for info in cache.store.list("snapshots"):
        if info.path.endswith(".parquet"):
            columns = [*(f"{kind}_key" for kind in SAMPLE_KINDS), "hint_keys"]
            table, footer = read_table(cache.store.read(info.path), SNAPSHOT, f"{cache.url}/{info.path}", columns)
            for kind in SAMPLE_KINDS:
                used[kind].append(table[f"{kind}_key"])
            used["hint"].append(flat_hints(table, "hint_keys"))
            used["context"].append(pa.chunked_array([[footer["null_key"], *footer["negative_keys"].values()]]))
    found: dict[str, Any] = {}
    for kind in kinds_in(cache):
        index = cache.index(kind, ["key", "status", "size"])
        keys = pa.chunked_array([chunk for column in used[kind] for chunk in column.chunks], pa.string())
        good = index.filter(pc.and_(pc.equal(index["status"], OK), pc.invert(pc.is_in(index["key"], value_set=keys))))
        found[kind] = {"entries": len(good), "bytes": pc.sum(good["size"]).as_py() or 0}
    return found


def _items_of(items: Sequence[SourceItem], video: str) -> list[SourceItem]:
    """The items of one video, given by path, file name, or name in its dataset."""
    path = str(Path(video).expanduser().resolve())
    found = [item for item in items if str(item.video) == video or os.path.realpath(str(item.video)) == path]
    found = found or [item for item in items if video in (item.name, name_of(item.video))]
    if not found:
        near = difflib.get_close_matches(os.path.basename(video), [name_of(item.video) for item in items], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{video}: not a video of the recipe's {len(items)}{hint}")
    return found


def _shares(split: Sequence[str]) -> dict[str, float]:
    shares = {}
    for text in split:
        part, separator, share = text.partition("=")
        try:
            shares[part] = float(share)
        except ValueError:
            separator = ""
        if not separator:
            raise UsageError(f"--split {text!r}: write it as NAME=SHARE, such as val=0.1")
    return shares


def _findings(findings: Sequence[Finding], as_json: bool) -> list[Any]:
    if as_json:
        return [asdict(finding) for finding in findings]
    return _first([f"{finding.where}: {finding.what}; {finding.todo}" for finding in findings], _SHOWN)


def _first(lines: list[str], shown: int | None) -> list[str]:
    if shown is None or len(lines) <= shown:
        return lines
    return [*lines[:shown], f"and {len(lines) - shown} more; --json has them all"]


def _change(change: Change) -> str:
    return f"{change.field} was {_short(change.old)}, is {_short(change.new)}"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_name(subset: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in subset.items() if name != "name"}
