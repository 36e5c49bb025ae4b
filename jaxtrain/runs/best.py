"""`Best` keeps the best validation of a run, and decides when to stop early.

What it knows travels in every checkpoint, so that a run that was killed decides as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtrain.config import RunConfig
from zarr_store.errors import InvalidInput

__all__ = ["Best"]

_LOWER = ("loss", "rmse")


class Best:
    """The best validation so far.

    Args:
        config: Gives `monitor` and `patience`.
        before: State from a checkpoint (`to_dict`); empty for a new run.
    """

    def __init__(self, config: RunConfig, before: Mapping[str, Any] | None = None) -> None:
        known = before or {}
        self._monitor, self._patience = config.monitor, config.patience
        self.step: int | None = known.get("step")
        self.value: float | None = known.get("value")
        self.waited = int(known.get("waited", 0))
        """Number of validations since the best one."""

    @property
    def ended(self) -> bool:
        """Whether enough validations were no better."""
        return self._patience > 0 and self.waited >= self._patience

    def see(self, step: int, scores: Mapping[str, float | None]) -> bool:
        """Record a validation, and return whether it is the best.

        Raises:
            InvalidInput: It has no such score.
        """
        if self._monitor == "none":
            return False
        if self._monitor not in scores:
            raise InvalidInput(
                f"run.monitor = {self._monitor!r}, but a validation of this run has {', '.join(scores)}: choose one"
            )
        value = scores[self._monitor]
        better = value is not None and math.isfinite(value) and self._is_better(value)
        if better:
            self.step, self.value, self.waited = step, value, 0
        else:
            self.waited += 1
        return better

    def _is_better(self, value: float) -> bool:
        if self.value is None:
            return True
        return value < self.value if self._monitor in _LOWER else value > self.value

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"step": self.step, "value": self.value, "waited": self.waited}
