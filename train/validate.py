"""Validation: the loss on held-out samples, at fixed quantiles of sigma, with a caption and noise that are
functions of the sample.

Two runs of one objective measure the same thing whatever their method, seed, steps or ranks, so their numbers compare.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch

from manifests.errors import LatentlineError, UsageError
from manifests.mixture import Mixture
from manifests.shards import read_tensors
from manifests.snapshot import Snapshot, load_snapshot
from manifests.store import Store
from manifests.subset import hold_out
from train.config import TrainConfig, ValidationConfig
from train.context_parallel import sharing
from train.hints import HintReader
from train.methods import computing
from train.parallel import Ranks, sum_over_ranks

# The seed of all validation noise; training seeds are the user's.
_SEED = -1


def split(snapshot: Snapshot, config: ValidationConfig, store: Store) -> tuple[Snapshot, Snapshot | None]:
    """Return (what to train on, what is held out or None), as `train.validation` says.

    Raises `UsageError` for a held-out snapshot that shares a video with the one to train on, or a split that leaves
    one side empty.
    """
    if config.fraction is not None and config.snapshot is not None:
        raise UsageError("train.validation: fraction and snapshot are two ways to hold samples out; give one of them")
    if config.fraction is not None:
        try:
            return hold_out(snapshot, config.fraction)
        except UsageError as error:
            raise UsageError(f"train.validation.fraction: {error}") from error
    if config.snapshot is not None:
        held = load_snapshot(store, config.snapshot)
        check_disjoint(snapshot, held, config.snapshot)
        return snapshot, held
    if config.every:
        raise UsageError("train.validation.every: nothing is held out; set train.validation.fraction, or its snapshot")
    return snapshot, None


def check_disjoint(snapshot: Snapshot, held: Snapshot, name: str) -> None:
    """Raise `UsageError` if a held-out sample, or its video, is in the snapshot that trains."""
    for column in ("source_hash", "sample_id"):
        trained = set(snapshot.table[column].drop_null().unique().to_pylist())
        shared = [value for value in held.table[column].drop_null().unique().to_pylist() if value in trained]
        if shared:
            index = held.column(column).to_pylist().index(shared[0])
            raise UsageError(
                f"train.validation.snapshot {name!r}: {held.sample(index).source} is in the snapshot to train on too; "
                "split it with `latentline cache snapshot --split`, or use train.validation.fraction"
            )


class Validation:
    """One rank's part of the validations of a run. held_out: the samples; `train.validation.samples` of them count."""

    def __init__(self, held_out: Snapshot, store: Store, config: TrainConfig, family: ModuleType, ranks: Ranks) -> None:
        self.snapshot = held_out
        self.store = store
        self.config = config
        self.family = family
        self.ranks = ranks
        self.hints = HintReader(held_out, store, config, family)
        self.num_samples = min(config.validation.samples, held_out.num_samples)

    @torch.no_grad()
    def run(self, transformer: torch.nn.Module, dtype: torch.dtype) -> dict[str, float]:
        """Return the mean loss, and the mean at each quantile; every rank must enter, and gets the same.

        Keys are `validation/loss`, and `validation/loss_q0.5` and so on by quantile.
        """
        config, ranks = self.config, self.ranks
        sigmas = [self.family.sigma_at(quantile, config.objective) for quantile in config.validation.sigmas]
        losses = torch.zeros(self.num_samples, len(sigmas), device=ranks.device)
        transformer.eval()
        # Ranks that have a sample less repeat their first, and leave it out: all must run the same number of times.
        rounds = -(-self.num_samples // ranks.data_world)
        for index in range(ranks.data_rank, rounds * ranks.data_world, ranks.data_world):
            counts = index < self.num_samples
            example = self._example(index if counts else 0)
            for column, sigma in enumerate(sigmas):
                example["sigma"] = torch.full((1,), sigma, device=ranks.device)
                with sharing(ranks.context), computing(config, dtype, ranks.device):
                    loss = self.family.loss(transformer, example, config.objective)
                if counts and ranks.reports_losses:
                    losses[index, column] = loss[0]
        transformer.train()
        by_sigma = sum_over_ranks(losses, ranks).double().mean(0).tolist()
        named = {f"validation/loss_q{q:g}": loss for q, loss in zip(config.validation.sigmas, by_sigma, strict=True)}
        return {"validation/loss": sum(by_sigma) / len(by_sigma), **named}

    def _example(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.snapshot.sample(index)
        drawn = self.family.draw(_SEED, 0, sample.sample_id, sample.latents_shape, self.config.objective)
        latents = read_tensors(self.store, sample.latents)["latents"]
        try:
            latents = self.family.normalise(latents, self.snapshot.fingerprints["latents"])
        except LatentlineError as error:
            raise LatentlineError(f"sample {sample.sample_id} ({sample.source}): {error}") from error
        names = sorted(sample.contexts)
        name = names[Mixture().caption(_SEED, 0, sample.sample_id, sample.dataset, names)]
        context = read_tensors(self.store, sample.contexts[name])["context"]
        hints = self.hints.of(sample, 0, _SEED)
        example = self.family.example(latents, context, replace(drawn, drop_text=False), **hints)
        return {name: tensor.unsqueeze(0).to(self.ranks.device) for name, tensor in example.items()}
