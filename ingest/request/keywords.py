"""The settings of `IngestConfig` as typed keywords: `make_plan(url, bands=["red", "nir"])`.

The types here say what may be written; every default and every check is in `IngestConfig`. A test holds the names of
both together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from ingest.trust.providers import ProviderRule

__all__ = ["PlanSettings", "RunSettings", "SearchSettings", "TrustSettings", "UpkeepSettings"]

Names = str | Sequence[str]


class TrustSettings(TypedDict, total=False):
    """Which hosts and folders may be opened, and with which keys."""

    sign: Literal["planetary-computer", "none"]
    providers: str | os.PathLike[str] | Sequence[str | os.PathLike[str] | ProviderRule]
    allow_hosts: Names
    allow_local: Names
    allow_private_hosts: bool
    requester_pays: bool
    timeout_s: float
    retries: int


class SearchSettings(TrustSettings, total=False):
    """Which scenes are asked for."""

    collections: Names
    bbox: str | Sequence[float] | None
    geometry: str | os.PathLike[str] | Mapping[str, Any] | None
    datetime: str | None
    query: Names
    bands: Names
    max_items: int | None
    strict: bool


class PlanSettings(SearchSettings, total=False):
    """What is selected, on which grid, and by which rules."""

    crs: str | None
    resolution: float | None
    resampling: Literal["nearest", "bilinear", "cubic", "average"]
    profile: Literal["train", "timeseries", "archive"]
    mask: Literal["scl", "none"]
    mask_classes: Sequence[int]
    mask_dilate_m: float
    group: Literal["solar-day", "item", "month"]
    reduce: Literal["first", "median", "mean"]
    indices: Names
    clip: bool
    offset_policy: Literal["repair", "warn", "fail"]


class RunSettings(TrustSettings, total=False):
    """How a plan is run; nothing of it changes the pixels of a cube."""

    on_error: Literal["retry", "skip", "fail"]
    limit: int | None
    store: Literal["folder", "icechunk"] | None
    workers: int | str
    threads_per_worker: int
    memory: str | None
    scheduler: str | None
    cluster: Literal["local", "ssh", "slurm", "pbs", "k8s", "gateway"]
    hosts: Names
    cluster_options: Mapping[str, Any]
    tls: str | None
    expose: bool
    rate_limits: Names
    dashboard: str | None


class UpkeepSettings(PlanSettings, RunSettings, total=False):
    """What is selected for a cube that exists, and how it is run."""
