"""Turn text into typed objects: a TOML file and `--set a.b=c` become one pydantic model.

The `terrashard` command and `python -m jaxtrain.train` read settings through this one file. Every problem of a
configuration is listed in one error, and an unknown key is answered with the nearest known one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from jaxtrain.config import TrainConfig
from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput
from zarr_store.regular import check_regular

__all__ = [
    "build",
    "check_one_mesh",
    "merge",
    "override",
    "parse_override",
    "read_settings",
    "read_toml",
    "read_train_config",
]

Model = TypeVar("Model", bound=BaseModel)

# A settings file is written by hand; anything longer is not one, and is refused before it is parsed.
_MAX_BYTES = 1_000_000


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

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
    """Parse `a.b=c` into nested tables; the value is read as TOML if it is valid TOML, else as text.

    >>> parse_override("run.steps=50")
    {'run': {'steps': 50}}
    >>> parse_override("data.cube=demo/cube.zarr")
    {'data': {'cube': 'demo/cube.zarr'}}
    """
    names, value = _split_override(text)
    for name in reversed(names):
        value = {name: value}
    return dict(value)


def _split_override(text: str) -> tuple[list[str], Any]:
    """Return the names of the key of `a.b=c`, and the value."""
    key, equals, value = text.partition("=")
    names = [part.strip() for part in key.split(".")]
    if not equals or not all(names):
        raise InvalidInput(f"--set expects KEY=VALUE such as run.steps=50, got {text!r}")
    try:
        return names, tomllib.loads(f"value = {value.strip()}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return names, value.strip()


def override(settings: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return the settings with the one of `a.b=c` set: its value takes the place of the old one, also of a table.

    >>> override({"data": {"classes": {"4": "land"}, "patch": 32}}, 'data.classes={6 = "water"}')
    {'data': {'classes': {'6': 'water'}, 'patch': 32}}
    >>> override({"data": {"classes": {"4": "land"}}}, "data.classes.6=water")
    {'data': {'classes': {'4': 'land', '6': 'water'}}}
    """
    names, value = _split_override(text)
    changed = inner = dict(settings)
    for name in names[:-1]:
        table = inner.get(name)
        if table is not None and not isinstance(table, Mapping):
            raise InvalidInput(
                f"--set {text}: {name} is already {table!r}, which has no {names[-1]}: leave one of them out"
            )
        inner[name] = dict(table) if isinstance(table, Mapping) else {}
        inner = inner[name]
    inner[names[-1]] = value
    return changed


def merge(base: Mapping[str, Any], over: Mapping[str, Any], model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Return `base` with the tables of `over` laid over it; a value of `over` wins.

    Args:
        base: Nested settings.
        over: Nested settings that win.
        model: The model of the settings. A table that is the value of one setting, such as `data.classes`, is then
            replaced as a whole; without a model, all tables are joined.

    >>> merge({"run": {"steps": 1, "seed": 2}}, {"run": {"steps": 3}})
    {'run': {'steps': 3, 'seed': 2}}
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        info = model.model_fields.get(key) if model else None
        inner = _model_of(info.annotation) if info else None
        joined = isinstance(old, Mapping) and isinstance(value, Mapping) and (model is None or inner is not None)
        merged[key] = merge(old, value, inner) if joined else value  # type: ignore[arg-type]
    return merged


def read_settings(path: Path | None, overrides: Iterable[str]) -> dict[str, Any]:
    """Return the settings file with the setting of each override in place of the file's, in order."""
    settings = read_toml(path) if path else {}
    for text in overrides:
        settings = override(settings, text)
    return settings


def build(model: type[Model], data: Mapping[str, Any], *, where: str) -> Model:
    """Make the model, or raise one error that lists every problem.

    Args:
        model: A strict pydantic model.
        data: Settings as the user gave them.
        where: Origin of the settings in messages: a file name, or "options".

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
    if problem["type"] == "missing" and path and isinstance(problem["loc"][-1], int):
        # of a tuple the value that would come next is absent
        return f"{'.'.join(path[:-1])}: expected more than {problem['loc'][-1]} values, got {problem['input']!r}"
    if problem["type"] == "missing":
        return f"key {key!r} is needed and absent"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return message
    came = "" if isinstance(problem["input"], dict) or " got " in message else f", got {problem['input']!r}"
    return f"{key}: {message}{came}"


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the names of the fields of the model that `path` leads to."""
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


def read_train_config(paths: Sequence[Path], overrides: Iterable[str] = ()) -> TrainConfig:
    """Read the configuration of a training run: files, each laid over the one before, then each `--set` in order.

    A relative `data.cube` is relative to the file it stands in, or, in a `--set`, to the working directory.

    Args:
        paths: TOML files with the tables data, model, optim, mesh and run.
        overrides: Texts such as "run.steps=50".

    Raises:
        InvalidInput: A file is absent or no TOML, or a key or value does not fit; the nearest known key is named.

    Example:
        >>> config = read_train_config([], ["data.cube=zagreb.zarr", "run.steps=50"])
        >>> config.run.steps, config.model.name
        (50, 'unet')
    """
    settings: dict[str, Any] = {}
    given: list[tuple[str, Mapping[str, Any]]] = []
    for path in paths:
        tables = read_toml(path)
        given.append((str(path), tables))
        settings = merge(settings, _located(tables, path.parent), TrainConfig)
    for text in overrides:
        given.append((f"--set {text}", parse_override(text)))
        settings = override(settings, text)
    check_one_mesh(given)
    return build(TrainConfig, settings, where=str(paths[0]) if paths else "options")


def check_one_mesh(given: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse settings of which one lets the planner choose the mesh and another names it, in whichever order they come.

    Without this the later one would win, and what the user asked for first would be lost without a word.

    Args:
        given: Where each part of the settings comes from, and its tables; the mesh is the table `mesh`.

    Raises:
        InvalidInput: Both are there; the message names the places of both.

    >>> check_one_mesh([("run.toml", {"mesh": {"data": 2}}), ("--set mesh.zero=1", {"mesh": {"zero": 1}})])
    """
    chosen, named, keys = "", "", ""
    for where, settings in given:
        mesh = settings.get("mesh")
        if mesh == "auto" or (isinstance(mesh, Mapping) and mesh.get("auto")):
            chosen = where
        if isinstance(mesh, Mapping) and (names := [f"mesh.{name}" for name in mesh if name != "auto"]):
            named, keys = where, ", ".join(names)
    if chosen and named and chosen != named:  # one place with both is refused where the mesh is made
        raise InvalidInput(
            f"mesh = 'auto' chooses the mesh ({chosen}), and {keys} is named too ({named}): leave one of the two out"
        )


def _located(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    data = settings.get("data")
    if not isinstance(data, dict):
        return settings
    cube, modalities = data.get("cube"), data.get("modalities")
    if isinstance(modalities, dict):
        placed = {name: _located({"data": one}, folder)["data"] for name, one in modalities.items()}
        settings = {**settings, "data": {**data, "modalities": placed}}
    if isinstance(cube, str) and cube:
        return merge(settings, {"data": {"cube": _locate(cube, folder)}})
    if isinstance(cube, list) and cube and all(isinstance(one, str) for one in cube):
        return merge(settings, {"data": {"cube": tuple(_locate(one, folder) for one in cube)}})
    return settings


def _locate(cube: str, folder: Path) -> str:
    """Resolve a path relative to the folder of the file it stands in; URLs stay as they are."""
    return cube if "://" in cube else str((folder / cube).resolve())
