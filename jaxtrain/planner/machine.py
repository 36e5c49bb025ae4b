"""The profile of this machine: measured once in a process of its own, and kept for the user."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from jaxtrain.planner.profile import Profile
from jaxtrain.runs.programs import private_folder
from zarr_store.durable import write_file
from zarr_store.errors import InvalidInput, TerrashardError

__all__ = ["device_count", "kept_profiles", "run_here", "this_machine"]

SECONDS = 120
"""Time after which a measurement is given up."""
FLAG = "--xla_force_host_platform_device_count"
JOINING = ("TERRASHARD_COORDINATOR", "TERRASHARD_COORDINATOR_BIND", "TERRASHARD_PROCESSES", "TERRASHARD_PROCESS",
           "TERRASHARD_LOCAL_PROCESS", "TERRASHARD_LOCAL_PROCESSES", "TERRASHARD_PARENT")  # fmt: skip
"""Variables by which a process would join the run that this one belongs to."""


def device_count() -> int:
    """Return the accelerators of this machine; without one, the cores, as a run that names no mesh would use them.

    Raises:
        TerrashardError: JAX does not name its devices in time.
    """
    script = "import jax; d = jax.local_devices(); print(0 if d[0].platform == 'cpu' else len(d))"
    command = [sys.executable, "-P", "-c", script]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise TerrashardError(
            f"JAX reported no devices of this machine within {SECONDS} s: give --devices, or name the mesh of the run"
        ) from error
    count = int(found.stdout.split()[-1]) if found.returncode == 0 and found.stdout.strip() else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return count or min(cores, 8)


def run_here(module: str, devices: int, processes: int, *, given: str = "", seconds: float = SECONDS) -> str:
    """Run a module of Python in processes of their own, which share this machine, and return what the first printed.

    Args:
        module: its name.
        devices: Devices of all processes together; a processor is split into as many.
        processes: Number of processes; several meet as those of a run do.
        given: text on the standard input of each.
        seconds: Time after which the processes are ended.

    Raises:
        TerrashardError: one of them failed; the message is its last line.
    """
    if devices % processes:
        raise InvalidInput(f"{devices} devices cannot be divided among {processes} processes: take a multiple")
    flags = [part for part in os.environ.get("XLA_FLAGS", "").split() if not part.startswith(FLAG)]
    common = {
        **{name: value for name, value in os.environ.items() if name not in JOINING},
        "XLA_FLAGS": " ".join([*flags, f"{FLAG}={devices // processes}"]),
    }
    if processes > 1:
        common |= {"TERRASHARD_COORDINATOR": f"127.0.0.1:{_free_port()}", "TERRASHARD_PROCESSES": str(processes),
                   "TERRASHARD_LOCAL_PROCESSES": str(processes)}  # fmt: skip
    with TemporaryDirectory() as folder:
        (Path(folder) / "in").write_text(given, encoding="utf-8")
        started = []
        for number in range(processes):
            own = {"TERRASHARD_PROCESS": str(number), "TERRASHARD_LOCAL_PROCESS": str(number)} if processes > 1 else {}
            with (
                (Path(folder) / "in").open("rb") as source,
                (Path(folder) / f"out{number}").open("wb") as out,
                (Path(folder) / f"err{number}").open("wb") as err,
            ):
                command = [sys.executable, "-P", "-m", module]
                started.append(subprocess.Popen(command, stdin=source, stdout=out, stderr=err, env={**common, **own}))
        try:
            codes = _wait_for(started, seconds)
        finally:
            for one in started:
                one.kill()
                one.wait()
        for number, code in enumerate(codes):
            if code:
                said = (Path(folder) / f"err{number}").read_text(encoding="utf-8", errors="replace").strip()
                raise TerrashardError(said.splitlines()[-1] if said else f"ended with {code}, without a message")
        return (Path(folder) / "out0").read_text(encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(started: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """Return the exit codes, as soon as all have ended or one has failed."""
    until = time.monotonic() + seconds
    while True:
        codes = [one.poll() for one in started]
        if all(code is not None for code in codes) or any(codes):
            return [code or 0 for code in codes]
        if time.monotonic() > until:
            raise TerrashardError(f"was not done after {seconds:.0f} s")
        time.sleep(0.05)


def this_machine(devices: int, *, processes: int = 1, again: bool = False) -> Profile:
    """Return the measured profile of this machine, from the user's cache where it was measured before.

    Args:
        devices: devices into which a processor is split.
        processes: Processes among which the devices are divided.
        again: Measure again.

    Raises:
        TerrashardError: the measurement failed.
    """
    place = _place(devices, processes)
    if not again and (kept := _read(place)) is not None:
        return kept
    try:
        profile = Profile.model_validate(json.loads(run_here("jaxtrain.planner.calibrate", devices, processes)))
    except (TerrashardError, ValueError) as error:
        last = str(error).splitlines()[0]
        raise TerrashardError(f"this machine could not be measured: {last}; name a profile with --profile") from error
    if place is not None:
        with suppress(OSError):  # a full disk costs the convenience, not the measurement
            write_file(place, json.dumps(profile.model_dump(mode="json")).encode())
    return profile


def kept_profiles() -> list[Profile]:
    """Return what was measured of this machine before, the newest first."""
    folder = private_folder("machines")
    paths = [] if folder is None else sorted(folder.glob("*.json"), key=lambda path: -path.stat().st_mtime)
    return [profile for path in paths if (profile := _read(path)) is not None]


def _place(devices: int, processes: int) -> Path | None:
    folder = private_folder("machines")
    facts = [
        platform.node(),
        platform.machine(),
        os.cpu_count(),
        devices,
        processes,
        version("jaxlib"),
        os.environ.get("JAX_PLATFORMS"),
        hashlib.sha256(Path(__file__).with_name("calibrate.py").read_bytes()).hexdigest(),
    ]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return None if folder is None else folder / f"{name}.json"


def _read(place: Path | None) -> Profile | None:
    if place is None:
        return None
    try:
        return Profile.model_validate(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None
