"""What a recipe wants of the cache: read the sources, hash and probe each video once, cut windows, name entries.

Nothing is decoded or encoded here. The result lists the wanted entries (for the plan) and the samples they
make up (for the snapshot).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from encode.config import DataConfig, EncodeConfig, FiltersConfig, HintsConfig
from encode.files import FileState, VideoFile, digest_of, parse_location, state_of
from encode.filters import failing, filtered_sources
from encode.naming import Clip, Names, clip_of
from encode.pool import DecodePool
from encode.probe import DecodeError
from encode.sources import SourceItem, check_image_contexts, with_hint_files
from manifests import keys
from manifests.cache import Cache
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.family import find_family
from manifests.hints import GIVEN
from manifests.image_context import IMAGE, SUFFIXES, wanted_shape
from manifests.snapshot import check_name
from manifests.sources import SourceFacts, SourceMemory

_AHEAD = 64
"""Videos read before the one that is next in order is done."""


@dataclass(frozen=True)
class Survey:
    """What a job wants.

    wanted: one row an entry, no key twice (schema `WANTED`). samples: one row a window and caption (columns
    `SAMPLE_COLUMNS`). num_windows: each counted once, whatever its captions.
    fingerprints: the producers' parts, by kind. null_key: the null context. negative_keys: by prompt.
    num_items: videos, or clips of videos, that the sources name and no filter leaves out. failed: error by item, for
    those that cannot be used at all. left_out: how many each filter left out, by dataset; each under one filter.
    """

    wanted: pa.Table
    samples: pa.Table
    fingerprints: dict[str, dict[str, Any]]
    null_key: str
    negative_keys: dict[str, str]
    num_items: int
    failed: dict[Clip, str]
    num_windows: int
    left_out: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Request:
    """Settings and sources that were found good.

    filters: of the videos themselves, by dataset. left_out: items that other settings left out, by dataset and setting.
    parts: the producers' parts, by kind.
    """

    model: ModelConfig
    data: DataConfig
    config: EncodeConfig
    items: list[SourceItem]
    filters: dict[str, FiltersConfig]
    left_out: dict[str, Counter[str]]
    parts: dict[str, dict[str, Any]]


def check(model: ModelConfig, data: DataConfig, config: EncodeConfig) -> Request:
    """Check settings, model and sources; raise `UsageError` for whatever is wrong. Opens no cache and no video."""
    family = find_family("encode", model)
    family.check_geometry(config)
    check_name(config.snapshot)
    _ = data.mixture
    found = filtered_sources(data)
    for name, dataset in data.datasets.items():
        if dataset.media == "images" and config.num_frames != 1:
            images = sum(item.dataset == name for item in found.items)
            raise UsageError(
                f"data.datasets.{name}: {images} images are videos of 1 frame, encode.num_frames is "
                f"{config.num_frames}; set it to 1, and encode videos with another recipe"
            )
    filters = {name: dataset.filters for name, dataset in data.datasets.items()}
    parts = {"latents": family.latents_parts(model, config), "context": family.context_parts(model, config)}
    if config.hints.kinds:
        parts["hint"] = family.hint_parts(model, config)
    elif config.hints.image_context == "given":
        raise UsageError('encode.hints.image_context = "given" goes with hints; name some in encode.hints.kinds')
    return Request(model, data, config, found.items, filters, found.left_out, parts)


def kept_videos(
    model: ModelConfig,
    data: DataConfig,
    config: EncodeConfig,
    *,
    track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> list[tuple[SourceItem, SourceFacts]]:
    """The videos a job would encode, with what is known of each; hints are not asked for. Errors are `check`'s."""
    request = check(model, data, replace(config, hints=HintsConfig()))
    left_out = {name: Counter(counts) for name, counts in request.left_out.items()}
    with (
        ThreadPoolExecutor(config.num_decoders) as threads,
        DecodePool(config.num_decoders, config.decode_timeout) as decoders,
    ):
        found = {"memory": SourceMemory(None), "threads": threads, "decoders": decoders, "retry_failed": False}
        known = dict(_until_full(request, found, track))
    return [(item, known[item.video]) for item in _kept(request, known, left_out)]


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
    Raises `UsageError` for a video that cannot be read, or if filters leave none; one that cannot be probed, or is
    too short, is not an error here but an entry that will be quarantined.
    """
    config, parts = request.config, request.parts
    family = find_family("encode", request.model)
    names = Names(config, {kind: keys.fingerprint(value) for kind, value in parts.items()})
    null_key = names.context(None)
    prompts = (family.DEFAULT_NEGATIVE_PROMPT, *config.negative_prompts)
    negative_keys = {prompt: names.context(prompt) for prompt in prompts}

    given: list[str] = [kind for kind in config.hints.kinds if kind in GIVEN]
    if config.hints.image_context == "given":
        given.append(IMAGE)
    memory = SourceMemory(cache)
    failed: dict[Clip, str] = {}
    known: dict[VideoFile, SourceFacts] = {}
    left_out = {name: Counter(counts) for name, counts in request.left_out.items()}
    with (
        ThreadPoolExecutor(config.num_decoders) as threads,
        DecodePool(config.num_decoders, config.decode_timeout) as decoders,
    ):
        found: dict[str, Any] = {
            "memory": memory,
            "threads": threads,
            "decoders": decoders,
            "retry_failed": retry_failed,
        }
        try:
            known.update(_until_full(request, found, track))
            items = _kept(request, known, left_out)
            if given:
                items = with_hint_files(request.data, items, given)
                if IMAGE in given:
                    check_image_contexts(items, wanted_shape(request.model))
                videos = list(dict.fromkeys(video for item in items for video in item.hints.values()))
                known.update(zip(videos, track(_look_at_all(videos, **found), len(videos)), strict=True))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            if remember:
                memory.save()
    kept: set[Clip] = set()
    for item in items:
        facts = known[item.video]
        kept.add(clip_of(item, facts))
        error = names.windows(item, facts, {kind: known[item.hints[kind]] for kind in given})
        if error:
            failed[clip_of(item, facts)] = error
    if not kept:
        counts = "; ".join(f"data.datasets.{name}: {_counted(counts)}" for name, counts in left_out.items())
        raise UsageError(f"no video is left of those the recipe names; left out: {counts}")
    wanted, samples = names.tables()
    return Survey(
        wanted=wanted,
        samples=samples,
        fingerprints=parts,
        null_key=null_key,
        negative_keys=negative_keys,
        num_items=len(kept),
        failed=failed,
        num_windows=names.num_windows,
        left_out={name: dict(+counts) for name, counts in left_out.items() if counts.total()},
    )


def _until_full(
    request: Request, found: Mapping[str, Any], track: Callable[[Iterable[Any], int], Iterable[Any]]
) -> Iterator[tuple[VideoFile, SourceFacts]]:
    """Look at each video, in order; no further ones once a dataset has all that its `filters.first` takes."""
    items_of: dict[VideoFile, list[SourceItem]] = {}
    for item in request.items:
        items_of.setdefault(item.video, []).append(item)
    left = {name: filters.first for name, filters in request.filters.items()}
    asked: deque[VideoFile] = deque()

    def wanted() -> Iterator[VideoFile]:
        for video, items in items_of.items():
            if any(left[item.dataset] != 0 for item in items):
                asked.append(video)
                yield video

    for facts in track(_look_at_all(wanted(), **found), len(items_of)):
        video = asked.popleft()
        yield video, facts
        item = items_of[video][0]
        count = left[item.dataset]
        if count and (facts.error or not failing(request.filters[item.dataset], item, facts)):
            left[item.dataset] = count - 1


def _kept(
    request: Request, known: Mapping[VideoFile, SourceFacts], left_out: dict[str, Counter[str]]
) -> list[SourceItem]:
    """The items that no filter leaves out; the others are counted."""
    kept = []
    counts: Counter[str] = Counter()
    for item in request.items:
        filters = request.filters[item.dataset]
        if filters.first is not None and counts[item.dataset] >= filters.first:
            left_out[item.dataset]["first"] += 1
            continue
        facts = known[item.video]
        reason = None if facts.error else failing(filters, item, facts)
        if reason:
            left_out[item.dataset][reason] += 1
            continue
        counts[item.dataset] += 1
        kept.append(item)
    return kept


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} by {name}" for name, count in counts.items() if count) or "none"


def _look_at_all(
    videos: Iterable[VideoFile],
    memory: SourceMemory,
    threads: ThreadPoolExecutor,
    decoders: DecodePool,
    retry_failed: bool,
) -> Iterator[SourceFacts]:
    """Facts of each video, in order. What is not known by location, size and time is read a few videos ahead, and
    added to the memory."""
    waiting: deque[SourceFacts | Future[SourceFacts]] = deque()
    folders: dict[str, str] = {}
    for video in videos:
        state = _state(video, folders)
        known = memory.get(state.location, state.size, state.modified_ns)
        if known is None or (known.error and retry_failed):
            waiting.append(
                threads.submit(_read, video, SourceFacts(state.location, state.size, state.modified_ns, ""), decoders)
            )
        else:
            waiting.append(known)
        while len(waiting) > _AHEAD:
            yield _settled(waiting.popleft(), memory)
    while waiting:
        yield _settled(waiting.popleft(), memory)


def _settled(facts: SourceFacts | Future[SourceFacts], memory: SourceMemory) -> SourceFacts:
    if isinstance(facts, Future):
        facts = facts.result()
        memory.add(facts)
    return facts


def _state(video: VideoFile, folders: dict[str, str]) -> FileState:
    try:
        state = state_of(video, folders)
        state.location.encode()
    except OSError as error:
        raise UsageError(f"{video}: cannot read this video: {error.strerror or error}") from error
    except UnicodeEncodeError as error:
        raise UsageError(f"{error.object!a}: this path is not UTF-8 text, as a cache keeps it; rename it") from error
    return state


def _read(video: VideoFile, facts: SourceFacts, decoders: DecodePool) -> SourceFacts:
    """Hash and probe a video; hash an image context."""
    try:
        facts = replace(facts, source_hash=digest_of(video))
        if isinstance(video, Path) and video.suffix.lower() in SUFFIXES:
            return facts  # an image context
        info = decoders.probe(parse_location(facts.location)).result()
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
