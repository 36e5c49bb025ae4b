"""Make one mesh of devices with the axes of the configuration; `processes.start_distributed` comes before.

Axes, outermost first: `pipe` (stages of a pipeline), `data` (samples), `space` (rows of an image), `space_w` (its
columns) and `model` (filters). `data` and `model` are always there, the others where they split something. Meshes are
made of JAX's devices here only. Axes are of type Auto: the compiler places what the rules and the batch sharding leave
open (GSPMD), so models hold no annotations.
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
"""Axes that split rows and columns."""

MOST_PARTS = 8
"""Largest number of parts into which a processor is split by default; with more, each gets few windows of a batch."""

logger = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh of the configuration over the first devices, as many as the product of its axes.

    Args:
        config: sizes of the axes.
        devices: Devices to use; None for all that JAX sees.

    Raises:
        InvalidInput: there are fewer devices than the mesh needs, or several processes and devices left over, or `zero`
            has nobody to share with.
    """
    if config.zero and config.data == 1:
        raise InvalidInput(
            f"mesh.zero = {config.zero} splits over the axis data, of which there is one device: name a larger "
            "mesh.data, or set mesh.zero = 0"
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
    """Return the configuration with `mesh.data` over the cores of a processor, if no mesh is named.

    XLA computes much of a backward pass on one core per device, so a processor is split into devices, each with its
    part of the batch. The answer is that of one device but for rounding; where it is not (`model.norm = "local"`),
    and where XLA_FLAGS names a number of devices, all stays as it is, as on any accelerator.

    A mesh of `mesh.data` alone, up to eight, gets its devices here: the config.toml of a run that was spread names one.

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
    """Make the processor so many devices; returns False, and changes nothing, where JAX or XLA_FLAGS has a number."""
    env = os.environ if environment is None else environment
    if "host_platform_device_count" in env.get("XLA_FLAGS", ""):
        return False
    try:
        jax.config.update("jax_num_cpu_devices", parts)  # type: ignore[no-untyped-call]  # of jax
    except RuntimeError:
        return False
    return True


def processor_parts() -> int:
    """Return the number of devices into which `share_cores` has split the processor; 1 on accelerators."""
    parts = int(getattr(jax.config, "jax_num_cpu_devices", 1))
    return parts if parts > 1 and jax.default_backend() == "cpu" else 1


def spec(*axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """Return the mesh axis of each dimension; dimensions that are not named are not split."""
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
