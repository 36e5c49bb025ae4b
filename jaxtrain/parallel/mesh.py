"""Devices: one mesh with the axes `data` and `model`. Several processes join before (`processes.start_distributed`).

Nothing else in jaxtrain asks JAX for its devices. Axes are of type Auto: the compiler places what the rules and the
batch sharding leave open (GSPMD), so models hold no sharding annotations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import MeshConfig
from zarr_store.errors import InvalidInput

__all__ = ["AXES", "batch_sharding", "make_mesh", "replicated", "spec"]

AXES = ("data", "model")

logger = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the configuration over the first `data × model` devices.

    Args:
        config: sizes of the axes.
        devices: those to use; all that JAX sees, where none are given.

    Raises:
        InvalidInput: there are fewer devices than the mesh needs, or several processes and devices left over.
    """
    found = list(jax.devices() if devices is None else devices)
    if config.size > len(found):
        platform = found[0].platform if found else "no"
        remedy = f"choose mesh.data × mesh.model ≤ {len(found)}"
        if platform == "cpu":
            remedy += (
                f", or split the CPU into {config.size} devices: "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={config.size}"
            )
        raise InvalidInput(
            f"mesh data={config.data} × model={config.model} needs {config.size} devices, "
            f"JAX sees {len(found)} ({platform}): {remedy}"
        )
    if config.size < len(found):
        used = found[: config.size]
        if {d.process_index for d in used} != {d.process_index for d in found}:
            raise InvalidInput(
                f"mesh data={config.data} × model={config.model} uses {config.size} of {len(found)} devices and "
                "leaves some processes without any: make data × model equal to the number of devices"
            )
        logger.info("the mesh uses %d of %d devices", config.size, len(found))
        found = used
    return jax.make_mesh((config.data, config.model), AXES, axis_types=(AxisType.Auto,) * 2, devices=found)


def spec(*axes: str | None) -> PartitionSpec:
    """Mesh axis per dimension; dimensions that are not named lie whole."""
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]  # of jax


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples split over `data`; the same samples on all devices along `model`."""
    return NamedSharding(mesh, spec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, spec())
