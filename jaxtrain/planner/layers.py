"""Find the layer of a network that an instruction of a compiled program works for.

The compiler keeps the path of each parameter beside the entry's parameters, and none beside the arithmetic. So the
layer of an array is the one whose parameters meet it next in the flow of data, or met it last.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping

from jaxtrain.planner.hlo import Instruction, Module

__all__ = ["layer_of"]

PATH = re.compile(r"\.params(?P<keys>(?:\[\\?'[^']*'\])+)")
KEY = re.compile(r"\[\\?'([^'\\]*)\\?'\]")
MOST_STEPS = 8
"""Instructions between a parameter and its use: a gather, a conversion, another order of dimensions."""


def layer_of(module: Module, instruction: Instruction) -> str:
    """Return the path of the layer that an array is made for, such as `decoder/level0/conv1`; empty if none is near.

    Args:
        module: the program.
        instruction: the instruction of the program that makes the array.
    """
    name, here = next(
        (
            (name, instructions)
            for name, instructions in module.computations.items()
            if instructions.get(instruction.name) is instruction
        ),
        ("", {}),
    )
    users = module.users(name) if name else {}
    forward = {one: [user.name for user in several] for one, several in users.items()}
    backward = {one.name: list(one.operands) for one in here.values()}
    return _nearest(instruction, here, forward) or _nearest(instruction, here, backward)


def _nearest(start: Instruction, here: Mapping[str, Instruction], near: Mapping[str, list[str]]) -> str:
    """Return the layer of the first instruction on the way that uses a parameter besides what it gets from before."""
    seen, waiting = {start.name}, deque([start.name])
    while waiting:
        for name in near.get(waiting.popleft(), []):
            if name in seen or name not in here or here[name].opcode == "tuple":
                continue
            seen.add(name)
            waiting.append(name)
            found = (_parameter(here, operand) for operand in here[name].operands)
            if layer := next(filter(None, found), ""):
                return layer
    return ""


def _parameter(here: Mapping[str, Instruction], name: str, steps: int = MOST_STEPS) -> str:
    """Return the layer of the parameter that an instruction alone comes from; empty if it comes from anything else."""
    one = here.get(name)
    if one is None or steps == 0:
        return ""
    if one.opcode == "parameter":
        return _path(one.source)
    sources = [operand for operand in one.operands if operand in here and here[operand].opcode != "constant"]
    layers = {_parameter(here, operand, steps - 1) for operand in sources}
    return layers.pop() if len(layers) == 1 else ""


def _path(source: str) -> str:
    """Return the layer of a parameter from the name that JAX gives it.

    >>> _path("state.params['encoder']['level0']['conv1']['kernel']"), _path("held.params['up/level0/bias']")
    ('encoder/level0/conv1', 'up/level0')
    """
    found = PATH.search(source)
    return "/".join(KEY.findall(found["keys"])).rpartition("/")[0] if found else ""
