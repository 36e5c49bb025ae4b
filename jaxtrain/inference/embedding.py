"""Embed windows or samples: the code of an autoencoder as vectors to search, cluster and compare.

OUT/embedding (sample, code)   float32: the mean of the code over the window
OUT/time, y, x (sample,)       of a cube: date and centre of the window, in its CRS
OUT/name (sample,)             of a sample store: where the sample came from
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from jaxtrain.data.arrays import put_batch
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.windows import Windows
from jaxtrain.display import result_table
from jaxtrain.evaluation.scores import restore_model, select_data
from jaxtrain.learn.step import make_embed_step
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.runs.rundir import load_card
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.folder import FolderStore

__all__ = ["EmbeddingResult", "embed"]


@dataclass(frozen=True, repr=False)
class EmbeddingResult:
    """The vectors that `embed` has written.

    Attributes:
        out: Path of the Zarr group that holds them.
        samples: Number of vectors.
        code: Number of values in each vector.
        warnings: Warnings about the vectors: damaged checkpoints, other ground or resolution.

    Example:
        >>> made = embed("runs/autoencoder", "zagreb.zarr", "more_vectors.zarr")
        >>> made.code
        2
    """

    out: str
    samples: int
    code: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<EmbeddingResult {self.out}: {self.samples} vectors of {self.code} values>"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        rows = {"samples": self.samples, "code": self.code, "warnings": "\n".join(self.warnings)}
        return result_table(f"Vectors {self.out}", rows)


def embed(
    run: str | PathLike[str],
    data: str | Path,
    out: str | Path,
    *,
    allow_mismatch: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> EmbeddingResult:
    """Embed all windows of a cube, or all samples of a store, with the encoder of a run.

    Args:
        run: A run of model `autoencoder`.
        data: A cube or sample store with the bands of the model.
        out: Path of the new vectors (Zarr); nothing may exist there.
        allow_mismatch: Use data of another pixel size or of units that cannot be converted, and warn.
        on_batch: Called with (batches done, batches in all).

    Returns:
        Where the vectors are, and how many there are.

    Raises:
        InvalidInput: The run is of another model, the data are of another kind, or something is at `out`.
        NothingFound: No window has enough observed pixels (`data.min_labelled` of the run).

    Example:
        >>> made = embed("runs/autoencoder", "zagreb.zarr", "vectors.zarr")
        >>> made.samples, made.code
        (60, 2)
    """
    run = Path(run)
    card = load_card(run)
    if not card.task.rebuild:
        raise InvalidInput(f"{run} is of model {card.config.model.name}, which has no code: train an autoencoder")
    store = FolderStore.at(out)
    if store.exists():
        raise InvalidInput(f"{store.url} exists; give another path, or remove it first")
    opened = open_training_data(data)
    chosen = select_data(card, opened, part=None, name=data, insist=allow_mismatch)
    windows = chosen.windows
    program, state, step, passed_over = restore_model(run, card)
    encode = make_embed_step(program)
    axis = int(program.mesh.shape["data"])
    size = -(-card.config.run.batch_size // axis) * axis
    sharding = batch_sharding(program.mesh)
    total = -(-len(windows) // size)
    found: list[npt.NDArray[np.float32]] = []
    enough: list[npt.NDArray[np.bool_]] = []
    with BatchStream(chosen.reader, windows, size=size, sharding=sharding) as batches:
        for number, rows, batch in batches:
            there = put_batch({name: batch[name] for name in ("image", "observed")}, sharding, size)
            found.append(np.asarray(jax.device_get(encode(state, there)))[: len(rows)])
            seen = batch["observed"][: len(rows)].mean(axis=(1, 2))
            enough.append(np.asarray(seen >= card.config.data.min_labelled))
            if on_batch:
                on_batch(number + 1, total)
    # a vector is a mean over the whole window, so one of hardly any pixels says nothing
    kept, warnings = np.concatenate(enough), [*chosen.warnings, *passed_over]
    if not kept.any():
        raise NothingFound(
            f"{chosen.url} has no window of which a share of {card.config.data.min_labelled:g} was observed "
            "(data.min_labelled of the run)"
        )
    if not kept.all():
        warnings.append(
            f"{int((~kept).sum()):,} of {len(kept):,} windows have no vector: less than a share of "
            f"{card.config.data.min_labelled:g} of them was observed (data.min_labelled of the run)"
        )
    vectors, windows = np.concatenate(found)[kept], Windows(windows.patch, windows.rows[kept])
    with store.beside() as fresh:
        root = zarr.create_group(fresh.zarr(), attributes={
            "terrashard_embedding": {"run": str(run.absolute()), "step": step, "data": chosen.url,
                                     "bands": list(card.bands)}
        })  # fmt: skip
        _write(root, "embedding", vectors, ("sample", "code"))
        for name, values in opened.places(card.config.data.collection, windows).items():
            _write(root, name, values, ("sample",))
    return EmbeddingResult(store.url, len(vectors), int(vectors.shape[1]), tuple(warnings))


def _write(root: zarr.Group, name: str, values: npt.NDArray[Any], dims: tuple[str, ...]) -> None:
    array = root.create_array(
        name, shape=values.shape, chunks=(min(len(values), 65_536), *values.shape[1:]),
        dtype="str" if values.dtype == object else values.dtype, compressors=[ZstdCodec(level=3, checksum=True)],
        dimension_names=dims,
    )  # fmt: skip
    array[...] = values
