"""`GridSettings` and `Pixels`: the grid of a cube, and the rules by which its pixels are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ingest.request.names import UniqueNames
from zarr_store.grid import check_pixel_size, normal_crs

__all__ = ["GridSettings", "Pixels"]


class GridSettings(BaseModel):
    """The grid of a cube, and the layout of its shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crs: str | None = Field(None, description="target CRS; none means the CRS of most pixels")
    resolution: float | None = Field(
        None, gt=0, description="pixel size in CRS units; none means that of the finest source"
    )
    resampling: Literal["nearest", "bilinear", "cubic", "average"] = Field(
        "bilinear",
        description="method for data bands; grids at least twice as coarse are averaged, except with nearest",
    )
    profile: Literal["train", "timeseries", "archive", "fast"] = Field(
        "train", description="layout of chunks and shards: for training patches, time series, small storage, or speed"
    )

    read_overviews: bool = Field(
        False,
        description="where the grid is at least twice as coarse as a file, read reflectance from its overviews",
    )
    native: bool = Field(
        False,
        description="keep each band at its own pixel size, as groups such as NAME_10m and NAME_20m on nested grids",
    )

    @field_validator("crs")
    @classmethod
    def _check_crs(cls, value: str | None) -> str | None:
        return None if value is None else normal_crs(value)

    @model_validator(mode="after")
    def _one_size(self) -> GridSettings:
        if self.native and self.resolution is not None:
            raise ValueError(
                f"--native keeps the pixel size of each band, --resolution {self.resolution:g} asks for one of all; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _average(self) -> GridSettings:
        if self.read_overviews and self.resampling == "nearest":
            raise ValueError(
                "--overviews takes averages that were made before, --resampling nearest asks for single pixels of the "
                "file; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_units(self) -> GridSettings:
        if self.crs is not None and self.resolution is not None:
            check_pixel_size(self.crs, self.resolution)
        return self


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class Pixels(BaseModel):
    """The rules for masking, compositing and radiometry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mask: Literal["scl", "none"] = Field("scl", description="scl: mask pixels by their scene classification")
    mask_classes: tuple[Annotated[int, Field(ge=0, le=255)], ...] = Field(
        (0, 1, 3, 8, 9, 10), description="classes that are masked: nodata, saturated, shadow, clouds, cirrus"
    )
    mask_dilate_m: float = Field(0.0, ge=0, le=10_000, description="distance by which masked areas grow, metres")
    group: Literal["solar-day", "item", "month"] = Field(
        "solar-day", description="scenes that make one time step: those of a solar day, one item, or a month"
    )
    reduce: Literal["first", "median", "mean"] = Field(
        "first",
        description="value of a pixel in a time step: its first clear scene, or median or mean of all clear ones",
    )
    indices: Annotated[UniqueNames, BeforeValidator(_lower)] = Field(
        (), description="spectral indices that are computed and stored as arrays, e.g. ndvi,ndwi"
    )
    clip: bool = Field(True, description="pixels outside the polygons of `geometry` become nodata")
    offset_policy: Literal["repair", "warn", "fail"] = Field(
        "repair", description="what to do when pixels contradict the metadata about the -1000 offset"
    )
