"""`make_mesh` makes the mesh of devices that a configuration describes; call `processes.start_distributed` first.

Axes, outermost first: `pipe` (stages of a pipeline), `data` (samples), `space` (rows of an image), `space_w` (its
columns) and `model` (filters). `data` and `model` always exist, the others only if they split something. Axes are of
type Auto: the compiler decides the shardings that the rules and the batch leave open (GSPMD), so models have no
annotations.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import MeshConfig, TrainConfig
from jaxtrain.parallel.rendezvous import LOCAL_COUNT, read_number
from zarr_store.errors import InvalidInput

__all__ = ["SPACE_AXES", "batch_sharding", "constrain", "image_spec", "make_mesh", "processor_parts",
           "replicated", "share_cores", "spec", "split_processor", "stored_sharding"]  # fmt: skip

SPACE_AXES = ("space", "space_w")
"""Mesh axes that split the rows and the columns of images."""

MOST_PARTS = 8
"""Largest number of devices into which a CPU is split by default; with more, each gets few windows of a batch."""

logger = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh of the configuration over the first devices, as many as the product of its axes.

    Args:
        config: Sizes of the axes.
        devices: Devices to use; None for all that JAX sees.

    Raises:
        InvalidInput: There are fewer devices than the mesh needs, devices of several processes are left over, or
            `zero` is set and the axis data has one device.
    """
    if config.zero and config.data == 1:
        raise InvalidInput(
            f"mesh.zero = {config.zero} splits over the axis data, which has one device: set a larger "
            "mesh.data, or mesh.zero = 0"
        )
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


def share_cores(config: TrainConfig, environment: Mapping[str, str] | None = None) -> TrainConfig:
    """Return the configuration with `mesh.data` over the cores of a CPU, if it names no mesh.

    XLA computes much of a backward pass on one core per device, so the CPU is split into devices, each with its
    part of the batch. The result is that of one device up to rounding. Nothing is changed where the result would differ
    (`model.norm = "local"`), where XLA_FLAGS sets a number of devices, and on accelerators.

    If the configuration has `mesh.data` alone, from 2 to 8, the CPU is split into this number: the config.toml of a run
    that was spread in this way has it.

    Call it before anything touches a device.
    """
    mesh, env = config.mesh, os.environ if environment is None else environment
    named = mesh.size > 1 or "data" in mesh.model_fields_set or "host_platform_device_count" in env.get("XLA_FLAGS", "")
    if mesh.size == mesh.data in range(2, MOST_PARTS + 1) and not (
        config.hetero.enabled or jax.distributed.is_initialized()
    ):
        split_processor(mesh.data, env)
    if named or config.model.norm == "local" or jax.distributed.is_initialized():
        return config
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if config.hetero.enabled:  # replicas of one machine share its cores
        cores = max(1, cores // (read_number(LOCAL_COUNT, env) or 1))
    parts = max(n for n in range(1, min(cores, MOST_PARTS) + 1) if config.unit % n == 0)
    if parts == 1:
        return config
    if not split_processor(parts, env) or jax.default_backend() != "cpu":
        return config
    spread = {**mesh.model_dump(exclude_unset=True), "data": parts}
    return TrainConfig.model_validate(config.model_dump(exclude_unset=True) | {"mesh": spread})


def split_processor(parts: int, environment: Mapping[str, str] | None = None) -> bool:
    """Split the CPU into `parts` devices; return False, without a change, if JAX or XLA_FLAGS has a number already."""
    env = os.environ if environment is None else environment
    if "host_platform_device_count" in env.get("XLA_FLAGS", ""):
        return False
    try:
        jax.config.update("jax_num_cpu_devices", parts)  # type: ignore[no-untyped-call]  # of jax
    except RuntimeError:
        return False
    return True


def processor_parts() -> int:
    """Return the number of devices into which `share_cores` has split the CPU; 1 on accelerators."""
    parts = int(getattr(jax.config, "jax_num_cpu_devices", 1))
    return parts if parts > 1 and jax.default_backend() == "cpu" else 1


def spec(*axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """Return the spec that splits each dimension over the named mesh axes; None and later dimensions stay whole."""
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]  # of jax


def image_spec(mesh: Mesh) -> PartitionSpec:
    """Return the split of (B, H, W, …): samples over `data`, rows and columns over the space axes that the mesh has."""
    return spec("data", *(axis if axis in mesh.shape else None for axis in SPACE_AXES))


def stored_sharding(mesh: Mesh, dimensions: int) -> NamedSharding:
    """Return the sharding of an array of a stored batch, rows and columns last: (B, …, H, W), or (B,) and (B, K)."""
    if dimensions < 3:
        return batch_sharding(mesh)
    first, *space = image_spec(mesh)
    return NamedSharding(mesh, spec(first, *(None,) * (dimensions - 3), *space))


def batch_sharding(mesh: Mesh, *, image: bool = False) -> NamedSharding:
    """Return the sharding of a batch: samples split over `data`, images also over the space axes."""
    return NamedSharding(mesh, image_spec(mesh) if image else spec("data"))


def constrain(tree: Any, shardings: Any) -> Any:
    """Constrain arrays to `shardings`, inside a jitted function."""
    return jax.lax.with_sharding_constraint(tree, shardings)  # type: ignore[no-untyped-call]  # of jax


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, spec())
