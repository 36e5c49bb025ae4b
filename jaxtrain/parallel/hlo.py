"""Read the collectives of a compiled step from its HLO text.

Communication that nobody wrote is how a sharded program gets slow without a word, so tests read it: data parallelism
may sum gradients, and must never gather activations.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Collective", "activation_all_gathers", "bytes_by_kind", "collectives"]

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}

# `%name = RESULT kind(` where RESULT is one array type or a tuple of them; `-done` repeats the result of `-start`
INSTRUCTION = re.compile(rf"=\s+(?P<result>[^%\"]*?)\s+(?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
ARRAY = re.compile(r"(?P<type>[a-z]+[0-9]*[a-z0-9]*)\[(?P<dims>[0-9,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One collective instruction of one device's program."""

    kind: str
    """Kind of the instruction, such as all-reduce."""
    shapes: tuple[tuple[int, ...], ...]
    """Size of its results, per device."""
    bytes: int
    """Size of its results, per device."""
    line: str
    """The instruction as the compiler printed it."""


def collectives(compiled: Any) -> tuple[Collective, ...]:
    """List all collectives of a compiled function (`jitted.lower(…).compile()`) or of its text, in program order."""
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    found = []
    for line in text.splitlines():
        if match := INSTRUCTION.search(line):
            arrays = [(m["type"], _dims(m["dims"])) for m in ARRAY.finditer(match["result"])]
            if match["start"] and len(arrays) > 1:
                arrays = arrays[len(arrays) // 2 :]  # an asynchronous start lists its operands before its results
            size = sum(_bytes(kind) * math.prod(dims) for kind, dims in arrays)
            found.append(Collective(match["kind"], tuple(dims for _, dims in arrays), size, line.strip()))
    return tuple(found)


def bytes_by_kind(compiled: Any) -> dict[str, int]:
    """Sum the result bytes per device and step, by kind of collective."""
    total: Counter[str] = Counter()
    for collective in collectives(compiled):
        total[collective.kind] += collective.bytes
    return dict(total)


def activation_all_gathers(compiled: Any, parameters: Iterable[Sequence[int]] = ()) -> tuple[Collective, ...]:
    """List the all-gathers that cannot be of a parameter; a sound program has none.

    Args:
        compiled: a compiled function, or its text.
        parameters: shapes of the parameters. A gathered array with as many elements as one of them counts as that
            parameter, whatever layout the compiler gave it; leave it out where parameters are not split.
    """
    sizes = {math.prod(shape) for shape in parameters}
    return tuple(
        collective
        for collective in collectives(compiled)
        if collective.kind == "all-gather" and any(math.prod(shape) not in sizes for shape in collective.shapes)
    )


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _bytes(kind: str) -> int:
    digits = re.search(r"[0-9]+$", kind)
    return BITS.get(kind, int(digits.group()) if digits else 32) // 8
