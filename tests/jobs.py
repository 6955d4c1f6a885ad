"""Encode jobs for tests: a recipe with a shard for each entry or two, the real command, and what a cache must hold."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manifests.cache import Cache
from manifests.schema import KINDS
from manifests.snapshot import load_snapshot
from manifests.store import Store
from tests.command import latentline
from tests.pipeline.recipes import recipe_values, write_recipe

LATENTLINE = str(Path(sys.executable).with_name("latentline"))
REPOSITORY = Path(__file__).parents[1]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def write_job(folder: Path, checkpoint: Path, dataset: Path, **encode: Any) -> Path:
    """A recipe file whose cache is `folder/cache`: 9 windows a video and an entry a shard, 5 to 10 shards a second."""
    values = recipe_values(folder, checkpoint, dataset)
    slow = {"height": 64, "width": 96, "shard_mb": 0.001, "windows": {"mode": "slide", "stride": 1}}
    values["encode"] |= slow | encode
    return write_recipe(folder, values)


def start(*arguments: str | Path, python: bool = False, **environment: str) -> subprocess.Popen[str]:
    """The command, or with `python` a script, in a process group of its own."""
    command = [sys.executable if python else LATENTLINE, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=os.environ | _ENVIRONMENT | environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str | Path, timeout: float = 180, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def encode(recipe: Path, *options: str) -> dict[str, Any]:
    """Run `latentline encode RECIPE --json` in this process; its result."""
    done = latentline("encode", recipe, "--json", *options)
    assert done.code == 0, done.err
    return done.json


def wait_until(true: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> Any:
    """What `true` returns once it returns something; fails when the process ends or the time passes first."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def committed(cache: str | Path) -> dict[str, str]:
    """Digest of the tar of each committed shard; every tar and every key only once."""
    opened = Cache(str(cache))
    tars, keys = {}, []
    for kind in KINDS:
        for shard_id in opened.shard_ids(kind).to_pylist():
            table, _ = opened.manifest(kind, shard_id)
            keys += table["key"].to_pylist()
            for path in set(table["shard"].drop_null().to_pylist()):
                tars[shard_id] = hashlib.sha256(opened.store.read(path)).hexdigest()
    assert len(set(keys)) == len(keys)
    return tars


def num_committed(cache: Path, kind: str) -> int:
    return len(list((cache / "entries" / kind).glob("*.parquet")))


def orphans(cache: Path) -> list[Path]:
    """Tars that no manifest names, staged ones included."""
    named = {
        path
        for kind in KINDS
        for shard_id in Cache(str(cache)).shard_ids(kind).to_pylist()
        for path in Cache(str(cache)).manifest(kind, shard_id)[0]["shard"].drop_null().to_pylist()
    }
    found = [path for path in (cache / "entries").rglob("*") if ".tar" in path.name]
    return [path for path in found if str(path.relative_to(cache)) not in named]


def samples(cache: str | Path, name: str = "train") -> list[dict[str, Any]]:
    """The identity of each sample of a snapshot."""
    table = load_snapshot(Store(str(cache)), name).table
    return table.select(["sample_id", "latents_key", "context_key", "latents_checksum"]).to_pylist()
