"""`BlockReader`: decodes blocks of a TIFF straight into the result, without GDAL's block cache.

GDAL opens the file once and gives the places of its blocks. How they are packed is read from the tags themselves, and
must agree with GDAL. The common packings (tiled, one band, deflate, zstd or none, with or without a predictor) are then
decoded by imagecodecs from the bytes into the result. On 10 m bands in deflate that takes two thirds of GDAL's
processor time. GDAL decodes everything else, and blocks that a sparse file leaves out. Checksums inside the packing are
verified, and a block that decodes to more or fewer bytes than it should is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import imagecodecs
import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import RasterioError
from rasterio.windows import Window

from ingest.raster.directory import Directory
from ingest.raster.gdal_read import hide_masked, read_window
from ingest.raster.ranges import RangeFile, Span, block_span, blocks_of
from ingest.worker.slots import computing

__all__ = ["BlockReader", "ContradictionError", "DamagedBlockError", "Packing", "check_streams"]

Pixels = npt.NDArray[np.generic]
Unpack = Callable[..., Any]

_UNPACK: dict[str, Unpack | None] = {
    "": None,
    "DEFLATE": imagecodecs.deflate_decode,
    "ZSTD": imagecodecs.zstd_decode,
}
_UNPREDICT: dict[tuple[str, str], Unpack | None] = {
    ("u", "1"): None,
    ("i", "1"): None,
    ("f", "1"): None,
    ("u", "2"): imagecodecs.delta_decode,
    ("i", "2"): imagecodecs.delta_decode,
    ("f", "3"): imagecodecs.floatpred_decode,
}
_FAULTS = (RuntimeError, ValueError)
"""Types that imagecodecs raises for damaged bytes."""


class DamagedBlockError(RasterioError):  # type: ignore[misc]  # rasterio is untyped
    """The bytes of a block differ from what the header of the file states."""


class ContradictionError(RasterioError):  # type: ignore[misc]
    """The tags of a file state something other than what GDAL reads."""


@dataclass(frozen=True)
class Packing:
    """The packing of the blocks of a TIFF that can be decoded without GDAL.

    Attributes:
        block: (height, width) of a block, in pixels.
        dtype: Type of the pixels.
        compression: GDAL's name of the compression, empty for none.
        predictor: TIFF's number of the predictor.
    """

    block: tuple[int, int]
    dtype: str
    compression: str
    predictor: str

    @classmethod
    def of(cls, dataset: rasterio.io.DatasetReader, file: RangeFile) -> Self | None:
        """Return the packing of an open file, or None where GDAL must decode.

        Raises:
            ContradictionError: GDAL reads something else than the tags of the file state.
        """
        directory = Directory.of(file)
        if directory is None:
            return None
        packing = cls(directory.block, directory.dtype, directory.compression, str(directory.predictor))
        if not packing.decodable or dataset.count != 1 or "NBITS" in dataset.tags(1, ns="IMAGE_STRUCTURE"):
            return None
        structure = dataset.tags(ns="IMAGE_STRUCTURE")
        _agree("size", directory.shape, dataset.shape)
        _agree("size of tiles", packing.block, dataset.block_shapes[0])
        _agree("type", packing.dtype, dataset.dtypes[0])
        _agree("compression", packing.compression, structure.get("COMPRESSION", ""))
        _agree("predictor", packing.predictor, structure.get("PREDICTOR", "1"))
        return packing

    @property
    def decodable(self) -> bool:
        """Whether tiles of this size and predictor are decoded without GDAL."""
        tall, wide = self.block
        return not (tall % 16 or wide % 16) and self._predicted in _UNPREDICT

    @property
    def unpack(self) -> Unpack | None:
        """The function that undoes the compression; None without compression."""
        return _UNPACK[self.compression]

    @property
    def unpredict(self) -> Unpack | None:
        """The function that undoes the predictor; None without a predictor."""
        return _UNPREDICT[self._predicted]

    @property
    def _predicted(self) -> tuple[str, str]:
        return (np.dtype(self.dtype).kind, self.predictor)


class BlockReader:
    """Reader of windows of the one band of a TIFF.

    Args:
        packing: Packing of the blocks.
        file: Bytes of the file.
        spans: Array (rows, columns, 2) of the first byte of each block and the first after it; None asks `dataset`.
        dataset: The open file, which gives the places of blocks, left-out blocks and the mask; not needed for a file
            without a mask where there are `spans`.
    """

    def __init__(
        self,
        packing: Packing,
        file: RangeFile,
        *,
        spans: npt.NDArray[np.int64] | None = None,
        dataset: rasterio.io.DatasetReader | None = None,
    ) -> None:
        self._dataset = dataset
        self._file = file
        self._spans = spans
        self._unpack = packing.unpack
        self._unpredict = packing.unpredict
        self._dtype = np.dtype(packing.dtype)
        self._block = packing.block

    @classmethod
    def of(cls, dataset: rasterio.io.DatasetReader, file: RangeFile) -> Self | None:
        """Make a reader of an open file; None where GDAL must decode."""
        packing = Packing.of(dataset, file)
        return None if packing is None else cls(packing, file, dataset=dataset)

    def read(self, row: int, col: int, height: int, width: int, out: Pixels | None = None) -> Pixels:
        """Read a window of (height, width) in the file's type, into `out` if it is given.

        Raises:
            DamagedBlockError: A block is cut short, or does not decode to its size.
        """
        if out is None:
            out = np.empty((height, width), self._dtype)
        blocks = self._blocks(row, col, height, width)
        spans = {block: self._span(*block) for block in blocks}
        self._file.fetch(span for span in spans.values() if span is not None)
        with computing():
            self._decode_all(spans, (row, col, height, width), out)
        if self._dataset is not None:
            hide_masked(self._dataset, out, window=Window(col, row, width, height))
        self._file.forget()
        return out

    def _decode_all(
        self, spans: dict[tuple[int, int], Span | None], window: tuple[int, int, int, int], out: Pixels
    ) -> None:
        row, col, height, width = window
        tall, wide = self._block
        scratch = np.empty((2, tall, wide), self._dtype)
        for (y, x), span in spans.items():
            top, left = max(row, y * tall), max(col, x * wide)
            bottom, right = min(row + height, y * tall + tall), min(col + width, x * wide + wide)
            view = out[top - row : bottom - row, left - col : right - col]
            if span is None:  # left out of a sparse file: GDAL gives its pixels
                assert self._dataset is not None, "spans without a dataset must hold all blocks"
                view[...] = read_window(self._dataset, window=Window(left, top, right - left, bottom - top))
                continue
            inside = (slice(top - y * tall, bottom - y * tall), slice(left - x * wide, right - x * wide))
            try:
                self._decode(span, view, inside, scratch)
            except _FAULTS as error:
                raise DamagedBlockError(f"block at row {y * tall}, column {x * wide} is damaged: {error}") from None

    def _decode(self, span: Span, view: Pixels, inside: tuple[slice, slice], scratch: Pixels) -> None:
        """Decode one block into the part of the result that it covers."""
        if span[1] > self._file.size:
            raise ValueError(f"the file ends at byte {self._file.size}, the block would at {span[1]}")
        packed = self._file.view(*span)
        size = scratch[0].nbytes
        if self._unpack is None:
            flat = np.frombuffer(packed, np.uint8)
        else:
            flat = np.frombuffer(self._unpack(packed, out=scratch[0].reshape(-1).view(np.uint8)), np.uint8)
        if flat.size != size:
            raise ValueError(f"expected {size} bytes, it holds {flat.size}")
        pixels = flat.view(self._dtype).reshape(self._block)
        if self._unpredict is None:
            view[...] = pixels[inside]
        elif view.shape == self._block:
            self._unpredict(pixels, axis=-1, out=view)
        else:  # each row is predicted by itself
            rows = inside[0]
            self._unpredict(pixels[rows], axis=-1, out=scratch[1][rows])
            view[...] = scratch[1][inside]

    def _blocks(self, row: int, col: int, height: int, width: int) -> list[tuple[int, int]]:
        tall, wide = self._block
        rows = range(row // tall, -(-(row + height) // tall))
        return [(y, x) for y in rows for x in range(col // wide, -(-(col + width) // wide))]

    def _span(self, y: int, x: int) -> Span | None:
        if self._spans is not None:
            start, stop = self._spans[y, x]
            return int(start), int(stop)
        return block_span(self._dataset, y, x)


def check_streams(dataset: rasterio.io.DatasetReader, file: RangeFile, window: tuple[int, int, int, int]) -> None:
    """Verify the checksums of deflated blocks before GDAL decodes them, because GDAL ignores the checksums.

    Args:
        dataset: The open file.
        file: Bytes of the file.
        window: (row, col, height, width) that is about to be read.

    Raises:
        DamagedBlockError: A block does not match its checksum, is cut short, or is larger than it may be.
    """
    if dataset.driver != "GTiff" or dataset.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION") != "DEFLATE":
        return
    unpack: Unpack = imagecodecs.deflate_decode
    tall, wide = dataset.block_shapes[0]
    unpacked = np.empty(tall * wide * np.dtype(dataset.dtypes[0]).itemsize, np.uint8)
    for start, stop in blocks_of(dataset, window):
        try:
            unpack(file.view(start, stop), out=unpacked)
        except _FAULTS as error:
            raise DamagedBlockError(f"block at byte {start} is damaged: {error}") from None


def _agree(what: str, by_tags: object, by_gdal: object) -> None:
    if by_tags != by_gdal:
        raise ContradictionError(
            f"the tags of the file state the {what} {by_tags}, GDAL reads {by_gdal}: it is damaged"
        )
