"""Start the processes of a run: here, over SSH or on Dask workers; or write the job file by which others start them."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cli.session import Session, speak
from jaxtrain.launch import LaunchConfig, OnLine, Outcome, describe, launch_at
from jaxtrain.launching.places import Places, ThisMachine
from zarr_store.errors import InvalidInput

__all__ = ["LaunchOptions", "TrainWords", "run_launch"]


@dataclass(frozen=True)
class LaunchOptions:
    """The options of `terrashard launch`, as they were typed.

    Attributes:
        processes: Number of processes, or None.
        dask: Address of a Dask scheduler.
        hosts: Hosts of SSH, separated by commas.
        emit: Kind of job file to write instead of starting anything.
        to: File to write; "-" is standard output.
        join: Address of a group that another launcher holds.
        listen: HOST or HOST:PORT at which the coordinator of a group listens.
        least, most: Fewest and largest number of processes.
        replace: Whether a replica that dies is replaced.
        restarts: How often all processes, or one replica, start again.
        grace_s: Seconds to save and end.
        cluster_options: KEY=VALUE.
    """

    processes: int | None = None
    dask: str | None = None
    hosts: str | None = None
    emit: Literal["sbatch", "jobset", "trainjob"] | None = None
    to: Path | None = None
    join: str | None = None
    listen: str | None = None
    least: int | None = None
    most: int | None = None
    replace: bool = True
    restarts: int = 3
    grace_s: float = 60.0
    cluster_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ways = [f"--{name}" for name in ("hosts", "dask", "emit") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise InvalidInput(f"{' and '.join(ways)} are different ways to start one run; give one of them")
        if self.join is not None and (self.emit is not None or self.listen is not None):
            other = "--emit" if self.emit is not None else "--listen"
            raise InvalidInput(f"--join adds processes to a group that has its coordinator; leave {other} out")
        if self.to is not None and self.emit is None:
            raise InvalidInput("--to names the job file of --emit; add --emit sbatch, jobset or trainjob")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise InvalidInput(
                f"--min-processes {self.least} is more than --max-processes {self.most}; expected 1 ≤ min ≤ max"
            )
        if self.cluster_options and self.hosts is None and self.emit is None:
            raise InvalidInput("--cluster-option is for --hosts and --emit; leave it out, or give one of these")

    @property
    def settings(self) -> dict[str, str]:
        """Values of the KEY=VALUE options by name; "-" in a name becomes "_"."""
        pairs = [text.partition("=") for text in self.cluster_options]
        for name, equals, _ in pairs:
            if not equals or not name.strip():
                raise InvalidInput(f"--cluster-option expects KEY=VALUE, e.g. queue=short, got {name!r}")
        return {name.strip().replace("-", "_"): value.strip() for name, _, value in pairs}


@dataclass(frozen=True)
class TrainWords:
    """The command that each process runs: train CONFIG.toml --out RUN …

    Attributes:
        words: All words as they were typed. The first is train or predict; for predict, other fields are not filled.
        files: Configuration files in the order in which they are read.
        out: The run directory, or None.
        overrides: The texts of --set.
        json: Whether the launcher wants the JSON of the processes.
    """

    words: tuple[str, ...]
    files: tuple[str, ...] = ()
    out: str | None = None
    overrides: tuple[str, ...] = field(default=())
    json: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """The words that each process gets."""
        return (*self.words, "--json") if self.json and "--json" not in self.words else self.words

    @classmethod
    def parse(cls, words: Sequence[str], *, json: bool = False) -> TrainWords:
        """Find the parts of a training command.

        Args:
            words: The command as it was typed.
            json: Whether the launcher wants the JSON of its processes.

        Raises:
            InvalidInput: It is another command.
        """
        words = list(words[1:] if words and words[0] == "terrashard" else words)
        if not words or words[0] not in ("train", "predict"):
            raise InvalidInput(
                f"launch starts training runs, got {' '.join(words) or 'nothing'!r}: terrashard launch -n 2 -- train "
                "CONFIG.toml --out RUN; or the processes of a map: -- predict RUN CUBE MAP.zarr"
            )
        if words[0] == "predict":
            return cls(tuple(words), json=json)
        values: dict[str, list[str]] = defaultdict(list)
        rest = iter(words[1:])
        for word in rest:
            name, equals, value = word.partition("=")
            if name in ("--out", "--set", "--config"):
                values[name].append(value if equals else next(rest, ""))
            elif not word.startswith("-"):
                values["CONFIG"].append(word)
        out = values["--out"][-1] if values["--out"] else None
        return cls(
            tuple(words), (*values["CONFIG"][:1], *values["--config"][-1:]), out or None, tuple(values["--set"]), json
        )

    def check(self, *, here: bool = False) -> None:
        """Raise an error, before anything starts, for settings with which no process could train.

        Args:
            here: Whether all processes start on this machine. Other machines may have files that this one lacks.

        Raises:
            InvalidInput: A file is absent here or is not TOML, or a key or value does not fit.
        """
        from jaxtrain.settings import read_train_config

        paths = [Path(name) for name in self.files]
        if self.words[0] == "train" and paths and (here or all(path.exists() for path in paths)):
            read_train_config(paths, self.overrides)

    def has_replicas(self) -> bool:
        """Return whether machines may join or leave the run, as far as its configuration can be read here."""
        from jaxtrain.settings import merge, override, read_toml

        settings: dict[str, Any] = {}
        for name in self.files:
            try:
                settings = merge(settings, read_toml(Path(name)))
            except InvalidInput:
                continue  # training will report it, or the file is on other machines only
        for text in self.overrides:
            settings = override(settings, text)
        table = settings.get("hetero")
        return bool(isinstance(table, Mapping) and table.get("enabled"))


def run_launch(session: Session, words: Sequence[str], options: LaunchOptions) -> int:
    """Run `terrashard WORDS` as several processes and return the exit code.

    Raises:
        InvalidInput: WORDS is not a training command, its settings do not fit, or the options contradict each other.
        AccessError: A host or the Dask cluster does not answer, or has too few workers.
        Locked: Another launcher holds the group of the run.
    """
    train = TrainWords.parse(words, json=session.json and options.emit is None)
    train.check()
    replicas = train.has_replicas()
    for name, given in (("--min-processes", options.least), ("--max-processes", options.most),
                        ("--join", options.join), ("--listen", options.listen)):  # fmt: skip
        if given is not None and not replicas:
            raise InvalidInput(
                f"{name} is for runs whose processes may come and go: add --set hetero.enabled=true to the train "
                "command"
            )
    if train.words[0] == "predict" and options.emit is not None:
        raise InvalidInput(
            "--emit writes jobs of training runs; start the processes of a map with -n, --hosts or --dask"
        )
    if options.emit is not None:
        return _write_job(session, train, options, replicas=replicas)
    said: dict[int, list[str]] = defaultdict(list)
    with _places(train, options) as (places, address):
        show = _printer(session, places.names, raw="--json" in train.arguments, replicas=replicas, said=said)
        if replicas:
            outcome = _launch_replicas(session, places, address, train, options, show)
        else:
            outcome = _launch_together(session, places, options, show, train)
        names = list(places.names)
    if outcome.exit_code:
        wrong = outcome.exit_code == InvalidInput.exit_code
        kept = "with what is missing" if train.words[0] == "predict" else "from the newest checkpoint"
        next_step = "correct what it reports" if wrong else f"the same command continues {kept}"
        session.fail(f"{describe(outcome.codes, names)}, after {outcome.restarts} restart(s); {next_step}")
    session.emit(
        {
            "exit_code": outcome.exit_code,
            "restarts": outcome.restarts,
            "codes": list(outcome.codes),
            "result": _document(said),
        }
    )
    return outcome.exit_code


@contextmanager
def _places(train: TrainWords, options: LaunchOptions) -> Iterator[tuple[Places, str]]:
    """Open the places of a run; yield them, and the address under which they reach this machine."""
    from jaxtrain.launching.group import address_towards

    arguments = ["-P", "-m", "cli.main", *train.arguments]
    if options.hosts is not None:
        from cli.dask_workers import FORWARDED
        from jaxtrain.launching.hosts import HostOptions, parse_hosts
        from jaxtrain.launching.remote import RemoteHosts

        hosts = parse_hosts(options.hosts)
        if options.processes not in (None, len(hosts)):
            raise InvalidInput(
                f"-n {options.processes} with {len(hosts)} hosts: one process runs on each host; leave -n out, or name "
                f"{options.processes} hosts"
            )
        with RemoteHosts(
            hosts, arguments, paths=train.files,
            options=HostOptions.from_options(options.settings, grace_s=options.grace_s),
            environment={name: os.environ[name] for name in FORWARDED if name in os.environ},
        ) as remote:  # fmt: skip
            yield remote, remote.our_address
    elif options.dask is not None:
        from urllib.parse import urlsplit

        from cli.dask_workers import dask_workers

        with dask_workers(options.dask, arguments, options.processes) as workers:
            scheduler = urlsplit(options.dask)
            yield workers, address_towards(scheduler.hostname or "127.0.0.1", scheduler.port or 8786)
    else:
        processes = 1 if options.processes is None and options.join is not None else options.processes
        if processes is None:
            raise InvalidInput(
                "give the number of processes with -n 2, or --dask ADDRESS for one on each worker, or --hosts A,B for "
                "one on each host"
            )
        yield ThisMachine([sys.executable, *arguments], processes), "127.0.0.1"


def _launch_together(
    session: Session, places: Places, options: LaunchOptions, show: OnLine, train: TrainWords
) -> Outcome:
    kept = "with what is missing" if train.words[0] == "predict" else "from the newest checkpoint"

    def on_restart(number: int, why: str) -> None:
        session.warn(f"{why}; all start again {kept} (restart {number} of {options.restarts})")

    train.check(here=isinstance(places, ThisMachine))
    config = LaunchConfig(len(places.names), options.restarts, options.grace_s)
    return launch_at(places, config, on_line=show, on_restart=on_restart)


def _launch_replicas(
    session: Session, places: Places, address: str, train: TrainWords, options: LaunchOptions, show: OnLine
) -> Outcome:
    """Launch replicas with the coordinator of their group, or into the group of another launcher."""
    from jaxtrain.launching.group import find_group_point, hold_group
    from jaxtrain.launching.replicas import ReplicaConfig, launch_replicas

    processes, least = len(places.names), options.least or 1
    config = ReplicaConfig(
        processes, 1 if options.join else least, options.most, options.replace, options.restarts, options.grace_s
    )
    run = None if train.out is None else Path(train.out)
    variables: dict[str, Any] = {"expected": processes, "least": least, "most": options.most}
    if options.join is not None:
        point = find_group_point(options.join, run)
        config = replace(config, prefix=f"{socket.gethostname()}-{os.getpid()}-")  # the first launcher has a 0, too
        return launch_replicas(places, config, point.environment(**variables), on_line=show, on_event=session.warn)
    if least > processes:
        raise InvalidInput(
            f"--min-processes {least} is more than the {processes} processes that are started; start more, or need "
            "fewer"
        )
    bind = _bind(options.listen, address)
    train.check(here=isinstance(places, ThisMachine))
    with hold_group(run, bind, **variables, on_event=session.warn) as point:
        session.note(
            f"group of {processes} process{'es' if processes > 1 else ''} at {point.address}; more are added with: "
            f"terrashard launch --join {point.address} -- {shlex.join(train.words)}"
        )
        return launch_replicas(
            places, config, point.environment(**variables), on_line=show, on_event=session.warn, members=point.members
        )


def _bind(listen: str | None, address: str) -> str:
    """Return host:port for the coordinator: as asked, else the address under which the processes reach this machine.

    >>> _bind(None, "127.0.0.1"), _bind("10.0.0.5", ""), _bind("10.0.0.5:7000", ""), _bind("[::1]:7000", "")
    ('127.0.0.1:0', '10.0.0.5:0', '10.0.0.5:7000', '[::1]:7000')
    """
    host = listen or address
    if ":" in host and not host.startswith("[") and host.count(":") > 1:
        host = f"[{host}]"
    port = host.rpartition("]")[2].rpartition(":")
    if port[1] and not (port[2].isdecimal() and int(port[2]) < 65536):
        raise InvalidInput(f"--listen {listen}: expected HOST or HOST:PORT, such as 10.0.0.5:7000")
    return host if port[1] else f"{host}:0"


def _write_job(session: Session, train: TrainWords, options: LaunchOptions, *, replicas: bool) -> int:
    """Write the job file of --emit; nothing is started."""
    from jaxtrain.launching.job import Job, job_name, write_job_file
    from jaxtrain.launching.kubernetes import jobset, resource_text, train_job
    from jaxtrain.launching.replicas import ReplicaConfig
    from jaxtrain.launching.sbatch import sbatch_script

    if options.processes is None:
        raise InvalidInput(f"--emit {options.emit} needs the number of processes: -n 16")
    if train.out is None or not train.files:
        raise InvalidInput(
            f"--emit {options.emit} needs the whole command, as the job runs it: -- train CONFIG.toml --out RUN"
        )
    least = options.least or 1
    if replicas:
        ReplicaConfig(options.processes, least, options.most)  # checks the limits
    job = Job(
        train.words, job_name(train.out), options.processes, replicas=replicas, least=least, most=options.most,
        restarts=options.restarts, options=options.settings,
    )  # fmt: skip
    if options.emit == "sbatch":
        text, command, suffix = sbatch_script(job), "sbatch", "sbatch"
    else:
        make = jobset if options.emit == "jobset" else train_job
        text, command, suffix = resource_text(job, make(job)), "kubectl create -f", "yaml"
    if options.to is not None and str(options.to) == "-":
        session.say_lines(text.rstrip("\n"))
        session.emit({"exit_code": 0, "restarts": 0, "codes": [], "result": None, "file": None})
        return 0
    path = options.to or Path(f"{job.name}.{suffix}")
    write_job_file(path, text)
    session.say(f"wrote {path}; start it with: {command} {path}")
    session.emit({"exit_code": 0, "restarts": 0, "codes": [], "result": None, "file": str(path)})
    return 0


def _printer(
    session: Session, names: Sequence[str], *, raw: bool, replicas: bool, said: dict[int, list[str]]
) -> OnLine:
    """Return a function that shows lines with the name of their process; with --json, documents are kept."""
    from zarr_store.printable import printable_json

    whole_lines = threading.Lock()

    def show(number: int, stream: str, line: str) -> None:
        with whole_lines:
            if raw and stream == "stdout":
                said[number].append(line)
                if (number == 0 or replicas) and not session.json:
                    sys.stdout.write(f"{printable_json(line)}\n")  # the JSON of the process that writes it, as it came
                return
            out = sys.stdout if stream == "stdout" and not session.json else sys.stderr
            speak(f"[{names[number]}] {line}", out)

    return show


def _document(said: Mapping[int, Sequence[str]]) -> Any:
    """Return the JSON that a process wrote; Gloo, which connects processes, writes lines of its own before it."""
    for number in sorted(said):
        lines = said[number]
        for start in reversed([index for index, line in enumerate(lines) if line == "{"]):
            try:
                return json.loads("\n".join(lines[start:]))
            except ValueError:
                continue
    return None
