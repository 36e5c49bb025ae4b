"""The number of chunks of a step for which a host has memory: those that are read ahead, besides everything else."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jaxtrain.data.room import free_bytes
from jaxtrain.parallel.rendezvous import LOCAL_COUNT, read_number

__all__ = ["most_chunks"]

_SHARE = 0.5
"""Part of the free memory of a host that its replicas may fill with chunks."""


def most_chunks(
    chunk_bytes: int, *, steps: int, free: int | None = None, environment: Mapping[str, str] | None = None
) -> int | None:
    """Return the most chunks of a step for which there is memory, at least one; None for no limit.

    Gradients are added chunk by chunk, so a device needs the same memory for any share; the host holds the chunks that
    are read ahead.

    Args:
        chunk_bytes: Bytes of one chunk.
        steps: Steps of which chunks are held at once.
        free: Bytes that are left; None to look.
        environment: Replaces `os.environ`.

    >>> most_chunks(1000, steps=3, free=60_000, environment={})
    10
    """
    left = free_bytes() if free is None else free
    if left is None:
        return None
    replicas = read_number(LOCAL_COUNT, os.environ if environment is None else environment) or 1
    return max(1, int(left * _SHARE / replicas / (chunk_bytes * steps)))
