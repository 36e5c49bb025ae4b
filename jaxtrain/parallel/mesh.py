"""Devices and processes: `start_distributed` first, then one mesh with the axes `data` and `model`.

Nothing else in jaxtrain asks JAX for its devices. Axes are of type Auto: the compiler places what the rules and the
batch sharding leave open (GSPMD), so models hold no sharding annotations.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import MeshConfig
from zarr_store.errors import AccessError, InvalidInput

__all__ = ["AXES", "ProcessInfo", "batch_sharding", "make_mesh", "replicated", "spec", "start_distributed"]

AXES = ("data", "model")
COORDINATOR = "TERRASHARD_COORDINATOR"
PROCESSES = "TERRASHARD_PROCESSES"
PROCESS = "TERRASHARD_PROCESS"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessInfo:
    """Which of the cooperating processes this is."""

    index: int
    count: int

    @property
    def is_first(self) -> bool:
        """The process that writes logs and reports."""
        return self.index == 0


def start_distributed(
    coordinator: str | None = None,
    *,
    processes: int | None = None,
    process: int | None = None,
    timeout_s: int = 120,
    environment: Mapping[str, str] | None = None,
) -> ProcessInfo:
    """Join the other processes of this run; call it before anything touches a device.

    What is not given comes from TERRASHARD_COORDINATOR, TERRASHARD_PROCESSES and TERRASHARD_PROCESS. Where nothing is
    given at all, the run has one process and nothing is started.

    Args:
        coordinator: `host:port` of process 0.
        processes: number of processes.
        process: this one, 0 … processes-1.
        timeout_s: how long to wait for the others.
        environment: stands in for `os.environ`.

    Raises:
        InvalidInput: only some of the three are given, or they contradict each other.
        AccessError: the others did not come in time.
    """
    env = os.environ if environment is None else environment
    coordinator = coordinator or env.get(COORDINATOR)
    processes = _number(PROCESSES, env) if processes is None else processes
    process = _number(PROCESS, env) if process is None else process
    if coordinator is None and processes is None and process is None:
        return ProcessInfo(0, 1)
    if coordinator is None or processes is None or process is None:
        raise InvalidInput(
            "a run of several processes needs all of: coordinator host:port, number of processes, number of this "
            f"process; got {coordinator!r}, {processes!r}, {process!r}. Set {COORDINATOR}, {PROCESSES} and {PROCESS}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidInput(f"the coordinator must be host:port, such as 10.0.0.1:1234, got {coordinator!r}")
    if not 0 <= process < processes:
        raise InvalidInput(f"process must be one of 0 … {processes - 1}, got {process}")
    try:
        # all three are known, so JAX must not look for a cluster of its own
        jax.distributed.initialize(
            coordinator,
            num_processes=processes,
            process_id=process,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout_s,
            # JAX binds to all interfaces by default; a coordinator named by address needs only that one
            coordinator_bind_address=coordinator if host in ("127.0.0.1", "localhost") else None,
        )
    except RuntimeError as error:
        if "before any JAX" in str(error) or "only be called once" in str(error):
            raise InvalidInput(f"process {process}: the run must be joined once, before any array is made") from error
        raise AccessError(
            f"process {process} of {processes} could not join {coordinator} within {timeout_s} s: {error}. "
            "Check that all processes were started and that the port can be reached"
        ) from error
    logger.info("process %d of %d joined %s", process, processes, coordinator)
    return ProcessInfo(process, processes)


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


def _number(name: str, env: Mapping[str, str]) -> int | None:
    text = env.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise InvalidInput(f"{name} must be a whole number, got {text!r}") from error
