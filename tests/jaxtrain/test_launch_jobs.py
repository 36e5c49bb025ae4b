"""Job files for SLURM and Kubernetes: what they say, and what a run started by them makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jaxtrain.launching.job import Job, job_name, write_job_file
from jaxtrain.launching.kubernetes import jobset, resource_text, train_job
from jaxtrain.launching.sbatch import sbatch_script
from jaxtrain.parallel.rendezvous import find_group, find_rendezvous
from zarr_store.errors import InvalidInput

from .kubernetes_schemas import JOBSET, TRAINJOB

WORDS = ("train", "config file.toml", "--out", "runs/it's", "--set", "run.track=[$(HOME)]")
KUBERNETES = {"image": "registry/terrashard:1", "claim": "cubes", "mount": "/work", "namespace": "earth", "cpu": "4",
              "memory": "16Gi", "gpu": "2"}  # fmt: skip


def job(processes: int = 16, *, replicas: bool = False, **options: Any) -> Job:
    return Job(WORDS, "zagreb", processes, replicas=replicas, least=3, most=20, options=options)


# ---- SLURM: the script runs here with a srun and a scontrol of the test.

SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$0.words"
env > "$0.environment"
pwd > "$0.folder"
echo start >> "$0.starts"
code=$(sed -n "$(wc -l < "$0.starts")p" "$0.codes")
exit "${code:-0}"
"""


def submit(folder: Path, script: str, *codes: int, **variables: str) -> tuple[int, list[str], str]:
    """Run a batch script as SLURM does; srun ends with these codes in turn. Returns code, words of srun, requeued."""
    for name, text in (
        ("srun", SRUN),
        ("scontrol", '#!/bin/bash\necho "$@" > "$0.words"\n'),
        ("sleep", "#!/bin/bash\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "srun.codes").write_text("".join(f"{code}\n" for code in codes))
    (folder / "job.sbatch").write_text(script)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"} | variables
    done = subprocess.run(
        ["bash", folder / "job.sbatch"], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    requeued = folder / "scontrol.words"
    words = (folder / "srun.words").read_text().splitlines() if (folder / "srun.words").exists() else []
    return done.returncode, words, requeued.read_text().strip() if requeued.exists() else ""


def starts(folder: Path) -> int:
    return len((folder / "srun.starts").read_text().splitlines())


def test_a_batch_script_starts_the_command_and_asks_for_what_it_needs(tmp_path: Path) -> None:
    script = sbatch_script(
        job(queue="gpu", account="earth", walltime="12:00:00", nodes="4", cpus="8", gpus="1", memory="4G",
            directives="--constraint=a100; --exclusive", python="/opt/env/bin/python", folder=str(tmp_path))
    )  # fmt: skip
    head = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    for directive in ("--job-name=zagreb", "--ntasks=16", "--nodes=4", "--cpus-per-task=8", "--gpus-per-task=1",
                      "--mem-per-cpu=4G", "--partition=gpu", "--account=earth", "--time=12:00:00", "--requeue",
                      "--signal=TERM@120", "--constraint=a100", "--exclusive"):  # fmt: skip
        assert directive in head
    code, words, requeued = submit(tmp_path, script, SLURM_CPUS_PER_TASK="8")
    assert (code, requeued) == (0, "")
    assert words == ["--kill-on-bad-exit=1", "/opt/env/bin/python", "-P", "-m", "cli.main", *WORDS]
    seen = (tmp_path / "srun.environment").read_text()
    assert "SRUN_CPUS_PER_TASK=8" in seen  # srun no longer takes it from the job
    assert "HETERO" not in seen
    assert (tmp_path / "srun.folder").read_text().strip() == str(tmp_path)


def test_a_job_that_was_stopped_queues_itself_again_and_one_that_died_starts_again(tmp_path: Path) -> None:
    script = sbatch_script(job(folder=str(tmp_path)))
    for number, (codes, code, count, requeued) in enumerate(
        (
            ([75], 75, 1, "requeue 4711"),  # its time was up: saved
            ([2, 0], 2, 1, ""),  # a cause that stays
            ([137, 1, 0], 0, 3, ""),  # killed twice
            ([1, 1, 1, 1, 0], 1, 4, ""),  # not without end
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert submit(folder, script, *codes) == (code, [*submit_words()], requeued)
        assert starts(folder) == count


def submit_words() -> list[str]:
    import sys

    return ["--kill-on-bad-exit=1", sys.executable, "-P", "-m", "cli.main", *WORDS]


def test_replicas_of_a_batch_job_share_a_secret_and_survive_each_other(tmp_path: Path) -> None:
    script = sbatch_script(job(replicas=True, folder=str(tmp_path)))
    seen = []
    for _ in range(2):
        code, words, _ = submit(tmp_path, script)
        assert code == 0
        assert words[:2] == ["--kill-on-bad-exit=0", "--wait=0"]
        lines = dict(line.partition("=")[::2] for line in (tmp_path / "srun.environment").read_text().splitlines())
        assert not any(lines["TERRASHARD_HETERO_SECRET"] in word for word in words)
        seen.append(lines)
        step = {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "16",
                "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}  # fmt: skip
        group = find_group(lines | step)
        assert group is not None
        assert (group.leads, group.expected, group.least, group.most) == (False, 16, 3, 20)
    secrets = [lines["TERRASHARD_HETERO_SECRET"] for lines in seen]
    assert [len(secret) for secret in secrets] == [64, 64]
    assert secrets[0] != secrets[1]
    assert not any(secret in script for secret in secrets)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_signal_reaches_the_script_and_it_still_decides(tmp_path: Path) -> None:
    """SLURM signals the script, too, when a job is preempted: it must outlive srun to queue itself again."""
    script = sbatch_script(job(folder=str(tmp_path)))
    slow = SRUN.replace("echo start", "kill -TERM $PPID; echo start")
    folder = tmp_path / "slow"
    folder.mkdir()
    text = script.replace("srun ", f"{folder}/slow ", 1).replace("    srun", f"    {folder}/slow")
    (folder / "slow").write_text(slow)
    (folder / "slow").chmod(0o755)
    (folder / "slow.codes").write_text("75\n")
    code, _, requeued = submit(folder, text)
    assert (code, requeued) == (75, "requeue 4711")


# ---- Kubernetes


@pytest.mark.parametrize("replicas", [False, True])
def test_a_jobset_keeps_to_its_type_and_its_pods_find_each_other(replicas: bool) -> None:
    made = job(replicas=replicas, folder="/work", **dict[str, Any](KUBERNETES))
    text = resource_text(made, jobset(made))
    resource = yaml.safe_load(text)
    jsonschema.validate(resource, JOBSET)
    assert resource["metadata"] == {"name": "zagreb", "namespace": "earth"}
    (replicated,) = resource["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (16, 16, "Indexed")
    assert spec["backoffLimit"] == (48 if replicas else 0)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["terrashard", *WORDS[:-1], "run.track=[$$(HOME)]"]
    assert container["workingDir"] == "/work"
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/work"}]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "2"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    # what the cluster makes of it: the variables of pod 5
    pod = environment_of(container, index=5)
    found = find_rendezvous(pod)
    assert found is not None
    assert (found.coordinator, found.processes, found.process) == ("zagreb-process-0-0.zagreb:29500", 16, 5)
    group = find_group(pod)
    assert (group is not None) == replicas
    if group is not None:
        assert (group.leads, group.expected, group.least, group.most) == (False, 16, 3, 20)
        assert group.address.startswith("zagreb-process-0-0.zagreb:")
        assert group.address != found.coordinator
        first = find_group(environment_of(container, index=0))
        assert first is not None
        assert first.leads
        assert "kubectl create secret generic zagreb-group --from-file=secret=/dev/stdin" in text


def environment_of(container: dict[str, Any], index: int) -> dict[str, str]:
    """The variables of a pod, as its kubelet sets them."""
    values = {"JOB_COMPLETION_INDEX": str(index)}
    for variable in container["env"]:
        source = variable.get("valueFrom", {})
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            values[variable["name"]] = str(index)
        elif "secretKeyRef" in source:
            values[variable["name"]] = "from the cluster"
        else:
            values[variable["name"]] = variable["value"]
    return values


@pytest.mark.parametrize("replicas", [False, True])
def test_a_trainjob_keeps_to_its_type(replicas: bool) -> None:
    made = job(replicas=replicas, **dict[str, Any](KUBERNETES))
    resource = yaml.safe_load(resource_text(made, train_job(made)))
    jsonschema.validate(resource, TRAINJOB)
    spec = resource["spec"]
    assert spec["runtimeRef"]["name"] == "jax-distributed"
    assert spec["trainer"]["numNodes"] == 16
    assert spec["trainer"]["command"][:2] == ["terrashard", "train"]
    assert spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "2"
    assert "zagreb-group" in str(spec["trainer"].get("env")) if replicas else "env" not in spec["trainer"]
    plain = train_job(job(image="x"))
    jsonschema.validate(plain, TRAINJOB)
    assert "runtimePatches" not in plain["spec"]


@pytest.mark.parametrize(
    ("path", "value"),
    [(("kind",), "Job"), (("spec", "network", "subDomain"), "x"), (("metadata", "name"), "2024"),
     (("spec", "failurePolicy", "rules", 0, "action"), "Restart"), (("spec", "replicatedJobs"), [])],
)  # fmt: skip
def test_the_schema_refuses_what_the_cluster_refuses(path: tuple[Any, ...], value: Any) -> None:
    resource: Any = jobset(job(image="x"))
    inner = resource
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(resource, JOBSET)


def test_options_that_make_no_sense() -> None:
    for make, options, message in (
        (sbatch_script, {"que": "short"}, "--emit sbatch has no option que; its options are account"),
        (sbatch_script, {"gpus": "two"}, "gpus=two: expected a whole number above 0"),
        (sbatch_script, {"queue": "gpu --wrap=x"}, "expected letters, digits"),
        (sbatch_script, {"directives": "--x\nrm -r /"}, "expected one line"),
        (jobset, {}, "--emit jobset needs --cluster-option image=REGISTRY/NAME:TAG"),
        (jobset, {"image": "x", "cpu": "many"}, "cpu=many: expected a quantity"),
        (jobset, {"image": "x", "mount": "/data"}, "needs claim=NAME"),
        (train_job, {"image": "x", "folder": "/"}, "--emit trainjob has no option folder"),
    ):
        with pytest.raises(InvalidInput, match=message):
            make(job(**dict[str, Any](options)))


def test_a_job_file_takes_no_other_file_s_place(tmp_path: Path) -> None:
    path = tmp_path / "zagreb.sbatch"
    write_job_file(path, sbatch_script(job()))
    write_job_file(path, sbatch_script(job(processes=2)))
    assert "--ntasks=2" in path.read_text()
    path.write_text("precious")
    with pytest.raises(InvalidInput, match="is not a job file of terrashard; name another with --to FILE"):
        write_job_file(path, sbatch_script(job()))
    assert path.read_text() == "precious"
    with pytest.raises(InvalidInput, match="is not a folder"):
        write_job_file(tmp_path / "absent" / "x", "")
    assert job_name("x" * 60) == "x" * 40
