"""How arrays lie on devices: the mesh, the rule table, and what the compiler made of them."""

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
