"""Who the other processes are, as every launcher says it; and what becomes of a run when one of them dies."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxtrain.config import MeshConfig, TrainConfig
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.processes import Agreement, find_rendezvous, first_host, local_gpus, spread_mesh
from zarr_store.errors import InvalidInput

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "PMIX_NAMESPACE": "prterun-vm-28270@1",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-08],login", "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}  # fmt: skip


def test_open_mpi_on_one_machine_meets_on_loopback() -> None:
    found = find_rendezvous(OPEN_MPI)
    assert found is not None
    assert (found.processes, found.process, found.source, found.local) == (2, 1, "Open MPI", (1, 2))
    host, _, port = (found.coordinator or "").partition(":")
    assert host == "127.0.0.1"
    assert 61440 <= int(port) < 65536
    other = find_rendezvous(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"})
    assert other is not None
    assert other.coordinator == found.coordinator  # all work out the same
    elsewhere = find_rendezvous(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-vm-28271@1"})
    assert elsewhere is not None
    assert elsewhere.coordinator != found.coordinator  # two runs on one machine do not meet


def test_mpich_and_a_single_process() -> None:
    found = find_rendezvous({"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "2"})
    assert found is not None
    assert (found.processes, found.process, found.source) == (4, 2, "MPICH")
    assert find_rendezvous({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None
    assert find_rendezvous({}) is None


def test_slurm_meets_at_the_first_host_of_the_step() -> None:
    found = find_rendezvous(SLURM)
    assert found is not None
    assert (found.processes, found.process, found.source, found.local) == (5, 3, "SLURM", (1, 2))
    assert (found.coordinator or "").startswith("gpu07:")
    # srun speaks PMI as well; the batch script outside of srun knows the tasks, but is alone
    both = find_rendezvous(SLURM | {"PMI_SIZE": "5", "PMI_RANK": "3"})
    assert both is not None
    assert both.source == "SLURM"
    assert find_rendezvous({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    assert first_host("a1") == "a1"
    with pytest.raises(InvalidInput, match="SLURM_STEP_NODELIST"):
        first_host("")


def test_what_is_named_wins_and_tpu_is_left_to_jax() -> None:
    named = find_rendezvous(SLURM | {"TERRASHARD_COORDINATOR": "10.0.0.9:7000"})
    assert named is not None
    assert (named.coordinator, named.processes, named.process) == ("10.0.0.9:7000", 5, 3)
    own = find_rendezvous(
        OPEN_MPI | {"TERRASHARD_COORDINATOR": "h:1", "TERRASHARD_PROCESSES": "3", "TERRASHARD_PROCESS": "2"}
    )
    assert own is not None
    assert (own.coordinator, own.processes, own.process) == ("h:1", 3, 2)
    for environment in ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"TERRASHARD_COORDINATOR": "auto"}):
        tpu = find_rendezvous(environment)
        assert tpu is not None
        assert (tpu.coordinator, tpu.processes, tpu.process) == (None, None, None)
    assert find_rendezvous({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    with pytest.raises(InvalidInput, match="OMPI_COMM_WORLD_RANK must be a whole number, got 'x'"):
        find_rendezvous(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "x"})


def test_several_machines_need_a_name_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(InvalidInput, match=r"needs mpi4py .*terrashard\[mpi\].*or TERRASHARD_COORDINATOR"):
        find_rendezvous(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    named = find_rendezvous(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "TERRASHARD_COORDINATOR": "a:1"})
    assert named is not None
    assert named.coordinator == "a:1"


def test_processes_of_one_machine_share_its_gpus() -> None:
    assert [local_gpus(i, 2, {"CUDA_VISIBLE_DEVICES": "4,5,6"}) for i in (0, 1)] == [[0], [1, 2]]
    assert local_gpus(0, 2, {"CUDA_VISIBLE_DEVICES": ""}) is None


def test_one_process_keeps_its_mesh_and_its_wishes() -> None:
    config = TrainConfig.model_validate({"data": {"cube": "c.zarr"}})
    assert spread_mesh(config) is config
    agreement = Agreement(make_mesh(MeshConfig(data=2)))
    assert agreement.answer(agreement.ask(True))
    assert not agreement.answer(agreement.ask(False))


@pytest.mark.parametrize(
    ("sections", "data"),
    [
        ({}, 8),
        ({"run": {"batch_size": 12}}, 6),
        ({"mesh": {"model": 2}}, 4),
        ({"mesh": {"zero": 3}}, 8),
        ({"mesh": {"pipe": 2, "microbatches": 4}}, 4),
        ({"mesh": {"data": 2}}, 2),
        ({"model": {"norm": "local"}}, 1),
    ],
)
def test_one_process_takes_all_accelerators_of_its_machine(
    sections: dict[str, Any], data: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert jax.device_count() == 8
    spread = spread_mesh(TrainConfig.model_validate({"data": {"cube": "c.zarr"}, **sections}))
    assert spread.mesh.data == data
    assert spread.mesh.zero == sections.get("mesh", {}).get("zero", 0)


def test_a_single_accelerator_leaves_it_to_the_mesh_to_refuse_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = TrainConfig.model_validate({"data": {"cube": "c.zarr"}, "mesh": {"zero": 1}})
    assert spread_mesh(config) is config
    with pytest.raises(InvalidInput, match="of which there is one device"):
        make_mesh(config.mesh)


def test_a_child_dies_with_its_parent() -> None:
    """T11: the parent is killed, so it cannot say goodbye; the child ends all the same."""
    child = "import os, time; from jaxtrain.parallel.processes import die_with_parent; "
    child += "die_with_parent(int(os.environ['TERRASHARD_PARENT'])); print('ready', flush=True); time.sleep(60)"
    parent = f"""
        import os, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE,
                                 env=os.environ | {{"TERRASHARD_PARENT": str(os.getpid())}})
        assert child.stdout.readline() == b"ready\\n"
        print(child.pid, flush=True)
        child.wait()
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected by its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
