"""`SampleOrder` gives the n-th sample of a run, for any n, without state.

The order is a function of (seed, global sample counter) and nothing else. A run that stops after any step continues
with the sample it would have seen next, and any number of processes can each work out their own rows of a batch: the
union over processes is the batch, whatever their number.

Each epoch is one permutation of all windows, made by a small Feistel cipher over the window numbers (Luby & Rackoff,
1988) with cycle walking (Black & Rogaway, 2002): O(1) memory for any number of windows. It is spelled out here in
integer arithmetic, because a library's shuffle may change between releases and a resumed run must not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zarr_store.errors import InvalidInput

__all__ = ["SampleOrder", "mix"]

Index = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# Four rounds make a pseudo-random permutation in theory; small domains show bias until about seven.
_ROUNDS = 8
_BLOCK, _BLOCKS = 4096, 8
"""Positions that are worked out together, and blocks that are remembered: numpy takes as long for a batch as for these,
a millisecond of the thread that trains."""


def mix(words: Words) -> Words:
    """Mix bits by the finaliser of SplitMix64 (Steele, Lea & Flood, 2014), a bijection of 64-bit words."""
    with np.errstate(over="ignore"):
        z = words + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class SampleOrder:
    """The endless order of `count` windows: one permutation an epoch, another in each epoch.

    Attributes:
        seed: Any integer; the same seed gives the same order on every machine.
        count: Number of windows, at least 1.

    >>> order = SampleOrder(seed=0, count=5)
    >>> sorted(order.indices(first=0, count=5).tolist()), sorted(order.indices(first=5, count=5).tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """

    seed: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidInput(f"an order needs at least one window, got {self.count}; lower data.min_labelled")

    def indices(self, first: int, count: int) -> Index:
        """Return the window numbers of the samples `first` … `first + count - 1` of the run.

        Args:
            first: Global sample counter, from 0.
            count: Number of samples.

        Returns:
            int64 (count,), each in [0, self.count).
        """
        numbers = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, position = divmod(first + done, self.count)
            block, at = divmod(position, _BLOCK)
            found = _permute_block(self.seed, self.count, epoch, block)[at : at + count - done]
            numbers[done : done + len(found)] = found
            done += len(found)
        return numbers


@functools.lru_cache(maxsize=_BLOCKS)
def _permute_block(seed: int, count: int, epoch: int, block: int) -> Index:
    """Return the window numbers of the positions `block * _BLOCK` … of an epoch; at most `_BLOCK`, and read-only."""
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = mix(mix(np.array([seed % (1 << 64)], np.uint64)) ^ np.uint64(epoch))
    keys = mix(key ^ np.arange(1, _ROUNDS + 1, dtype=np.uint64))

    def encrypt(words: Words) -> Words:
        left, right = words >> half, words & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        return (left << half) | right

    words = encrypt(np.arange(block * _BLOCK, min((block + 1) * _BLOCK, count), dtype=np.uint64))
    # the cipher permutes a power of four ≥ count; walking on until inside permutes exactly [0, count)
    while (outside := words >= np.uint64(count)).any():
        words[outside] = encrypt(words[outside])
    numbers = words.astype(np.int64)
    numbers.flags.writeable = False
    return numbers
