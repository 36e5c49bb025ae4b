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
from jaxtrain.parallel.processes import Agreement, await_name, find_rendezvous, first_host, local_gpus, spread_mesh
from jaxtrain.parallel.rendezvous import find_group
from zarr_store.errors import AccessError, InvalidInput

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


@pytest.mark.parametrize(
    ("variables", "own"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "a100:2"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_TRES_PER_TASK": "cpu=4,gres/gpu:a100=2"}, True),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "4", "SLURM_GPU_BIND": "per_task:2"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "2", "SLURM_GPU_BIND": "none"}, False),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, False),
        ({"SLURM_GPUS_PER_TASK": "1"}, False),
    ],
)
def test_gpus_that_slurm_gave_to_a_task_are_not_divided_again(variables: dict[str, str], own: bool) -> None:
    """Its number on the machine would name a GPU that it does not see, or leave half of its own idle."""
    found = find_rendezvous(SLURM | variables)
    assert found is not None
    assert found.local == (None if own else (1, 2))


TRAINER = {
    "JAX_NUM_PROCESSES": "16", "JAX_PROCESS_ID": "3", "JAX_COORDINATOR_ADDRESS": "zagreb-node-0-0.zagreb:29500",
    "JAX_COORDINATOR_PORT": "29500", "JAX_DISTRIBUTED_BACKEND": "gloo",
}  # fmt: skip
JAXJOB = {
    "COORDINATOR_ADDRESS": "zagreb-worker-0", "COORDINATOR_PORT": "6666", "NUM_PROCESSES": "4", "PROCESS_ID": "1",
}  # fmt: skip
TORCH = {
    "PET_NNODES": "4", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "zagreb-node-0-0.zagreb",
    "PET_MASTER_PORT": "29500",
}  # fmt: skip
JOBSET = {
    "JOB_COMPLETION_INDEX": "5", "JOBSET_NAME": "zagreb", "REPLICATED_JOB_NAME": "process", "JAX_NUM_PROCESSES": "8",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "coordinator", "processes", "process", "source"),
    [
        (TRAINER, "zagreb-node-0-0.zagreb:29500", 16, 3, "Kubeflow Trainer"),
        (JAXJOB, "zagreb-worker-0:6666", 4, 1, "Kubeflow JAXJob"),
        (TORCH, "zagreb-node-0-0.zagreb:29500", 4, 2, "Kubeflow's torch runtime"),
        (JOBSET, "zagreb-process-0-0.zagreb:", 8, 5, "JobSet"),
        (
            {
                "JOB_COMPLETION_INDEX": "1",
                "JOBSET_NAME": "z",
                "HOSTNAME": "z-my-job-0-1",
                "JAX_PROCESS_COUNT": "2",
            },
            "z-my-job-0-0.z:",
            2,
            1,
            "JobSet",
        ),
        (  # as manifests for JobSet often have it: the index is that of Kubernetes
            {"JOB_COMPLETION_INDEX": "1", "JAX_COORDINATOR_ADDRESS": "a-0-0.a", "JAX_COORDINATOR_PORT": "1234",
             "JAX_PROCESS_COUNT": "2"},
            "a-0-0.a:1234", 2, 1, "Kubeflow Trainer",
        ),
    ],
)  # fmt: skip
def test_what_kubernetes_injects_is_understood(
    variables: dict[str, str], coordinator: str, processes: int, process: int, source: str
) -> None:
    found = find_rendezvous(variables)
    assert found is not None
    assert (found.coordinator or "").startswith(coordinator)
    assert (found.processes, found.process, found.source) == (processes, process, source)
    assert found.local is None  # a pod has its own GPUs
    assert found.late
    host, _, port = (found.coordinator or "").rpartition(":")
    assert host
    assert port.isdecimal()


def test_a_pod_alone_and_a_pod_that_knows_too_little() -> None:
    for variables in (
        TRAINER | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        TORCH | {"PET_NNODES": "1", "PET_NODE_RANK": "0"},
        JOBSET | {"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"},
        {"JOB_COMPLETION_INDEX": "1"},  # an indexed Job whose pods have nothing to do with each other
        {"NUM_PROCESSES": "4", "PROCESS_ID": "1"},  # names that anything may have
    ):
        assert find_rendezvous(variables) is None
    with pytest.raises(InvalidInput, match="zagreb needs JAX_NUM_PROCESSES, which JobSet does not set by itself"):
        find_rendezvous({name: value for name, value in JOBSET.items() if name != "JAX_NUM_PROCESSES"})
    with pytest.raises(InvalidInput, match="pod 5 of Job 0 is none of 4 processes"):
        find_rendezvous(JOBSET | {"JAX_NUM_PROCESSES": "4"})
    with pytest.raises(InvalidInput, match="pod 1 of Job 1 is none"):
        find_rendezvous(JOBSET | {"JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "1"})
    with pytest.raises(InvalidInput, match="PET_NNODES must be a whole number, got '1:4'"):
        find_rendezvous(TORCH | {"PET_NNODES": "1:4"})
    # the address alone leaves the numbers to the starter that has them
    both = find_rendezvous(SLURM | {"JAX_COORDINATOR_ADDRESS": "h:1"})
    assert both is not None
    assert both.source == "SLURM"


def test_the_name_of_the_first_pod_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([OSError("unknown"), OSError("unknown"), []])

    def lookup(host: str, port: None) -> list[Any]:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return []

    monkeypatch.setattr("socket.getaddrinfo", lookup)
    await_name("zagreb-node-0-0.zagreb", 0.5)
    assert next(answers, None) is None
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("unknown")))
    with pytest.raises(AccessError, match=r"no name server knows zagreb-0 within 0\.05 s .*headless service"):
        await_name("zagreb-0", 0.05)


def test_replicas_meet_at_the_launcher_or_at_process_0() -> None:
    launched = {"TERRASHARD_HETERO_COORDINATOR": "10.0.0.1:7000", "TERRASHARD_HETERO_SECRET": "s3cret",
                "TERRASHARD_HETERO_NAME": "gpu-a"}  # fmt: skip
    group = find_group(launched)
    assert group is not None
    assert (group.address, group.name, group.leads) == ("10.0.0.1:7000", "gpu-a", False)
    assert "s3cret" not in repr(group)
    # in a batch job nobody else is there: process 0 leads, and all work out the same address
    variables = {"TERRASHARD_HETERO_SECRET": "s", "TERRASHARD_HETERO_MIN": "2", "TERRASHARD_HETERO_MAX": "6"}
    own, first = find_group(SLURM | variables), find_group(SLURM | variables | {"SLURM_PROCID": "0"})
    assert own is not None
    assert first is not None
    assert (own.leads, first.leads, own.expected, own.least, own.most) == (False, True, 5, 2, 6)
    assert own.address == first.address
    assert own.name != first.name
    distributed = find_rendezvous(SLURM)
    assert distributed is not None
    assert own.address != distributed.coordinator
    assert find_group(SLURM) is None
    assert find_group(variables) is None
    with pytest.raises(InvalidInput, match="TERRASHARD_HETERO_SECRET is not"):
        find_group({"TERRASHARD_HETERO_COORDINATOR": "10.0.0.1:7000"})
    with pytest.raises(InvalidInput, match="must be host:port"):
        find_group(launched | {"TERRASHARD_HETERO_COORDINATOR": "10.0.0.1"})


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
    with pytest.raises(InvalidInput, match="which has one device"):
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
