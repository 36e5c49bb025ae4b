"""`TrainingIndex`: what is known of each chunk without reading a pixel.

While a shard is written its chunks are counted; the counts travel in the shard's ledger row. Put together they say
where there is something to learn, and give normalisation statistics of any part of the cube (for example of the
training blocks only, so that nothing of the test ground leaks into them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from zarr_store.errors import IntegrityError
from zarr_store.spec import STATUS_MASKED, STATUS_MISSING, STATUS_OBSERVED, CubeSpec

if TYPE_CHECKING:
    from zarr_store.ledger import LedgerRow

__all__ = ["ChunkStats", "TrainingIndex"]

Counts = npt.NDArray[np.int64]
Moments = npt.NDArray[np.float64]

_FEW_CLASSES = 24
"""With more values than this a table is faster."""


@dataclass(frozen=True)
class ChunkStats:
    """Counts and moments of one chunk.

    Attributes:
        observed, masked, missing: Pixels of each status.
        mean, m2: Per band, mean and sum of squared deviations over observed pixels.
        classes: Per class layer, value → pixels among those observed or masked.
    """

    observed: int
    masked: int
    missing: int
    mean: tuple[float, ...]
    m2: tuple[float, ...]
    classes: Mapping[str, Mapping[int, int]]

    @classmethod
    def of(cls, main: np.ndarray, status: np.ndarray, layers: Mapping[str, np.ndarray]) -> Self:
        """Count one chunk.

        Args:
            main: (time, band, y, x).
            status: (time, y, x).
            layers: Class layers, each (time, y, x) uint8.
        """
        status = np.ascontiguousarray(status)  # rows of a shard lie far apart, and each is looked at several times
        clear = status == STATUS_OBSERVED
        observed = int(np.count_nonzero(clear))
        masked = status == STATUS_MASKED
        counted = observed + int(np.count_nonzero(masked))
        mean, m2 = _moments(main, clear, observed)
        seen = clear | masked
        classes = {}
        for name, layer in layers.items():
            classes[name] = _class_counts(layer.ravel() if counted == layer.size else layer[seen])
        missing = int(np.count_nonzero(status == STATUS_MISSING))
        return cls(observed, counted - observed, missing, mean, m2, classes)

    def to_list(self) -> list[Any]:
        """JSON form, short because there is one per chunk."""
        classes = {name: {str(k): v for k, v in counts.items()} for name, counts in self.classes.items()}
        return [self.observed, self.masked, self.missing, list(self.mean), list(self.m2), classes]

    @classmethod
    def from_list(cls, data: list[Any]) -> Self:
        """Inverse of `to_list`."""
        observed, masked, missing, mean, m2, classes = data
        return cls(
            int(observed),
            int(masked),
            int(missing),
            tuple(map(float, mean)),
            tuple(map(float, m2)),
            {name: {int(k): int(v) for k, v in counts.items()} for name, counts in classes.items()},
        )


@dataclass(frozen=True)
class TrainingIndex:
    """Counts and moments of every chunk of one collection, each array of shape (T, CY, CX) in chunks.

    Attributes:
        chunk: (time, y, x) pixels of a chunk.
        present: Chunks that have been written.
        pixels, observed, masked, missing: Pixels in all, and by status.
        band_mean, band_m2: (T, CY, CX, B) mean and sum of squared deviations over observed pixels.
        class_counts: Class layer → (T, CY, CX, 256) pixels of each value among those observed or masked.
    """

    chunk: tuple[int, int, int]
    present: npt.NDArray[np.bool_]
    pixels: Counts
    observed: Counts
    masked: Counts
    missing: Counts
    band_mean: Moments
    band_m2: Moments
    class_counts: dict[str, Counts]

    @classmethod
    def from_rows(cls, spec: CubeSpec, rows: Mapping[tuple[int, int, int], LedgerRow]) -> Self:
        """Put the ledger rows of a collection together.

        Raises:
            IntegrityError: A row is not one of this collection.
        """
        ct, cy, cx = spec.layout.chunk
        times, height, width = spec.shape
        shape = (-(-times // ct), -(-height // cy), -(-width // cx))
        bands = len(spec.bands)
        index = cls(
            chunk=spec.layout.chunk,
            present=np.zeros(shape, bool),
            pixels=np.zeros(shape, np.int64),
            observed=np.zeros(shape, np.int64),
            masked=np.zeros(shape, np.int64),
            missing=np.zeros(shape, np.int64),
            band_mean=np.zeros((*shape, bands)),
            band_m2=np.zeros((*shape, bands)),
            class_counts={name: np.zeros((*shape, 256), np.int64) for name in spec.class_layers},
        )
        for row in rows.values():
            try:
                index._add(spec, row)
            except (ValueError, KeyError, IndexError, OverflowError) as error:
                raise IntegrityError(
                    f"the ledger row of shard {row.index} is not one of this collection ({type(error).__name__}: "
                    f"{error}); `terrashard repair` makes the shard again"
                ) from error
        return index

    def _add(self, spec: CubeSpec, row: LedgerRow) -> None:
        ct, cy, cx = self.chunk
        region, (times, height, width) = row.region, spec.shape
        if region.t1 > times or region.y1 > height or region.x1 > width:
            raise ValueError(f"{region} reaches beyond {spec.shape}")
        for box, stats in zip(spec.chunks(region).values(), row.stats, strict=False):
            at = (box.t0 // ct, box.y0 // cy, box.x0 // cx)
            self.present[at] = True
            self.pixels[at] = np.prod(box.shape)
            self.observed[at] = stats.observed
            self.masked[at] = stats.masked
            self.missing[at] = stats.missing
            self.band_mean[at] = stats.mean
            self.band_m2[at] = stats.m2
            for name, counts in stats.classes.items():
                self.class_counts[name][at][list(counts)] = list(counts.values())

    @cached_property
    def whole(self) -> npt.NDArray[np.bool_]:
        """Chunks (T, CY, CX) that are observed in every pixel."""
        whole: npt.NDArray[np.bool_] = self.present & (self.observed == self.pixels)
        return whole

    def statistics(self, select: npt.NDArray[np.bool_] | None = None) -> tuple[Moments, Moments]:
        """Mean and standard deviation of each band over the observed pixels of the selected chunks.

        Moments are merged pairwise by Chan, Golub & LeVeque (1979), which loses no precision to large means.

        Args:
            select: (T, CY, CX) chunks to use; None for all.

        Returns:
            (mean, std), each float64 (B,); std is 1 where a band is constant or nothing was observed.
        """
        chosen = self.present if select is None else self.present & select
        counts = self.observed[chosen].astype(np.float64)[:, None]
        total = counts.sum()
        if not total:
            bands = self.band_mean.shape[-1]
            return np.zeros(bands), np.ones(bands)
        means = self.band_mean[chosen]
        mean = (counts * means).sum(axis=0) / total
        m2 = self.band_m2[chosen].sum(axis=0) + (counts * np.square(means - mean)).sum(axis=0)
        std = np.sqrt(m2 / total)
        return mean, np.where(std > 0, std, 1.0)


def _class_counts(layer: np.ndarray) -> dict[int, int]:
    """Value → pixels of a flat layer; comparing with each of a few values is twice as fast as a table of 256."""
    top = int(layer.max(initial=0))
    if top >= _FEW_CLASSES:
        counts = np.bincount(layer, minlength=256)
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    found = ((value, int(np.count_nonzero(layer == value))) for value in range(top + 1))
    return {value: count for value, count in found if count}


def _moments(main: np.ndarray, clear: np.ndarray, observed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per band, mean and sum of squared deviations over the pixels that are clear.

    Whole numbers are summed exactly: a chunk of up to 2²¹ pixels of 16 bits sums to less than 2⁵³ even when squared,
    so neither the order of summation nor the size of the mean costs a bit. Products are summed row by row: for a whole
    chunk at once BLAS would wake a thread on every core, and those then spin.
    """
    bands = main.shape[1]
    if not observed:
        return (0.0,) * bands, (0.0,) * bands
    if main.dtype.kind == "f" or main.dtype.itemsize > 2 or observed > 1 << 21:
        values = np.moveaxis(main, 1, 0)[:, clear].astype(np.float64)
        means = values.mean(axis=1)
        squares = np.square(values - means[:, None]).sum(axis=1)
        return tuple(float(v) for v in means), tuple(float(v) for v in squares)
    mean, m2 = [], []
    values = np.empty((main.shape[0], *main.shape[2:]))  # one for all bands: fresh memory costs more than the sums
    ones = np.ones(values.shape[-1])
    kept = clear.astype(np.float64) if observed < values.size else None
    for band in range(bands):
        values[...] = main[:, band]
        if kept is not None:
            values *= kept
        total, squared = int((values @ ones).sum()), int(np.vecdot(values, values).sum())
        mean.append(total / observed)
        m2.append((observed * squared - total * total) / observed)
    return tuple(mean), tuple(m2)
