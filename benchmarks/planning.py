"""How planning and snapshotting grow with the number of windows: seconds and peak memory, as a Markdown table.

    python benchmarks/planning.py [--windows 10000 100000 1000000] [--output FILE]

Videos are empty files whose facts the cache already knows, so no byte of video is read or decoded: this measures what
is left when everything is known, which is also what every later run of `encode` pays. Manifests and shards' names are
real, tars are not written. Each step runs in a process of its own, held to two cores.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

CORES = 2
WINDOWS_PER_VIDEO = 10
ENTRIES_PER_SHARD = {"latents": 24, "context": 64}
SHARDS_PER_PART = 20_000
LINKS = 50_000


def prepare(folder: Path, num_windows: int) -> None:
    """Videos, a table of captions, the tiny checkpoint, a recipe, and a cache that knows the videos."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from manifests.cache import Cache
    from manifests.schema import SOURCES
    from manifests.tables import table_bytes
    from pipeline.demo.checkpoint import build_tiny_checkpoint

    numbers = range(max(1, num_windows // WINDOWS_PER_VIDEO))
    build_tiny_checkpoint(folder / "model")
    cache = Cache(str(folder / "cache"), create=True)
    videos = str((folder / "videos").resolve())
    for part in range(1000):
        os.makedirs(f"{videos}/{part:03d}")
    paths = [f"{videos}/{number % 1000:03d}/episode_{number:08d}.mp4" for number in numbers]
    for path in paths:
        os.mknod(path)
    known = {
        "location": paths,
        "size": [0] * len(paths),
        "modified_ns": [os.stat(path).st_mtime_ns for path in paths],
        "source_hash": [_name(number) for number in numbers],
        "source_frames": [93 * WINDOWS_PER_VIDEO + number % 90 for number in numbers],
        "source_fps": [16.0] * len(paths),
        "height": [480] * len(paths),
        "width": [832] * len(paths),
    }
    cache.store.write("sources/known.parquet", table_bytes(_table(known, len(paths), SOURCES), {}))
    captions = [f"Use the left arm to move object {number} to the tray." for number in numbers]
    pq.write_table(pa.table({"video": paths, "caption": captions}), folder / "data.parquet")


def recipe_parts(folder: Path) -> tuple[Any, Any, Any]:
    from pipeline.recipe import validate

    values = {
        "model": {"path": str(folder / "model")},
        "data": {"datasets": {"robots": {"layout": "table", "path": str(folder / "data.parquet")}}},
        "encode": {"cache": str(folder / "cache"), "windows": {"mode": "slide"}, "height": 480, "width": 832},
    }
    recipe = validate(values, "benchmark")
    return recipe.model, recipe.data, recipe.encode


def survey_all(folder: Path) -> tuple[Any, Any]:
    from encode.survey import check, survey
    from manifests.cache import Cache

    cache = Cache(str(folder / "cache"))
    return cache, survey(check(*recipe_parts(folder)), cache, remember=False)


def plan(folder: Path) -> int:
    from manifests.plan import adopt_plan, missing_entries

    cache, found = survey_all(folder)
    missing = missing_entries(cache, found.wanted)
    footer = {"fingerprints": found.fingerprints}
    adopted = adopt_plan(cache, found.wanted, missing, ENTRIES_PER_SHARD, footer)
    assert adopted.num_entries == len(found.wanted)
    return len(found.samples)


def commit(folder: Path) -> int:
    """Write the manifests of every shard, as workers would; not timed as planning."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(CORES) as workers:
        return sum(workers.map(commit_part, [folder] * CORES, range(CORES)))


def commit_part(folder: Path, index: int) -> int:
    import numpy as np
    import pyarrow as pa

    from manifests.cache import Cache
    from manifests.plan import read_plan
    from manifests.schema import MANIFEST, manifest_path, tar_path
    from manifests.tables import table_bytes

    cache = Cache(str(folder / "cache"))
    [info] = cache.store.list("plans")
    table = read_plan(cache, info.path.removeprefix("plans/").removesuffix(".parquet")).table.combine_chunks()
    for kind in ENTRIES_PER_SHARD:
        os.makedirs(folder / "cache" / "entries" / kind, exist_ok=True)
    ids, kinds, keys = (table[name].to_numpy() for name in ("shard_id", "kind", "key"))
    begins = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    tars: list[str] = []
    for begin, end in list(zip(begins, [*begins[1:], len(ids)], strict=True))[index::CORES]:
        rows, kind, shard_id = range(end - begin), kinds[begin], ids[begin]
        tar = tar_path(kind, shard_id, "0" * 12)
        placed = {name: table[name].slice(begin, len(rows)) for name in table.column_names} | {
            "status": ["ok"] * len(rows),
            "shard": [tar] * len(rows),
            "offset": [1024 * row for row in rows],
            "size": [1000] * len(rows),
            "checksum": [key + "0" * 24 for key in keys[begin:end]],
            "shape": pa.array([[16, 24, 60, 104]] * len(rows), MANIFEST.field("shape").type),
            "dtype": ["bfloat16"] * len(rows),
        }
        path = folder / "cache" / manifest_path(kind, shard_id)
        path.write_bytes(table_bytes(_table(placed, len(rows), MANIFEST), {"format": 1}))
        tars.append(f"{folder}/cache/{tar}")
    _make_empty(tars)
    return len(tars)


def plan_again(folder: Path) -> int:
    from manifests.plan import missing_entries

    cache, found = survey_all(folder)
    assert not len(missing_entries(cache, found.wanted))
    return len(found.samples)


def snapshot(folder: Path) -> int:
    from manifests.snapshot import build_snapshot

    cache, found = survey_all(folder)
    keys = {"null_key": found.null_key, "negative_keys": found.negative_keys}
    _, counts = build_snapshot(cache, found.samples, name="train", fingerprints=found.fingerprints, **keys)
    return counts.samples


def load(folder: Path) -> int:
    from manifests.order import Order
    from manifests.snapshot import load_snapshot
    from manifests.store import Store

    frozen = load_snapshot(Store(folder / "cache"), "train")
    order = Order(frozen.hash, 0, frozen.num_samples)
    for position in range(1000):
        frozen.sample(order[position][1])
    return frozen.num_samples


def compact(folder: Path) -> int:
    from manifests.cache import Cache
    from manifests.compact import compact as run

    return sum(run(Cache(str(folder / "cache"))).values())


def make_shards(folder: Path, num_shards: int) -> None:
    """A compacted cache of one entry a shard: names of manifests and tars, and the compacted rows."""
    from manifests.cache import Cache
    from manifests.schema import COMPACTED, compacted_path, manifest_path, tar_path
    from manifests.tables import table_bytes

    cache = Cache(str(folder / "cache"), create=True)
    tag = _name("plan")[:12]
    os.makedirs(folder / "cache" / "entries" / "latents")
    for begin in range(0, num_shards, SHARDS_PER_PART):
        names = [_name(number) for number in range(begin, min(begin + SHARDS_PER_PART, num_shards))]
        ids = [tag + name[12:] for name in names]
        tars = [tar_path("latents", shard_id, "0" * 12) for shard_id in ids]
        _make_empty([f"{folder}/cache/{manifest_path('latents', shard_id)}" for shard_id in ids])
        _make_empty([f"{folder}/cache/{tar}" for tar in tars])
        rows = {
            "key": names,
            "kind": ["latents"] * len(ids),
            "status": ["ok"] * len(ids),
            "source": [f"/videos/{name}.mp4" for name in names],
            "source_hash": names,
            "shard": tars,
            "offset": [1024] * len(ids),
            "size": [1000] * len(ids),
            "checksum": [name + "0" * 24 for name in names],
            "shard_id": ids,
        }
        data = table_bytes(_table(rows, len(ids), COMPACTED), {"format": 1, "tag": tag, "plan_shards": num_shards})
        cache.store.write(compacted_path("latents", tag, _name(begin)), data)


def open_shards(folder: Path) -> int:
    from manifests.cache import Cache

    return Cache(str(folder / "cache")).summary("latents").entries


def _make_empty(paths: list[str]) -> None:
    """Empty files, as names of few inodes: what is never opened need not cost one each."""
    for number, path in enumerate(paths):
        if number % LINKS == 0:
            os.mknod(first := path)
        else:
            os.link(first, path)


def _name(what: object) -> str:
    """What looks like a key."""
    return hashlib.sha256(str(what).encode()).hexdigest()[:40]


def _table(columns: dict[str, Any], num_rows: int, schema: Any) -> Any:
    """A table of a schema; columns that are not given are null."""
    import pyarrow as pa

    return pa.table([columns.get(field.name, pa.nulls(num_rows, field.type)) for field in schema], schema=schema)


STEPS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (prepare, plan, commit, plan_again, snapshot, load, compact, make_shards, open_shards)
}


def measure(step: str, folder: Path, *arguments: int) -> dict[str, Any]:
    """Run a step in a process of its own; its `seconds`, `cpu_seconds`, peak `mib`, and the `value` it returned."""
    command = [sys.executable, __file__, "--step", step, str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_step(step: str, folder: Path, arguments: list[int]) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    import encode.job  # noqa: F401 - imports are not what is measured
    import pipeline.recipe  # noqa: F401

    begin, cpu = time.monotonic(), time.process_time()
    value = STEPS[step](folder, *arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = {"seconds": time.monotonic() - begin, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({**times, "mib": peak, "value": value}))


def table(sizes: list[int], scratch: Path) -> str:
    header = ["step", *(f"{size:,}" for size in sizes)]
    lines: dict[str, list[str]] = {}

    def add(label: str, step: str, folder: Path) -> None:
        result = measure(step, folder)
        text = f"{result['seconds']:.1f} s ({result['cpu_seconds']:.1f}), {result['mib']:,.0f} MiB"
        lines.setdefault(label, []).append(text)

    for size in sizes:
        folder = scratch / str(size)
        measure("prepare", folder, size)
        add("survey, name and plan", "plan", folder)
        shards = measure("commit", folder)["value"]
        lines.setdefault("shards", []).append(f"{shards:,}")
        add("plan again, all committed", "plan_again", folder)
        add("compact", "compact", folder)
        add("plan again, compacted", "plan_again", folder)
        add("survey and snapshot, compacted", "snapshot", folder)
        add("load the snapshot, read 1,000 places", "load", folder)
        shutil.rmtree(folder)
        measure("make_shards", folder, size)
        add("open a compacted cache of as many shards", "open_shards", folder)
        shutil.rmtree(folder)
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*rows, *("| " + " | ".join([label, *values]) + " |" for label, values in lines.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--scratch", type=Path, help="folder for the caches, removed again (default: the system's)")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, folder, *arguments = options.step
        run_step(step, Path(folder), [int(argument) for argument in arguments])
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        body = table(options.windows, Path(scratch))
    commit_id = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    report = (
        f"# Planning and snapshotting, by number of windows\n\n{body}\n\n"
        f"Seconds (of CPU) and peak resident memory of the whole process, imports included, on {CORES} cores; "
        f"{WINDOWS_PER_VIDEO} windows a video, {ENTRIES_PER_SHARD['latents']} latents a shard, local disk.\n"
        f"{_processor()}, Python {platform.python_version()}, {datetime.date.today()}, commit {commit_id}.\n"
    )
    print(report)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
