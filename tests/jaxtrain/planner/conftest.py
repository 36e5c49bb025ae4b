"""A mesh of eight devices, and the shardings along it."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import MeshConfig
from jaxtrain.parallel.mesh import make_mesh


@pytest.fixture(scope="session")
def device_mesh() -> tuple[Mesh, NamedSharding, NamedSharding]:
    mesh = make_mesh(MeshConfig(data=8))
    assert jax.device_count() >= 8
    return mesh, NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
