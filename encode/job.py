"""Stage 1 as a whole: plan what is missing, run it, freeze a snapshot. Each step can be repeated safely."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from encode.config import DataConfig, EncodeConfig
from encode.naming import Clip
from encode.stopping import Stop
from encode.survey import Survey, check, survey
from encode.throughput import throughput
from manifests.cache import Cache
from manifests.compact import compact
from manifests.config import ModelConfig
from manifests.errors import LatentlineError, Preempted, UsageError
from manifests.events import EventLog
from manifests.family import find_family
from manifests.plan import Plan, adopt_plan, make_plan, missing_entries
from manifests.repair import mend_snapshots
from manifests.sample_rows import flat_hints, hint_rows
from manifests.schema import KINDS, PLAN, SAMPLE_KINDS, Kind
from manifests.snapshot import Snapshot, SnapshotCounts, build_snapshot
from manifests.store import Store

if TYPE_CHECKING:
    from encode.worker import ShardReport

_BYTES = {"bfloat16": 2, "float32": 4}

Track = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class EncodePlan:
    """What `encode` would do.

    wanted, missing: entries by kind. entry_bytes: of one entry, by kind. cache: None if there is none yet.
    """

    survey: Survey
    plan: Plan
    wanted: dict[str, int]
    missing: dict[str, int]
    entry_bytes: dict[str, int]
    cache: Cache | None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of entries the job has."""
        return tuple(kind for kind in KINDS if kind in self.entry_bytes)

    @property
    def missing_bytes(self) -> int:
        return sum(self.missing[kind] * self.entry_bytes[kind] for kind in self.kinds)

    @property
    def num_shards(self) -> int:
        return sum(len(self.plan.shard_ids(kind)) for kind in KINDS)


@dataclass(frozen=True)
class EncodeResult:
    """What `encode` did.

    encoded, truncated: entries written and captions cut by this run. quarantined: an error for each video, or
    clip, that has a window in quarantine.
    """

    snapshot: Snapshot
    counts: SnapshotCounts
    encoded: dict[str, int]
    truncated: int
    quarantined: dict[Clip, str]


def plan_encode(
    model: ModelConfig,
    data: DataConfig,
    config: EncodeConfig,
    recipe: Mapping[str, Any],
    *,
    create: bool,
    retry_quarantined: bool = False,
    track: Track = lambda items, total: items,
) -> EncodePlan:
    """Find out what is missing. With `create` the cache is made and the plan is kept in it.

    recipe: the resolved recipe, recorded in every manifest. Raises `UsageError` for settings or data that are
    wrong, before anything is written.
    """
    request = check(model, data, config)
    family = find_family("encode", model)
    cache = Cache(config.cache, create=True) if create else _existing(config.cache)
    found = survey(request, cache, remember=create, retry_failed=retry_quarantined, track=track)
    missing = missing_entries(cache, found.wanted, retry_quarantined=retry_quarantined)
    size = _BYTES[config.dtype]
    kinds = KINDS if config.hints.kinds else SAMPLE_KINDS
    entry_bytes: dict[str, int] = {kind: math.prod(family.entry_shape(kind, model, config)) * size for kind in kinds}
    per_shard: dict[str, int] = {kind: max(1, int(config.shard_mb * 2**20 / entry_bytes[kind])) for kind in kinds}
    footer = {"fingerprints": found.fingerprints, "recipe": recipe}
    if create and cache is not None and len(missing):
        plan = _where_videos_are(adopt_plan(cache, found.wanted, missing, per_shard, footer), found.wanted)
    else:
        plan = make_plan("dry-run", missing, per_shard, footer)
    return EncodePlan(
        survey=found,
        plan=plan,
        wanted=_count(found.wanted, kinds),
        missing=_count(missing, kinds),
        entry_bytes=entry_bytes,
        cache=cache,
    )


def run_encode(
    model: ModelConfig,
    config: EncodeConfig,
    planned: EncodePlan,
    *,
    index: int = 0,
    total: int = 1,
    stop: Stop | None = None,
    on_report: Callable[[ShardReport], None] = lambda report: None,
) -> list[ShardReport]:
    """Run the plan's tasks (those of worker `index` of `total`) and return their reports.

    Raises `LatentlineError` when more than `encode.max_failed` of the videos cannot be used, and `Preempted` once
    `stop` is requested. What happens is written to the job's events.
    """
    failed = dict(planned.survey.failed)
    _check_failed(config, planned, failed)
    reports: list[ShardReport] = []
    if not planned.plan.num_entries:
        return reports
    assert planned.cache is not None
    log = EventLog(planned.cache.store, planned.plan.plan_id)
    log.write("started", executor=config.executor, index=index, total=total, missing=planned.missing)
    running = _executor(config)(
        model, config, planned.plan, index=index, total=total, stop=stop or Stop(), event=log.write
    )
    try:
        with contextlib.closing(cast("Generator[ShardReport, None, None]", running)):
            for report in running:
                reports.append(report)
                _write_events(log, report)
                on_report(report)
                if report.quarantined:
                    failed |= _failed_in(planned, report)
                    _check_failed(config, planned, failed)
        log.write("finished", shards=len(reports), **throughput(reports))
    except Preempted as error:
        log.write("preempted", reason=str(error), shards=len(reports))
        raise
    except LatentlineError as error:
        log.write("failed", reason=str(error), shards=len(reports))
        raise
    finally:
        log.flush()
    return reports


def _executor(config: EncodeConfig) -> Callable[..., Iterator[ShardReport]]:
    """In a function of its own: planning imports no torch, and other executors no Ray."""
    if config.executor == "ray":
        from encode.ray_executor import run_ray

        return run_ray
    from encode.executors import run_local

    return run_local


def _write_events(log: EventLog, report: ShardReport) -> None:
    facts = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in asdict(report).items()
        if name not in ("errors", "began")
    }
    log.write("shard", **facts, quarantined=report.quarantined)
    for what, error in report.errors:
        log.write("quarantined", shard_id=report.shard_id, what=what, error=error)


def finish_encode(config: EncodeConfig, planned: EncodePlan, reports: list[ShardReport]) -> EncodeResult:
    """Freeze the snapshot named `encode.snapshot` from what is committed, and compact what the cache says of it.

    Other snapshots that held entries which were damaged and encoded again are mended too.
    Raises `LatentlineError` when more than `encode.max_failed` of the videos are in quarantine, and leaves the
    name as it was.
    """
    assert planned.cache is not None
    quarantined = _quarantined(planned)
    _check_failed(config, planned, quarantined)
    snapshot, counts = build_snapshot(
        planned.cache,
        planned.survey.samples,
        name=config.snapshot,
        fingerprints=planned.survey.fingerprints,
        null_key=planned.survey.null_key,
        negative_keys=planned.survey.negative_keys,
    )
    if planned.cache.store.names("damaged"):
        mend_snapshots(planned.cache)
    compact(planned.cache)
    encoded: dict[str, int] = {
        kind: sum(r.entries for r in reports if r.kind == kind and r.committed) for kind in planned.kinds
    }
    return EncodeResult(
        snapshot=snapshot,
        counts=counts,
        encoded=encoded,
        truncated=sum(report.truncated for report in reports),
        quarantined=quarantined,
    )


def _check_failed(config: EncodeConfig, planned: EncodePlan, failed: Mapping[Clip, str]) -> None:
    total = planned.survey.num_items
    if len(failed) > config.max_failed * total:
        (video, *_), error = next(iter(failed.items()))
        raise LatentlineError(
            f"{len(failed)} of {total} videos cannot be used, more than encode.max_failed = {config.max_failed:g} "
            f"allows; first: {video}: {error}"
        )


def _quarantined(planned: EncodePlan) -> dict[Clip, str]:
    """An error for each video, or clip, of this job that has a window or its caption in quarantine."""
    assert planned.cache is not None
    found: dict[Clip, str] = {}
    for kind in planned.kinds:
        found |= _videos_with(planned, kind, planned.cache.index(kind, ["key", "error"]))
    return found


def _failed_in(planned: EncodePlan, report: ShardReport) -> dict[Clip, str]:
    assert planned.cache is not None
    table, _ = planned.cache.manifest(report.kind, report.shard_id)
    return _videos_with(planned, report.kind, table)


def _videos_with(planned: EncodePlan, kind: str, entries: pa.Table) -> dict[Clip, str]:
    """The first error of each video, or clip, whose samples use an entry that has one."""
    samples, wanted = planned.survey.samples, planned.survey.wanted
    bad = entries.filter(pc.is_valid(entries["error"]))
    if kind == "hint":
        samples = hint_rows(samples).append_column("hint_key", flat_hints(samples, "hint_keys"))
    ours = samples.filter(pc.is_in(samples[f"{kind}_key"], value_set=bad["key"]))
    clips = wanted.take(pc.index_in(ours["latents_key"], value_set=wanted["key"])).select(["clip_start", "clip_end"])
    errors = dict(zip(bad["key"].to_pylist(), bad["error"].to_pylist(), strict=True))
    found: dict[Clip, str] = {}
    for sample, clip in zip(ours.to_pylist(), clips.to_pylist(), strict=True):
        found.setdefault((sample["source"], clip["clip_start"], clip["clip_end"]), errors[sample[f"{kind}_key"]])
    return found


def _where_videos_are(plan: Plan, wanted: pa.Table) -> Plan:
    """The plan with each video's path of today: it may have been made before the videos were moved."""
    rows = pc.index_in(plan.table["key"], value_set=wanted["key"])
    column = plan.table.schema.get_field_index("source")
    return replace(plan, table=plan.table.set_column(column, PLAN.field("source"), wanted["source"].take(rows)))


def _existing(url: str) -> Cache | None:
    """Open the cache if there is one; a dry run makes nothing."""
    try:
        store = Store(url)
    except UsageError:
        return None
    return Cache(url) if store.exists("format.json") else None


def _count(table: pa.Table, kinds: tuple[Kind, ...]) -> dict[str, int]:
    found = table["kind"].to_pylist()
    return {kind: found.count(kind) for kind in kinds}
