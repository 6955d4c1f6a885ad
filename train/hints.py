"""The hint of a visit to a sample: which kind and variant, and its tensor; for families that take hints."""

from __future__ import annotations

import hashlib
from types import ModuleType
from typing import Any

from manifests.errors import LatentlineError, UsageError
from manifests.hints import kind_of
from manifests.image_context import IMAGE
from manifests.shards import read_tensors
from manifests.snapshot import Sample, Snapshot
from manifests.store import Store
from train.config import TrainConfig


def uses_hints(family: ModuleType) -> bool:
    """Say whether a family's samples have hints."""
    return getattr(family, "USES_HINTS", False)


def drawn_kinds(snapshot: Snapshot) -> dict[str, int]:
    """Samples that have hints of each kind, of those a visit draws one from."""
    return {kind: count for kind, count in snapshot.hint_kinds.items() if kind != IMAGE}


def has_image_contexts(snapshot: Snapshot) -> bool:
    """Say whether samples have an image context."""
    return IMAGE in snapshot.hint_kinds


def hint_weights(config: TrainConfig, snapshot: Snapshot) -> dict[str, float]:
    """How often each kind of hint is drawn, relative to the others.

    Raises `UsageError` for a kind the snapshot has not, or several where none is named.
    """
    kinds = drawn_kinds(snapshot)
    if config.hints is None:
        if len(kinds) != 1:
            raise UsageError(
                f"train.hints: the snapshot has {', '.join(sorted(kinds)) or 'no hints'}; name what to train on, "
                "with weights, such as { edge = 1 }"
            )
        return dict.fromkeys(kinds, 1.0)
    missing = sorted(config.hints.keys() - kinds.keys())
    if missing:
        raise UsageError(
            f"train.hints: the snapshot has no {missing[0]} hints, it has {', '.join(sorted(kinds)) or 'none'}; add it "
            "to encode.hints.kinds and run `latentline encode`"
        )
    return {str(kind): weight for kind, weight in config.hints.items()}


def check_hints(config: TrainConfig, snapshot: Snapshot, family: ModuleType) -> None:
    """Raise `UsageError` unless every sample has the hints that the run draws from."""
    if not uses_hints(family):
        if config.hints is not None:
            raise UsageError('train.hints: this model takes none; set model.family = "cosmos-transfer2.5", or drop it')
        return
    kinds = snapshot.hint_kinds
    for kind in (*hint_weights(config, snapshot), *({IMAGE} & kinds.keys())):
        if kinds[kind] < snapshot.num_samples:
            names = snapshot.column("hint_names").to_pylist()
            index = next(i for i, own in enumerate(names) if kind not in {kind_of(name) for name in own or ()})
            raise UsageError(
                f"train.hints: {snapshot.num_samples - kinds[kind]} of {snapshot.num_samples} samples have no {kind} "
                f"hint (first: {snapshot.sample(index).source})"
            )


class HintReader:
    """Reads what `example` of a family takes of hints; nothing for families that take none."""

    def __init__(self, snapshot: Snapshot, store: Store, config: TrainConfig, family: ModuleType) -> None:
        self._snapshot = snapshot
        self._store = store
        self._family = family
        self._weights = hint_weights(config, snapshot) if uses_hints(family) else {}

    def of(self, sample: Sample, epoch: int, seed: int) -> dict[str, Any]:
        """The hint of one visit, normalised, and the sample's padding and image context.

        A function of (seed, epoch, sample) alone.
        """
        if not self._weights:
            return {}
        name = self.name_of(sample, epoch, seed)
        stored = read_tensors(self._store, sample.hints[name])["hint"]
        try:
            hint = self._family.normalise_hint(stored, self._snapshot.fingerprints["hint"])
        except LatentlineError as error:
            raise LatentlineError(f"sample {sample.sample_id} ({sample.source}), hint {name}: {error}") from error
        image = read_tensors(self._store, sample.hints[IMAGE])["hint"] if IMAGE in sample.hints else None
        return {"hint": hint, "padding": sample.padding, "image_context": image}

    def name_of(self, sample: Sample, epoch: int, seed: int) -> str:
        """Which hint a visit draws: its kind by weight, then one of the kind's variants."""
        number = int.from_bytes(hashlib.sha256(f"hint/{seed}/{epoch}/{sample.sample_id}".encode()).digest()[:12], "big")
        place = (number >> 48) / 2**48 * sum(self._weights.values())
        kinds = sorted(self._weights)
        chosen = kinds[-1]
        for kind in kinds:
            place -= self._weights[kind]
            if place < 0:
                chosen = kind
                break
        variants = sorted(name for name in sample.hints if kind_of(name) == chosen)
        return variants[(number & (2**48 - 1)) * len(variants) >> 48]
