"""Ranks: who they are, how samples and weights lie on them, and the few values they exchange.

The ranks, in order, are a mesh of replicate x shard x context. `context` neighbours share a sample, token by token
(`train.context_parallel`); all others see different samples. The frozen base is whole on every rank, or split over
shard x context and repeated over `replicate`. Adapters are whole on every rank in every mode, so their gradients are
summed here, once a step, in float32; weights of the base that train are split with the base, and FSDP sums their
gradients, in float32 as well. Losses are weighted by samples before they are summed: the number of ranks, what
they share and the size of micro-batches do not enter the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from manifests.errors import LatentlineError, Preempted, UsageError
from train.context_parallel import Context
from train.trained import is_added

Mode = Literal["replicate", "shard", "hybrid"]

# Rank 0 may make sample videos between steps while the others wait in their next collective.
_TIMEOUT = timedelta(hours=2)

_PIECE_VALUES = 2**26
"""Values of a gradient that are added up at once, and copied for it: 256 MiB."""


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    rank, world: over all processes. data_rank, data_world: over the groups that see different samples. device: where
    this rank computes. local_world: processes of this machine. context: the ranks that share this rank's samples,
    None if it has them to itself.
    """

    rank: int
    world: int
    data_rank: int
    data_world: int
    device: torch.device
    local_world: int = 1
    context: Context | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def reports_losses(self) -> bool:
        """One rank of those that share a sample does."""
        return self.context is None or self.context.rank == 0


@contextmanager
def join(context_parallel: int = 1) -> Iterator[Ranks]:
    """Be one of the ranks torchrun describes in the environment, or the only one.

    Uses NCCL and one GPU a local rank where there are GPUs, gloo on the CPU otherwise. A process group that
    exists is used as it is; one made here is left at the end and after `Preempted`, but not after another
    error: the other ranks may be waiting in a collective, and it is for whoever started them to end them. Raises
    `UsageError` if there are more local ranks than GPUs, or `context_parallel` does not divide the ranks;
    `LatentlineError` when another rank has gone.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world % context_parallel:
        raise UsageError(
            f"train.context_parallel: {context_parallel} ranks a sample do not divide {world} "
            f"rank{'s' if world > 1 else ''}; start a multiple of {context_parallel}, or change it"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun --nproc-per-node: local rank {local_rank} has no GPU, "
                f"this machine has {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    owned = world > 1 and not dist.is_initialized()
    try:
        if owned and device.type == "cuda":
            dist.init_process_group("nccl", timeout=_TIMEOUT, device_id=device)
        elif owned:
            dist.init_process_group("gloo", timeout=_TIMEOUT)
        yield Ranks(
            rank,
            world,
            data_rank=rank // context_parallel,
            data_world=world // context_parallel,
            device=device,
            local_world=int(os.environ.get("LOCAL_WORLD_SIZE", str(world))),
            context=_context(device, world, context_parallel),
        )
    except Preempted:
        if owned:
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if world > 1 and _is_lost_peer(error):
            raise LatentlineError("another rank has ended; its own error says why") from error
        raise
    if owned:
        dist.destroy_process_group()


def _context(device: torch.device, world: int, context_parallel: int) -> Context | None:
    if context_parallel == 1:
        return None
    mesh = init_device_mesh(
        device.type, (world // context_parallel, context_parallel), mesh_dim_names=("data", "context")
    )
    return Context(mesh.get_local_rank("context"), context_parallel, mesh.get_group("context").group_name)


def _is_lost_peer(error: RuntimeError) -> bool:
    """Gloo raises plain RuntimeErrors; NCCL waits instead, and the rank is ended from outside."""
    return "gloo" in str(error) and ("closed by peer" in str(error) or "reset by peer" in str(error))


def choose_mode(mode: Literal["auto", "replicate", "shard", "hybrid"], ranks: Ranks, base_bytes: int) -> Mode:
    """Resolve `auto`: replicate a base that leaves half of a GPU free; else shard it, inside machines if that will do.

    A machine's GPUs gather weights from each other an order of magnitude faster than from another machine's.
    """
    if mode != "auto":
        return mode
    if ranks.world == 1 or ranks.device.type != "cuda":
        return "replicate"
    half = torch.cuda.get_device_properties(ranks.device).total_memory / 2
    if base_bytes <= half:
        return "replicate"
    inside = 1 < ranks.local_world < ranks.world and base_bytes / ranks.local_world <= half
    return "hybrid" if inside else "shard"


def num_shards(mode: Mode, ranks: Ranks) -> int:
    """Return how many ranks split one copy of the base."""
    if mode == "hybrid" and ranks.world % ranks.local_world:
        raise UsageError(
            f"train.parallel=hybrid: {ranks.world} ranks are not whole machines of {ranks.local_world}; "
            "start as many on each, or use shard"
        )
    return {"replicate": 1, "shard": ranks.world, "hybrid": ranks.local_world}[mode]


def place(
    transformer: torch.nn.Module, blocks: Iterable[torch.nn.Module], mode: Mode, ranks: Ranks, dtype: torch.dtype
) -> None:
    """Move the transformer from the CPU to where it trains.

    shard, hybrid: FSDP2 splits the base's weights over the ranks, or over each machine's, block by block, so that a
    GPU never holds more than its share and one block; those that train are float32 there and gathered in `dtype`.
    Adapters stay whole, outside FSDP.
    """
    if num_shards(mode, ranks) == 1:
        transformer.to(ranks.device)
        return
    mesh = _weights_mesh(mode, ranks)
    whole = {parameter for name, parameter in transformer.named_parameters() if is_added(name)}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, transformer):
        # Resharded after each forward pass: weights may change between two without a backward pass (validation).
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # losses are weighted already: gradients add up
        module.set_force_sum_reduction_for_comms(True)
    for parameter in whole:
        parameter.data = parameter.data.to(ranks.device)


def _weights_mesh(mode: Mode, ranks: Ranks) -> DeviceMesh:
    shards = num_shards(mode, ranks)
    if shards == ranks.world:
        return init_device_mesh(ranks.device.type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(ranks.device.type, (ranks.world // shards, shards), mesh_dim_names=("replicate", "shard"))


def sum_gradients(parameters: Iterable[torch.nn.Parameter], ranks: Ranks) -> None:
    """Add up the gradients of all ranks, in place, in float32 pieces; every rank enters with all of them.

    Parameters that FSDP splits are left out: it has added theirs up.
    """
    if ranks.world == 1:
        return
    piece: list[torch.Tensor] = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        assert parameter.grad is not None
        piece.append(parameter.grad)
        if sum(gradient.numel() for gradient in piece) >= _PIECE_VALUES:
            _sum_flat(piece)
            piece = []
    if piece:
        _sum_flat(piece)


def _sum_flat(gradients: Sequence[torch.Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: Sequence[torch.nn.Parameter], limit: float) -> float:
    """Scale the gradients, summed before, so that their norm over all parameters is at most `limit`; return the norm.

    All ranks that split parameters must enter; the norm is the same on each.
    """
    groups = by_layout(parameters)
    norms = []
    for group in groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, limit, total)
    return float(total)


def by_layout(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Whole parameters, and those FSDP splits, apart: what computes on many tensors at once takes one kind only."""
    groups: dict[bool, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return [groups[kind] for kind in sorted(groups)]


def sum_over_ranks(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Add up a tensor of all ranks, in place, and return it."""
    if ranks.world > 1:
        dist.all_reduce(values)
    return values


def from_main(value: int, ranks: Ranks) -> int:
    """Return rank 0's value on every rank."""
    tensor = torch.tensor(value if ranks.is_main else 0, device=ranks.device, dtype=torch.int64)
    return int(sum_over_ranks(tensor, ranks))


def least(values: Sequence[int], ranks: Ranks) -> list[int]:
    """Return the smallest of all ranks' values, place by place."""
    tensor = torch.tensor(values, device=ranks.device, dtype=torch.int64)
    if ranks.world > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor.tolist()


def barrier(ranks: Ranks) -> None:
    """Wait for all ranks."""
    if ranks.world > 1:
        dist.barrier()
