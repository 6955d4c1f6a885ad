"""Each stage as the command line runs it: a recipe in, a result to print out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import TaskID

from encode.job import EncodePlan, finish_encode, plan_encode, run_encode
from encode.naming import Clip
from encode.stopping import Stop, stop_on_signal
from encode.throughput import throughput
from infer.config import AdapterConfig, InferConfig
from manifests.cache import Cache
from manifests.errors import EXIT_DONE, EXIT_FAILURE, EXIT_QUARANTINED, UsageError
from manifests.family import find_family
from manifests.local_cache import CachedStore
from manifests.order import order_of
from manifests.schema import TASK_KINDS
from manifests.snapshot import Snapshot, load_snapshot
from manifests.store import Store
from pipeline.array import array_expression, array_tasks, missing_tasks, plan_array
from pipeline.recipe import Recipe, resolved, write_resolved
from pipeline.report import human_bytes, log, progress_bar, quiet_downloads, quiet_libraries, track
from pipeline.sample_table import show_samples

if TYPE_CHECKING:
    from encode.worker import ShardReport
    from infer.results import Result

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
        total = array_tasks(planned) if total is None else total
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


def train_stage(
    recipe: Recipe, *, dry_run: bool = False, profile: bool = False, push_to: str | None = None
) -> dict[str, Any]:
    """Train on the recipe's snapshot, or with `dry_run` describe what would be trained. Nothing is written before
    model and snapshot are known to fit. The adapter's folder becomes a whole Hugging Face model, uploaded if
    `push_to` names a repository."""
    from pipeline.control import write_control
    from pipeline.model_card import write_model_folder
    from pipeline.push import check_push, push
    from pipeline.samples import SampleVideos
    from train.model import check, describe
    from train.trainer import train
    from train.validate import split

    quiet_libraries()
    if push_to is not None:
        check_push(push_to)
    is_main = int(os.environ.get("RANK", "0")) == 0
    store = Cache(recipe.encode.cache).store
    snapshot = load_snapshot(store, recipe.train.snapshot or recipe.encode.snapshot)
    mixture = recipe.data.mixture
    training, held_out = split(snapshot, recipe.train.validation, store)
    order_of(training, recipe.train.seed, mixture)
    if dry_run:
        described = _train_dry_run(describe(recipe.model, recipe.train, training))
        return {**described, "held_out": 0 if held_out is None else held_out.num_samples}
    check(recipe.model, recipe.train, training)
    make_samples = None
    if recipe.train.samples.every:
        make_samples = SampleVideos(recipe, held_out or training, store)
    store = prepare_output(recipe, snapshot, store)
    result = train(
        recipe.model, recipe.train, snapshot, store, mixture=mixture, make_samples=make_samples, profile=profile
    )
    told = {**asdict(result), "snapshot": snapshot.hash}
    if is_main:
        told |= write_control(recipe, training)
        folder = write_model_folder(recipe, Path(recipe.train.output), repo_id=push_to)
        if push_to is not None:
            told["pushed"] = push(folder, push_to)
    return told


def prepare_output(recipe: Recipe, snapshot: Snapshot, store: Store) -> Store:
    """Write the recipe and the facts about the data beside the run, and return the store to train from."""
    from pipeline.run_facts import write_dataset_facts

    if int(os.environ.get("RANK", "0")) == 0:
        write_resolved(recipe, Path(recipe.train.output))
        write_dataset_facts(snapshot, recipe.model, Path(recipe.train.output))
    if recipe.train.local_cache is not None:
        return CachedStore(store.url, recipe.train.local_cache, int(recipe.train.local_cache_gb * 1e9))
    return store


def infer_stage(
    recipe: Recipe,
    inputs: str | None,
    *,
    adapters: Sequence[str] | None = None,
    guardrail: bool = True,
    force: bool = False,
    dry_run: bool = False,
) -> tuple[dict[str, Any], int]:
    """Generate the videos of `inputs`, or of `infer.inputs`; `adapters` replace the recipe's.

    Returns the result and the exit code: 3 if some requests failed, 1 if all did. With `dry_run`, say what the videos
    would be after the checks that need no model. Nothing is written before all that can be checked is.
    """
    from infer.adapters import check_adapters
    from infer.generate import check_controls, check_requests, generate
    from infer.inputs import read_requests

    quiet_libraries()
    config = replace(recipe.infer, inputs=inputs or recipe.infer.inputs)
    if adapters:
        config = replace(config, adapters={_adapter_name(i): AdapterConfig(path=p) for i, p in enumerate(adapters)})
    if config.inputs is None:
        raise UsageError(
            "infer has no inputs: give a prompt, a folder, a .json, .jsonl or .yaml file, or set infer.inputs"
        )
    requests = read_requests(config.inputs, config, getattr(find_family("infer", recipe.model), "parse_entry", None))
    check_requests(recipe.model, requests)
    check_controls(recipe.model, config, requests)
    check_adapters(config.adapters, fuse=config.fuse)
    if dry_run:
        paths = {name: adapter.path for name, adapter in config.adapters.items()}
        videos = [asdict(request) for request in requests]
        return {"output": config.output, "adapters": paths, "videos": videos}, EXIT_DONE
    results = generate(
        recipe.model,
        config,
        requests,
        guardrail=guardrail,
        force=force,
        on_ready=lambda: write_resolved(replace(recipe, infer=config), Path(config.output)),
        accelerate_vae=find_family("encode", recipe.model).models().accelerate_vae,
    )
    return _infer_result(config, results)


def _infer_result(config: InferConfig, results: Sequence[Result]) -> tuple[dict[str, Any], int]:
    failed = [f"{result.request.name}: {result.error}" for result in results if result.error is not None]
    kept = sum(result.status == "kept" for result in results)
    summary: dict[str, Any] = {"output": config.output}
    scored = [result for result in results if result.ssim is not None]
    if scored:
        summary["scores"] = {r.request.name: {"psnr_db": r.psnr, "ssim": r.ssim} for r in scored}
        known = [r.psnr for r in scored if r.psnr is not None]
        summary["mean_psnr_db"] = sum(known) / len(known) if known else None
        summary["mean_ssim"] = sum(r.ssim or 0.0 for r in scored) / len(scored)
    summary |= {"kept": kept, "failed": failed}
    summary["videos"] = [result.video for result in results if result.video is not None]
    code = EXIT_DONE if not failed else EXIT_QUARANTINED if summary["videos"] else EXIT_FAILURE
    return summary, code


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


def _train_dry_run(described: dict[str, Any]) -> dict[str, Any]:
    memory = dict(described.pop("memory"))
    formula = memory.pop("formula")
    return {**described, "memory_bytes": memory, "memory_formula": formula}


def _still_missing(planned: EncodePlan) -> int:
    from manifests.plan import missing_entries

    return len(missing_entries(planned.cache, planned.survey.wanted))


def _adapter_name(index: int) -> str:
    return "default" if index == 0 else f"adapter_{index}"
