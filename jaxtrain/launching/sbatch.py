"""`sbatch_script` writes the batch script of a run for SLURM.

`srun` starts the processes, and `start_distributed` finds the others by the variables of the job step. Before the time
limit SLURM sends SIGTERM to the steps: the run saves, ends with 75, and the job queues itself again.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from jaxtrain.launching.job import FINAL_CODES, INTERRUPTED, MARK, PREEMPTED, SAVE_S, Job
from zarr_store.errors import InvalidInput

__all__ = ["SBATCH_OPTIONS", "sbatch_script"]

SBATCH_OPTIONS = ("queue", "account", "walltime", "nodes", "cpus", "gpus", "memory", "directives", "python", "folder")


def sbatch_script(job: Job) -> str:
    """Return the script.

    Options: `queue` (partition), `account`, `walltime`, `nodes`, `cpus` and `gpus` of each process, `memory` of each
    core (`--mem-per-cpu`), `directives` (further ones, separated by semicolons), `python` and `folder`.

    Raises:
        InvalidInput: An option is unknown, or would break out of its line.
    """
    job.check_options("sbatch", SBATCH_OPTIONS)
    options = job.options
    for name, value in options.items():
        if re.search(r"[\x00-\x1f\x7f]", value):
            raise InvalidInput(f"--cluster-option {name}: expected one line, got a control character")
    directives = [f"--job-name={job.name}", f"--ntasks={job.processes}"]
    for name, flag in (("nodes", "nodes"), ("cpus", "cpus-per-task"), ("gpus", "gpus-per-task")):
        if (count := job.count(name)) is not None:
            directives.append(f"--{flag}={count}")
    for name, flag in (("memory", "mem-per-cpu"), ("queue", "partition"), ("account", "account"), ("walltime", "time")):
        if name in options:
            directives.append(f"--{flag}={_word(name, options[name])}")
    directives += [
        "--output=%x-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{SAVE_S}",
        *(part.strip() for part in options.get("directives", "").split(";") if part.strip()),
    ]
    folder = shlex.quote(options.get("folder", str(Path.cwd())))
    python = shlex.quote(options.get("python", sys.executable))
    words = shlex.join(job.words)
    final = "|".join(str(code) for code in (0, *FINAL_CODES, INTERRUPTED))
    # one that ends must not end the others where they can go on without it
    together = "--kill-on-bad-exit=0 --wait=0" if job.replicas else "--kill-on-bad-exit=1"
    lines = [
        "#!/bin/bash",
        f"# {MARK} sbatch. Submit it with: sbatch FILE",
        *(f"#SBATCH {directive}" for directive in directives),
        "",
        "# SIGTERM is for the processes: this shell waits for them, and then decides",
        "trap : TERM",
        f"cd {folder} || exit 2",
        *_group(job),
        "# --cpus-per-task of the job is not passed on to srun by itself since SLURM 22.05",
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"' if "cpus" in options else None,
        "code=1",
        f"for attempt in $(seq 0 {job.restarts}); do",
        f"    srun {together} {python} -P -m cli.main {words}",
        "    code=$?",
        '    case "$code" in',
        f"        {final}) break ;;  # done, or a cause that stays",
        f'        {PREEMPTED}) scontrol requeue "$SLURM_JOB_ID"; break ;;  # saved; it continues when its turn comes',
        "    esac",
        '    echo "srun ended with $code (start $attempt); the run continues from its newest checkpoint" >&2',
        "    sleep 10",
        "done",
        'exit "$code"',
    ]
    shown = [line for line in lines if line is not None]
    if "cpus" not in options:
        shown.remove("# --cpus-per-task of the job is not passed on to srun by itself since SLURM 22.05")
    return "\n".join(shown) + "\n"


def _group(job: Job) -> list[str]:
    """Return the lines that give replicas a secret: one of this job alone, in no command line."""
    if not job.replicas:
        return []
    limit = [] if job.most is None else [f"export TERRASHARD_HETERO_MAX={job.most}"]
    return [
        "# the replicas of this job know each other by a secret that only they have",
        "draw() { od -An -N32 -tx1 /dev/urandom | tr -d ' \\n'; }",
        'export TERRASHARD_HETERO_SECRET="${TERRASHARD_HETERO_SECRET:-$(draw)}"',
        f"export TERRASHARD_HETERO_MIN={job.least}",
        *limit,
    ]


def _word(name: str, text: str) -> str:
    if not re.fullmatch(r"[\w.,:@+\-]+", text):
        raise InvalidInput(f"--cluster-option {name}={text}: expected letters, digits and . , : @ + -")
    return text
