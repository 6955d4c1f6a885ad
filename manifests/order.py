"""The training order: a pure function of (snapshot, seed, position), computed index by index.

Position p of the endless stream is sample `permutation_epoch(p mod N)` of epoch `p div N`. Each epoch visits
every sample exactly once, whatever the number of ranks and wherever the run was interrupted, because nobody
keeps state: ranks read their own positions of one global stream. The permutation is a keyed Feistel network
over the next power of four, walked until it lands inside [0, N) (format-preserving encryption's
"cycle walking"), so 100,000,000 samples cost no memory.

With weights the stream is woven (`manifests.mixture.Weave`) of one such stream for each stratum, the samples of one
dataset that weigh the same: each has its own permutation and its own epochs, and the order is a pure function of
(snapshot, seed, weights, position).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.errors import UsageError
from manifests.mixture import Mixture, Weave, exact
from manifests.snapshot import Snapshot

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


class Order:
    """The sample order of one run.

    snapshot_hash, seed: what the order is a function of. num_samples: N >= 1, else `ValueError`.
    """

    def __init__(self, snapshot_hash: str, seed: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self.snapshot_hash = snapshot_hash
        self.seed = seed
        self.num_samples = num_samples
        self._half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
        self._latest: tuple[int, tuple[int, ...]] = (-1, ())

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (epoch, sample index) of a position >= 0 of the stream."""
        if position < 0:
            raise IndexError(position)
        epoch, index = divmod(position, self.num_samples)
        keys = self._round_keys(epoch)
        index = self._permute(index, keys)
        while index >= self.num_samples:
            index = self._permute(index, keys)
        return epoch, index

    def _round_keys(self, epoch: int) -> tuple[int, ...]:
        latest, keys = self._latest  # one read, so that threads in different epochs cannot mix them up
        if latest != epoch:
            text = f"{self.snapshot_hash}/{self.seed}/{epoch}".encode()
            keys = struct.unpack(f"<{_ROUNDS}Q", hashlib.sha512(text).digest()[: 8 * _ROUNDS])
            self._latest = epoch, keys
        return keys

    def _permute(self, index: int, keys: tuple[int, ...]) -> int:
        bits = self._half_bits
        mask = (1 << bits) - 1
        left, right = index >> bits, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << bits) | right


class WovenOrder:
    """The order of a run with weights.

    strata: label, share (positive) and sample indices of each; the label keys its permutation.
    """

    def __init__(
        self, snapshot_hash: str, seed: int, strata: Sequence[tuple[str, Fraction, npt.NDArray[np.int64]]]
    ) -> None:
        self._weave = Weave(share for _, share, _ in strata)
        self._orders = [Order(f"{snapshot_hash}/{label}", seed, len(samples)) for label, _, samples in strata]
        self._samples = [samples for _, _, samples in strata]

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (epoch of its stratum, sample index) of a position >= 0 of the stream."""
        if position < 0:
            raise IndexError(position)
        stratum, place = self._weave[position]
        epoch, index = self._orders[stratum][place]
        return epoch, int(self._samples[stratum][index])


def order_of(snapshot: Snapshot, seed: int, mixture: Mixture) -> Order | WovenOrder:
    """The order a run with these weights has; without any, every sample comes once an epoch.

    A dataset's share is its weight, or without weights the sum of its samples' own; within it a sample's share is its
    own weight, 1 where it has none. Raises `UsageError` for weights that do not fit the snapshot.
    """
    _check_captions(snapshot, mixture)
    weights = snapshot.column("weight")
    if mixture.datasets is None and weights.null_count == len(weights):
        return Order(snapshot.hash, seed, snapshot.num_samples)
    strata = _strata(snapshot)
    own = [exact(weight) for _, weight in strata]
    scale = math.lcm(*(weight.denominator for weight in own))
    sizes = [int(weight * scale) * len(samples) for weight, samples in zip(own, strata.values(), strict=True)]
    totals: dict[str, int] = {}
    for (dataset, _), size in zip(strata, sizes, strict=True):
        totals[dataset] = totals.get(dataset, 0) + size
    factors = _dataset_factors(snapshot, mixture, totals)
    chosen = [
        (f"{dataset}/{weight!r}", Fraction(factors[dataset] * size), samples)
        for ((dataset, weight), samples), size in zip(strata.items(), sizes, strict=True)
        if factors[dataset] * size
    ]
    if not chosen:
        raise UsageError(f"snapshot {snapshot.hash[:12]}: the weights of its samples sum to 0; nothing to train on")
    return WovenOrder(snapshot.hash, seed, chosen)


def _strata(snapshot: Snapshot) -> dict[tuple[str, float], npt.NDArray[np.int64]]:
    """Sample indices by dataset and own weight, sorted."""
    names = snapshot.column("dataset").cast(pa.string()).combine_chunks().dictionary_encode()
    weights = snapshot.column("weight").fill_null(1.0).to_numpy()
    codes, datasets = names.indices.to_numpy(), names.dictionary.to_pylist()
    order = np.lexsort((weights, codes))
    changes: npt.NDArray[np.int64] = np.flatnonzero((np.diff(codes[order]) != 0) | (np.diff(weights[order]) != 0)) + 1
    groups = np.split(order, changes)  # lexsort is stable: each group ascends
    found = {(datasets[codes[group[0]]], float(weights[group[0]])): group for group in groups}
    return dict(sorted(found.items()))


def _dataset_factors(snapshot: Snapshot, mixture: Mixture, totals: dict[str, int]) -> dict[str, int]:
    """What the sizes of each dataset's strata are multiplied by, so that they are shares of the whole."""
    if mixture.datasets is None:
        return dict.fromkeys(totals, 1)
    unknown = sorted(totals.keys() - mixture.datasets.keys())
    if unknown:
        raise UsageError(
            f"snapshot {snapshot.hash[:12]} has samples of {', '.join(unknown)}, which data.datasets gives no weight"
        )
    for name, weight in mixture.datasets.items():
        if weight and not totals.get(name):
            raise UsageError(
                f"data.datasets.{name}.weight = {weight:g}, but snapshot {snapshot.hash[:12]} has no sample of it to "
                "draw; set it to 0, or run `latentline encode` with this recipe"
            )
    shares = {name: exact(mixture.datasets[name]) / total if total else Fraction(0) for name, total in totals.items()}
    scale = math.lcm(*(share.denominator for share in shares.values()))
    return {name: int(share * scale) for name, share in shares.items()}


def _check_captions(snapshot: Snapshot, mixture: Mixture) -> None:
    """Refuse weights of captions that are not exactly those a dataset's samples have."""
    if not mixture.captions:
        return
    pairs = snapshot.table.select(["dataset", "caption_name"]).group_by(["dataset", "caption_name"]).aggregate([])
    found: dict[str, set[str]] = {}
    for row in pairs.to_pylist():
        found.setdefault(row["dataset"], set()).add(row["caption_name"] or "")
    for dataset, weights in mixture.captions.items():
        if dataset in found and found[dataset] - {""} != set(weights):
            has = ", ".join(sorted(found[dataset] - {""})) or "one without a name"
            raise UsageError(
                f"data.datasets.{dataset}.captions names {', '.join(sorted(weights))}, snapshot {snapshot.hash[:12]} "
                f"has {has}; run `latentline encode` with this recipe"
            )


def _mix(value: int) -> int:
    """SplitMix64's finaliser: every output bit depends on every input bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
