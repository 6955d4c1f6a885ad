"""In which proportions a run draws from datasets and captions, and the weave that keeps them exactly.

Weights are no part of the cache or of a snapshot: changing them encodes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Mixture:
    """Relative weights, as a recipe gives them.

    datasets: by name, finite, not negative, with a positive sum; None draws every sample equally often.
    captions: by dataset and caption name, positive; a dataset that is not named draws its captions equally often.
    """

    datasets: Mapping[str, float] | None = None
    captions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What of it decides the order of a run, by dotted name of the recipe; nothing where it is all left open."""
        found: dict[str, Any] = {f"data.datasets.{name}.weight": w for name, w in (self.datasets or {}).items()}
        return found | {f"data.datasets.{name}.captions": dict(weights) for name, weights in self.captions.items()}

    def caption(self, seed: int, epoch: int, sample_id: str, dataset: str, names: Sequence[str]) -> int:
        """Choose one of a sample's captions for a visit: an index into `names`, a function of the arguments alone."""
        if len(names) == 1:
            return 0
        weights = self.captions.get(dataset)
        shares = [weights.get(name, 0.0) if weights else 1.0 for name in names]
        if not any(shares):
            raise ValueError(f"no caption of {dataset!r} has a weight: {', '.join(names)}")
        drawn = hashlib.sha256(f"caption/{seed}/{epoch}/{sample_id}".encode()).digest()
        place = int.from_bytes(drawn[:7], "big") / 2**56 * math.fsum(shares)
        for index, share in enumerate(shares):
            place -= share
            if place < 0:
                return index
        return max(index for index, share in enumerate(shares) if share)


def exact(weight: float) -> Fraction:
    """The decimal a weight was written as: 0.7 is 7/10."""
    return Fraction(str(weight))


class Weave:
    """Positions 0, 1, 2, ... dealt to strands in fixed proportions, computed position by position.

    shares: positive and finite. A binary tree over the strands gives its left side floor((p l + t/2) / t) of the first
    p positions, with l and t the left and the whole share as integers. So the proportions are exact over every period
    (the sum of the shares as coprime integers), and in any run of positions no strand is off by more than a place a
    level of the tree; a place costs the logarithm of the strands, and nothing is remembered.
    """

    def __init__(self, shares: Iterable[Fraction]) -> None:
        fractions = list(shares)
        if not fractions or min(fractions) <= 0:
            raise ValueError("a weave needs strands, each with a positive share")
        scale = math.lcm(*(fraction.denominator for fraction in fractions))
        integers = [int(fraction * scale) for fraction in fractions]
        common = math.gcd(*integers)
        sums = [0]
        for integer in integers:
            sums.append(sums[-1] + integer // common)
        self._sums = sums
        self.period = sums[-1]

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (strand, how many positions before this one it has) of a position >= 0."""
        first, last = 0, len(self._sums) - 1
        while last - first > 1:
            middle = (first + last) // 2
            left, whole = (self._sums[end] - self._sums[first] for end in (middle, last))
            before, after = ((2 * p * left + whole) // (2 * whole) for p in (position, position + 1))
            if after > before:
                position, last = before, middle
            else:
                position, first = position - before, middle
        return first, position
