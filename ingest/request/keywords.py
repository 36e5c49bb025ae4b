"""The settings of `IngestConfig` as typed keywords: `make_plan(url, bands=["red", "nir"])`.

These types list what may be written; all defaults and checks are in the sections of `IngestConfig`. A test compares the
names of both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from ingest.trust.providers import ProviderRule

__all__ = ["PlanSettings", "RunSettings", "SearchSettings", "TrustSettings", "UpkeepSettings"]

Names = str | Sequence[str]


class TrustSettings(TypedDict, total=False):
    """Settings of trust and patience: hosts and folders that may be opened, keys, timeouts and retries."""

    sign: Literal["planetary-computer", "none"]
    providers: str | os.PathLike[str] | Sequence[str | os.PathLike[str] | ProviderRule]
    allow_hosts: Names
    allow_local: Names
    allow_private_hosts: bool
    requester_pays: bool
    timeout_s: float
    retries: int


class SearchSettings(TrustSettings, total=False):
    """Settings of a search, with those of trust."""

    collections: Names
    bbox: str | Sequence[float] | None
    geometry: str | os.PathLike[str] | Mapping[str, Any] | None
    wrap: bool
    datetime: str | None
    query: Names
    bands: Names
    max_items: int | None
    strict: bool


class PlanSettings(SearchSettings, total=False):
    """Settings of a plan: search, trust, grid, and rules for pixels."""

    crs: str | None
    resolution: float | None
    resampling: Literal["nearest", "bilinear", "cubic", "average"]
    profile: Literal["train", "timeseries", "archive", "fast"]
    read_overviews: bool
    native: bool
    mask: Literal["scl", "none"]
    mask_classes: Sequence[int]
    mask_dilate_m: float
    group: Literal["solar-day", "item", "month"]
    reduce: Literal["first", "median", "mean"]
    indices: Names
    clip: bool
    offset_policy: Literal["repair", "warn", "fail"]


class RunSettings(TrustSettings, total=False):
    """Settings of a run, with those of trust."""

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
    """All settings: for work on a cube that exists."""
