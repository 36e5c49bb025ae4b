"""`MapOptions` says how a scene becomes a map: one answer of a model has many maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from jaxtrain.inference.area import Area
from zarr_store.errors import InvalidInput, UnknownName

__all__ = ["Dates", "MapOptions", "Method"]

Method = Literal["blend", "exact"]
Dates = Literal["mean", "majority", "each"]


@dataclass(frozen=True)
class MapOptions:
    """Options by which a scene becomes a map.

    Attributes:
        time: One date, as in the cube; None for all dates.
        method: "blend": windows of the size of training overlap and are blended. "exact": windows are padded by as
            much as the network looks, so that each pixel is what one pass over the whole scene would give.
        overlap: Pixels that neighbouring windows of a blend share; None for a quarter of a window.
        dates: "mean": the mean probability over dates. "majority": each date votes. "each": a map of each date.
        probabilities: Also keep the probability of every class.
        entropy: Also keep the entropy of the probabilities.
        scaled: Store values as int16 with a scale.
        area: Map these polygons only.
        without: Modalities that the network does not get, as if they were missing everywhere.
        devices: Devices over which batches are split; None for those of the run.
        allow_mismatch: Map a cube of another pixel size or of units that cannot be converted, and warn.

    Raises (when made):
        UnknownName: A method or a way to join dates that there is not.
        InvalidInput: Options that contradict each other.
    """

    time: str | None = None
    method: Method = "blend"
    overlap: int | None = None
    dates: Dates = "mean"
    probabilities: bool = False
    entropy: bool = False
    scaled: bool = False
    area: Area | None = None
    without: tuple[str, ...] = ()
    devices: int | None = None
    allow_mismatch: bool = False

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UnknownName.of("method", self.method, get_args(Method))
        if self.dates not in get_args(Dates):
            raise UnknownName.of("way to join dates", self.dates, get_args(Dates))
        if self.method == "exact" and self.overlap:
            raise InvalidInput("the overlap of windows is for a blend; an exact map takes what the network looks at")
        if self.time is not None and self.dates != "mean":
            raise InvalidInput(
                f"one date is mapped ({self.time}), so there are none to join: leave out the time, or the "
                f"{'map of each date' if self.dates == 'each' else 'majority'}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        area = None if self.area is None else self.area.to_list()
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "area": area,
            "without": list(self.without),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        area = data.get("area")
        return cls(**{
            **data,
            "area": None if area is None else Area.from_list(area),
            "without": tuple(data.get("without", ())),
        })  # fmt: skip
