"""Count the arithmetic of a compiled program, and the bytes that its instructions read and write.

The compiler's own `cost_analysis` counts the body of a loop once, and on GPUs it does not see what a library call does.
Here convolutions and matrix products are counted from their shapes, with the turns of their loops. A multiplication and
the addition that follows it are two operations. Places where a window hangs over the padding, or falls between the
pixels of a stretched image (the gradient of a stride), are not counted, as no machine need compute them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtrain.planner.hlo import Array, Instruction, Module, read_module

__all__ = ["KINDS", "Operation", "convolution_flops", "find_operations", "touched_bytes"]

KINDS = ("swapped", "convolution", "gradient", "product", "transpose", "reduce", "elementwise")
"""Kinds of instruction that a machine runs at rates of their own; a fusion is of the first kind that is in it.

`gradient` is a convolution whose window is the image, as that of a kernel's gradient is. `swapped` is one whose image
is smaller than its kernel, so that the compiler has exchanged the two, which few libraries are quick at. `transpose`
moves the last dimension, or joins arrays while it computes them; any other order of dimensions is as quick as a copy.
"""
LARGE_WINDOW = 8
"""Pixels from which a window is an image, and not a kernel."""

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
        "partition-id", "replica-id"}  # fmt: skip
"""Instructions that move no bytes of their own; what a loop moves is counted inside."""
ELEMENTWISE = 1.0
"""Operations for each element of the result of everything that is neither a convolution nor a matrix product."""


@dataclass(frozen=True)
class Operation:
    """One instruction of the program as it is executed, with all that is fused into it."""

    name: str
    opcode: str
    count: int
    """How often it runs in one execution of the program."""
    flops: float
    """Operations of its convolutions and matrix products, each turn."""
    elements: float
    """Operations of all else, each turn: one for each element of a result."""
    bytes: float
    """Bytes that it reads and writes, each turn."""
    source: str
    """Operation of JAX that it comes from."""
    kind: str = "elementwise"
    """One of `KINDS`."""


def find_operations(compiled: Any) -> tuple[Operation, ...]:
    """List what a program executes, in order: convolutions, products, and fusions of everything else.

    Args:
        compiled: a compiled function, its text, or a `Module`.
    """
    module = compiled if isinstance(compiled, Module) else read_module(compiled)
    fused = {name for _, one, _ in module.walk() if one.opcode == "fusion" for name in one.called("calls")}
    found = []
    for computation, instruction, count in module.walk():
        if computation in fused or instruction.opcode in FREE:
            continue
        flops, elements = _arithmetic(module, computation, instruction)
        operands = module.computations[computation]
        read = sum(operands[name].bytes for name in dict.fromkeys(instruction.operands) if name in operands)
        if instruction.opcode in ("dynamic-slice", "gather", "slice"):
            read = instruction.bytes  # it reads what it takes, not all it could take from
        size, kind = read + instruction.bytes, _kind(module, instruction)
        found.append(
            Operation(instruction.name, instruction.opcode, count, flops, elements, size, instruction.source, kind)
        )
    return tuple(found)


def _kind(module: Module, instruction: Instruction) -> str:
    parts = [instruction]
    if instruction.opcode == "fusion":
        parts = [inner for name in instruction.called("calls") for inner in module.computations[name].values()]
        if any(part.opcode == "concatenate" for part in parts):
            parts.append(replace(instruction, opcode="transpose", attributes=""))
    return min((_kind_alone(part) for part in parts), key=KINDS.index, default="elementwise")


def _kind_alone(instruction: Instruction) -> str:
    match instruction.opcode:
        case "convolution":
            window = _window(instruction.attributes)
            if "1" in window.get("rhs_reversal", ()):
                return "swapped"
            sizes = window.get("size", ["1"])
            return "gradient" if max(map(int, sizes)) >= LARGE_WINDOW else "convolution"
        case "dot":
            return "product"
        case "transpose":
            found = re.search(r"dimensions=\{[\d,]*?(\d+)\}", instruction.attributes)
            last = len(instruction.results[0].dims) - 1
            return "elementwise" if found is not None and int(found[1]) == last else "transpose"
        case "reduce" | "reduce-window" | "sort" | "scatter":
            return "reduce"
    return "elementwise"


def touched_bytes(operations: tuple[Operation, ...]) -> float:
    """Sum the bytes that all instructions read and write in one execution."""
    return sum(one.bytes * one.count for one in operations)


def _arithmetic(module: Module, computation: str, instruction: Instruction) -> tuple[float, float]:
    """Return operations of convolutions and products, and of the rest, of an instruction and what is fused into it."""
    if instruction.opcode == "fusion":
        flops = elements = 0.0
        for called in instruction.called("calls"):
            for inner in module.computations[called].values():
                more = _arithmetic(module, called, inner)
                flops, elements = flops + more[0], elements + more[1]
        return flops, elements
    here = module.computations[computation]
    if instruction.opcode in ("convolution", "dot"):
        shapes = [here[name].results[0] for name in instruction.operands[:2]]
        count = convolution_flops if instruction.opcode == "convolution" else _dot_flops
        return count(instruction.results[0], shapes[0], shapes[1], instruction.attributes), 0.0
    if instruction.opcode in FREE:
        return 0.0, 0.0
    if instruction.opcode in ("reduce", "reduce-window"):
        return 0.0, ELEMENTWISE * sum(here[name].results[0].size for name in instruction.operands[:1])
    return 0.0, ELEMENTWISE * sum(array.size for array in instruction.results)


def _dot_flops(result: Array, left: Array, _right: Array, attributes: str) -> float:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    summed = [left.dims[int(axis)] for axis in found[1].split(",") if axis] if found else []
    return 2.0 * result.size * math.prod(summed)


def convolution_flops(result: Array, image: Array, kernel: Array, attributes: str) -> float:
    """Count the operations of one convolution.

    Args:
        result: shape of the result.
        image: shape of the left operand.
        kernel: shape of the right operand.
        attributes: what the compiler prints behind the operands: `window`, `dim_labels`, groups.
    """
    labels = re.search(r"dim_labels=([0-9a-z?]+)_([0-9a-z?]+)->([0-9a-z?]+)", attributes)
    if labels is None:
        return 0.0
    window = _window(attributes)
    spatial = sorted(set(labels[1]) - {"b", "f"})
    places = 1
    for position, axis in enumerate(spatial):
        extent = {
            "size": kernel.dims[labels[2].index(axis)],
            "image": image.dims[labels[1].index(axis)],
            "result": result.dims[labels[3].index(axis)],
        }
        places *= _valid(window, position, extent)
    batch, features = result.dims[labels[3].index("b")], result.dims[labels[3].index("f")]
    joined = kernel.dims[labels[2].index("i")]
    return 2.0 * places * batch * features * joined


def _window(attributes: str) -> Mapping[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return {
        name: value.split("x")
        for name, _, value in (part.partition("=") for part in (found[1] if found else "").split())
    }


def _valid(window: Mapping[str, list[str]], position: int, extent: Mapping[str, int]) -> int:
    """Count the pairs of a result and a place of its window that meet a pixel of the image, along one dimension."""

    def value(name: str, default: int) -> int:
        return int(window[name][position]) if name in window else default

    low = int(window["pad"][position].split("_")[0]) if "pad" in window else 0
    stride, spread, stretch = value("stride", 1), value("rhs_dilate", 1), value("lhs_dilate", 1)
    last = (extent["image"] - 1) * stretch
    total = 0
    for place in range(extent["size"]):
        first = place * spread - low
        if stretch == 1:  # results o with 0 <= first + o * stride <= last
            begin = max(0, -(first // stride))
            end = min(extent["result"] - 1, (last - first) // stride)
            total += max(0, end - begin + 1)
        else:
            at = (first + o * stride for o in range(extent["result"]))
            total += sum(0 <= one <= last and one % stretch == 0 for one in at)
    return total
