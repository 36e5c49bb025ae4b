"""`Selection`: which scenes and bands an ingest uses."""

from __future__ import annotations

import calendar
import datetime as dt
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ingest.request.geometry import bare_geometry, cut_uncut
from ingest.request.names import UniqueNames
from ingest.request.query import Comparison, Condition, parse_condition, split_conditions

__all__ = ["Selection", "parse_interval"]

_HALF_WAY_ROUND = 180.0
"""Widest region across the antimeridian, in degrees, that needs no `wrap`."""


class Selection(BaseModel):
    """Selection of scenes and bands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    collections: UniqueNames = Field((), description="collection ids; empty means all of the source that are supported")
    bbox: tuple[float, float, float, float] | None = Field(
        None, description="west, south, east, north in degrees; west > east crosses the antimeridian"
    )
    geometry: dict[str, Any] | None = Field(
        None, description="GeoJSON geometry in lon/lat, or (command line, TOML, keywords) the path of a file"
    )
    wrap: bool = Field(False, description="the region is meant as written, although it is wider than 180 degrees")
    datetime: str | None = Field(None, description="day, month, year or RFC 3339 instant, or a range A/B, A/.., ../B")
    query: tuple[str, ...] = Field(
        (), description='conditions on item properties, e.g. "eo:cloud_cover<40", or CQL2 text'
    )
    bands: UniqueNames = Field((), description="common names or B02-style names; empty means the product's usual ones")
    max_items: Annotated[int, Field(gt=0)] | None = Field(None, description="stop after this many scenes")

    @field_validator("bbox", mode="before")
    @classmethod
    def _parse_bbox(cls, value: Any) -> Any:
        parts = tuple(value.split(",")) if isinstance(value, str) else value
        if isinstance(parts, tuple | list) and len(parts) != 4:
            raise ValueError(f"expected four numbers in degrees, west,south,east,north, got {len(parts)}: {value!r}")
        odd = [part.strip() for part in parts if isinstance(part, str) and not _is_number(part)] if parts else []
        if odd:
            raise ValueError(
                f"expected four numbers in degrees, west,south,east,north, got {', '.join(odd)} in {value!r}"
            )
        return parts

    @field_validator("bbox")
    @classmethod
    def _check_bbox(cls, value: tuple[float, float, float, float] | None) -> tuple[float, float, float, float] | None:
        if value is None:
            return None
        west, south, east, north = value
        if not all(math.isfinite(v) for v in value):
            raise ValueError(f"west,south,east,north must be finite numbers, got {value}")
        if not (-90 <= south <= 90 and -90 <= north <= 90):
            raise ValueError(
                f"south and north must be degrees of latitude in -90…90, got {south:g} and {north:g}; "
                "the order is west,south,east,north in lon/lat degrees, not projected metres"
            )
        if not (-180 <= west <= 180 and -180 <= east <= 180):
            raise ValueError(f"west and east must be degrees of longitude in -180…180, got {west:g} and {east:g}")
        if south >= north:
            raise ValueError(f"south must be below north (order: west,south,east,north), got {south:g} and {north:g}")
        if west == east:
            raise ValueError(f"west and east must differ, got {west:g} twice")
        return value

    @field_validator("geometry", mode="before")
    @classmethod
    def _check_geometry(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            raise ValueError(
                f"expected a GeoJSON geometry, got {str(value)!r}; read a file with "
                "ingest.request.geometry.load_geometry, or give its path to find_scenes or make_plan"
            )
        if not isinstance(value, Mapping):
            return value
        bare = bare_geometry(value, "geometry")
        # the reduced form of a plan names what it stands for
        return bare | {"sha256": value["sha256"]} if isinstance(value.get("sha256"), str) else bare

    @field_validator("datetime")
    @classmethod
    def _check_datetime(cls, value: str | None) -> str | None:
        if value is not None:
            parse_interval(value)
        return value

    @field_validator("query", mode="before")
    @classmethod
    def _split_query(cls, value: Any) -> Any:
        return split_conditions(value) if isinstance(value, str) else value

    @field_validator("query")
    @classmethod
    def _check_query(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_condition(text)
        return value

    @model_validator(mode="after")
    def _one_region(self) -> Selection:
        if self.bbox and self.geometry:
            raise ValueError("give bbox or geometry, not both")
        return self

    @model_validator(mode="after")
    def _right_way_round(self) -> Selection:
        """Refuse a bbox that crosses the antimeridian the long way, and cut a geometry that crosses it uncut."""
        if self.wrap:
            return self
        if self.bbox and self.bbox[0] > self.bbox[2]:
            west, south, east, north = self.bbox
            degrees = east + 360.0 - west
            if degrees > _HALF_WAY_ROUND:
                raise ValueError(
                    f"bbox {west:g},{south:g},{east:g},{north:g} begins at longitude {west:g} and goes east, over the "
                    f"antimeridian, to {east:g}: that is {degrees:g} degrees of the Earth's 360. Write "
                    f"{east:g},{south:g},{west:g},{north:g} for the {360 - degrees:g} degrees between them, or add "
                    "--wrap (wrap=True) if the large region is meant"
                )
        if self.geometry is not None:
            object.__setattr__(self, "geometry", cut_uncut(self.geometry))
        return self

    @property
    def interval(self) -> tuple[dt.datetime | None, dt.datetime | None]:
        """The first and last time that are wanted, both inclusive and in UTC; None for an open end."""
        return parse_interval(self.datetime) if self.datetime else (None, None)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The parsed conditions of `query`; an item must fulfil all of them."""
        return tuple(parse_condition(text) for text in self.query)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The conditions of `query` that are simple comparisons."""
        return tuple(condition for condition in self.conditions if isinstance(condition, Comparison))


def parse_interval(text: str) -> tuple[dt.datetime | None, dt.datetime | None]:
    """Parse a day, month, year, instant or range into inclusive UTC bounds; None for an open end.

    >>> parse_interval("2023-08/2023-09-10")[1].isoformat()
    '2023-09-10T23:59:59+00:00'
    """
    parts = [part.strip() for part in text.split("/")]
    if len(parts) > 2 or not any(part not in ("", "..") for part in parts):
        raise ValueError(f"datetime {text!r} must be one date or a range A/B with at least one date")
    start = _bound(parts[0], end=False)
    stop = _bound(parts[-1], end=True)
    if start and stop and start > stop:
        raise ValueError(f"datetime range is reversed: {parts[0]} is after {parts[1]}; swap them")
    return start, stop


def _bound(text: str, *, end: bool) -> dt.datetime | None:
    if text in ("", ".."):
        return None
    short = re.fullmatch(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?", text)
    try:
        if not short:
            moment = dt.datetime.fromisoformat(text)
            return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)
        year, month, day = (int(part) if part else None for part in short.groups())
        if not end:
            return dt.datetime(year or 0, month or 1, day or 1, tzinfo=dt.UTC)
        month = month or 12
        day = day or calendar.monthrange(year or 1, month)[1]
        return dt.datetime(year or 0, month, day, 23, 59, 59, tzinfo=dt.UTC)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"datetime {text!r} is not a date: expected e.g. 2023, 2023-08, 2023-08-10 or "
            f"2023-08-10T09:57:57Z ({error})"
        ) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
