"""What a module of tests may not leave behind in its process, because later modules would be run with it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

__all__ = ["nothing_is_left_behind"]

TESTED_NOW = "PYTEST_CURRENT_TEST"
"""What pytest itself sets for each test."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare the state of the process before and after each module; a difference is an error of its last test."""
    before = state_of_process()
    yield
    left = changes(before, state_of_process())
    assert not left, f"{request.node.nodeid} leaves this behind in the process:\n" + "\n".join(left)


def state_of_process() -> dict[str, Any]:
    """Name and value of all that one test could change for another, without an import that no test has made."""
    state: dict[str, Any] = {f"os.environ[{name!r}]": value for name, value in os.environ.items() if name != TESTED_NOW}
    state |= {f"the handler of {number.name}": signal.getsignal(number) for number in SIGNALS}
    state["the working directory"] = os.getcwd()
    state["sys.path"] = tuple(sys.path)
    state["sys.excepthook"], state["threading.excepthook"] = sys.excepthook, threading.excepthook
    root = logging.getLogger()
    state["the level of the root logger"] = root.level
    state["the handlers of the root logger"] = tuple(root.handlers)
    if distributed := sys.modules.get("distributed.client"):
        state["the current client of Dask"] = distributed._get_global_client()
    if dask := sys.modules.get("dask.config"):
        usual = {leaf for part in (*dask.defaults, dask.collect_env()) for leaf in flat(part)}
        state |= {f"dask.config[{name!r}]": value for name, value in flat(dask.config) if (name, value) not in usual}
    return state


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested settings, by their names with dots."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", repr(value)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line on each value that is not what it was."""
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return [f"  {name}: {before.get(name)!r} before, {after.get(name)!r} now" for name in names]
