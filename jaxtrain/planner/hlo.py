"""Read the text of a compiled program (HLO): its computations, instructions and how often each runs.

What the compiler prints is one device's program after partitioning. The body of a loop is printed once, so whoever
counts bytes or operations must multiply by the number of its turns, which the compiler states where it knows it
(`known_trip_count`). Grammar: openxla.org/xla/operation_semantics, and the compiler's own printer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zarr_store.errors import InvalidInput

__all__ = ["Array", "Instruction", "Module", "read_module"]

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
ARRAY = re.compile(r"\b(?P<type>[a-z][a-z0-9]*)\[(?P<dims>[0-9,<=]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
HEAD = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*\{\s*$")
START = re.compile(r"^\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = ")
TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
OPEN, CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Array:
    """Number type and shape of one array."""

    type: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of all elements, without padding."""
        return (self.size * _bits(self.type) + 7) // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation, as it was printed."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    """The result, or all arrays of a tuple."""
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    """What stands behind the operands."""
    root: bool = False
    parameter: int | None = None
    """Position of a parameter of its computation; None of other instructions."""

    def called(self, attribute: str) -> tuple[str, ...]:
        """Return the computations that an attribute such as `calls` or `body` names."""
        found = re.search(rf"\b{attribute}=(?:\{{(?P<many>[^}}]*)\}}|(?P<one>%[\w.\-]+))", self.attributes)
        return tuple(NAME.findall(found["many"] or found["one"])) if found else ()

    @property
    def source(self) -> str:
        """Name of the operation of JAX that it comes from; empty where the compiler states none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        """Bytes of the results."""
        return sum(array.bytes for array in self.results)


@dataclass(frozen=True)
class Module:
    """All computations of a program, by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def walk(self) -> Iterator[tuple[str, Instruction, int]]:
        """Yield the computation, the instruction and how often it runs, from the entry through all it calls.

        Reducers of single elements are not entered. Both sides of a condition are yielded: which one runs is known
        only when it runs. A loop whose number of turns is unknown counts once; `unknown_loops` names those.
        """
        yield from self._walk(self.entry, 1)

    def _walk(self, computation: str, count: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations[computation].values():
            yield computation, instruction, count
            for name, turns in self._enters(instruction):
                yield from self._walk(name, count * turns)

    def _enters(self, instruction: Instruction) -> list[tuple[str, int]]:
        opcode = instruction.opcode
        if opcode == "while":
            turns = trip_count(instruction) or 1
            bodies, tests = instruction.called("body"), instruction.called("condition")
            return [*((name, turns) for name in bodies), *((name, turns + 1) for name in tests)]
        if opcode == "fusion" or opcode.startswith("async"):
            return [(name, 1) for name in instruction.called("calls")]
        if opcode == "call":
            return [(name, 1) for name in instruction.called("to_apply")]
        if opcode == "conditional":
            names = ("branch_computations", "true_computation", "false_computation")
            return [(name, 1) for attribute in names for name in instruction.called(attribute)]
        return []

    @cached_property
    def unknown_loops(self) -> tuple[str, ...]:
        """Names of loops whose number of turns the compiler does not state."""
        return tuple(one.name for _, one, _ in self.walk() if one.opcode == "while" and trip_count(one) is None)

    def users(self, computation: str) -> dict[str, list[Instruction]]:
        """Return the instructions that use each instruction of a computation."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.computations[computation].values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


def trip_count(loop: Instruction) -> int | None:
    """Return the number of turns of a `while`; None where the compiler does not state it."""
    found = TRIPS.search(loop.attributes)
    return int(found[1]) if found else None


def read_module(compiled: Any) -> Module:
    """Read a compiled function (`jitted.lower(…).compile()`), or its text.

    Raises:
        InvalidInput: the text is not that of a program with an entry computation.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations: dict[str, dict[str, Instruction]] = {}
    entry, here = None, None
    for line in text.splitlines():
        if head := HEAD.match(line):
            here = computations.setdefault(head["name"], {})
            entry = head["name"] if head["entry"] else entry
        elif here is not None and (start := START.match(line)):
            instruction = _instruction(start, line[start.end() :])
            here[instruction.name] = instruction
        elif line.startswith("}"):
            here = None
    if entry is None:
        raise InvalidInput("a program must have an entry computation (ENTRY): give the text of a compiled function")
    return Module(computations, entry)


def _instruction(start: re.Match[str], rest: str) -> Instruction:
    end = _until(rest, 0, " ")
    opcode, _, _ = rest[end + 1 :].partition("(")
    opening = end + 1 + len(opcode)
    closing = _until(rest, opening + 1, ")")
    return Instruction(
        name=start["name"],
        opcode=opcode.strip(),
        results=_arrays(rest[:end]),
        operands=tuple(NAME.findall(rest[opening:closing])),
        attributes=rest[closing + 1 :],
        root=start["root"] is not None,
        parameter=int(rest[opening + 1 : closing]) if opcode.strip() == "parameter" else None,
    )


def _until(text: str, position: int, character: str) -> int:
    """Return the place of a character outside all brackets, or the end of the text."""
    depth = 0
    for at in range(position, len(text)):
        one = text[at]
        if one == character and depth == 0:
            return at
        depth += (one in OPEN) - (one in CLOSE)
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(found["type"], tuple(int(part.lstrip("<=")) for part in found["dims"].split(",") if part))
        for found in ARRAY.finditer(text)
    )


def _bits(kind: str) -> int:
    if kind in BITS:
        return BITS[kind]
    digits = re.match(r"[a-z]+?(\d+)", kind)  # f8e4m3fn has 8, u16 has 16, c64 has 64
    return int(digits[1]) if digits else 32
