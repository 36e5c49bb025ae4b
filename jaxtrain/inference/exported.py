"""`export_model` writes a trained network for other programs: weights, StableHLO, ONNX, and a description.

    DIR/model.safetensors   parameters and batch statistics, by path
    DIR/model.stablehlo     `jax.export.deserialize` runs it; weights are inside
    DIR/model.onnx          the same function for ONNX runtimes
    DIR/item.json           STAC item with the MLM extension: input bands, normalisation, output, classes

The function takes stored numbers (float32) and what was observed (1 or 0), normalises them itself, and returns
probabilities or values as `predict` computes them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config import MeshConfig
from jaxtrain.evaluation.scores import restore_model
from jaxtrain.inference.model_item import input_shapes, list_numbers, model_bands, network_fields
from jaxtrain.learn.modalities import modality_shapes
from jaxtrain.learn.optim import evaluation_params
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import answer_batch
from jaxtrain.parallel.links import shape_of
from jaxtrain.parallel.sharding import path_name
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.rundir import ModelCard, load_card, program_of
from zarr_store.errors import InvalidInput
from zarr_store.samples import is_sample_store, open_samples
from zarr_store.stac_item import place_of, utc
from zarr_store.store import translate_os_errors

__all__ = ["ExportedModel", "export_model", "exported_function"]

FORMATS = ("safetensors", "stablehlo", "onnx")
_NEEDS = (("safetensors", "safetensors"), ("stablehlo", "flatbuffers"), ("onnx", "jax2onnx"))
_MLM = "https://stac-extensions.github.io/mlm/v1.5.0/schema.json"
_ALWAYS = ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z")
_KINDS = {"safetensors": "application/octet-stream; application=safetensors",
          "stablehlo": "application/octet-stream; application=stablehlo",
          "onnx": "application/octet-stream; framework=onnx"}  # fmt: skip


@dataclass(frozen=True)
class ExportedModel:
    """The files of an exported network.

    Attributes:
        folder: Where they are.
        files: Their names.
        inputs: Shape of each input, by name.
        output: Shape of the output.
        step: Step of the checkpoint.
        parameters: Number of parameters.
        warnings: What could not be used of the run.
    """

    folder: str
    files: tuple[str, ...]
    inputs: dict[str, tuple[int, ...]]
    output: tuple[int, ...]
    step: int
    parameters: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def export_model(
    run: str | PathLike[str],
    folder: str | Path,
    *,
    formats: tuple[str, ...] = FORMATS,
    batch: int = 1,
    side: int | None = None,
) -> ExportedModel:
    """Write the best or newest checkpoint of a run for other programs.

    Args:
        run: The run directory.
        folder: Folder of the files; nothing may be there.
        formats: The formats: some of "safetensors", "stablehlo" and "onnx".
        batch: Windows of one call.
        side: Side of a window in pixels; None for that of training.

    Raises:
        InvalidInput: A library is not installed, the folder exists, or ONNX lacks a layer of the network (named).
    """
    run, folder = Path(run), Path(folder)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InvalidInput(f"formats: expected some of {', '.join(FORMATS)}, got {', '.join(unknown) or 'none'}")
    lacking = [module for name, module in _NEEDS
               if name in formats and importlib.util.find_spec(module) is None]  # fmt: skip
    if lacking:
        verb = "is" if len(lacking) == 1 else "are"
        raise InvalidInput(
            f"{', '.join(lacking)} {verb} not installed: pip install 'terrashard[export]', or leave it out with "
            "--formats"
        )
    if folder.exists():
        raise InvalidInput(f"{folder} exists; give another folder, or remove it first")
    card = load_card(run)
    mesh = MeshConfig(data=1, model=1)
    program, state, step, passed_over = restore_model(run, card, program_of(card, _whole(card, mesh)))
    shapes = _input_shapes(card, program, batch, side)
    function, weights = exported_function(program, state)
    specs = {name: shape_of(shape, _dtype(name)) for name, shape in shapes.items()}
    output = jax.eval_shape(function, *specs.values()).shape
    count = sum(int(np.size(leaf)) for name, leaf in weights.items() if name.startswith("params."))
    with translate_os_errors(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            for name in formats:
                _WRITERS[name](part / f"model.{name}", function, specs, weights, card)
            item = _describe(card, shapes, output, count, formats, CheckpointStore(run / "checkpoints").digest(step))
            (part / "item.json").write_text(
                json.dumps(item, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8"
            )
            part.chmod(0o755)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    files = (*(f"model.{name}" for name in formats), "item.json")
    return ExportedModel(str(folder), files, shapes, tuple(output), step, count, passed_over)


def exported_function(program: Program, state: TrainState) -> tuple[Callable[..., jax.Array], dict[str, Any]]:
    """Return the network as a function of its inputs in the order of `_input_shapes`, and its weights by path."""
    params, model_state = jax.device_get((evaluation_params(state.params, state.opt_state), state.model_state))
    names = tuple(modality_shapes(program, 1)) if program.modalities else (
        ("image", "observed", "day") if program.config.data.dates != 1 else ("image", "observed")
    )  # fmt: skip

    def function(*arrays: jax.Array) -> jax.Array:
        return answer_batch(program, params, model_state, dict(zip(names, arrays, strict=True)))

    weights = {
        f"{group}.{path_name(path)}": np.asarray(leaf)
        for group, tree in (("params", params), ("state", model_state))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return function, weights


def _whole(card: ModelCard, mesh: MeshConfig) -> Any:
    return card.config.model_copy(update={"mesh": mesh})


def _dtype(name: str) -> Any:
    return jnp.int32 if name.startswith("day") else jnp.float32


def _input_shapes(card: ModelCard, program: Program, batch: int, side: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input by name, in order."""
    if batch < 1 or (side is not None and side < 1):
        raise InvalidInput(f"batch and side must be at least 1, got {batch} and {side}")
    if program.modalities:
        if side is not None and side != card.config.data.patch:
            raise InvalidInput(f"a network of several modalities has windows of data.patch, {card.config.data.patch}")
    elif side is None:
        side = card.config.data.patch
        if card.unit == "images":
            if "://" in card.cube or not is_sample_store(card.cube):
                raise InvalidInput(f"{card.cube} does not exist, so the size of its images is not known: give --side")
            side = open_samples(card.cube).spec.size[0]
    return input_shapes(card, program, batch, side or card.config.data.patch)


def _write_safetensors(path: Path, function: Any, specs: Any, weights: dict[str, Any], card: ModelCard) -> None:
    from safetensors.numpy import save_file

    about = {
        "architecture": card.config.model.name,
        "bands": ",".join(card.bands),
        "classes": ",".join(card.answers.names),
        "numbers": json.dumps(list_numbers(card)),
    }
    save_file({name: np.ascontiguousarray(array) for name, array in sorted(weights.items())}, str(path), metadata=about)


def _write_stablehlo(path: Path, function: Any, specs: dict[str, Any], weights: Any, card: ModelCard) -> None:
    from jax import export

    with _no_traceback():
        made = export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(*specs.values())
    path.write_bytes(made.serialize())


@contextlib.contextmanager
def _no_traceback() -> Iterator[None]:
    """Omit source lines from what JAX lowers: they name files of this machine, and depend on the caller."""
    before = jax.config.values["jax_traceback_in_locations_limit"]
    update: Callable[[str, Any], None] = jax.config.update
    update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        update("jax_traceback_in_locations_limit", before)


def _write_onnx(path: Path, function: Any, specs: dict[str, Any], weights: Any, card: ModelCard) -> None:
    import jax2onnx

    output = "values" if card.task.values else "probabilities"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Flax, in jax2onnx
            made = jax2onnx.to_onnx(function, list(specs.values()), model_name="terrashard",
                                    input_names=list(specs), output_names=[output])  # fmt: skip
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidInput(
            f"ONNX has no counterpart of a layer of {card.config.model.name}: {lines[0][:200]}; "
            "leave it out with --formats safetensors,stablehlo"
        ) from error
    path.write_bytes(made.SerializeToString(deterministic=True))


_WRITERS: dict[str, Callable[..., None]] = {
    "safetensors": _write_safetensors, "stablehlo": _write_stablehlo, "onnx": _write_onnx,
}  # fmt: skip


def _describe(
    card: ModelCard,
    shapes: dict[str, tuple[int, ...]],
    output: tuple[int, ...],
    parameters: int,
    formats: tuple[str, ...],
    digest: str,
) -> dict[str, Any]:
    """Return the STAC item with the MLM extension; it names no place and no path of the run."""
    name = card.config.model.name
    times = sorted({time for dates in card.dates for time in dates})
    first, last = (utc(times[0]), utc(times[-1])) if times else _ALWAYS
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [_MLM],
        "id": f"{name}-{digest[:12]}",
        **({"geometry": None} if card.grid is None else place_of(card.grid)),
        "properties": {
            "datetime": None, "start_datetime": first, "end_datetime": last,
            "description": f"A network {name} that terrashard trained on {', '.join(card.bands)}",
            "bands": model_bands(card),
            **network_fields(card, shapes, output, parameters),
        },
        "links": [],
        "assets": {
            form: {"href": f"./model.{form}", "type": _KINDS[form], "roles": ["mlm:model", "data"],
                   "title": f"The network as {form}", "mlm:artifact_type": form, "bands": model_bands(card)}
            for form in formats
        },
    }  # fmt: skip
