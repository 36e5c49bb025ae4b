"""`ClusterModel` holds features, scaling and centres of k-means, as JSON by which other data are labelled later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.folder import read_result
from jaxtrain.tasks.scaling import Scaling
from jaxtrain.tasks.table import Feature, Kind, Table
from zarr_store.bounded import load_json
from zarr_store.errors import IntegrityError, InvalidInput

__all__ = ["MODEL", "ClusterModel", "load_cluster_model"]

MODEL = "model.json"
"""Name of the model in a folder of results."""
_FORMAT = 1


@dataclass(frozen=True)
class ClusterModel:
    """Fitted clusters.

    Attributes:
        kind: Kind of data that it was fitted on.
        features: Its columns, in order.
        dates: Rule by which dates became features.
        scaling: Scaling of the rows.
        centres: float64 (k, scaled).
    """

    kind: Kind
    features: tuple[Feature, ...]
    dates: str
    scaling: Scaling
    centres: npt.NDArray[np.float64]

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centres)

    def check_table(self, table: Table, where: str) -> None:
        """Refuse data whose features are not those of the model.

        Raises:
            InvalidInput: Names, units or numbers of features differ.
        """
        mine = [(one.name, one.unit) for one in self.features]
        found = [(one.name, one.unit) for one in table.features]
        if mine == found:
            return
        lacking = [name for name, _ in mine if name not in {name for name, _ in found}]
        more = [name for name, _ in found if name not in {name for name, _ in mine}]
        if lacking or more:
            said = "; ".join(
                f"{word} {', '.join(dict.fromkeys(names))}"
                for word, names in (("without", lacking), ("with", more))
                if names
            )
        elif len(mine) != len(found):
            said = f"with {len(found)} features (bands × dates), the model has {len(mine)}"
        else:
            wrong = next((a, b) for a, b in zip(mine, found, strict=True) if a != b)
            said = f"with {wrong[1][0]} in {wrong[1][1]!r} where the model has {wrong[0][0]} in {wrong[0][1]!r}"
        names = ", ".join(dict.fromkeys(name for name, _ in mine))
        # vectors have neither bands nor dates to choose, and samples no dates
        options = {"cube": "choose the same with --bands and --time, or ",
                   "samples": "choose the same with --bands, or "}  # fmt: skip
        raise InvalidInput(
            f"{table.url} does not fit the clusters of {where}, which were made from {names}: it comes {said}; "
            f"{options.get(table.kind, '')}fit new clusters"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "format": _FORMAT, "kind": self.kind, "features": [asdict(one) for one in self.features],
            "dates": self.dates, "scaling": self.scaling.to_dict(), "centres": self.centres.tolist(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        scaling, centres = Scaling.from_dict(data["scaling"]), np.array(data["centres"], np.float64)
        features = tuple(Feature(**one) for one in data["features"])
        if (
            scaling.mean.shape != (len(features),)
            or scaling.matrix.ndim != 2
            or scaling.matrix.shape[1] != len(features)
            or centres.ndim != 2
            or not 0 < len(centres) <= 254
            or centres.shape[1] != len(scaling.matrix)
            or not all(np.isfinite(one).all() for one in (scaling.mean, scaling.matrix, centres))
        ):
            raise ValueError("its arrays do not fit each other")
        return cls(data["kind"], features, str(data["dates"]), scaling, centres)


def load_cluster_model(folder: str | Path) -> ClusterModel:
    """Load the clusters of an earlier `terrashard kmeans`.

    Raises:
        InvalidInput: The folder is not a result of it.
        IntegrityError: The model is damaged.
    """
    path = Path(folder) / MODEL
    if read_result(folder, "kmeans") is None or not path.is_file():
        raise InvalidInput(f"{folder}: expected a result of `terrashard kmeans`")
    try:
        data = load_json(path.read_bytes(), str(path))
        if data["format"] != _FORMAT:
            raise InvalidInput(f"{path} has format {data['format']}, this release reads {_FORMAT}; fit it again")
        return ClusterModel.from_dict(data)
    except InvalidInput:
        raise
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path}: the model is damaged ({error}); fit it again") from error
