"""Where text becomes typed objects: a TOML file, `--set a.b=c` and options become one pydantic model.

Nothing else in terrashard parses settings. Every problem of a configuration is listed in one error, and an unknown
key is answered with the nearest known one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.regular import check_regular

__all__ = ["apply_to_options", "build", "merge", "parse_override", "read_settings", "read_toml"]

Model = TypeVar("Model", bound=BaseModel)

# A settings file is written by hand; anything longer is not one, and is refused before it is parsed.
_MAX_BYTES = 1_000_000


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        InvalidInput: It does not exist, is too large, or is not TOML; the message names file and line.
    """
    try:
        if check_regular(path).st_size > _MAX_BYTES:
            raise InvalidInput(f"{path} has more than {_MAX_BYTES} bytes; expected a TOML file written by hand")
        return tomllib.loads(read_file(path, _MAX_BYTES).decode("utf-8"))
    except FileNotFoundError as error:
        raise InvalidInput(f"configuration file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"configuration file {path} cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"configuration file {path} is not TOML: {error}") from error


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=c` as nested tables; the value is read as TOML where it is TOML, else as text.

    >>> parse_override("run.steps=50")
    {'run': {'steps': 50}}
    >>> parse_override("data.cube=demo/cube.zarr")
    {'data': {'cube': 'demo/cube.zarr'}}
    """
    key, equals, value = text.partition("=")
    names = [part.strip() for part in key.split(".")]
    if not equals or not all(names):
        raise InvalidInput(f"--set expects KEY=VALUE such as run.steps=50, got {text!r}")
    try:
        parsed: Any = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for name in reversed(names):
        parsed = {name: parsed}
    return dict(parsed)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the tables of `over` laid into it; where both have a value, `over` wins.

    >>> merge({"run": {"steps": 1, "seed": 2}}, {"run": {"steps": 3}})
    {'run': {'steps': 3, 'seed': 2}}
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_settings(path: Path | None, overrides: Iterable[str]) -> dict[str, Any]:
    """The settings file with each override laid over it, in order."""
    settings = read_toml(path) if path else {}
    for text in overrides:
        settings = merge(settings, parse_override(text))
    return settings


def build(model: type[Model], data: Mapping[str, Any], *, where: str) -> Model:
    """Make the model, or raise one error that lists every problem.

    Args:
        model: A strict pydantic model.
        data: What the user gave.
        where: What to call its origin in the message: a file name, or "options".

    Raises:
        InvalidInput: One line; an unknown key names the nearest known one.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [_describe(model, dict(problem)) for problem in error.errors(include_url=False)]
        raise InvalidInput(f"{where}: " + "; ".join(problems)) from error


def _describe(model: type[BaseModel], problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = _fields(model, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else f"(known: {', '.join(sorted(known))})"
        return f"unknown key {key!r}: {hint}"
    if problem["type"] == "missing":
        return f"key {key!r} is needed and absent"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return message
    came = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    return f"{key}: {message}{came}"


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields of the model that `path` leads to."""
    for name in path:
        info = model.model_fields.get(name)
        inner = _model_of(info.annotation) if info else None
        if inner is None:
            return []
        model = inner
    return [info.alias or name for name, info in model.model_fields.items()]


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_of(part))), None)


def apply_to_options(
    settings: Mapping[str, Any], options: Mapping[str, Any], given: frozenset[str], command: str
) -> dict[str, Any]:
    """Values for a command's own options from settings of the same names; what stood on the command line stays.

    Args:
        settings: From --config and --set; `-` and `_` mean the same in a key.
        options: Option name → annotation.
        given: Options that were given on the command line.
        command: Its name, for messages.
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
