"""Fill the shards of a map by several processes: on this machine, or one on each worker of a Dask cluster."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.session import Session, speak
from zarr_store.errors import (
    AccessError,
    IntegrityError,
    InvalidInput,
    Locked,
    NoSpace,
    NothingFound,
    TerrashardError,
)

if TYPE_CHECKING:
    from jaxtrain.launching.places import Places

__all__ = ["HelperOptions", "fill_elsewhere"]

HelperOptions = Mapping[str, Any]
"""`workers`, `dask`, `cluster` and its options (`_OF_CLUSTER`) as they were typed."""

_RESTARTS = 3
_LOOK_S = 1.0
"""Seconds between two looks at the ledger of a map, for the page."""
_OF_CLUSTER = ("hosts", "cluster_options", "tls", "expose", "memory", "dashboard")
"""Options of a cluster to start; `tls` is also for a running one."""


def fill_elsewhere(
    session: Session, options: HelperOptions, on_progress: Callable[[int, int, str], None]
) -> Callable[[Path], None] | None:
    """Return a function that fills a map with other processes, or None if no option asks for them.

    Args:
        session: The running command.
        options: Where the processes run, and how many.
        on_progress: Called with (batches done, batches in all, number of processes in words).

    Raises:
        InvalidInput: The options contradict each other.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return None
    if "dask" in given and "cluster" in given:
        raise InvalidInput("--dask uses a running cluster and --cluster starts one; give one of them")
    if "cluster" not in given:
        lost = [name for name in _OF_CLUSTER if name in given]
        if lost and not (lost == ["tls"] and "dask" in given):
            option = lost[0].replace("_options", "-option")
            raise InvalidInput(f"--{option} is for --cluster; leave it out, or name one")
    if "dask" in given:
        from cli.dask_workers import check_address

        check_address(given["dask"])
    count = _count(given.get("workers"))

    def fill(folder: Path) -> None:
        from jaxtrain.launch import LaunchConfig, describe, launch_at

        state = _State(on_progress)
        with _places(folder, given, count) as places, _page(session, places, folder):
            state.count = len(places.names)
            config = LaunchConfig(len(places.names), _RESTARTS)
            outcome = launch_at(
                places, config, on_line=state.read,
                on_restart=lambda _, why: session.warn(f"{why}; the processes start again with what is missing"),
            )  # fmt: skip
            names = list(places.names)
        if outcome.exit_code in (75, 130):
            raise KeyboardInterrupt
        if outcome.exit_code:
            said = state.said or "repeat the command, which makes what is missing"
            raise _kind(outcome.exit_code)(f"{describe(outcome.codes, names)}: {said}")

    return fill


def _count(workers: str | int | None) -> int | None:
    if workers is None:
        return None
    if not str(workers).isdecimal() or int(workers) < 1:
        raise InvalidInput(f"--workers is the number of processes that fill the map, at least 1, got {workers!r}")
    return int(workers)


def _kind(code: int) -> type[TerrashardError]:
    """Return the class of error that belongs to an exit code."""
    kinds = (InvalidInput, NothingFound, Locked, IntegrityError, NoSpace, AccessError)
    return next((kind for kind in kinds if kind.exit_code == code), AccessError)


@contextmanager
def _places(folder: Path, given: HelperOptions, count: int | None) -> Iterator[Places]:
    if "dask" in given or "cluster" in given:
        from cli.dask_workers import cluster_places
        from ingest.request.settings import make_config

        settings = {name: value for name, value in given.items() if name not in ("dask", "workers")}
        if "dask" in given:
            settings["scheduler"] = given["dask"]
        elif count is not None:
            settings["workers"] = str(count)
        with cluster_places(make_config(None, settings), _command(folder), count) as workers:
            yield workers
        return
    from jaxtrain.launching.places import ThisMachine

    yield ThisMachine([sys.executable, *_command(folder)], count or 1)


@contextmanager
def _page(session: Session, places: Places, folder: Path) -> Iterator[None]:
    """Show the shards on the page of a Dask cluster while its workers make them; nothing without a cluster."""
    client = getattr(places, "client", None)
    if client is None:
        yield
        return
    from ingest.run.map_page import publish_map
    from jaxtrain.inference.making import open_making
    from zarr_store.grid import Grid

    making, plan = open_making(folder)
    told = set(making.ledger.rows())
    times = plan["times"] or plan["attributes"]["dates"][-1:]
    name = folder.name.removeprefix(".").split(".making")[0]
    page, tell = publish_map(
        client, str(folder.with_name(name)), plan["digest"], Grid.from_dict(plan["grid"]), plan["side"], times, told
    )
    session.note(f"dashboard: {page}")
    over = threading.Event()

    def follow() -> None:
        while True:
            last = over.wait(_LOOK_S)
            for index in sorted(set(making.ledger.rows()) - told):
                told.add(index)
                tell(index)
            if last:
                tell(None)
                return

    follower = threading.Thread(target=follow, name="map-page", daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join(_LOOK_S * 10)


def _command(folder: Path) -> list[str]:
    from jaxtrain.inference.helper import helper_command

    return helper_command(folder)


class _State:
    """Sum of the progress that the processes write, and the last error that one of them reported."""

    def __init__(self, on_progress: Callable[[int, int, str], None]) -> None:
        self.count = 0
        self.said = ""
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._done: dict[int, tuple[int, int]] = {}

    def read(self, number: int, stream: str, line: str) -> None:
        with self._lock:
            if stream == "stderr":
                if line.startswith("error: "):
                    self.said = line.removeprefix("error: ")
                elif line.strip():
                    speak(f"[{number}] {line}")
                return
            try:
                document = json.loads(line)
                self._done[number] = (int(document["done"]), int(document["total"]))
            except (ValueError, KeyError, TypeError):
                return
            done, total = (sum(values) for values in zip(*self._done.values(), strict=True))
            self._on_progress(done, total, f"{self.count} processes")
