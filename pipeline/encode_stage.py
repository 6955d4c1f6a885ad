"""Stage 1 as the command line runs it: plan, encode, snapshot; or plan for an array, or say what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import TaskID

from encode.job import EncodePlan, finish_encode, plan_encode, run_encode
from encode.naming import Clip
from encode.stopping import Stop, stop_on_signal
from encode.throughput import throughput
from manifests.errors import EXIT_DONE, EXIT_QUARANTINED, UsageError
from manifests.plan import missing_entries
from manifests.schema import TASK_KINDS
from pipeline.array import array_expression, array_tasks, missing_tasks, plan_array
from pipeline.recipe import Recipe, resolved
from pipeline.report import human_bytes, log, progress_bar, quiet_downloads, quiet_libraries, track
from pipeline.sample_table import show_samples

if TYPE_CHECKING:
    from encode.worker import ShardReport

_SHOWN_ERRORS = 5


def encode_stage(
    recipe: Recipe,
    *,
    index: int = 0,
    total: int | None = 1,
    dry_run: bool = False,
    retry_quarantined: bool = False,
) -> tuple[dict[str, Any], int]:
    """Plan, encode, snapshot. Returns the result and the exit code (0, or 3 if inputs are quarantined).

    index, total: which array task this is; total None: of as many as the job was planned for. The task that finds
    nothing missing at its end freezes the snapshot. Raises `Preempted` after SIGTERM, SIGUSR1 or SIGINT.
    """
    with stop_on_signal() as stop:
        planned = plan_stage(recipe, stop, create=not dry_run, retry_quarantined=retry_quarantined)
        if dry_run:
            show_samples(planned.survey.samples, recipe.encode)
            return _dry_run(planned), EXIT_DONE
        for line in _left_out_lines(planned):
            log(line)
        log(_plan_line(planned))
        if total is None:  # a task that comes when all is done has nothing to do, whatever its number
            index, total = (index, array_tasks(planned)) if planned.plan.num_entries else (0, 1)
        if index >= total:
            raise UsageError(f"--task {index}: the job was planned for the tasks 0 to {total - 1}")
        reports = _run_with_progress(recipe, planned, index, total, stop)
    if total > 1 and (missing := _still_missing(planned)):
        log(f"task {index} of {total} is done; {missing} entries are left to the other tasks")
        return {"cache": recipe.encode.cache, "task": f"{index}/{total}", "entries_missing": missing}, EXIT_DONE
    result = finish_encode(recipe.encode, planned, reports)
    for line in _failure_lines(result.quarantined)[:_SHOWN_ERRORS]:
        log(f"quarantined: {line}")
    if len(result.quarantined) > _SHOWN_ERRORS:
        log(f"quarantined: {len(result.quarantined) - _SHOWN_ERRORS} more")
    if result.truncated:
        log(f"{result.truncated} captions are longer than encode.text_length and were cut")
    summary = {
        "cache": recipe.encode.cache,
        "snapshot": result.snapshot.hash,
        "name": recipe.encode.snapshot,
        "samples": result.counts.samples,
        "encoded": result.encoded,
        "reused": {kind: planned.wanted[kind] - planned.missing[kind] for kind in planned.kinds},
        "left_out": planned.survey.left_out,
        "quarantined_videos": len(result.quarantined),
        "duplicate_samples": result.counts.duplicates,
        "truncated_captions": result.truncated,
        **throughput(reports),
    }
    return summary, EXIT_QUARANTINED if result.quarantined else EXIT_DONE


def plan_stage(recipe: Recipe, stop: Stop, *, create: bool, retry_quarantined: bool = False) -> EncodePlan:
    """Look at the videos and plan what is missing; `stop` may end it between two videos."""
    quiet_downloads()

    def watched(items: Iterable[Any], total: int) -> Iterator[Any]:
        for item in track("reading videos")(items, total):
            stop.check()
            yield item

    return plan_encode(
        recipe.model,
        recipe.data,
        recipe.encode,
        resolved(recipe),
        create=create,
        retry_quarantined=retry_quarantined,
        track=watched,
    )


def array_stage(recipe: Recipe, *, tasks: int | None, retry_quarantined: bool = False) -> dict[str, Any]:
    """Plan a job for an array of `tasks`; with None, say which tasks of the array it was planned for have work left."""
    with stop_on_signal() as stop:
        planned = plan_stage(recipe, stop, create=True, retry_quarantined=retry_quarantined)
    if not planned.plan.num_entries:
        log("nothing is missing; `latentline encode` freezes the snapshot if there is none yet")
    if tasks is not None:
        return plan_array(planned, tasks)
    return {
        "cache": recipe.encode.cache,
        "entries_missing": planned.missing,
        "shards": planned.num_shards,
        "tasks": array_tasks(planned),
        "array": array_expression(missing_tasks(planned, array_tasks(planned))),
    }


def _run_with_progress(recipe: Recipe, planned: EncodePlan, index: int, total: int, stop: Stop) -> list[ShardReport]:
    if planned.plan.num_entries:
        quiet_libraries()
    with progress_bar() as progress:
        bars: dict[str, TaskID] = {
            kind: progress.add_task(f"encoding {kind}", total=planned.missing[kind], note="")
            for kind in TASK_KINDS
            if planned.missing.get(kind)
        }
        waited: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in TASK_KINDS}

        def show(report: ShardReport) -> None:
            waited[report.kind][0] += report.wait_seconds
            waited[report.kind][1] += report.seconds
            share = waited[report.kind][0] / max(1e-9, waited[report.kind][1])
            note = f"decode wait {share:.0%}" if report.kind != "context" else ""
            progress.update(bars[report.kind], advance=report.rows, note=note)
            if progress.disable:
                log(
                    f"{report.kind} {report.shard_id[-12:]}: {report.entries} entries, {human_bytes(report.bytes)}, "
                    f"{report.seconds:.1f} s{', ' + note if note else ''}"
                )

        return run_encode(recipe.model, recipe.encode, planned, index=index, total=total, stop=stop, on_report=show)


def _left_out_lines(planned: EncodePlan) -> list[str]:
    return [
        f"left out of {dataset}: {', '.join(f'{count} by {setting}' for setting, count in counts.items())}"
        for dataset, counts in planned.survey.left_out.items()
    ]


def _plan_line(planned: EncodePlan) -> str:
    if not planned.plan.num_entries:
        return "nothing to encode: every entry is in the cache"
    counts = ", ".join(f"{planned.missing[kind]} of {planned.wanted[kind]} {kind}" for kind in planned.kinds)
    return f"to encode: {counts}; {human_bytes(planned.missing_bytes)} in {planned.num_shards} shards"


def _dry_run(planned: EncodePlan) -> dict[str, Any]:
    return {
        "cache": planned.cache.url if planned.cache else None,
        "videos": planned.survey.num_items,
        "windows": planned.survey.num_windows,
        "left_out": planned.survey.left_out,
        "entries_wanted": planned.wanted,
        "entries_present": {kind: planned.wanted[kind] - planned.missing[kind] for kind in planned.kinds},
        "entries_missing": planned.missing,
        "entry_bytes": planned.entry_bytes,
        "missing_bytes": planned.missing_bytes,
        "shards": planned.num_shards,
        "unusable_videos": _failure_lines(planned.survey.failed),
    }


def _failure_lines(failed: Mapping[Clip, str]) -> list[str]:
    lines = []
    for (video, start, end), error in failed.items():
        clip = "" if start is None else f" from {start:g} s" + ("" if end is None else f" to {end:g} s")
        lines.append(f"{video}{clip}: {error}")
    return lines


def _still_missing(planned: EncodePlan) -> int:
    return len(missing_entries(planned.cache, planned.survey.wanted))
