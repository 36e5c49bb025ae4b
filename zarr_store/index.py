"""`TrainingIndex` holds counts and moments of each chunk, from the ledger; no pixel is read.

While a shard is written its chunks are counted; the counts are kept in the shard's ledger row. Together they show
where there is something to learn, and give normalisation statistics of any part of the cube (for example of the
training blocks only, so that nothing of the test ground leaks into them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from zarr_store.errors import IntegrityError
from zarr_store.ledger import LedgerRow
from zarr_store.spec import CubeSpec

__all__ = ["TrainingIndex"]

Counts = npt.NDArray[np.int64]
Moments = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TrainingIndex:
    """Counts and moments of every chunk of one collection, each array of shape (T, CY, CX) in chunks.

    Attributes:
        chunk: (time, y, x) pixels of a chunk.
        present: Chunks that have been written.
        pixels, observed, masked, missing: Pixels in all, and by status.
        band_mean, band_m2: (T, CY, CX, B) mean and sum of squared deviations over observed pixels.
        class_counts: Class layer → (T, CY, CX, 256) pixels of each value among those observed or masked.

    Example:
        >>> from zarr_store import open_cube
        >>> index = open_cube("cube.zarr").index("sentinel-2-l2a")
        >>> index.pixels.sum(axis=(1, 2)).tolist()
        [4096, 4096]
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
        """Join the ledger rows of a collection.

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
        """Mask (T, CY, CX) of the chunks that are observed in every pixel."""
        whole: npt.NDArray[np.bool_] = self.present & (self.observed == self.pixels)
        return whole

    def statistics(self, select: npt.NDArray[np.bool_] | None = None) -> tuple[Moments, Moments]:
        """Return mean and standard deviation of each band over the observed pixels of the selected chunks.

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
