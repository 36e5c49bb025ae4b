"""`IngestConfig`: what is asked of an ingest, every default and every check, in one place.

Libraries take this object; only the command line turns text into it. It is frozen and refuses unknown keys.
"""

from __future__ import annotations

import calendar
import datetime as dt
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ingest.request.geometry import bare_geometry, load_geometry
from ingest.request.query import Comparison, Condition, parse_condition, split_conditions
from ingest.trust.hrefs import HrefPolicy
from ingest.trust.providers import ProviderRule, load_provider_file
from zarr_store.grid import normal_crs

__all__ = ["EXECUTION_FIELDS", "TRUST_FIELDS", "IngestConfig", "load_geometry"]

Positive = Annotated[int, Field(gt=0)]
Names = tuple[str, ...]

EXECUTION_FIELDS = frozenset(
    {
        "workers",
        "workers_least",
        "threads_per_worker",
        "memory",
        "scheduler",
        "cluster",
        "hosts",
        "cluster_options",
        "tls",
        "expose",
        "rate_limits",
        "dashboard",
        "on_error",
        "limit",
        "store",
        "timeout_s",
        "retries",
        "strict",
    }
)
"""Fields that change how a plan is run but never what ends in the cube; they do not belong in a plan's digest."""

TRUST_FIELDS = frozenset({"sign", "providers", "allow_hosts", "allow_local", "allow_private_hosts", "requester_pays"})
"""What the user of a command trusts. Plans and cubes neither keep nor give it: they may come from somebody else."""


class IngestConfig(BaseModel):
    """The whole of an ingest: what is selected, on which grid, by which rules, and how it is run.

    Example:
        >>> IngestConfig(bands="red,nir", datetime="2023-08").bands
        ('red', 'nir')
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # What is selected
    collections: Names = Field((), description="collection ids; empty means all that the source has and we understand")
    bbox: tuple[float, float, float, float] | None = Field(
        None, description="west, south, east, north in degrees; west > east crosses the antimeridian"
    )
    geometry: dict[str, Any] | None = Field(None, description="GeoJSON geometry in lon/lat, or the path of a file")
    datetime: str | None = Field(None, description="day, month, year or RFC 3339 instant, or a range A/B, A/.., ../B")
    query: Names = Field((), description='conditions on item properties, e.g. "eo:cloud_cover<40", or CQL2 text')
    bands: Names = Field((), description="common names or B02-style names; empty means the product's usual ones")
    max_items: Positive | None = Field(None, description="stop after this many scenes")
    strict: bool = Field(
        False, description="errors instead of warnings: other counts than promised, lacking bands, odd pixel values"
    )

    # The grid
    crs: str | None = Field(None, description="target CRS; none means the one with most pixels")
    resolution: float | None = Field(None, gt=0, description="pixel size in CRS units; none means the finest source")
    resampling: Literal["nearest", "bilinear", "cubic", "average"] = "bilinear"
    profile: Literal["train", "timeseries", "archive"] = "train"

    # Masking, compositing, radiometry
    mask: Literal["scl", "none"] = "scl"
    mask_classes: tuple[Annotated[int, Field(ge=0, le=255)], ...] = Field(
        (0, 1, 3, 8, 9, 10), description="classes that are masked: nodata, saturated, shadow, clouds, cirrus"
    )
    mask_dilate_m: float = Field(0.0, ge=0, le=10_000, description="how far masked areas grow, metres")
    group: Literal["solar-day", "item", "month"] = "solar-day"
    reduce: Literal["first", "median", "mean"] = Field(
        "first", description="what a step keeps of a pixel: its first clear scene, or median or mean of all clear ones"
    )
    indices: Annotated[Names, BeforeValidator(lambda value: _split_names(value))] = Field(
        (), description="spectral indices kept as arrays of their own, e.g. ndvi,ndwi"
    )
    clip: bool = Field(True, description="pixels outside the polygons of `geometry` become nodata")
    offset_policy: Literal["repair", "warn", "fail"] = Field(
        "repair", description="when pixels contradict what the metadata says of the -1000 offset"
    )

    # Trust
    sign: Literal["planetary-computer", "none"] = "none"
    providers: tuple[ProviderRule, ...] = Field((), description="more providers, or the paths of TOML files of them")
    allow_hosts: Names = Field((), description="more hosts (or s3 buckets) that hrefs may name; *.example.org works")
    allow_local: Names = Field((), description="more folders that local hrefs may lie in")
    allow_private_hosts: bool = Field(False, description="allow private, loopback and link-local addresses")
    requester_pays: bool = Field(False, description="read buckets that bill whoever reads, with your keys")

    # Running; see EXECUTION_FIELDS
    on_error: Literal["retry", "skip", "fail"] = "retry"
    limit: Positive | None = Field(None, description="stop after this many shards; the same command goes on")
    store: Literal["folder", "icechunk"] | None = Field(
        None, description="what holds a new cube: plain files or objects, or an Icechunk repository with a commit a run"
    )
    workers: Positive = Field(2, description="processes; LEAST..MOST lets their number follow the work")
    workers_least: Positive | None = Field(None, description="what `workers = LEAST..MOST` sets; none: all the time")
    threads_per_worker: Positive = 1
    memory: str | None = Field(None, description='limit of one worker, e.g. "4GB"')
    scheduler: str | None = Field(None, description="address of a running Dask scheduler")
    cluster: Literal["local", "ssh", "slurm", "pbs", "k8s", "gateway"] = Field(
        "local", description="where workers are started"
    )
    hosts: Names = Field((), description="of --cluster ssh: the scheduler's, then one per worker")
    cluster_options: dict[str, Any] = Field(
        {}, description="what the cluster needs: queue, account, walltime, image, namespace, address, username, port …"
    )
    tls: str | None = Field(None, description="folder with ca.pem, cert.pem and key.pem for every connection")
    expose: bool = Field(False, description="allow ports beyond this machine without TLS")
    rate_limits: Names = Field((), description="HOST=N: at most N requests per second from all workers together")
    dashboard: str | None = Field(None, description='address of the dashboard, e.g. ":8787"; none picks a free port')
    timeout_s: float = Field(30.0, gt=0, le=3600, description="longest silence of a server, seconds")
    retries: int = Field(4, ge=0, le=20, description="how often a failed request is repeated")

    @field_validator("providers", mode="before")
    @classmethod
    def _read_providers(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str | Path) else value
        if not isinstance(given, list | tuple):
            return value
        return tuple(load_provider_file(one) if isinstance(one, str | Path) else one for one in given)

    @model_validator(mode="before")
    @classmethod
    def _worker_range(cls, data: Any) -> Any:
        asked = data.get("workers") if isinstance(data, dict) else None
        if isinstance(asked, str) and (found := re.fullmatch(r"\s*(\d+)\s*\.\.\s*(\d+)\s*", asked)):
            least, most = (int(part) for part in found.groups())
            if not 1 <= least <= most:
                raise ValueError(f"workers is a number or LEAST..MOST with 1 ≤ LEAST ≤ MOST, got {asked}")
            return {**data, "workers": most, "workers_least": least}
        return data

    @field_validator("cluster_options", mode="before")
    @classmethod
    def _parse_options(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        pairs = [str(text).partition("=") for text in value]
        for name, equals, _ in pairs:
            if not equals or not name.strip():
                raise ValueError(f"a cluster option is KEY=VALUE, e.g. queue=short, got {name!r}")
        return {name.strip().replace("-", "_"): text.strip() for name, _, text in pairs}

    @field_validator("hosts", "rate_limits", mode="before")
    @classmethod
    def _split_hosts(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("rate_limits")
    @classmethod
    def _check_limits(cls, value: Names) -> Names:
        for text in value:
            parse_limit(text)
        return value

    @field_validator("query", mode="before")
    @classmethod
    def _split_query(cls, value: Any) -> Any:
        return split_conditions(value) if isinstance(value, str) else value

    @field_validator("collections", "bands", "allow_hosts", "allow_local", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        # "red,nir" is what people type, also inside TOML
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("collections", "bands", "indices")
    @classmethod
    def _named_once(cls, value: Names) -> Names:
        if any(not name.strip() for name in value):
            raise ValueError("names must not be empty")
        if len(set(value)) != len(value):
            raise ValueError(f"each name once, got {', '.join(value)}")
        return value

    @field_validator("bbox", mode="before")
    @classmethod
    def _parse_bbox(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

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
    def _read_geometry(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return load_geometry(value)
        return bare_geometry(value, "geometry") if isinstance(value, Mapping) else value

    @field_validator("datetime")
    @classmethod
    def _check_datetime(cls, value: str | None) -> str | None:
        if value is not None:
            parse_interval(value)
        return value

    @field_validator("query")
    @classmethod
    def _check_query(cls, value: Names) -> Names:
        for text in value:
            parse_condition(text)
        return value

    @field_validator("crs")
    @classmethod
    def _check_crs(cls, value: str | None) -> str | None:
        return None if value is None else normal_crs(value)

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+(\.\d+)?\s*([kMGT]i?)?B", value.strip()):
            raise ValueError(f"expected a size such as 4GB or 512MiB, got {value!r}")
        return value

    @model_validator(mode="after")
    def _one_region(self) -> IngestConfig:
        if self.bbox and self.geometry:
            raise ValueError("give bbox or geometry, not both")
        return self

    def href_policy(self, source: str, provider_hosts: Iterable[str] = ()) -> HrefPolicy:
        """What may be opened for `source`: its own place, what this config names, and the hosts of its provider."""
        return HrefPolicy.around(
            source,
            hosts=(*self.allow_hosts, *provider_hosts),
            roots=self.allow_local,
            allow_private=self.allow_private_hosts,
        )

    @property
    def interval(self) -> tuple[dt.datetime | None, dt.datetime | None]:
        """(start, end), both inclusive and in UTC; None is open."""
        return parse_interval(self.datetime) if self.datetime else (None, None)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The parsed conditions of `query`; an item must fulfil all of them."""
        return tuple(parse_condition(text) for text in self.query)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Those conditions that are a simple comparison."""
        return tuple(one for one in self.conditions if isinstance(one, Comparison))


def _split_names(value: Any) -> Any:
    return tuple(part.strip().lower() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def parse_interval(text: str) -> tuple[dt.datetime | None, dt.datetime | None]:
    """Parse a day, month, year, instant or range into inclusive UTC bounds.

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
            f"datetime {text!r} is no date: expected e.g. 2023, 2023-08, 2023-08-10 or 2023-08-10T09:57:57Z ({error})"
        ) from error


def parse_limit(text: str) -> tuple[str, float]:
    """Parse a rate limit, HOST=REQUESTS_PER_SECOND.

    >>> parse_limit("eodata=8")
    ('eodata', 8.0)
    """
    host, _, number = text.partition("=")
    if not host.strip() or not re.fullmatch(r"\s*\d+(\.\d+)?\s*", number) or not 0 < float(number) <= 10_000:
        raise ValueError(f"a rate limit is HOST=REQUESTS_PER_SECOND, e.g. eodata=8, got {text!r}")
    return host.strip(), float(number)
