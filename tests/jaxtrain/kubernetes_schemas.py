"""What the published types of Kubernetes say about the resources that the launcher writes, as JSON schemas.

Written from the Go types of kubernetes-sigs/jobset (api/jobset/v1alpha2/jobset_types.go), kubeflow/trainer
(pkg/apis/trainer/v1alpha1/trainjob_types.go, Trainer 2.2 and later), and k8s.io/api (batch/v1, core/v1). A field that a
type does not have is refused, as the API server's strict validation does.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def listed(item: Schema, most: int = 1000, least: int = 0) -> Schema:
    return {"type": "array", "items": item, "maxItems": most, "minItems": least}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


TEXT: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
LABEL: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
NAME_1035: Schema = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[kKMGTP]i?)?$"}
AMOUNTS: Schema = {"type": "object", "additionalProperties": QUANTITY}

ENV_VAR = {
    **record(
        ("name",),
        name={"type": "string", "pattern": r"^[A-Za-z_][A-Za-z0-9_]*$"},
        value=TEXT,
        valueFrom=record(
            fieldRef=record(("fieldPath",), fieldPath=TEXT),
            secretKeyRef=record(("name", "key"), name=LABEL, key=TEXT),
        ),
    ),
    "not": {"required": ["value", "valueFrom"]},  # one or the other
}
VOLUME = record(("name",), name=LABEL, persistentVolumeClaim=record(("claimName",), claimName=LABEL))
MOUNT = record(("name", "mountPath"), name=LABEL, mountPath={"type": "string", "pattern": "^/"})
RESOURCES = record(requests=AMOUNTS, limits=AMOUNTS)
CONTAINER = record(
    ("name", "image"),
    name=LABEL,
    image=TEXT,
    command=listed(TEXT),
    env=listed(ENV_VAR),
    ports=listed(record(("containerPort",), containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
    resources=RESOURCES,
    workingDir=TEXT,
    volumeMounts=listed(MOUNT),
    securityContext=record(allowPrivilegeEscalation=BOOL, capabilities=record(drop=listed(TEXT), add=listed(TEXT))),
)
POD = record(
    ("containers", "restartPolicy"),
    containers=listed(CONTAINER, least=1),
    restartPolicy=one_of("Never", "OnFailure"),  # a Job allows no other; podFailurePolicy only Never
    terminationGracePeriodSeconds=COUNT,
    automountServiceAccountToken=BOOL,
    volumes=listed(VOLUME),
)
POD_FAILURE_RULE = {
    **record(
        ("action",),
        action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
        onExitCodes=record(
            ("operator", "values"),
            containerName=LABEL,
            operator=one_of("In", "NotIn"),
            values={**listed({"type": "integer", "minimum": 1}, most=255, least=1), "uniqueItems": True},
        ),
        onPodConditions=listed(record(("type", "status"), type=TEXT, status=one_of("True", "False", "Unknown")), 20),
    ),
    "oneOf": [{"required": ["onExitCodes"]}, {"required": ["onPodConditions"]}],
}
JOB = record(
    ("template",),
    parallelism=COUNT,
    completions=COUNT,
    completionMode=one_of("Indexed", "NonIndexed"),
    backoffLimit=COUNT,
    podFailurePolicy=record(("rules",), rules=listed(POD_FAILURE_RULE, most=20)),
    template=record(("spec",), metadata={"type": "object"}, spec=POD),
)
META = record(("name",), name=NAME_1035, namespace=LABEL)
JOBSET = record(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion=one_of("jobset.x-k8s.io/v1alpha2"),
    kind=one_of("JobSet"),
    metadata=META,
    spec=record(
        replicatedJobs=listed(
            record(
                ("name", "template"),
                name=LABEL,
                groupName=TEXT,
                replicas=COUNT,
                template=record(("spec",), metadata={"type": "object"}, spec=JOB),
            ),
            least=1,
        ),
        network=record(enableDNSHostnames=BOOL, subdomain=LABEL, publishNotReadyAddresses=BOOL),
        failurePolicy=record(
            maxRestarts=COUNT,
            restartStrategy=one_of("Recreate", "BlockingRecreate", "InPlaceRestart"),
            rules=listed(
                record(
                    ("name", "action"),
                    name={"type": "string", "pattern": r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action=one_of(
                        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
                        "RestartJobAndIgnoreMaxRestarts",
                    ),
                    onJobFailureReasons={
                        **listed(
                            one_of("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
                                   "MaxFailedIndexesExceeded", "PodFailurePolicy")
                        ),
                        "uniqueItems": True,
                    },
                    targetReplicatedJobs=listed(TEXT),
                )
            ),
        ),
        suspend=BOOL,
    ),
)  # fmt: skip
POD_PATCH = record(
    volumes=listed(VOLUME, 128),
    # the environment of the container "node" can only be set by the trainer's own field
    containers=listed(record(("name",), name=LABEL, volumeMounts=listed(MOUNT, 128)), 64),
    nodeSelector=AMOUNTS,
)
JOB_PATCH = record(
    ("name",),
    name=LABEL,
    template=record(spec=record(template=record(spec=POD_PATCH))),
)
TRAINJOB = record(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion=one_of("trainer.kubeflow.org/v1alpha1"),
    kind=one_of("TrainJob"),
    metadata=META,
    spec=record(
        ("runtimeRef",),
        runtimeRef=record(
            ("name",), name={"type": "string", "minLength": 1, "maxLength": 253}, apiGroup=TEXT, kind=TEXT
        ),
        trainer=record(
            image={"type": "string", "maxLength": 500},
            command=listed({"type": "string", "maxLength": 65536}, 128),
            args=listed({"type": "string", "maxLength": 65536}, 128),
            env=listed(ENV_VAR, 128),
            numNodes=COUNT,
            resourcesPerNode=RESOURCES,
        ),
        runtimePatches=listed(
            record(
                ("manager",),
                manager={"type": "string", "minLength": 1, "maxLength": 253},
                trainingRuntimeSpec=record(template=record(spec=record(replicatedJobs=listed(JOB_PATCH, 100)))),
            ),
            16,
        ),
        suspend=BOOL,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
    ),
)
