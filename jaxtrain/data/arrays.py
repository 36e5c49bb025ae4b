"""Batches: numpy arrays in the layout of cubes, and their places on the devices.

Letters: B windows, H = W = patch, C bands. A batch is
    image     B C H W   stored numbers of the cube (uint16 reflectance, float32 backscatter)
    label     B H W     uint8 class index, 255 = unlabelled; or float32 value, nan = unlabelled
    observed  B H W     uint8, 1 where the network may see the pixel
In a series of T dates, image and observed have an axis T after B (B T C H W), and there is
    day       B T       uint16 day of the year, from 1
Rows and columns come last, as in the cube, so that chunks are decoded into the memory that a processor's device uses:
moving bands behind them (`as_images`), casting, normalising and augmenting are done on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import numpy as np
import numpy.typing as npt

from jaxtrain.parallel.mesh import stored_sharding
from zarr_store.errors import InvalidInput

__all__ = ["HostBatch", "Reader", "Rows", "as_images", "local_rows", "put_batch"]

HostBatch = dict[str, np.ndarray]
Rows = npt.NDArray[np.int32]


class Reader(Protocol):
    """A reader of rows into batches: windows of a cube, or samples of a store."""

    @property
    def shows(self) -> Literal["windows", "images"]:
        """Kind of a row: a window of the ground, or an image by itself."""
        ...

    def read(self, rows: Rows) -> HostBatch:
        """Read rows, int32 (B, 3) of (time, y, x) or (sample, y, x)."""
        ...

    def begin(self, rows: Rows) -> Callable[[], HostBatch]:
        """Start to read rows, and return a function that waits for them."""
        ...


def as_images(array: Any) -> Any:
    """Move rows and columns behind the samples, (B, …, H, W) → (B, H, W, …); labels of whole images stay."""
    n = array.ndim
    return array.transpose(0, n - 2, n - 1, *range(1, n - 2)) if n > 3 else array


def local_rows(sharding: jax.sharding.Sharding, size: int) -> slice:
    """Return the rows of a batch of `size` that this process must read.

    Raises:
        InvalidInput: They are not one run of rows, as on a mesh whose devices are not in order of processes.
    """
    spans = sorted(
        (index[0].start or 0, size if index[0].stop is None else index[0].stop)
        for index in sharding.addressable_devices_indices_map((size,)).values()
        if index is not None
    )
    low, high = spans[0][0], max(stop for _, stop in spans)
    reach = low
    for start, stop in spans:
        if start > reach:
            raise InvalidInput(
                f"this process's devices hold rows {spans} of a batch, expected one run of rows; order the mesh's data "
                "axis by process"
            )
        reach = max(reach, stop)
    return slice(low, high)


def put_batch(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding, size: int) -> dict[str, jax.Array]:
    """Make global arrays on the mesh from the rows that this process has read.

    Args:
        batch: Local rows of each array; of images whole ones, also where the mesh splits images.
        sharding: Splits the leading axis; rows and columns, the last two axes of arrays of three dimensions or more,
            are split further as its mesh says.
        size: Rows of the global batch.
    """
    first = local_rows(sharding, size).start
    mesh = sharding.mesh if isinstance(sharding, jax.NamedSharding) else None
    make: Callable[..., jax.Array] = jax.make_array_from_callback

    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            cut: np.ndarray = array[(slice(start - first, stop - first), *index[1:])]
            return cut

        lies = stored_sharding(mesh, array.ndim) if isinstance(mesh, jax.sharding.Mesh) else sharding
        return make((size, *array.shape[1:]), lies, part, dtype=array.dtype)

    return {name: place(array) for name, array in batch.items()}
