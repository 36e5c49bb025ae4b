"""`MeasuredRows` keeps what was measured of placements until the whole table is there: an interruption loses one row.

Each row is a small file of the user's cache. The same measurement takes up the rows of an interrupted one; one that
ends removes its own, so that a new measurement measures everything again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtrain.runs.programs import private_folder
from zarr_store.durable import write_file

__all__ = ["MeasuredRows"]

_FRESH_S = 24 * 3600.0
"""Age in seconds up to which a row is used: later the machine may be busier, and the data may be others."""


class MeasuredRows:
    """The rows of one measurement.

    Args:
        what: All that the figures depend on but the placement, as JSON: epochs, where the processes run.
    """

    def __init__(self, what: Mapping[str, Any]) -> None:
        self._what = {**what, "jax": version("jax"), "cores": os.cpu_count()}
        self._folder = private_folder("survey")
        self._own: set[Path] = set()
        self._drop_old()

    def take(self, placement: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what an interrupted measurement has found of a placement; None where it has nothing.

        Args:
            placement: Name and configuration.
        """
        place = self._place(placement)
        if place is None:
            return None
        try:
            if time.time() - place.stat().st_mtime > _FRESH_S:
                return None
            found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        self._own.add(place)
        return found

    def keep(self, placement: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Keep what was measured of a placement."""
        place = self._place(placement)
        if place is None:
            return
        with suppress(OSError):  # a full disk costs the convenience, not the measurement
            write_file(place, json.dumps(row).encode())
            self._own.add(place)

    def forget(self) -> None:
        """Remove the rows of this measurement, whose table is complete."""
        for place in self._own:
            with suppress(OSError):
                place.unlink(missing_ok=True)
        self._own.clear()

    def _drop_old(self) -> None:
        """Remove rows that no measurement uses any longer, and rows that a killed one left half written."""
        if self._folder is None:
            return
        for path in [*self._folder.glob("measured-*"), *self._folder.glob(".measured-*")]:
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _FRESH_S:
                    path.unlink()

    def _place(self, placement: Mapping[str, Any]) -> Path | None:
        if self._folder is None:
            return None
        text = json.dumps([self._what, placement], sort_keys=True)
        return self._folder / f"measured-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
