"""Placement of arrays on devices: the mesh, the table of rules, and the collectives of the compiled program."""

from __future__ import annotations

from jaxtrain.parallel.mesh import batch_sharding, make_mesh, replicated
from jaxtrain.parallel.processes import ProcessInfo, start_distributed
from jaxtrain.parallel.sharding import DEFAULT_RULES, partition_specs

__all__ = [
    "DEFAULT_RULES",
    "ProcessInfo",
    "batch_sharding",
    "make_mesh",
    "partition_specs",
    "replicated",
    "start_distributed",
]
