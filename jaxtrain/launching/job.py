"""`Job` describes a run for another starter: a batch system or Kubernetes, which gets it as a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtrain.launching.outcome import INTERRUPTED, PREEMPTED
from zarr_store.errors import InvalidInput

__all__ = ["FINAL_CODES", "INTERRUPTED", "MARK", "PREEMPTED", "SAVE_S", "Job", "job_name", "write_job_file"]

MARK = "Written by terrashard launch --emit"
"""Text of the second line of each job file: only a file that has it is written over."""

FINAL_CODES = (2, 4, 5, 6, 7)
"""Exit codes after which the same command fails again."""

SAVE_S = 120
"""Seconds that a run gets to save before its time ends or its pod is taken away."""

_LONGEST_NAME = 40
"""Longest name of a job: pods have this name with a suffix, of at most 63 characters together."""


@dataclass(frozen=True)
class Job:
    """A run of several processes.

    Attributes:
        words: The command without `terrashard`: train CONFIG.toml --out RUN …
        name: Name of the job: letters, digits and hyphens.
        processes: Number of processes.
        replicas: Whether the run may change its machines, so that a process that ends does not end the others.
        least: Fewest processes with which such a run goes on.
        most: Largest number of processes of such a run.
        restarts: How often the run, or one of its replicas, is started again.
        options: KEY=VALUE options of the starter.
    """

    words: Sequence[str]
    name: str
    processes: int
    replicas: bool = False
    least: int = 1
    most: int | None = None
    restarts: int = 3
    options: Mapping[str, str] = field(default_factory=dict)

    def check_options(self, kind: str, known: Sequence[str], needed: Mapping[str, str] | None = None) -> None:
        """Refuse options that the starter does not have, and ask for those that it needs.

        Args:
            kind: Name of the starter.
            known: Names of its options.
            needed: Options that must be given, with an example.

        Raises:
            InvalidInput: One is unknown or absent.
        """
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            raise InvalidInput(
                f"--emit {kind} has no option {', '.join(unknown)}; its options are {', '.join(sorted(known))}"
            )
        for name, example in (needed or {}).items():
            if not self.options.get(name):
                raise InvalidInput(f"--emit {kind} needs --cluster-option {name}={example}")

    def count(self, name: str) -> int | None:
        """Return an option that is a whole number above 0; None where it is not given.

        Raises:
            InvalidInput: It is something else.
        """
        text = self.options.get(name)
        if text is None:
            return None
        if not re.fullmatch(r"[1-9]\d{0,5}", text):
            raise InvalidInput(f"--cluster-option {name}={text}: expected a whole number above 0")
        return int(text)


def job_name(run: str) -> str:
    """Return a name for Kubernetes and SLURM from a run directory.

    >>> job_name("runs/Zagreb_SCL.2"), job_name("runs/2024")
    ('zagreb-scl-2', 'run-2024')
    """
    name = re.sub(r"[^a-z0-9]+", "-", Path(run).name.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}".rstrip("-")
    return name[:_LONGEST_NAME].rstrip("-")


def write_job_file(path: Path, text: str) -> None:
    """Write a job file; a file of another origin is left alone.

    Raises:
        InvalidInput: There is one, or the folder does not exist.
    """
    if path.exists():
        try:
            ours = MARK in "".join(path.read_text(encoding="utf-8").splitlines()[:3])
        except (OSError, UnicodeDecodeError):
            ours = False
        if not ours:
            raise InvalidInput(f"{path} exists and is not a job file of terrashard; name another with --to FILE")
    elif not path.parent.is_dir():
        raise InvalidInput(f"{path.parent} is not a folder; name a file in an existing one with --to FILE")
    path.write_text(text, encoding="utf-8")
