"""The transformer as it trains: loaded, adapted, and placed; and what it will cost, without loading it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, get_args

import torch

from manifests.config import ModelConfig
from manifests.family import find_family
from manifests.snapshot import Snapshot
from train.activation import (
    KEPT_VALUES,
    LEVELS,
    POLICY_LEVELS,
    WORKING_VALUES,
    Level,
    MemoryPlan,
    choose_levels,
    estimate,
    measure,
    set_levels,
)
from train.attention import Kernel, choose_kernel, use_kernel
from train.config import TrainConfig
from train.context_parallel import sharing
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
    for people.
    """

    transformer: torch.nn.Module
    kernel: Kernel
    plan: MemoryPlan
    flops_per_sample: float
    methods: str

    def describe(self) -> str:
        return f"{self.methods}\nattention: {self.kernel}; {self.plan.describe()}"

    def out_of_memory(self, config: TrainConfig) -> str:
        """Say which settings would fit, and what they are predicted to take."""
        plan, num_blocks = self.plan, len(self.plan.levels)
        static = plan.resident
        smallest = static + num_blocks * plan.kept["full"] + plan.working
        activations = smallest - static
        options = [f"train.activation=full (predicted {smallest / 2**30:.1f} GiB)"]
        if config.micro_batch_size > 1:
            single = static + activations // config.micro_batch_size
            options.append(f"train.micro_batch_size=1 with it ({single / 2**30:.1f} GiB)")
        options.append(f"encode.num_frames halved with it ({(static + activations // 2) / 2**30:.1f} GiB)")
        options.append("train.parallel=shard under torchrun, which divides the weights by the ranks")
        return f"out of GPU memory with {plan.describe()}; what would fit: {'; '.join(options[:3])}"


def build(model: ModelConfig, config: TrainConfig, family: ModuleType, ranks: Ranks, snapshot: Snapshot) -> Built:
    """Load the base, apply the methods (equal on every rank), plan its memory, put it on this rank's device."""
    dtype = DTYPES[config.dtype]
    projected = family.is_projected(snapshot)
    transformer = family.load_transformer(model, torch.float32 if trains_base(config) else dtype, projected=projected)
    apply_methods(transformer, config, family)
    _compute_frozen_in(transformer, dtype)
    weights = count_weights(transformer)
    base_bytes = weights.frozen_bytes(dtype.itemsize) + weights.base * (bytes_per_trained(config) + dtype.itemsize)
    mode = choose_mode(config.parallel, ranks, base_bytes)
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
    return Built(transformer.train(), kernel, plan, flops, methods)


def _compute_frozen_in(transformer: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in transformer.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


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
        inputs = family.block_inputs(
            transformer, (config.micro_batch_size, *shape), snapshot.fingerprints["context"]["length"], device
        )
        kept, working = measure(block, inputs, LEVELS)
        limit = config.memory_limit_gib
        allowed = int(limit * 2**30) if limit else int(0.92 * torch.cuda.get_device_properties(device).total_memory)
        return choose_levels(num_blocks, resident=resident, kept=kept, working=working, limit=allowed)
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
            "activations": plan.peak - plan.resident,
            "total": plan.peak,
            "formula": (
                f"frozen parameters x {itemsize} + trainable x {bytes_per_trained(config)} (weight, gradient, two "
                f"moments{', average' if config.ema.kind != 'none' else ''}) "
                f"{_copy_formula(weights.base, itemsize)}+ tokens x micro-batch x hidden x {itemsize} x (blocks x "
                f"{KEPT_VALUES[level]:g} + {WORKING_VALUES:g}), activation level {level!r}"
            ),
        },
    }


def check(model: ModelConfig, config: TrainConfig, snapshot: Snapshot) -> None:
    """Raise `UsageError` unless model, settings and snapshot fit each other; nothing is loaded or written."""
    family = find_family("train", model)
    check_trackers(config.track)
    family.check_snapshot(snapshot, model)
    family.check_objective(config.objective, snapshot.shapes)
    family.check_context_parallel(config.context_parallel, model, snapshot.shapes)
