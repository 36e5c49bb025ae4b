"""Lists of names as people type them: "red,nir" on a command line or in TOML, a sequence in Python."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

__all__ = ["Names", "UniqueNames", "split_names"]


def split_names(value: Any) -> Any:
    """Split a text at its commas; other values stay as they are.

    >>> split_names("red, nir")
    ('red', 'nir')
    """
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _check_unique(value: tuple[str, ...]) -> tuple[str, ...]:
    if any(not name.strip() for name in value):
        raise ValueError("names must not be empty")
    if len(set(value)) != len(value):
        raise ValueError(f"each name once, got {', '.join(value)}")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(split_names)]
UniqueNames = Annotated[Names, AfterValidator(_check_unique)]
