"""`find_rendezvous` reads from the environment where the processes of a run meet; `find_group` does so for replicas.

Nothing here starts JAX or opens a connection, so the launcher may use it too. The starters are asked in this order:

1. the variables TERRASHARD_COORDINATOR, _PROCESSES and _PROCESS (`terrashard launch` sets them)
2. the variables that Kubeflow injects for JAX (Trainer: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID;
   Training Operator: COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID), and those of its runtime for torch (PET_…)
3. JobSet: JOB_COMPLETION_INDEX, and JOBSET_NAME and REPLICATED_JOB_NAME from the labels of the pod
4. Open MPI and MPICH: `mpirun -n 2 terrashard train …`
5. SLURM: `srun -n 2 terrashard train …`
6. Cloud TPU, or TERRASHARD_COORDINATOR=auto: JAX finds them itself
"""

from __future__ import annotations

import glob
import os
import platform
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from zarr_store.errors import InvalidInput

__all__ = ["Group", "Rendezvous", "find_group", "find_rendezvous", "first_host", "local_gpus", "read_number"]

COORDINATOR = "TERRASHARD_COORDINATOR"
PROCESSES = "TERRASHARD_PROCESSES"
PROCESS = "TERRASHARD_PROCESS"
LOCAL = "TERRASHARD_LOCAL_PROCESS"
LOCAL_COUNT = "TERRASHARD_LOCAL_PROCESSES"

GROUP = "TERRASHARD_HETERO_COORDINATOR"
GROUP_SECRET = "TERRASHARD_HETERO_SECRET"
GROUP_NAME = "TERRASHARD_HETERO_NAME"
GROUP_EXPECTED = "TERRASHARD_HETERO_PROCESSES"
GROUP_LEAST = "TERRASHARD_HETERO_MIN"
GROUP_MOST = "TERRASHARD_HETERO_MAX"

_FIRST_PORT, _PORTS = 61440, 4096
"""Ports above those that Linux assigns (32768-60999), so that one computed from a job's name is free."""
_COUNTS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT")
_INDICES = ("JAX_PROCESS_ID", "JAX_PROCESS_INDEX")


@dataclass(frozen=True)
class Rendezvous:
    """The meeting point of the processes of a run.

    Attributes:
        coordinator: host:port of process 0; None lets JAX find it.
        processes: Number of processes; None lets JAX find it.
        process: This one, from 0.
        source: Origin of these values, for messages.
        local: (this one, how many) among those of this machine, where that is known: each takes its share of the GPUs.
        late: Whether the name of the coordinator's host may become known only some seconds after the start.
    """

    coordinator: str | None
    processes: int | None
    process: int | None
    source: str
    local: tuple[int, int] | None = None
    late: bool = False


def find_rendezvous(environment: Mapping[str, str]) -> Rendezvous | None:
    """Read from the environment where the processes meet; None if this one is alone.

    Raises:
        InvalidInput: Variables contradict each other, or some are absent.
    """
    env = environment
    coordinator = env.get(COORDINATOR)
    if coordinator == "auto":
        return Rendezvous(None, None, None, f"{COORDINATOR}=auto")
    processes, process = read_number(PROCESSES, env), read_number(PROCESS, env)
    if processes is not None or process is not None:
        own = read_number(LOCAL, env), read_number(LOCAL_COUNT, env)
        local = None if own[0] is None or own[1] is None else (own[0], own[1])
        return Rendezvous(coordinator, processes, process, f"{COORDINATOR}, {PROCESSES} and {PROCESS}", local)
    for ask in (_of_kubeflow, _of_jobset, _of_open_mpi, _of_mpich, _of_slurm, _of_tpu):
        found = ask(env)
        if found is not None:
            return replace(found, coordinator=coordinator or found.coordinator)
    return None if coordinator is None else Rendezvous(coordinator, None, None, COORDINATOR)


def _of_kubeflow(env: Mapping[str, str]) -> Rendezvous | None:
    """Read the variables of Kubeflow: Trainer 2, its predecessor (JAXJob), and Trainer's runtime for torch; or None."""
    for source, address, port, counts, indices in (
        ("Kubeflow Trainer", "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", _COUNTS, _INDICES),
        ("Kubeflow JAXJob", "COORDINATOR_ADDRESS", "COORDINATOR_PORT", ("NUM_PROCESSES",), ("PROCESS_ID",)),
        ("Kubeflow's torch runtime", "PET_MASTER_ADDR", "PET_MASTER_PORT", ("PET_NNODES",), ("PET_NODE_RANK",)),
    ):
        if address not in env:
            continue
        processes, process = _first_number(counts, env), _first_number(indices, env)
        if processes == 1:
            return None
        if processes is None and process is None and "JOB_COMPLETION_INDEX" not in env:
            continue  # the address alone: another starter may know the rest
        if process is None:
            process = read_number("JOB_COMPLETION_INDEX", env)
        return Rendezvous(_with_port(env[address], env.get(port)), processes, process, source, late=True)
    return None


def _of_jobset(env: Mapping[str, str]) -> Rendezvous | None:
    """Read the index that Kubernetes gives a pod of an indexed Job, and the names that a JobSet's labels give it.

    The first pod has the host name JOBSET-JOB-0-0.JOBSET in the headless service of the JobSet.
    """
    process, name = read_number("JOB_COMPLETION_INDEX", env), env.get("JOBSET_NAME")
    if process is None or name is None:
        return None
    job = env.get("REPLICATED_JOB_NAME") or env.get("JOBSET_REPLICATED_JOB_NAME") or _job_of_host(name, env)
    processes = _first_number((*_COUNTS, "NUM_PROCESSES", "NNODES"), env)
    if processes is None or job is None:
        absent = "JAX_NUM_PROCESSES" if processes is None else "REPLICATED_JOB_NAME"
        raise InvalidInput(
            f"a pod of the JobSet {name} needs {absent}, which JobSet does not set by itself; `terrashard launch "
            "--emit jobset` writes a JobSet that has all variables"
        )
    if processes == 1:
        return None
    if process >= processes or (read_number("JOB_INDEX", env) or 0) > 0:
        raise InvalidInput(
            f"JobSet {name}: pod {process} of Job {env.get('JOB_INDEX', '0')} is none of {processes} processes; use "
            "one Job with as many completions, or set JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS for each pod"
        )
    return Rendezvous(f"{name}-{job}-0-0.{name}:{_port(name)}", processes, process, "JobSet", late=True)


def _job_of_host(name: str, env: Mapping[str, str]) -> str | None:
    found = re.fullmatch(rf"{re.escape(name)}-(.+)-\d+-\d+", env.get("HOSTNAME", ""))
    return found[1] if found else None


def _with_port(address: str, port: str | None) -> str:
    """Return host:port of an address that may have its port in a variable of its own."""
    if re.search(r":\d+$", address):
        return address
    return f"{address}:{port or _port(address)}"


def _first_number(names: tuple[str, ...], env: Mapping[str, str]) -> int | None:
    return next((read_number(name, env) for name in names if name in env), None)


def _of_open_mpi(env: Mapping[str, str]) -> Rendezvous | None:
    return _of_mpi(
        env, "Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE", ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri"),
    )  # fmt: skip


def _of_mpich(env: Mapping[str, str]) -> Rendezvous | None:
    if "SLURM_STEP_NODELIST" in env:  # srun sets PMI_RANK as well, and knows the hosts
        return None
    return _of_mpi(env, "MPICH", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_PORT", "PMI_ID"))


def _of_mpi(
    env: Mapping[str, str], name: str, size: str, rank: str, local_rank: str, local_size: str, job: tuple[str, ...]
) -> Rendezvous | None:
    processes, process = read_number(size, env), read_number(rank, env)
    if processes is None or process is None or processes == 1:
        return None
    own, here = read_number(local_rank, env), read_number(local_size, env)
    local = None if own is None or here is None else (own, here)
    if here is None or here == processes:  # all of one machine: its name need not be known
        # PMI_PORT is the same for all processes of an mpirun, PMI_ID is not: without a job's name its parent names it
        named = next((env[key] for key in job if key in env and key != "PMI_ID"), str(os.getppid()))
        return Rendezvous(f"127.0.0.1:{_port(named)}", processes, process, name, local)
    return Rendezvous(None if COORDINATOR in env else _ask_mpi(name), processes, process, name, local)


def _ask_mpi(name: str) -> str:
    """Choose a port in process 0 and send it to the others through MPI."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise InvalidInput(
            f"{name} has started processes on several machines; to find process 0 this needs mpi4py (pip install "
            f"'terrashard[mpi]'), or {COORDINATOR}=host:port of the first one"
        ) from error
    import socket

    world = MPI.COMM_WORLD
    mine = None
    if world.Get_rank() == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            mine = f"{socket.gethostname()}:{probe.getsockname()[1]}"
    return str(world.bcast(mine, root=0))


def _of_slurm(env: Mapping[str, str]) -> Rendezvous | None:
    """Read the variables of a step of `srun`; None without one: the batch script has SLURM_NTASKS, but runs alone."""
    processes, process = read_number("SLURM_STEP_NUM_TASKS", env), read_number("SLURM_PROCID", env)
    nodes = env.get("SLURM_STEP_NODELIST")
    if processes is None or process is None or nodes is None or processes == 1:
        return None
    host, port = first_host(nodes), _port(f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_STEP_ID', '')}")
    own, here = read_number("SLURM_LOCALID", env), _tasks_here(env)
    whole = own is None or not here or _gpus_are_divided(env)
    return Rendezvous(f"{host}:{port}", processes, process, "SLURM", None if whole else (own or 0, here or 1))


def _gpus_are_divided(env: Mapping[str, str]) -> bool:
    """Return whether SLURM shows each task its own GPUs only, as it does for --gpus-per-task and --gpu-bind.

    Such a task has GPU 0, whatever its number on the machine (jax-ml/jax 28194), and all that it sees are its own.
    """
    named = env.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return False
    visible = len([name for name in named.split(",") if name.strip()])
    asked = re.search(r"(?:^|[:=])(\d+)$", env.get("SLURM_GPUS_PER_TASK", "")) or re.search(
        r"gres[/:]gpu[^,]*[:=](\d+)", env.get("SLURM_TRES_PER_TASK", "")
    )
    if asked:
        return visible <= int(asked[1])
    on_node = env.get("SLURM_GPUS_ON_NODE", "")
    return on_node.isdigit() and visible < int(on_node)


def _tasks_here(env: Mapping[str, str]) -> int | None:
    """Return the number of tasks of this node; None if SLURM does not say.

    SLURM_STEP_TASKS_PER_NODE is like "2(x3),1" for nodes 0, 1, 2 and 3.
    """
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()):
            counts += [int(found[1])] * int(found[2] or 1)
    node = read_number("SLURM_NODEID", env) or 0
    return counts[node] if node < len(counts) else None


def first_host(nodes: str) -> str:
    """Return the first name of a SLURM node list.

    >>> first_host("gpu[007-010,012],login1"), first_host("node-1,node-2"), first_host("a[3,5]-ib")
    ('gpu007', 'node-1', 'a3-ib')
    """
    found = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodes.strip())
    if not found:
        raise InvalidInput(f"SLURM_STEP_NODELIST is {nodes!r}, expected names such as gpu[007-010]")
    head, numbers, tail = found[1], found[2], found[3] or ""
    return head if numbers is None else head + re.split(r"[-,]", numbers)[0] + tail


def _of_tpu(env: Mapping[str, str]) -> Rendezvous | None:
    hosts = [name for name in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(hosts) < 2 and "MEGASCALE_COORDINATOR_ADDRESS" not in env:
        return None
    return Rendezvous(None, None, None, "Cloud TPU")


def _port(name: str) -> int:
    return _FIRST_PORT + zlib.crc32(name.encode()) % _PORTS


def local_gpus(process: int, count: int, environment: Mapping[str, str]) -> list[int] | None:
    """Return the GPUs of this machine for one of its `count` processes; None if there are too few to share.

    >>> local_gpus(1, 2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    [2, 3]
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = len(glob.glob("/dev/nvidia[0-9]*")) if named is None else len([n for n in named.split(",") if n.strip()])
    if gpus < count:
        return None
    return list(range(process * gpus // count, (process + 1) * gpus // count))


@dataclass(frozen=True)
class Group:
    """The meeting point of the replicas of a run with unequal or changing machines.

    Attributes:
        address: host:port of the coordinator.
        secret: Shared by all members; shown nowhere.
        name: Name of this member, unique among those that ever were.
        leads: Whether this process starts the coordinator, as nothing else did.
        expected: Number of processes that the run begins with.
        least: Fewest members with which the run goes on.
        most: Largest number of members; None is no limit.
    """

    address: str
    secret: str = field(repr=False)
    name: str
    leads: bool
    expected: int
    least: int = 1
    most: int | None = None


def find_group(environment: Mapping[str, str]) -> Group | None:
    """Read from the environment where the replicas meet; None if this process is the only one.

    `terrashard launch` names a coordinator, which it holds itself. A job of SLURM or Kubernetes has only the secret;
    there process 0 holds the coordinator, at a port of its own beside that of `find_rendezvous`.

    Raises:
        InvalidInput: Variables contradict each other, or some are absent.
    """
    env = environment
    address, secret = env.get(GROUP), env.get(GROUP_SECRET)
    least, most = read_number(GROUP_LEAST, env) or 1, read_number(GROUP_MOST, env)
    if address is not None:
        if not secret:
            raise InvalidInput(
                f"{GROUP} is set and {GROUP_SECRET} is not: start with `terrashard launch`, or set the secret that the "
                "other members have"
            )
        if not re.fullmatch(r".+:\d+", address):
            raise InvalidInput(f"{GROUP} must be host:port, such as 10.0.0.1:1234, got {address!r}")
        name = env.get(GROUP_NAME) or f"{platform.node()}-{os.getpid()}"
        return Group(address, secret, name, False, read_number(GROUP_EXPECTED, env) or 1, least, most)
    found = find_rendezvous(env) if secret else None
    if not secret or found is None or found.coordinator is None or found.processes is None or found.process is None:
        return None
    host = found.coordinator.rpartition(":")[0]
    restarted = env.get("SLURM_RESTART_COUNT", "0")
    # a pod that replaces another one has its number, but is another member
    name = env.get(GROUP_NAME) or f"{found.process}-{platform.node()}-{os.getpid()}-{restarted}"
    return Group(
        f"{host}:{_port(f'group at {found.coordinator}')}",
        secret,
        name,
        found.process == 0,
        found.processes,
        least,
        most,
    )


def read_number(name: str, env: Mapping[str, str]) -> int | None:
    """Return the value of a variable as a whole number; None where it is not set."""
    text = env.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise InvalidInput(f"{name} must be a whole number, got {text!r}") from error
