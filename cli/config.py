"""Settings of commands: the values of `--config` and `--set` become values of a command's own options.

`jaxtrain.settings` reads the files and overrides, for both packages. Its functions are exported here for all commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from jaxtrain.settings import build, check_one_mesh, merge, override, parse_override, read_settings, read_toml
from zarr_store.errors import InvalidInput, UnknownName

__all__ = [
    "apply_to_options",
    "build",
    "check_one_mesh",
    "merge",
    "override",
    "parse_override",
    "read_settings",
    "read_toml",
]


def apply_to_options(
    settings: Mapping[str, Any], options: Mapping[str, Any], given: frozenset[str], command: str
) -> dict[str, Any]:
    """Return values for a command's own options from settings of the same names; options that were typed win.

    Args:
        settings: Settings of --config and --set; `-` and `_` mean the same in a key.
        options: Option name → annotation.
        given: Names of the options that were given on the command line.
        command: Name of the command, for messages.

    Raises:
        UnknownName: The command has no option of that name; the nearest one is named.
        InvalidInput: A value has the wrong type.
    """
    values = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name not in options:
            raise UnknownName.of("setting", key, options, f"terrashard {command}")
        if name in given:
            continue
        annotation = options[name]
        kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        try:
            values[name] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise InvalidInput(
                f"terrashard {command}: {key}: {error.errors()[0]['msg'].lower()}, got {value!r}"
            ) from error
    return values
