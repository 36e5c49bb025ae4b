"""`python -m jaxtrain.train CONFIG.toml --out RUN`: the training script, without the `terrashard` command."""

from __future__ import annotations

import argparse
import logging
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from jaxtrain.config import TrainConfig
from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput, TerrashardError, UnknownName
from zarr_store.printable import one_line, safe_output
from zarr_store.redact import redact_text

__all__ = ["main", "read_config", "resolve_cube"]

_MOST_BYTES = 1_000_000
"""Of a configuration, which is written by hand."""


def resolve_cube(cube: str | Sequence[str], config_folder: Path) -> str | tuple[str, ...]:
    """The cube or cubes of a configuration file: a relative path counts from its folder; URLs stay as they are."""
    if not isinstance(cube, str):
        return tuple(str(resolve_cube(one, config_folder)) for one in cube)
    return cube if "://" in cube else str((config_folder / cube).resolve())


def read_config(path: Path) -> TrainConfig:
    """Read a configuration file.

    Raises:
        InvalidInput: It is absent, is no TOML, or has a value that does not fit.
        UnknownName: It has a key that does not exist; the nearest one is named.
    """
    try:
        values = tomllib.loads(read_file(path, _MOST_BYTES).decode("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"cannot read configuration {path}: {error}; expected a TOML file") from error
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, path) from error
    cube = resolve_cube(config.data.cube, path.parent)
    return config.model_copy(update={"data": config.data.model_copy(update={"cube": cube})})


def _explain(error: ValidationError, path: Path) -> InvalidInput:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            model: object = TrainConfig
            for part in problem["loc"][:-1]:
                model = type(None) if not hasattr(model, "model_fields") else model.model_fields[str(part)].annotation
            known = getattr(model, "model_fields", {})
            return UnknownName.of("key", str(problem["loc"][-1]), known, f"{path} ({key})")
        lines.append(f"{key or 'the whole'}: {problem['msg']}, got {problem['input']!r}"[:300])
    return InvalidInput(f"{path}: {'; '.join(lines)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jaxtrain.train", description="Train on a cube, or continue.")
    parser.add_argument("config", type=Path, help="TOML file with the tables data, model, optim, mesh, run")
    parser.add_argument("--out", type=Path, required=True, help="run directory; continued if it holds this run")
    parsed = parser.parse_args(arguments)
    # force: libraries that were imported have set up logging of their own
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("jaxtrain").setLevel(logging.INFO)
    with safe_output():
        return _run(parsed)


def _run(parsed: argparse.Namespace) -> int:
    try:
        from jaxtrain.heap import keep_freed_memory
        from jaxtrain.parallel.processes import spread_mesh, start_distributed
        from jaxtrain.repeat import repeat_exactly
        from jaxtrain.train import train

        config = read_config(parsed.config)
        keep_freed_memory()
        if config.run.deterministic:
            repeat_exactly()
        if not start_distributed().is_first:
            logging.getLogger("jaxtrain").setLevel(logging.WARNING)
        train(spread_mesh(config), parsed.out)
    except TerrashardError as error:
        sys.stderr.write(f"{one_line(redact_text(f'error: {error}'))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues from the last checkpoint\n")
        return 130
    return 0
