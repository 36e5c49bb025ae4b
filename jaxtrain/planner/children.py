"""Processes that compile strategies side by side, each with as many fake devices as the largest of them needs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from threading import local
from typing import Any

from jaxtrain.planner.scale import representative
from jaxtrain.runs.programs import private_folder
from zarr_store.errors import TerrashardError
from zarr_store.temporary import PARTIAL

__all__ = ["Answer", "compile_all"]

Answer = Mapping[str, Any]
FLAG = "--xla_force_host_platform_device_count"
# fewer seconds of the compiler; what it exchanges, keeps and computes is decided before this level matters
QUICK = "--xla_backend_optimization_level=0"
# twice as quick again, but a few loops of split images are then joined that a processor's program keeps apart, or the
# other way round (a few per cent of the memory traffic): only for machines that run another compiler's programs anyway
PLAINER = "--xla_cpu_use_fusion_emitters=false"
KINDS = ("hlo.py", "operations.py", "collectives.py", "facts.py", "layers.py", "scale.py", "bound.py", "compiler.py")


class CompilerDied(TerrashardError):
    """A process that compiled strategies ended without an answer."""

    exit_code = 1


def compile_all(
    requests: Sequence[dict[str, Any]],
    devices: int,
    *,
    processes: int,
    on_answer: Callable[[int], None],
    exact: bool = True,
    limit: float | None = None,
) -> list[Answer]:
    """Compile many strategies; what was compiled before is read from the user's cache, also after an interruption.

    Args:
        requests: as of `jaxtrain.planner.compiler.answer`.
        devices: Fake devices of each process.
        processes: Processes that compile at the same time.
        on_answer: called with the number of each request that has its answer.
        exact: Whether the machine that is planned for runs the very programs that are compiled.
        limit: Bytes of a device; a strategy that needs more in any case is not compiled. None for no limit.

    Raises:
        CompilerDied: a process ended without an answer.
    """
    folder, flags = private_folder("survey"), QUICK if exact else f"{QUICK} {PLAINER}"
    places = [None if folder is None else folder / f"{_key(request, flags)}.json" for request in requests]
    answers: list[Answer | None] = [_kept(place, limit) for place in places]
    missing = [number for number, found in enumerate(answers) if found is None]
    for number in sorted(set(range(len(requests))) - set(missing)):
        on_answer(number)
    if missing:
        groups: dict[str, list[int]] = {}  # requests that one program answers go to the process that compiled it
        for number in missing:
            groups.setdefault(json.dumps(representative(requests[number]), sort_keys=True), []).append(number)
        with _Compilers(devices, flags) as compilers, _workers(min(processes, len(groups))) as pool:

            def work(numbers: Sequence[int]) -> None:
                for number in numbers:
                    asked = requests[number] if limit is None else {**requests[number], "limit": limit}
                    found = compilers.ask(asked)
                    place = places[number]
                    if place is not None:
                        partial = place.with_suffix(f".{os.getpid()}{PARTIAL}")
                        partial.write_text(json.dumps(found), encoding="utf-8")
                        partial.replace(place)
                    answers[number] = found
                    on_answer(number)

            for done in [pool.submit(work, numbers) for numbers in groups.values()]:
                done.result()
    return [found for found in answers if found is not None]


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads that begin nothing new once the caller is interrupted."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Compilers:
    """One process for each thread that asks."""

    def __init__(self, devices: int, quick: str) -> None:
        flags = [part for part in os.environ.get("XLA_FLAGS", "").split() if not part.startswith(FLAG)]
        self._environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([*flags, f"{FLAG}={devices}", quick]),
        }
        self._mine = local()
        self._all: list[subprocess.Popen[str]] = []
        self._said = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed with the processes

    def __enter__(self) -> _Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        self._said.close()

    def _last_line(self) -> str:
        self._said.seek(0)
        return next((line.strip() for line in reversed(self._said.readlines()) if line.strip()), "it said nothing")

    def ask(self, request: dict[str, Any]) -> Answer:
        if not hasattr(self._mine, "process"):
            self._mine.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "jaxtrain.planner.compiler"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=self._environment,
            )  # fmt: skip
            self._all.append(self._mine.process)
        process = self._mine.process
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            code, last = process.wait(), self._last_line()
            raise CompilerDied(f"a process that compiled strategies ended with {code}: {last}; run the survey again")
        found: Answer = json.loads(line)
        return found


def _key(request: dict[str, Any], flags: str) -> str:
    """Return a name for the answer to a request: by all that decides it, and by the code that counts."""
    here = Path(__file__).parent
    digest = hashlib.sha256(json.dumps([request, flags], sort_keys=True).encode())
    for name in ("jax", "jaxlib", "flax", "optax", "terrashard"):
        digest.update(version(name).encode())
    for path in sorted(_code(here)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:40]


def _code(here: Path) -> Iterable[Path]:
    yield from (here / name for name in KINDS)
    for room in ("learn", "models", "parallel"):
        yield from (here.parent / room).glob("*.py")


def _kept(place: Path | None, limit: float | None) -> Answer | None:
    """Return the answer kept from before; None without one, or if it is a bound below this limit."""
    if place is None:
        return None
    try:
        found: Answer = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if least := found.get("least"):
        return found if limit is not None and sum(least.values()) > limit else None
    return found if "facts" in found or "why_not" in found else None
