"""The training order: a pure function of (snapshot, seed, position), computed index by index.

Position p of the endless stream is sample `permutation_epoch(p mod N)` of epoch `p div N`. Each epoch visits
every sample exactly once, whatever the number of ranks and wherever the run was interrupted, because nobody
keeps state: ranks read their own positions of one global stream. The permutation is a keyed Feistel network
over the next power of four, walked until it lands inside [0, N) (format-preserving encryption's
"cycle walking"), so 100,000,000 samples cost no memory.
"""

from __future__ import annotations

import hashlib
import struct

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


def _mix(value: int) -> int:
    """SplitMix64's finaliser: every output bit depends on every input bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
