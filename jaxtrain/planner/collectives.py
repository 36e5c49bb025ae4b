"""Count what a compiled program sends over the wires, by kind of collective and by axis of the mesh.

The compiler prints the results of a collective; what travels is another number. With n devices in a group and R bytes
of results, a ring sends per device

    all-reduce            2 (n - 1) / n · R      reduced in parts, and the parts gathered
    all-gather              (n - 1) / n · R      R is the gathered array
    reduce-scatter          (n - 1)     · R      R is the part that is kept
    all-to-all              (n - 1) / n · R
    collective-permute                    R      of each device that sends to another one
    collective-broadcast                  R

(Thakur, Rabenseifner & Gropp 2005, doi:10.1177/1094342005051521, for the first three.)

A program that was compiled for processors is not what an accelerator runs, in two ways which are corrected here, each
beside the raw figure: an all-reduce of which every device keeps its own part only is a reduce-scatter there, and
bfloat16, which processors reduce as float32, stays bfloat16.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxtrain.planner.hlo import Array, Instruction, Module, read_module

__all__ = [
    "Collective",
    "Dialect",
    "activation_gathers",
    "find_collectives",
    "raw_bytes",
    "result_bytes",
    "wire_bytes",
    "wire_factor",
]

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
THROUGH = ("get-tuple-element", "bitcast", "copy", "reshape", "transpose", "convert")
"""Instructions that only pass on their input."""

MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\((?P<order>[^ ]*)\))? *\{(?P<axes>[^}]*)\}"
)

Groups = list[list[int]]


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a program, on all devices."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of its results, per device."""
    types: tuple[str, ...]
    """Number types of its results."""
    result_bytes: int
    """Bytes of its results per device and turn, as printed."""
    count: int
    """How often it runs in one execution of the program."""
    axes: tuple[str, ...]
    """Axes of the mesh over which devices exchange; empty where nothing leaves a device."""
    group: int
    """Devices that exchange with each other."""
    wire_bytes: float
    """Bytes that the busiest device sends in one execution, all turns together."""
    total_bytes: float
    """Bytes that all devices send in one execution."""
    source: str
    """Operation of JAX that it comes from."""
    corrected: str = ""
    """Correction for the target; empty where nothing was corrected."""
    printed_bytes: float | None = None
    """`wire_bytes` of the program as it was compiled; None where nothing was corrected."""

    @property
    def raw_bytes(self) -> float:
        """Bytes that the busiest device would send if the program ran as it was compiled."""
        return self.wire_bytes if self.printed_bytes is None else self.printed_bytes

    @property
    def axis(self) -> str:
        """The axes as one word."""
        return "+".join(self.axes) or "none"


@dataclass(frozen=True)
class Dialect:
    """Differences between the collectives of the planned machine and those in the program of a processor."""

    scatters: bool = False
    """It has reduce-scatter, and its compiler makes one of an all-reduce whose parts are kept."""
    half: bool = False
    """It reduces bfloat16 as bfloat16."""
    pairs: bool = True
    """It takes two columns at once where filters are few (`jaxtrain.models.narrow`), as processors do."""


PRINTED = Dialect()


def find_collectives(compiled: Any, mesh: Mapping[str, int], dialect: Dialect = PRINTED) -> tuple[Collective, ...]:
    """List the collectives of a program, in the order in which they are printed.

    An instruction that combines several arrays gives two where the target would treat some of them in another way.

    Args:
        compiled: a compiled function, its text, or a `Module`.
        mesh: sizes of the axes, outermost first; devices are numbered in this order.
        dialect: the target's; as printed where none is given.
    """
    module = compiled if isinstance(compiled, Module) else read_module(compiled)
    found = []
    for computation, instruction, count in module.walk():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        whole, parts = list(_results(instruction)), []
        if kind == "all-reduce" and dialect.scatters:
            n = _group_size(instruction, mesh)
            keeps = _keep_parts(module, computation, instruction, n)
            parts = [array for array, part in zip(whole, keeps, strict=True) if part]
            whole = [array for array, part in zip(whole, keeps, strict=True) if not part]
        promoted = kind == "all-reduce" and any("_promoted" in name for name in instruction.called("to_apply"))
        half = dialect.half and promoted
        if whole:
            found.append(_collective(kind, instruction, whole, count, mesh, half=half))
        if parts:
            found.append(_collective("reduce-scatter", instruction, parts, count, mesh, half=half, folded=True))
    return tuple(found)


def wire_bytes(collectives: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """Sum the bytes that a device sends, by axis and by kind: `{axis: {kind: bytes}}`."""
    total: dict[str, dict[str, float]] = {}
    for one in collectives:
        if one.wire_bytes:
            kinds = total.setdefault(one.axis, {})
            kinds[one.kind] = kinds.get(one.kind, 0.0) + one.wire_bytes
    return total


def raw_bytes(collectives: Sequence[Collective]) -> dict[str, float]:
    """Sum the bytes that a device would send if the program ran as it was compiled, by axis."""
    total: dict[str, float] = {}
    for one in collectives:
        if one.raw_bytes:
            total[one.axis] = total.get(one.axis, 0.0) + one.raw_bytes
    return total


def result_bytes(compiled: Any) -> dict[str, int]:
    """Sum the bytes of results per device, by kind, as the compiler printed them; loops count each turn."""
    module = compiled if isinstance(compiled, Module) else read_module(compiled)
    total: dict[str, int] = {}
    for _, instruction, count in module.walk():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            total[kind] = total.get(kind, 0) + count * sum(array.bytes for array in _results(instruction))
    return total


def activation_gathers(compiled: Any, parameters: Sequence[Sequence[int]] = ()) -> tuple[Instruction, ...]:
    """List the all-gathers that cannot be of a parameter; a sound program has none.

    Args:
        compiled: a compiled function, its text, or a `Module`.
        parameters: shapes of the parameters. A gathered array with as many elements as one of them counts as that
            parameter, whatever layout the compiler gave it; leave it out where parameters are not split.
    """
    module = compiled if isinstance(compiled, Module) else read_module(compiled)
    sizes = {int(np.prod(shape)) for shape in parameters}
    return tuple(
        instruction
        for _, instruction, _ in module.walk()
        if instruction.opcode in ("all-gather", "all-gather-start")
        and any(array.size not in sizes for array in _results(instruction))
    )


def _results(instruction: Instruction) -> tuple[Any, ...]:
    arrays = instruction.results
    # an asynchronous start lists its operands before its results, and may end with scalars of its own
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start" and len(arrays) > 1:
        arrays = tuple(array for array in arrays if array.dims or array.type not in ("u32", "s32")) or arrays
        arrays = arrays[len(arrays) // 2 :]
    return arrays


def _collective(
    kind: str,
    instruction: Instruction,
    arrays: Sequence[Array],
    count: int,
    mesh: Mapping[str, int],
    *,
    half: bool,
    folded: bool = False,
) -> Collective:
    size = sum(array.bytes for array in arrays)
    sent = size / 2 if half else float(size)
    printed = None
    if kind == "collective-permute":
        groups = [[a, b] for a, b in _pairs(instruction.attributes) if a != b]
        n = 2 if groups else 1
        wire, total = (sent if groups else 0.0), sent * len(groups)
    else:
        groups = replica_groups(instruction.attributes, math.prod(mesh.values()))
        n = max(map(len, groups), default=1)
        # what was printed is the whole result; of a reduce-scatter each device keeps its part
        wire, total = (
            sent / (size_of if folded else 1) * wire_factor(kind, size_of) * many
            for size_of, many in ((n, 1), (n, n * len(groups)))
        )
        if half or folded:
            printed = count * size * wire_factor(instruction.opcode.removesuffix("-start"), n)
    said = [
        *(["bfloat16 is reduced as it is"] if half else []),
        *(["all-reduce whose parts are kept"] if folded else []),
    ]
    return Collective(
        kind=kind,
        shapes=tuple(array.dims for array in arrays),
        types=tuple(array.type for array in arrays),
        result_bytes=size,
        count=count,
        axes=_axes(groups, mesh),
        group=n,
        wire_bytes=count * wire,
        total_bytes=count * total,
        source=instruction.source,
        corrected=", ".join(said),
        printed_bytes=printed,
    )


def _group_size(instruction: Instruction, mesh: Mapping[str, int]) -> int:
    return max(map(len, replica_groups(instruction.attributes, math.prod(mesh.values()))), default=1)


def wire_factor(kind: str, n: int) -> float:
    """Return the bytes that a device sends in a ring of n, for each byte of results."""
    if n == 1:
        return 0.0
    return {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-broadcast": 1.0}.get(
        kind, (n - 1) / n
    )


def replica_groups(attributes: str, devices: int) -> Groups:
    """Return the groups of devices that a collective names, in any of the compiler's three notations.

    `{{0,1},{2,3}}` lists them; `[2,4]<=[4,2]T(1,0)` reshapes and transposes the numbers of all devices;
    `mesh['a'=4,'b'=2] {'a'}` names axes of a mesh. None, or `{}`, means all devices together.
    """
    if found := MESH_GROUPS.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found["sizes"])}
        ids = _order(found["order"]) if found["order"] else np.arange(math.prod(sizes.values()))
        return _groups_of_axes(sizes, ids, found["axes"])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        shape = _numbers(found[1])
        return [list(map(int, row)) for row in _order(found[2]).reshape(-1, shape[-1])]
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
    return [list(range(devices))]


def _order(text: str) -> NDArray[np.int64]:
    """Return the numbers of devices that `[4,2]T(1,0)` means: counted in that shape, transposed, in a row."""
    dims, _, axes = text.partition("T")
    ids = np.arange(math.prod(_numbers(dims.strip("[]")))).reshape(_numbers(dims.strip("[]")))
    return (ids.transpose(_numbers(axes.strip("()"))) if axes else ids).reshape(-1)


def _groups_of_axes(sizes: Mapping[str, int], ids: NDArray[np.int64], axes: str) -> Groups:
    """Return the groups along some axes; `'a':(2)4` is the part of size 4 of axis a that begins after 2."""
    wanted = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    dims: list[int] = []
    chosen: list[int] = []
    for name, size in sizes.items():
        before, part = wanted.get(name, (size, 1))
        part = part or size
        if name in wanted:
            chosen.append(len(dims) + 1)
        dims += [before, part, size // (before * part)]
    size_of_group = math.prod(dims[at] for at in chosen)
    moved = np.moveaxis(ids.reshape(dims), chosen, range(-len(chosen), 0))
    return [list(map(int, row)) for row in moved.reshape(-1, size_of_group)]


def _pairs(attributes: str) -> list[tuple[int, int]]:
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])] if found else []


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the axes of the mesh along which the devices of a group differ."""
    shape = tuple(mesh.values())
    found: set[str] = set()
    for group in groups:
        if len(group) > 1 and max(group) < int(np.prod(shape, dtype=int)):
            places = np.stack(np.unravel_index(group, shape))
            found |= {name for name, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1}
    return tuple(name for name in mesh if name in found)


# ---- Which results of an all-reduce are kept in parts only


def _keep_parts(module: Module, computation: str, instruction: Instruction, group: int) -> list[bool]:
    """Return for each result of an all-reduce whether every use takes one of `group` parts of it, and nothing more."""
    arrays = instruction.results
    if group == 1:
        return [False] * len(arrays)
    users = module.users(computation).get(instruction.name, [])
    names = {0: [instruction.name]} if len(arrays) == 1 else {}
    for user in users:
        found = re.search(r"\bindex=(\d+)", user.attributes)
        if len(arrays) > 1 and user.opcode == "get-tuple-element" and found:
            names.setdefault(int(found[1]), []).append(user.name)
    keeps = []
    for position, array in enumerate(arrays):
        kept = [_kept(module, computation, name) for name in names.get(position, [])]
        keeps.append(bool(kept) and all(part is not None and 0 < part * group <= array.bytes for part in kept))
    return keeps


def _kept(module: Module, computation: str, name: str) -> int | None:
    """Return the bytes of the largest slice that is taken of a value; None where some use needs all of it."""
    users = module.users(computation).get(name, [])
    parts: list[int | None] = []
    for user in users:
        if user.opcode == "dynamic-slice" and user.operands[0] == name:
            parts.append(user.bytes)
        elif user.opcode in THROUGH and not user.root:
            parts.append(_kept(module, computation, user.name))
        elif user.opcode == "fusion":
            (called,) = user.called("calls")
            for position, operand in enumerate(user.operands):
                if operand == name:
                    inside = _parameter(module, called, position)
                    parts.append(None if inside is None else _kept(module, called, inside))
        else:
            return None
    known = [part for part in parts if part is not None]
    return max(known) if known and len(known) == len(parts) else None


def _parameter(module: Module, computation: str, position: int) -> str | None:
    found = (one.name for one in module.computations[computation].values() if one.parameter == position)
    return next(found, None)
