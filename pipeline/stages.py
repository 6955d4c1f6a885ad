"""Training and inference as the command line runs them: a recipe in, a result to print out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.config import AdapterConfig, InferConfig
from manifests.cache import Cache
from manifests.errors import EXIT_DONE, EXIT_FAILURE, EXIT_QUARANTINED, UsageError
from manifests.family import find_family
from manifests.local_cache import CachedStore
from manifests.order import order_of
from manifests.snapshot import Snapshot, load_snapshot
from manifests.store import Store
from pipeline.recipe import Recipe, write_resolved
from pipeline.report import quiet_libraries

if TYPE_CHECKING:
    from infer.results import Result


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
    from train.lock import only_writer
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
    with only_writer(Path(recipe.train.output)):
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


def _train_dry_run(described: dict[str, Any]) -> dict[str, Any]:
    memory = dict(described.pop("memory"))
    formula = memory.pop("formula")
    return {**described, "memory_bytes": memory, "memory_formula": formula}


def _adapter_name(index: int) -> str:
    return "default" if index == 0 else f"adapter_{index}"
