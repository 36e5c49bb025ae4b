"""`jobset` and `train_job` make the Kubernetes resources of a run, and `resource_text` their file.

Both give each pod the variables JAX_NUM_PROCESSES, JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS, which
`start_distributed` understands. A JobSet names them itself; for a TrainJob the runtime `jax-distributed` of Kubeflow
Trainer does.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from jaxtrain.launching.job import FINAL_CODES, MARK, SAVE_S, Job
from zarr_store.errors import InvalidInput

__all__ = ["JOBSET_OPTIONS", "TRAINJOB_OPTIONS", "jobset", "resource_text", "train_job"]

_RESOURCES = ("cpu", "memory", "gpu", "gpu_resource")
JOBSET_OPTIONS = ("image", "namespace", "claim", "mount", "folder", *_RESOURCES)
TRAINJOB_OPTIONS = ("image", "namespace", "claim", "mount", "runtime", *_RESOURCES)

_PORT = 29500
"""Port of the coordinator: each pod has an address of its own, so it is always free."""
_PROCESS, _CONTAINER, _VOLUME = "process", "train", "data"


def jobset(job: Job) -> dict[str, Any]:
    """Return the JobSet (jobset.x-k8s.io/v1alpha2): one indexed Job with a pod for each process.

    Options: `image`; `namespace`; `claim` (PersistentVolumeClaim) and `mount` (where it is seen, default /data);
    `folder` to start in; `cpu`, `memory`, `gpu` of each pod, and `gpu_resource` (default nvidia.com/gpu).

    Raises:
        InvalidInput: An option is unknown or absent.
    """
    job.check_options("jobset", JOBSET_OPTIONS, {"image": "REGISTRY/NAME:TAG, an image with this terrashard in it"})
    first = f"{job.name}-{_PROCESS}-0-0.{job.name}:{_PORT}"
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    environment = [
        {"name": "JAX_NUM_PROCESSES", "value": str(job.processes)},
        {"name": "JAX_PROCESS_ID", "valueFrom": index},
        {"name": "JAX_COORDINATOR_ADDRESS", "value": first},
        *_group(job),
    ]
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": job.options["image"],
        "command": _command(job),
        "env": environment,
        "ports": [{"containerPort": _PORT}],
        "resources": _resources(job),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if "folder" in job.options:
        container["workingDir"] = job.options["folder"]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SAVE_S,
        "automountServiceAccountToken": False,
        "containers": [container],
    }
    if (claim := _claim(job)) is not None:
        container["volumeMounts"] = [{"name": _VOLUME, "mountPath": _mount(job)}]
        pod["volumes"] = [claim]
    rules = [
        {"action": "FailJob",
         "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": list(FINAL_CODES)}},
        # a node that was drained or preempted is no failure of the run
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]  # fmt: skip
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job.restarts,
                "rules": [
                    {"name": "causeStays", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [
                {
                    "name": _PROCESS,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "parallelism": job.processes,
                            "completions": job.processes,
                            "completionMode": "Indexed",
                            # a replica is replaced by itself; processes of an ordinary run begin again together
                            "backoffLimit": job.restarts * job.processes if job.replicas else 0,
                            "podFailurePolicy": {"rules": rules},
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


def train_job(job: Job) -> dict[str, Any]:
    """Return the TrainJob (trainer.kubeflow.org/v1alpha1) for Kubeflow Trainer 2.2 and later.

    Options: those of `jobset` but for `folder`, which a TrainJob does not have, and `runtime` (default
    jax-distributed).

    Raises:
        InvalidInput: An option is unknown or absent.
    """
    job.check_options("trainjob", TRAINJOB_OPTIONS, {"image": "REGISTRY/NAME:TAG, an image with this terrashard in it"})
    trainer: dict[str, Any] = {
        "image": job.options["image"],
        "command": _command(job),
        "numNodes": job.processes,
    }
    if resources := _resources(job):
        trainer["resourcesPerNode"] = resources
    if environment := _group(job):
        trainer["env"] = environment
    spec: dict[str, Any] = {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "ClusterTrainingRuntime",
            "name": job.options.get("runtime", "jax-distributed"),
        },
        "trainer": trainer,
    }
    if (claim := _claim(job)) is not None:
        # the runtime's job and its container have the same name, "node"
        container = {"name": "node", "volumeMounts": [{"name": _VOLUME, "mountPath": _mount(job)}]}
        pod = {"volumes": [claim], "containers": [container]}
        node = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
        patch = {"template": {"spec": {"replicatedJobs": [node]}}}
        spec["runtimePatches"] = [{"manager": "terrashard.launch/emit", "trainingRuntimeSpec": patch}]
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job),
        "spec": spec,
    }


def resource_text(job: Job, resource: dict[str, Any]) -> str:
    """Return the file of a resource, with the commands that it needs as comments."""
    kind = resource["kind"].lower()
    lines = [f"# {MARK} {kind}. Start it with: kubectl create -f FILE"]
    if job.replicas:
        lines += [
            "# Before, once, a secret by which the replicas of this run know each other:",
            "#   openssl rand -hex 32 | "
            f"kubectl create secret generic {_secret_name(job)} --from-file=secret=/dev/stdin",
        ]
    plain = json.loads(json.dumps(resource))  # or YAML writes an anchor for what occurs twice
    body: str = yaml.safe_dump(plain, sort_keys=False)
    return "\n".join(lines) + "\n" + body


def _command(job: Job) -> list[str]:
    """Return the command; Kubernetes would replace $(NAME) by a variable, and $$ stands for one dollar there."""
    return [word.replace("$(", "$$(") for word in ("terrashard", *job.words)]


def _metadata(job: Job) -> dict[str, Any]:
    place = {"namespace": job.options["namespace"]} if "namespace" in job.options else {}
    return {"name": job.name, **place}


def _group(job: Job) -> list[dict[str, Any]]:
    """Return the variables of replicas. The first pod holds the coordinator; the secret comes from the cluster."""
    if not job.replicas:
        return []
    secret = {"secretKeyRef": {"name": _secret_name(job), "key": "secret"}}
    limit = [] if job.most is None else [{"name": "TERRASHARD_HETERO_MAX", "value": str(job.most)}]
    return [
        {"name": "TERRASHARD_HETERO_SECRET", "valueFrom": secret},
        {"name": "TERRASHARD_HETERO_MIN", "value": str(job.least)},
        *limit,
    ]


def _secret_name(job: Job) -> str:
    return f"{job.name}-group"


def _resources(job: Job) -> dict[str, Any]:
    """Return equal requests and limits, so that a pod gets what it was promised and no more."""
    amounts: dict[str, str] = {}
    for name in ("cpu", "memory"):
        if name in job.options:
            if not re.fullmatch(r"\d+(\.\d+)?(m|[kKMGTP]i?)?", job.options[name]):
                raise InvalidInput(
                    f"--cluster-option {name}={job.options[name]}: expected a quantity such as 4 or 16Gi"
                )
            amounts[name] = job.options[name]
    if (gpus := job.count("gpu")) is not None:
        amounts[job.options.get("gpu_resource", "nvidia.com/gpu")] = str(gpus)
    return {"requests": amounts, "limits": dict(amounts)} if amounts else {}


def _claim(job: Job) -> dict[str, Any] | None:
    claim = job.options.get("claim")
    if claim is None:
        if "mount" in job.options:
            raise InvalidInput("--cluster-option mount=PATH needs claim=NAME, the volume claim to mount there")
        return None
    return {"name": _VOLUME, "persistentVolumeClaim": {"claimName": claim}}


def _mount(job: Job) -> str:
    return job.options.get("mount", "/data")
