"""Choose the mesh of a run on this machine: `mesh = "auto"`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable

import jax
from jax._src.distributed import global_state  # the number of processes, before anything touches a device

from jaxtrain.config import MeshConfig, TrainConfig
from jaxtrain.parallel.processes import find_rendezvous, from_first, local_gpus
from jaxtrain.planner.machine import FLAG, device_count, this_machine
from jaxtrain.planner.profile import Profile
from jaxtrain.planner.survey import describe_network, survey_run
from jaxtrain.planner.words import mesh_text, verdict
from zarr_store.errors import InvalidInput

__all__ = ["choose_mesh"]


def choose_mesh(config: TrainConfig, tell: Callable[[str], None]) -> TrainConfig:
    """Return the configuration with the mesh that a survey of this machine chooses; call it before using a device.

    Of several processes the first one chooses, and the others take its choice.

    Args:
        config: the run, with `mesh.auto`.
        tell: called with one line: the mesh, and why.

    Raises:
        InvalidInput: no strategy fits.
    """
    chosen = json.loads(from_first("choice of a mesh", lambda: json.dumps(_choice(config))))
    if chosen["split"]:  # the processor is split into as many devices as were planned for
        jax.config.update("jax_num_cpu_devices", chosen["split"])  # type: ignore[no-untyped-call]  # of jax
    tell(chosen["line"])
    model = config.model.model_copy(update={"remat": chosen["remat"]})
    return config.model_copy(update={"mesh": MeshConfig.model_validate(chosen["mesh"]), "model": model})


def _choice(config: TrainConfig) -> dict[str, object]:
    """Return the mesh, whether activations are computed again, the devices of a split processor, and the line."""
    devices, profile, note = _machine()
    network = describe_network(config.model_copy(update={"mesh": MeshConfig()}))
    survey = survey_run(network, devices, profile)
    choice = survey.choice
    if choice is None or choice.candidate.config is None:
        raise InvalidInput(f"mesh = 'auto': {verdict(survey)}")
    alone = not jax.distributed.is_initialized()
    return {
        "mesh": choice.candidate.mesh.model_dump(mode="json", exclude_unset=True),
        "remat": choice.candidate.config.model.remat,
        "split": devices if alone and profile.device.kind == "cpu" else 0,
        "line": f"mesh {mesh_text(choice)}: {verdict(survey)}{note}",
    }


def _machine() -> tuple[int, Profile, str]:
    """Return the devices of the run, the profile of what can be measured here, and what that leaves out."""
    if not jax.distributed.is_initialized():
        devices = device_count()
        return devices, this_machine(devices), ""
    processes = global_state.num_processes or 1
    found = find_rendezvous(os.environ)
    mine, here = (found.local if found is not None else None) or (0, processes)
    note = "" if here == processes else " Links between machines were not measured; those of this one stand for them."
    gpus = local_gpus(mine, here, os.environ)
    if gpus:  # one process sees all GPUs of a machine as several do
        return len(gpus) * processes, this_machine(len(gpus) * here), note
    split = re.search(rf"{FLAG}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    each = int(split[1]) if split else 1
    return each * processes, this_machine(each * here, processes=here), note
