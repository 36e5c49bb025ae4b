"""Devices: one mesh with the axes of the configuration. Several processes join before (`processes.start_distributed`).

Axes, outermost first: `data` (samples) and `model` (filters) are always there; `space` (rows of an image) and
`space_w` (its columns) where they split something. Nothing else in jaxtrain asks JAX for its devices. Axes are of type
Auto: the compiler places what the rules and the batch sharding leave open (GSPMD), so models hold no annotations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import MeshConfig
from zarr_store.errors import InvalidInput

__all__ = ["SPACE_AXES", "batch_sharding", "constrain", "image_spec", "make_mesh", "replicated", "spec"]

SPACE_AXES = ("space", "space_w")
"""Axes that split rows and columns."""

logger = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the configuration over the first devices, as many as the product of its axes.

    Args:
        config: sizes of the axes.
        devices: those to use; all that JAX sees, where none are given.

    Raises:
        InvalidInput: there are fewer devices than the mesh needs, or several processes and devices left over.
    """
    found = list(jax.devices() if devices is None else devices)
    shape = " × ".join(f"{name}={size}" for name, size in config.axes.items())
    factors = " × ".join(f"mesh.{name}" for name in config.axes if name != "space_w")
    if config.size > len(found):
        platform = found[0].platform if found else "no"
        remedy = f"choose {factors} ≤ {len(found)}"
        if platform == "cpu":
            remedy += (
                f", or split the CPU into {config.size} devices: "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={config.size}"
            )
        raise InvalidInput(f"mesh {shape} needs {config.size} devices, JAX sees {len(found)} ({platform}): {remedy}")
    if config.size < len(found):
        used = found[: config.size]
        if {d.process_index for d in used} != {d.process_index for d in found}:
            raise InvalidInput(
                f"mesh {shape} uses {config.size} of {len(found)} devices and leaves some processes without any: "
                f"make {factors} equal to the number of devices"
            )
        logger.info("the mesh uses %d of %d devices", config.size, len(found))
        found = used
    axes = config.axes
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=found)


def spec(*axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """Mesh axis per dimension; dimensions that are not named lie whole."""
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]  # of jax


def image_spec(mesh: Mesh) -> PartitionSpec:
    """Of (B, H, W, …): samples over `data`, rows and columns over the space axes that the mesh has."""
    return spec("data", *(axis if axis in mesh.shape else None for axis in SPACE_AXES))


def batch_sharding(mesh: Mesh, *, image: bool = False) -> NamedSharding:
    """Samples split over `data`, images also over the space axes; the same on all devices along other axes."""
    return NamedSharding(mesh, image_spec(mesh) if image else spec("data"))


def constrain(tree: Any, shardings: Any) -> Any:
    """Inside a jitted function: the same arrays, lying as `shardings` say."""
    return jax.lax.with_sharding_constraint(tree, shardings)  # type: ignore[no-untyped-call]  # of jax


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, spec())
