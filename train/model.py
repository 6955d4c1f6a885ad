"""The transformer as it trains: loaded, adapted, and placed; and what it will cost, without loading it."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, get_args

import torch

from manifests.config import ModelConfig
from manifests.errors import LatentlineError, UsageError
from manifests.family import find_family
from manifests.snapshot import Snapshot
from train.activation import (
    KEPT_VALUES,
    LEVELS,
    OUTSIDE_VALUES,
    POLICY_LEVELS,
    WORKING_VALUES,
    Level,
    MemoryPlan,
    estimate,
    measured_plan,
    set_levels,
)
from train.attention import Kernel, choose_kernel, use_kernel
from train.config import TrainConfig
from train.context_parallel import MOST_RANKS, sharing
from train.fp8 import check_device, quantise_base
from train.hints import check_hints, has_image_contexts
from train.methods import (
    apply_methods,
    bytes_per_trained,
    computing,
    count_weights,
    describe_methods,
    trains_base,
)
from train.metrics import check_trackers
from train.parallel import Ranks, choose_mode, from_main, least, num_shards, place
from train.schedule import milestones

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Built:
    """The transformer on its device, the attention kernel it runs, and what its activations were planned to take.

    flops_per_sample: model FLOP of a step (`train.flops`), the mean over the snapshot's samples. methods: what trains,
    for people. limit: bytes of the device that the run may use. halves: whether twice the ranks can share each sample.
    """

    transformer: torch.nn.Module
    kernel: Kernel
    plan: MemoryPlan
    flops_per_sample: float
    methods: str
    limit: int
    halves: bool

    def describe(self) -> str:
        return f"{self.methods}\nattention: {self.kernel}; {self.plan.describe()}"

    def out_of_memory(self, config: TrainConfig) -> str:
        """Say which three settings would fit, and what they are predicted to take."""
        least = replace(self.plan, levels=LEVELS[:1] * len(self.plan.levels))
        static, activations = least.resident, least.peak - least.resident
        ranks = 2 * config.context_parallel
        options = {"train.activation=full": 1.0}
        if config.micro_batch_size > 1:
            options["train.micro_batch_size=1"] = 1 / config.micro_batch_size
        if self.halves:
            options[f"train.context_parallel={ranks} on {ranks} GPUs a sample"] = 0.5
        options["encode.num_frames halved"] = 0.5
        options["encode.height and encode.width halved"] = 0.25
        if self.plan.levels == least.levels:
            del options["train.activation=full"]
        sizes = {text: static + int(activations * share) for text, share in options.items()}
        fitting = [text for text, size in sizes.items() if size <= self.limit][:3]
        told = "; ".join(f"{text} (predicted {sizes[text] / 2**30:.1f} GiB)" for text in fitting)
        if not fitting:
            told = f"nothing; the weights take {static / 2**30:.1f} GiB, train.parallel=shard divides them by the GPUs"
        elif len(fitting) > 1 or "train.activation=full" not in fitting:
            told += "; each with train.activation=full"
        return f"out of GPU memory with {self.plan.describe()}, {self.limit / 2**30:.1f} GiB usable; would fit: {told}"


def build(model: ModelConfig, config: TrainConfig, family: ModuleType, ranks: Ranks, snapshot: Snapshot) -> Built:
    """Load the base, apply the methods (equal on every rank), plan its memory, put it on this rank's device."""
    dtype = DTYPES[config.dtype]
    if config.base_linears == "fp8":
        check_device(ranks.device)
    projected = family.is_projected(snapshot)
    transformer = family.load_transformer(model, torch.float32 if trains_base(config) else dtype, projected=projected)
    apply_methods(transformer, config, family)
    _compute_frozen_in(transformer, dtype)
    weights = count_weights(transformer)
    base_bytes = weights.frozen_bytes(dtype.itemsize) + weights.base * (bytes_per_trained(config) + dtype.itemsize)
    mode = choose_mode(config.parallel, ranks, base_bytes)
    if config.base_linears == "fp8":
        _check_whole(mode)
        quantise_base(family.blocks(transformer), family.TOKEN_LINEARS, ranks.device)
    shape = max(snapshot.shapes, key=lambda shape: family.num_tokens(transformer, shape))
    kernels = get_args(Kernel)
    measured = choose_kernel(family.attention_shape(transformer, shape), dtype, ranks.device)
    kernel = kernels[from_main(kernels.index(measured), ranks)]
    shards = num_shards(mode, ranks)
    resident = weights.frozen_bytes(dtype.itemsize) // shards
    resident += weights.trained_bytes(config, dtype.itemsize, shards=shards)
    with use_kernel(kernel), sharing(ranks.context), computing(config, dtype, ranks.device):
        plan = _plan_memory(config, family, transformer, ranks.device, shape, resident, snapshot)
    # Ranks that share a sample meet in collectives, also in what is computed again: they must keep the same.
    levels = least([LEVELS.index(level) for level in plan.levels], ranks)
    plan = replace(plan, levels=tuple(LEVELS[index] for index in levels))
    flops = _mean_flops(family, transformer, snapshot)
    blocks = family.blocks(transformer)
    set_levels(blocks, plan.levels, compiled=ranks.device.type == "cuda")
    methods = describe_methods(config, transformer, projected=projected)
    place(transformer, blocks, mode, ranks, dtype)
    tokens = [family.num_tokens(transformer, shape) for shape in snapshot.shapes]
    halves = 2 * config.context_parallel <= MOST_RANKS and not any(n % (2 * config.context_parallel) for n in tokens)
    return Built(transformer.train(), kernel, plan, flops, methods, _usable_bytes(config, ranks.device), halves)


def _usable_bytes(config: TrainConfig, device: torch.device) -> int:
    """What the run may fill: as told, or 92% of the device, or of the part of it this process is held to."""
    if config.memory_limit_gib:
        return int(config.memory_limit_gib * 2**30)
    if device.type != "cuda":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = torch.cuda.get_device_properties(device).total_memory
    return int(0.92 * total * torch.cuda.get_per_process_memory_fraction(device))


def _compute_frozen_in(transformer: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in transformer.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _check_whole(mode: str) -> None:
    if mode in ("shard", "hybrid"):
        raise UsageError(
            f"train.base_linears = fp8 keeps the base whole on each rank, and train.parallel is {mode}; "
            "set that to replicate, or base_linears to dtype"
        )


def _check_base_linears(config: TrainConfig) -> None:
    if config.base_linears == "dtype":
        return
    _check_whole(config.parallel)
    if trains_base(config):
        raise UsageError(
            "train.base_linears = fp8 is for a frozen base, and weights of the base train here; set it to dtype, or "
            "leave out train.method = full and train.trainable"
        )
    if config.dtype != "bfloat16":
        raise UsageError(f"train.base_linears = fp8 goes with train.dtype = bfloat16, not {config.dtype}")


def _copy_formula(trained_base: int, itemsize: int) -> str:
    return f"+ trainable base x {itemsize} (a copy to compute with) " if trained_base and itemsize < 4 else ""


def _mean_flops(family: ModuleType, transformer: torch.nn.Module, snapshot: Snapshot) -> float:
    length = snapshot.fingerprints["context"]["length"]
    total = sum(count * family.flops_per_sample(transformer, shape, length) for shape, count in snapshot.shapes.items())
    return total / snapshot.num_samples


def _plan_memory(
    config: TrainConfig,
    family: ModuleType,
    transformer: torch.nn.Module,
    device: torch.device,
    shape: tuple[int, ...],
    resident: int,
    snapshot: Snapshot,
) -> MemoryPlan:
    num_blocks = len(family.blocks(transformer))
    if config.activation == "auto" and device.type == "cuda":
        # The second block: the first one's input needs no gradient.
        block = copy.deepcopy(family.blocks(transformer)[1]).to(device).train()
        length = snapshot.fingerprints["context"]["length"]
        given = {"image_context": True} if has_image_contexts(snapshot) else {}
        inputs = family.block_inputs(transformer, (config.micro_batch_size, *shape), length, device, **given)
        try:
            limit = _usable_bytes(config, device)
            together = config.context_parallel > 1
            return measured_plan(block, inputs, num_blocks=num_blocks, resident=resident, limit=limit, every=together)
        except torch.OutOfMemoryError as error:
            raise LatentlineError(
                f"out of GPU memory with one block of the model alone, for latents of {'x'.join(map(str, shape))}; "
                "encode smaller or fewer frames, or share samples with train.context_parallel"
            ) from error
    level: Level = "none" if config.activation == "auto" else POLICY_LEVELS[config.activation]
    return estimate(
        level,
        num_blocks=num_blocks,
        resident=resident,
        tokens=family.num_tokens(transformer, shape) * config.micro_batch_size // config.context_parallel,
        hidden_size=family.hidden_size(transformer),
        itemsize=DTYPES[config.dtype].itemsize,
    )


def describe(model: ModelConfig, config: TrainConfig, snapshot: Snapshot) -> dict[str, Any]:
    """Return what a run would be, for `--dry-run`, after the checks a run begins with.

    method: what trains, in words. parameters, trainable_parameters: counts. tokens_per_sample: by latent shape
    "CxTxHxW". samples, epochs. lr: effective learning rate by 0-based step. memory: bytes on one unsharded rank, by
    part, with the formula.
    The model is built without weights, so this takes no time and no memory.
    """
    check(model, config, snapshot)
    family = find_family("train", model)
    transformer = family.empty_transformer(model, projected=family.is_projected(snapshot))
    apply_methods(transformer, config, family)
    weights = count_weights(transformer)
    tokens = {shape: family.num_tokens(transformer, shape) for shape in snapshot.shapes}
    itemsize = DTYPES[config.dtype].itemsize
    base, trained = weights.frozen_bytes(itemsize), weights.trained_bytes(config, itemsize)
    level: Level = "attention" if config.activation == "auto" else POLICY_LEVELS[config.activation]
    plan = estimate(
        level,
        num_blocks=len(family.blocks(transformer)),
        resident=base + trained,
        tokens=max(tokens.values()) * config.micro_batch_size // config.context_parallel,
        hidden_size=family.hidden_size(transformer),
        itemsize=itemsize,
    )
    return {
        "method": describe_methods(config, transformer, projected=family.is_projected(snapshot)),
        "parameters": weights.total,
        "trainable_parameters": weights.trained,
        "samples": snapshot.num_samples,
        "steps": config.steps,
        "epochs": config.steps * config.batch_size / snapshot.num_samples,
        "tflop_per_sample": _mean_flops(family, transformer, snapshot) / 1e12,
        "tokens_per_sample": {"x".join(map(str, shape)): count for shape, count in tokens.items()},
        "lr": milestones(config),
        "memory": {
            "base": base,
            "trained": trained,
            "activations": plan.peak - base - trained,
            "total": plan.peak,
            "formula": (
                f"frozen parameters x {itemsize} + trainable x {bytes_per_trained(config)} (weight, gradient, two "
                f"moments{', average' if config.ema.kind != 'none' else ''}) "
                f"{_copy_formula(weights.base, itemsize)}+ tokens x micro-batch x hidden x {itemsize} x (blocks x "
                f"{KEPT_VALUES[level]:g} + {WORKING_VALUES[level] + OUTSIDE_VALUES:g}), activation level {level!r}"
            ),
        },
    }


def check(model: ModelConfig, config: TrainConfig, snapshot: Snapshot) -> None:
    """Raise `UsageError` unless model, settings and snapshot fit each other; nothing is loaded or written."""
    family = find_family("train", model)
    check_trackers(config.track)
    _check_base_linears(config)
    family.check_snapshot(snapshot, model)
    family.check_objective(config.objective, snapshot.shapes)
    family.check_context_parallel(config.context_parallel, model, snapshot.shapes)
    check_hints(config, snapshot, family)
