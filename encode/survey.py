"""What a recipe wants of the cache: read the sources, hash and probe each video once, cut windows, name entries.

Nothing is decoded or encoded here. The result lists the wanted entries (for the plan) and the samples they
make up (for the snapshot).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from encode.config import DataConfig, EncodeConfig
from encode.naming import Clip, Names, clip_of
from encode.pool import DecodePool
from encode.probe import DecodeError
from encode.sources import SourceItem, read_sources
from manifests import keys
from manifests.cache import Cache
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.family import find_family
from manifests.snapshot import check_name
from manifests.sources import SourceFacts, SourceMemory

_AHEAD = 64
"""Videos read before the one that is next in order is done."""


@dataclass(frozen=True)
class Survey:
    """What a job wants.

    wanted: one row an entry, no key twice (schema `WANTED`). samples: one row a window (columns `SAMPLE_COLUMNS`).
    fingerprints: the producers' parts, by kind. null_key: the null context. negative_keys: by prompt.
    num_items: videos, or clips of videos, that the sources name. failed: error by item, for those that cannot be
    used at all.
    """

    wanted: pa.Table
    samples: pa.Table
    fingerprints: dict[str, dict[str, Any]]
    null_key: str
    negative_keys: dict[str, str]
    num_items: int
    failed: dict[Clip, str]


@dataclass(frozen=True)
class Request:
    """Settings and sources that were found good. parts: the producers' parts, by kind."""

    model: ModelConfig
    config: EncodeConfig
    items: list[SourceItem]
    parts: dict[str, dict[str, Any]]


def check(model: ModelConfig, data: DataConfig, config: EncodeConfig) -> Request:
    """Check settings, model and sources; raise `UsageError` for whatever is wrong. Opens no cache and no video."""
    family = find_family("encode", model)
    family.check_geometry(config)
    check_name(config.snapshot)
    items = read_sources(data)
    parts = {"latents": family.latents_parts(model, config), "context": family.context_parts(model, config)}
    return Request(model, config, items, parts)


def survey(
    request: Request,
    cache: Cache | None,
    *,
    remember: bool,
    retry_failed: bool = False,
    track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> Survey:
    """Name everything that is asked for.

    cache: where hashes and probes of sources are known from. remember: write new ones there.
    retry_failed: probe again what could not be probed before.
    track: wraps the loop over videos, for progress; what is known when it raises is remembered.
    Raises `UsageError` for a video that cannot be read; one that cannot be probed, or is too short, is not an
    error here but an entry that will be quarantined.
    """
    config, items, parts = request.config, request.items, request.parts
    family = find_family("encode", request.model)
    names = Names(config, {kind: keys.fingerprint(value) for kind, value in parts.items()})
    null_key = names.context(None)
    prompts = (family.DEFAULT_NEGATIVE_PROMPT, *config.negative_prompts)
    negative_keys = {prompt: names.context(prompt) for prompt in prompts}

    memory = SourceMemory(cache)
    failed: dict[Clip, str] = {}
    videos = list(dict.fromkeys(item.video for item in items))
    known: dict[Path, SourceFacts] = {}
    with (
        ThreadPoolExecutor(config.num_decoders) as threads,
        DecodePool(config.num_decoders, config.decode_timeout) as decoders,
    ):
        looks = _look_at_all(videos, memory, threads, decoders, retry_failed)
        try:
            for video, facts in zip(videos, track(looks, len(videos)), strict=True):
                memory.add(facts)
                known[video] = facts
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            if remember:
                memory.save()
    for item in items:
        error = names.windows(item, known[item.video])
        if error:
            failed[clip_of(item, known[item.video])] = error
    wanted, samples = names.tables()
    return Survey(
        wanted=wanted,
        samples=samples,
        fingerprints=parts,
        null_key=null_key,
        negative_keys=negative_keys,
        num_items=len({clip_of(item, known[item.video]) for item in items}),
        failed=failed,
    )


def _look_at_all(
    videos: Iterable[Path],
    memory: SourceMemory,
    threads: ThreadPoolExecutor,
    decoders: DecodePool,
    retry_failed: bool,
) -> Iterator[SourceFacts]:
    """Facts of each video, in order. What is not known by location, size and time is read a few videos ahead."""
    waiting: deque[SourceFacts | Future[SourceFacts]] = deque()
    for video in videos:
        path, size, modified_ns = _place(video)
        known = memory.get(path, size, modified_ns)
        if known is None or (known.error and retry_failed):
            waiting.append(threads.submit(_read, video, SourceFacts(path, size, modified_ns, ""), decoders))
        else:
            waiting.append(known)
        while len(waiting) > _AHEAD:
            yield _settled(waiting.popleft())
    while waiting:
        yield _settled(waiting.popleft())


def _settled(facts: SourceFacts | Future[SourceFacts]) -> SourceFacts:
    return facts.result() if isinstance(facts, Future) else facts


def _place(video: Path) -> tuple[str, int, int]:
    """(resolved path, bytes, time of change)."""
    try:
        path = os.path.realpath(video)
        stat = os.stat(path)
    except OSError as error:
        raise UsageError(f"{video}: cannot read this video: {error.strerror or error}") from error
    return path, stat.st_size, stat.st_mtime_ns


def _read(video: Path, facts: SourceFacts, decoders: DecodePool) -> SourceFacts:
    """Hash and probe a video."""
    path = Path(facts.location)
    try:
        facts = replace(facts, source_hash=keys.file_digest(path))
        info = decoders.probe(path).result()
    except OSError as error:
        raise UsageError(f"{video}: cannot read this video: {error.strerror or error}") from error
    except DecodeError as error:
        return replace(facts, error=str(error))
    return replace(
        facts,
        source_frames=info.num_frames,
        source_fps=info.fps,
        frame_times=[float(time) for time in info.frame_times] if info.variable_frame_rate else None,
        height=info.height,
        width=info.width,
    )
