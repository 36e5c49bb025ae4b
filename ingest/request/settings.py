"""The settings of `IngestConfig` as keywords of the public functions: `make_plan(url, bands=["red", "nir"])`.

The types here say what may be written; every default and every check is in `IngestConfig`. A test holds the names of
both together.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar

from pydantic import ValidationError

from ingest.request.config import TRUST_FIELDS, IngestConfig
from ingest.trust.providers import ProviderRule
from zarr_store.errors import InvalidInput, UnknownName

__all__ = [
    "PlanSettings",
    "RunSettings",
    "SearchSettings",
    "TrustSettings",
    "UpkeepSettings",
    "make_config",
    "spell_out",
    "trust_of",
]

Names = str | Sequence[str]
Asked = ParamSpec("Asked")
Given = TypeVar("Given")


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


def make_config(config: IngestConfig | None, settings: Mapping[str, Any]) -> IngestConfig:
    """Lay settings over a configuration and check the whole.

    Args:
        config: What to start from; None for the defaults.
        settings: Fields of `IngestConfig`; they win. A region takes the place of the other kind of region.

    Raises:
        UnknownName: A setting that does not exist; the nearest one is named.
        InvalidInput: One line that lists every problem.

    >>> make_config(None, {"bands": ["red", "nir"], "bbox": (16.0, 45.9, 16.2, 46.1)}).bands
    ('red', 'nir')
    """
    for name in settings:
        if name not in IngestConfig.model_fields:
            raise UnknownName.of("setting", name, IngestConfig.model_fields)
    base = {} if config is None else {name: getattr(config, name) for name in config.model_fields_set}
    if any(settings.get(name) is not None for name in ("bbox", "geometry")):
        base = {name: value for name, value in base.items() if name not in ("bbox", "geometry")}
    try:
        return IngestConfig.model_validate({**base, **{name: _plain(value) for name, value in settings.items()}})
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc'])) or 'settings'}: {str(one['msg']).removeprefix('Value error, ')}"
            for one in error.errors(include_url=False)
        ]
        raise InvalidInput("; ".join(problems)) from error


def trust_of(config: IngestConfig) -> dict[str, Any]:
    """The settings of trust that a configuration was given."""
    return {name: getattr(config, name) for name in TRUST_FIELDS & config.model_fields_set}


def spell_out(settings: type) -> Callable[[Callable[Asked, Given]], Callable[Asked, Given]]:
    """Show the settings that a function takes as keywords of its own, to `help`, editors and the documentation.

    Args:
        settings: The TypedDict of its `**settings`.
    """

    def show(function: Callable[Asked, Given]) -> Callable[Asked, Given]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {parameter.name for parameter in own}
        shown = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=IngestConfig.model_fields[name].get_default(),
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in settings.__annotations__.items()
            if name not in taken
        ]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return show


def _plain(value: Any) -> Any:
    """Lists, arrays and sets become the tuples that fields are; texts, paths and mappings stay."""
    if isinstance(value, str | os.PathLike | Mapping) or not hasattr(value, "__iter__"):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    return tuple(value)
