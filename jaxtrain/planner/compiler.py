"""The process that compiles strategies for devices that this machine lacks: `python -m jaxtrain.planner.compiler`.

It reads one request from each line of its standard input and answers each with a line: the facts of the strategy, or
why it cannot be; what cannot fit is not compiled. Devices of a processor stand for the real ones; the parent sets their
number in `XLA_FLAGS`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.learn.state import Program
from jaxtrain.parallel.zero import share_out
from jaxtrain.planner.bound import least_bytes
from jaxtrain.planner.collectives import Dialect
from jaxtrain.planner.facts import Facts, compile_facts, fullest
from jaxtrain.planner.scale import State, extend, representative, smallest_mesh
from jaxtrain.runs.rundir import ModelCard, program_of
from zarr_store.errors import TerrashardError

__all__ = ["answer", "serve"]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one strategy.

    Args:
        request: `config` of the run, `card` of its data, `dtypes` of its batches, `dialect` of the machine; `limit`
            where a strategy that needs more bytes of a device is not worth compiling.

    Returns:
        `facts`; or `least`, the bytes of `jaxtrain.planner.bound.Least` if they are above the limit; or `why_not`.
    """
    asked = {name: value for name, value in request.items() if name != "limit"}
    try:
        data = TrainConfig.model_validate(request["config"]).mesh.data
        text = json.dumps(representative(asked), sort_keys=True)
        program = _built(text)
        if request.get("limit") is not None:
            held = _state(program, data, *(fullest(*tree) for tree in _trees(program)))
            least = least_bytes(asked, held.parameters + held.optimizer)
            if least.total > request["limit"]:
                return {"least": asdict(least)}
        facts = _compiled(text)
        if smallest_mesh(data) != data:
            facts = extend(facts, data, _state(program, data, facts.parameter_bytes, facts.optimizer_bytes))
        return {"facts": facts.to_dict()}
    except TerrashardError as error:
        return {"why_not": str(error)}


@lru_cache(maxsize=1)
def _built(text: str) -> Program:
    """Build the network of a request on its mesh; the next request often has the same one."""
    request = json.loads(text)
    return program_of(ModelCard.from_dict(request["card"]), TrainConfig.model_validate(request["config"]))


@lru_cache(maxsize=1)
def _compiled(text: str) -> Facts:
    """Compile the representative of a request."""
    request = json.loads(text)
    return compile_facts(_built(text), request["dtypes"], Dialect(**request["dialect"]))


def _trees(program: Program) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return shapes and shardings of the parameters, and those of the optimiser's state."""
    shapes, lies = program.shapes, program.shardings
    return (shapes.params, lies.params), (shapes.opt_state, lies.opt_state)


def _state(program: Program, data: int, parameters: int, optimizer: int) -> State:
    """Return the bytes of the fullest device with another number of replicas."""
    if not program.config.mesh.zero:
        return State(parameters, optimizer)
    before, after = (_parts(program, size) for size in (program.mesh.shape["data"], data))
    return State(after if program.config.mesh.zero == 3 else parameters, round(optimizer * after / max(before, 1)))


def _parts(program: Program, data: int) -> int:
    """Return the bytes of the parameters on a device where each of `data` replicas updates a part."""
    sizes = {**program.mesh.shape, "data": data}
    mesh: Any = SimpleNamespace(shape=sizes)
    lies = share_out(program.shapes.params, jax.tree.map(lambda at: at.spec, program.whole), mesh)
    leaves = jax.tree.leaves(program.shapes.params)
    places = jax.tree.leaves(lies, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec))
    total = 0
    for leaf, at in zip(leaves, places, strict=True):
        parts = math.prod(sizes[axis] for axis in at if axis is not None)
        total += int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize // parts
    return total


def serve() -> None:
    """Answer requests until the input ends."""
    # whatever a library prints must not stand between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
