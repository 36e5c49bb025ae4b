"""Devices and how arrays lie on them: processes, meshes, sharding rules, split images, and stages of a pipeline."""

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
