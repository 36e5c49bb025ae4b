"""`python -m jaxtrain.train CONFIG.toml --out RUN`: the training script, without the `terrashard` command."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from jaxtrain.settings import read_train_config
from zarr_store.errors import TerrashardError
from zarr_store.printable import one_line, safe_output, shown
from zarr_store.redact import redact_text

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return the exit code."""
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
        from jaxtrain.loop import train
        from jaxtrain.parallel.heap import keep_freed_memory
        from jaxtrain.parallel.processes import spread_mesh, start_distributed, start_replica
        from jaxtrain.runs.repeat import repeat_exactly

        config = read_train_config([parsed.config])
        keep_freed_memory()
        if config.run.deterministic:
            repeat_exactly()
        if config.hetero.enabled:
            start_replica()
        elif not start_distributed().is_first:
            logging.getLogger("jaxtrain").setLevel(logging.WARNING)
        if config.mesh.auto:
            from jaxtrain.planner.choose import choose_mesh

            config = choose_mesh(config, logging.getLogger("jaxtrain").info)
        train(spread_mesh(config), parsed.out, progress=False)
    except TerrashardError as error:
        sys.stderr.write(f"{one_line(redact_text(f'error: {error}'))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues from the last checkpoint\n")
        return 130
    except Exception:  # noqa: BLE001  whatever it is, its traceback may quote addresses
        sys.stderr.write(shown(traceback.format_exc()))
        return 1
    return 0
