"""Reading samples: the trainer's random access by manifest against stock WebDataset's sequential stream.

    python -m benchmarks.loader [--samples 128] [--commit REV] [--output FILE]

Latents in their real shape at 432x768x93 (4.0 MB bfloat16) with a context each (1.05 MB), on this machine's disk and on
an S3 endpoint (moto's server on loopback: it bounds both, so only the ratio says something). Ours checks the SHA-256 of
every payload and reads in the training order; WebDataset checks nothing and reads in the order of the tar.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from importlib.metadata import version
from pathlib import Path

import obstore
import safetensors.torch
import torch
import webdataset as wds
from obstore.store import from_url

from manifests.cache import Cache
from manifests.commit import commit_shard
from manifests.keys import digest
from manifests.order import Order
from manifests.places import Location
from manifests.schema import OK
from manifests.shards import Entry, read_tensors
from manifests.store import Store
from tests.manifests.s3 import BUCKET, environment, moto_server

LATENTS, CONTEXT = (16, 24, 54, 96), (512, 1024)
PER_SHARD = 32
THREADS = 4


def fill(url: str, samples: int) -> tuple[list[tuple[Location, Location]], dict[str, list[str]]]:
    """Write a cache of random samples; return each sample's two locations, and the tars by kind."""
    cache = Cache(url, create=True)
    tars: dict[str, list[str]] = {}
    found: dict[str, list[Location]] = {}
    for kind, shape in (("latents", LATENTS), ("context", CONTEXT)):
        for begin in range(0, samples, PER_SHARD):
            keys = [digest([kind, index]) for index in range(begin, begin + PER_SHARD)]
            commit_shard(
                cache.store,
                kind=kind,
                shard_id=digest([kind, begin]),
                inputs=[{"key": key, "kind": kind} for key in keys],
                entries={key: Entry(key, {kind: torch.randn(shape).bfloat16()}, {}) for key in keys},
                errors={},
                footer={},
            )
        rows = [row for row in cache.rows(kind).to_pylist() if row["status"] == OK]
        found[kind] = [Location(row["shard"], row["offset"], row["size"], row["checksum"]) for row in rows]
        tars[kind] = sorted({row["shard"] for row in rows})
    return list(zip(found["latents"], found["context"], strict=True)), tars


def ours(store: Store, locations: list[tuple[Location, Location]]) -> int:
    """Read every sample once in a training order, with the trainer's threads."""
    order = Order("benchmark", 0, len(locations))

    def read(position: int) -> int:
        latents, context = locations[order[position][1]]
        return read_tensors(store, latents)["latents"].numel() + read_tensors(store, context)["context"].numel()

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(read, range(len(locations))))


def webdataset(urls: dict[str, list[str]]) -> int:
    """Iterate the same shards with stock WebDataset, one stream a kind side by side, tensors decoded."""

    def stream(kind: str) -> Iterator[torch.Tensor]:
        for sample in wds.WebDataset(urls[kind], shardshuffle=False, empty_check=False):
            yield safetensors.torch.load(sample["safetensors"])[kind]

    return sum(a.numel() + b.numel() for a, b in zip(stream("latents"), stream("context"), strict=True))


def rate(call: Callable[[], int], samples: int, expected: int) -> tuple[float, float]:
    """Samples/s and MB/s, the better of two runs."""
    best = float("inf")
    for _ in range(2):
        begin = time.perf_counter()
        if call() != expected:
            raise SystemExit("a reader did not return every value")
        best = min(best, time.perf_counter() - begin)
    return samples / best, expected * 2 / best / 1e6


def compare(name: str, url: str, tar_url: Callable[[str], str], samples: int) -> list[str]:
    locations, tars = fill(url, samples)
    store = Store(url)
    urls = {kind: [tar_url(tar) for tar in paths] for kind, paths in tars.items()}
    expected = samples * (torch.Size(LATENTS).numel() + torch.Size(CONTEXT).numel())
    mine = rate(lambda: ours(store, locations), samples, expected)
    theirs = rate(lambda: webdataset(urls), samples, expected)
    return [
        f"| {name} | latentline, random order, checked | {mine[0]:.0f} | {mine[1]:.0f} | {mine[0] / theirs[0]:.2f} |",
        f"| {name} | webdataset, in order, unchecked | {theirs[0]:.0f} | {theirs[1]:.0f} | 1 |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare("local disk", f"{folder}/cache", lambda tar: f"{folder}/cache/{tar}", options.samples)
        with moto_server() as port:
            os.environ.update(environment(port))
            url = f"s3://{BUCKET}/cache"
            expires = timedelta(hours=1)
            rows += compare("S3", url, lambda tar: obstore.sign(from_url(url), "GET", tar, expires), options.samples)
    text = io.StringIO()
    print("# Reading samples of 432x768x93: 4.0 MB of latents and 1.05 MB of context", file=text)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "webdataset", "obstore", "moto"))
    hardware = f"{os.cpu_count()} cores, {platform.machine()}"
    print(
        f"\n{hardware}, {packages}, {date.today()}, commit {options.commit}; `python -m benchmarks.loader`", file=text
    )
    print("\n| store | reader | samples/s | MB/s | ratio |\n|---|---|---|---|---|", file=text)
    print(*rows, sep="\n", file=text)
    print(text.getvalue())
    if options.output:
        options.output.write_text(text.getvalue())


if __name__ == "__main__":
    main()
