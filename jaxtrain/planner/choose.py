"""Choose the mesh of a run on this machine: `mesh = "auto"`."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxtrain.config import TrainConfig
from jaxtrain.planner.machine import device_count, this_machine
from jaxtrain.planner.survey import describe_network, survey_run
from jaxtrain.planner.words import mesh_text, verdict
from zarr_store.errors import InvalidInput

__all__ = ["choose_mesh"]


def choose_mesh(config: TrainConfig, tell: Callable[[str], None]) -> TrainConfig:
    """Return the run on the mesh that a survey of this machine chooses; call it before anything touches a device.

    Args:
        config: the run, with `mesh.auto`.
        tell: called with one line: the mesh, and why.

    Raises:
        InvalidInput: several processes train together, or no strategy fits.
    """
    if jax.distributed.is_initialized():
        raise InvalidInput(
            "mesh = 'auto' chooses for one process: see `terrashard survey CONFIG.toml --devices N` for several, and "
            "name the mesh"
        )
    devices = device_count()
    survey = survey_run(describe_network(config.model_copy(update={"mesh": type(config.mesh)()})), devices,
                        this_machine(devices))  # fmt: skip
    choice = survey.choice
    if choice is None or choice.candidate.config is None:
        raise InvalidInput(f"mesh = 'auto': {verdict(survey)}")
    if survey.profile.device.kind == "cpu":  # the processor is split into as many devices as were planned for
        jax.config.update("jax_num_cpu_devices", devices)  # type: ignore[no-untyped-call]  # of jax
    tell(f"mesh {mesh_text(choice)}: {verdict(survey)}")
    return choice.candidate.config
