"""`terrashard doctor` shows what this machine has, and what would stop a run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.session import Session, command

__all__ = ["examine", "register"]

_PACKAGES = (
    "terrashard", "numpy", "xarray", "zarr", "tensorstore", "odc-geo", "pyproj", "dask", "distributed", "stackstac",
    "pystac-client", "rasterio", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "typer", "pydantic",
)  # fmt: skip
_EXTRAS = {"cuda": "jax-cuda13-plugin", "tpu": "libtpu"}
_DASHBOARD_PORT = 8787
# A cube of one Sentinel-2 tile and date with four bands is about half a gigabyte.
_LEAST_FREE_BYTES = 2 << 30
_LEAST_OPEN_FILES = 1024


def examine(folder: Path, *, devices: bool = True) -> dict[str, Any]:
    """Return versions, devices, interpreters, disk, ports and limits; `problems` lists what would stop a run."""
    import resource

    import psutil

    disk = shutil.disk_usage(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found: dict[str, Any] = {
        "python": {"version": sys.version.split()[0], "executable": sys.executable},
        "versions": {name: _version(name) for name in _PACKAGES},
        "gdal": _gdal_version(),
        "extras": {extra: _version(package) is not None for extra, package in _EXTRAS.items()},
        "devices": _devices() if devices else None,
        "interpreters": _interpreters(),
        "measured": _measured(),
        "cpu": {"cores": os.cpu_count(), "usable": _usable_cores()},
        "memory": {"total_bytes": psutil.virtual_memory().total, "available_bytes": psutil.virtual_memory().available},
        "disk": {
            "folder": str(folder.resolve()),
            "free_bytes": disk.free,
            "free_inodes": os.statvfs(folder).f_favail,
            "temporary": tempfile.gettempdir(),
            "temporary_free_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        },
        "ports": {"loopback": _can_listen(0), "dashboard_8787_free": _can_listen(_DASHBOARD_PORT)},
        "limits": {"open_files": soft, "open_files_hard": hard},
        "environment": {
            name: os.environ[name]
            for name in ("GDAL_NUM_THREADS", "JAX_PLATFORMS", "XLA_FLAGS", "OMP_NUM_THREADS", "LANG")
            if name in os.environ
        },
    }
    found["problems"] = _problems(found, folder)
    return found


def _problems(found: dict[str, Any], folder: Path) -> list[str]:
    problems = [
        f"{name} is not installed; run `make install`" for name, version in found["versions"].items() if not version
    ]
    if found["disk"]["free_bytes"] < _LEAST_FREE_BYTES:
        problems.append(
            f"only {found['disk']['free_bytes'] / 1e9:.1f} GB are free in {folder}; a cube of a few scenes needs 2 GB"
        )
    if not os.access(folder, os.W_OK):
        problems.append(f"{folder} cannot be written to")
    if found["limits"]["open_files"] < _LEAST_OPEN_FILES:
        problems.append(f"only {found['limits']['open_files']} open files are allowed; raise it with `ulimit -n 4096`")
    if not found["ports"]["loopback"]:
        problems.append("no port of 127.0.0.1 can be opened; Dask workers need one")
    if "GDAL_NUM_THREADS" in found["environment"]:
        problems.append("GDAL_NUM_THREADS is set, which makes GDAL turn failed reads into zeros; unset it")
    if isinstance(found["devices"], dict) and "error" in found["devices"]:
        problems.append(f"JAX finds no device: {found['devices']['error']}")
    return problems


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gdal_version() -> str | None:
    try:
        import rasterio
    except ImportError:
        return None
    return str(rasterio.__gdal_version__)


def _devices() -> list[dict[str, Any]] | dict[str, str]:
    try:
        import jax

        return [
            {"id": d.id, "platform": d.platform, "kind": d.device_kind, "process": d.process_index}
            for d in jax.devices()
        ]
    except (ImportError, RuntimeError) as error:
        return {"error": str(error).splitlines()[0]}


def _measured() -> list[dict[str, Any]]:
    """Return the measurements of this machine that `terrashard survey` has kept, the newest first."""
    from jaxtrain.planner.machine import kept_profiles

    return [profile.model_dump(mode="json") for profile in kept_profiles()]


def _interpreters() -> list[dict[str, str]]:
    """Return the interpreters on PATH that run: a name may be a shim that leads nowhere."""
    found = []
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        path = shutil.which(name)
        if path:
            answer = subprocess.run(
                [path, "-c", "import sys; print(sys.version.split()[0])"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            if answer.returncode == 0:
                found.append({"name": name, "path": path, "version": answer.stdout.strip()})
    return found


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _can_listen(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _lines(found: dict[str, Any]) -> list[str]:
    def size(n: int) -> str:
        return f"{n / 1e9:.1f} GB"

    devices = found["devices"]
    kinds = (
        "not asked"
        if devices is None
        else devices["error"]
        if isinstance(devices, dict)
        else ", ".join(f"{d['platform']}:{d['id']} {d['kind']}" for d in devices)
    )
    versions = [f"{name} {version or 'absent'}" for name, version in found["versions"].items()]
    extras = [f"{name}: {'yes' if present else 'no'}" for name, present in found["extras"].items()]
    disk, ports = found["disk"], found["ports"]
    return [
        f"python        {found['python']['version']} ({found['python']['executable']})",
        *(f"{'versions' if i == 0 else '':14}{', '.join(versions[i : i + 5])}" for i in range(0, len(versions), 5)),
        f"gdal          {found['gdal'] or 'absent'}",
        f"extras        {', '.join(extras)}",
        f"devices       {kinds}",
        *(
            f"measured      {one['title']}: {one['device']['peak']['float32'] / 1e9:.0f} GFLOP/s in float32, "
            f"{one['device']['bandwidth'] / 1e9:.1f} GB/s ({one['sources']['all']})"
            for one in found["measured"][:1]
        ),
        f"interpreters  {', '.join(i['name'] + ' = ' + i['version'] for i in found['interpreters']) or 'none on PATH'}",
        f"cpu           {found['cpu']['usable']} of {found['cpu']['cores']} cores usable",
        f"memory        {size(found['memory']['available_bytes'])} of {size(found['memory']['total_bytes'])} available",
        f"disk          {size(disk['free_bytes'])} free in {disk['folder']}, "
        f"{size(disk['temporary_free_bytes'])} in {disk['temporary']}",
        f"ports         loopback {'open' if ports['loopback'] else 'CLOSED'}, "
        f"8787 {'free' if ports['dashboard_8787_free'] else 'taken'}",
        f"limits        {found['limits']['open_files']} open files, at most {found['limits']['open_files_hard']}",
        f"environment   {', '.join(f'{k}={v}' for k, v in found['environment'].items()) or 'nothing set'}",
    ]


def register(app: typer.Typer) -> None:
    @command(app, examples=("terrashard doctor", "terrashard doctor --json > doctor.json"))
    def doctor(
        session: Session,
        folder: Annotated[Path, typer.Option(help="Folder for cubes and runs.")] = Path(),
    ) -> None:
        """Show versions, devices, interpreters, disk, ports and limits, and what would stop a run."""
        found = examine(folder)
        for line in _lines(found):
            session.say(line)
        for problem in found["problems"]:
            session.warn(problem)
        session.say("no problem found" if not found["problems"] else f"{len(found['problems'])} problem(s)")
        session.emit(found)
