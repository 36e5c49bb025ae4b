"""`make_config` turns settings into a checked `IngestConfig`, for the command line and for keywords in Python.

It reads the files that settings name (regions, rules of providers) before it builds the configuration.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ingest.request.config import SETTINGS, IngestConfig
from ingest.request.geometry import load_geometry
from ingest.request.keywords import PlanSettings, RunSettings, SearchSettings, TrustSettings, UpkeepSettings
from ingest.trust.providers import load_provider_file
from zarr_store.errors import InvalidInput

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

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def make_config(config: IngestConfig | None, settings: Mapping[str, Any], *, where: str = "") -> IngestConfig:
    """Read the files that settings name, put the settings over a configuration, and check the result.

    Args:
        config: Configuration to start from; None for the defaults.
        settings: Settings by their flat names; they win. A region takes the place of the other kind of region.
        where: Origin of the settings, for messages: a file name, or "options".

    Raises:
        UnknownName: A setting does not exist; the nearest one is named.
        InvalidInput: A file or a value cannot be used. Both messages list every problem.

    >>> make_config(None, {"bands": ["red", "nir"], "bbox": (16.0, 45.9, 16.2, 46.1)}).selection.bands
    ('red', 'nir')
    """
    base = {} if config is None else config.to_flat()
    if any(settings.get(name) is not None for name in ("bbox", "geometry")):
        base = {name: value for name, value in base.items() if name not in ("bbox", "geometry")}
    if "workers" in settings:  # a number takes the place of a range
        base.pop("workers_least", None)
    kind: type[InvalidInput] = InvalidInput
    problems = []
    values = {}
    for name, value in settings.items():
        try:
            values[name] = _READERS.get(name, _plain)(value)
        except InvalidInput as error:
            problems.append(f"{name}: {error}")
    try:
        made = IngestConfig.from_flat({**base, **values})
    except InvalidInput as error:
        kind = type(error)
        problems.append(str(error))
    if problems:
        raise kind((f"{where}: " if where else "") + "; ".join(problems))
    return made


def trust_of(config: IngestConfig) -> dict[str, Any]:
    """Return the settings of trust that a configuration was given, under their flat names."""
    return {name: getattr(config.trust, name) for name in config.trust.model_fields_set}


def spell_out(settings: type) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorate a function so that `help`, editors and documentation show each of its `**settings` as a keyword.

    Args:
        settings: TypedDict of the settings.
    """

    def show(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {parameter.name for parameter in own}
        shown = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=SETTINGS[name].get_default(),
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in settings.__annotations__.items()
            if name not in taken
        ]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return show


def _plain(value: Any) -> Any:
    """Turn lists, arrays and sets into tuples, and paths into texts; texts and mappings stay."""
    if isinstance(value, str | os.PathLike | Mapping) or not hasattr(value, "__iter__"):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    return tuple(value)


def _read_geometry(value: Any) -> Any:
    return load_geometry(Path(value)) if isinstance(value, str | os.PathLike) else _plain(value)


def _read_providers(value: Any) -> Any:
    given = (value,) if isinstance(value, str | os.PathLike) else _plain(value)
    if not isinstance(given, tuple):
        return given
    return tuple(load_provider_file(Path(one)) if isinstance(one, str | os.PathLike) else one for one in given)


_READERS: dict[str, Callable[[Any], Any]] = {"geometry": _read_geometry, "providers": _read_providers}
