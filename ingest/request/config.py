"""`IngestConfig`: all settings of an ingest, in five sections.

Each section is a frozen model with its own defaults and checks. It refuses unknown keys, and opens no file. Settings
are written under flat names, without sections: as options, with `--set`, in TOML files, as keywords in Python, and in
plan files. `IngestConfig.from_flat` and `to_flat` alone map flat names to sections and back.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, Unpack

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ingest.request.keywords import UpkeepSettings
from ingest.request.pixels import GridSettings, Pixels
from ingest.request.running import Running
from ingest.request.selection import Selection
from ingest.request.trust import Trust
from zarr_store.errors import InvalidInput, UnknownName

__all__ = ["SECTIONS", "SETTINGS", "IngestConfig"]

SECTIONS: dict[str, type[BaseModel]] = {
    "selection": Selection,
    "grid": GridSettings,
    "pixels": Pixels,
    "trust": Trust,
    "running": Running,
}
_SECTION_OF = {setting: section for section, model in SECTIONS.items() for setting in model.model_fields}
SETTINGS: dict[str, FieldInfo] = {name: field for m in SECTIONS.values() for name, field in m.model_fields.items()}
"""Flat name of a setting → its field, with default and description."""
_KEPT = ("selection", "grid", "pixels")
"""Sections that plans keep, as they decide what a cube holds."""


class IngestConfig(BaseModel):
    """All settings of an ingest: selection, grid, rules for pixels, trust, and running.

    Settings are given as flat keywords; instead, a section may be given as a whole.

    Example:
        >>> config = IngestConfig(bands="red,nir", datetime="2023-08", workers=4)
        >>> config.selection.bands, config.running.workers
        (('red', 'nir'), 4)
        >>> config
        IngestConfig(datetime='2023-08', bands=('red', 'nir'), workers=4)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    selection: Selection = Selection()
    grid: GridSettings = GridSettings()
    pixels: Pixels = Pixels()
    trust: Trust = Trust()
    running: Running = Running()

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            selection: Selection = ...,
            grid: GridSettings = ...,
            pixels: Pixels = ...,
            trust: Trust = ...,
            running: Running = ...,
            **settings: Unpack[UpkeepSettings],
        ) -> None:
            """Take settings by their flat names, or whole sections."""

    @model_validator(mode="before")
    @classmethod
    def _sort_into_sections(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        whole = {name: value for name, value in data.items() if name in SECTIONS}
        flat = {name: value for name, value in data.items() if name not in SECTIONS}
        problems = [_unknown(str(name)) for name in flat if name not in SETTINGS]
        if problems:
            raise UnknownName("; ".join(problems))
        nested = _nest(flat)
        for name in whole.keys() & nested.keys():
            raise ValueError(f"give the section {name} as a whole, or {', '.join(nested[name])} by itself, not both")
        return whole | nested

    @classmethod
    def from_flat(cls, settings: Mapping[str, Any]) -> Self:
        """Make a configuration from settings under their flat names.

        Args:
            settings: Name → value, as in a TOML file or a plan.

        Raises:
            UnknownName: A setting does not exist; the nearest one is named.
            InvalidInput: A value cannot be used. Both messages list every problem.

        >>> IngestConfig.from_flat({"bands": "red", "resolution": 20}).to_flat()
        {'bands': ('red',), 'resolution': 20.0}
        """
        unknown = [_unknown(str(name)) for name in settings if name not in SETTINGS]
        try:
            made = cls.model_validate(_nest({name: value for name, value in settings.items() if name in SETTINGS}))
        except ValidationError as error:
            wrong = [_describe(dict(problem)) for problem in error.errors(include_url=False)]
            kind = UnknownName if unknown else InvalidInput
            raise kind("; ".join([*unknown, *wrong])) from error
        if unknown:
            raise UnknownName("; ".join(unknown))
        return made

    def to_flat(self) -> dict[str, Any]:
        """Return the settings that were given, under their flat names; those left at their defaults are not in it."""
        sections = (getattr(self, name) for name in SECTIONS)
        return {
            name: getattr(section, name)
            for section in sections
            for name in type(section).model_fields
            if name in section.model_fields_set
        }

    def plan_settings(self) -> dict[str, Any]:
        """Return the settings that a plan keeps, under their flat names and as JSON.

        They are those of selection, grid and pixels that are not at their defaults. Trust is not among them, as a plan
        may come from somebody else.
        """
        kept: dict[str, Any] = {}
        for name in _KEPT:
            kept |= getattr(self, name).model_dump(mode="json", exclude_defaults=True)
        return kept

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the configuration with settings changed, under flat names; unlike pydantic, it checks the copy."""
        update = update or {}
        copy = super().model_copy(update={k: v for k, v in update.items() if k in SECTIONS}, deep=deep)
        flat = {k: v for k, v in update.items() if k not in SECTIONS}
        return self.from_flat({**copy.to_flat(), **flat}) if flat else copy

    def __repr_args__(self) -> Any:
        """Show the settings that were given, as the constructor takes them."""
        return self.to_flat().items()


def _nest(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort flat settings into sections."""
    nested: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        nested.setdefault(_SECTION_OF[name], {})[name] = value
    return nested


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
    return f"unknown setting {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"(known: {', '.join(SETTINGS)})")


def _describe(problem: Mapping[str, Any]) -> str:
    """Describe a problem under the name that the user wrote, which has no section."""
    key = ".".join(str(part) for part in problem["loc"][1:])
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return message
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        # of a tuple the value that would come next is absent
        key = ".".join(str(part) for part in problem["loc"][1:-1])
        return f"{key}: expected more than {problem['loc'][-1]} values, got {problem['input']!r}"
    came = "" if isinstance(problem["input"], dict) or " got " in message else f", got {problem['input']!r}"
    return f"{key}: {message}{came}"
