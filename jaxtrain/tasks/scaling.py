"""`Scaling` is the affine map of features in which distances are measured: centred, standardised, or components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.moments import Components, Moments, principal_components

__all__ = ["Scaling", "make_scaling"]

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scaling:
    """Scaled = matrix · (row − mean).

    Attributes:
        mean: float64 (feature,).
        matrix: float64 (scaled, feature).
    """

    mean: F64
    matrix: F64

    def apply(self, values: npt.NDArray[np.floating[Any]]) -> F64:
        """Scale (feature, row), feature by feature, so that no rounding depends on the threads of a library."""
        scaled = np.zeros((len(self.matrix), values.shape[1]))
        for at, (value, mean) in enumerate(zip(values, self.mean, strict=True)):
            column = self.matrix[:, at]
            if column.any():
                scaled += column[:, None] * (value.astype(np.float64) - mean)[None]
        return scaled

    def invert(self, scaled: F64) -> F64:
        """Return (row, feature) of (row, scaled); of components, the point of their plane."""
        found: F64 = scaled @ np.linalg.pinv(self.matrix).T + self.mean
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"mean": self.mean.tolist(), "matrix": self.matrix.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(np.array(data["mean"], np.float64), np.array(data["matrix"], np.float64))


def make_scaling(
    moments: Moments, *, standardise: bool = False, components: int | None = None
) -> tuple[Scaling, Components | None]:
    """Make the scaling of a table.

    Args:
        moments: Moments of the rows of the table.
        standardise: Divide each feature by its standard deviation.
        components: Number of principal components; None keeps the features.
    """
    scale = moments.std if standardise else np.ones(len(moments.mean))
    if components is None:
        return Scaling(moments.mean, np.diag(1.0 / scale)), None
    found = principal_components(moments, components, scale)
    return Scaling(moments.mean, found.vectors / scale[None, :]), found
