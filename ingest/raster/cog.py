"""`CogWriter`: writes a cloud-optimised GeoTIFF (COG), for example a simulated band or a predicted map.

GDAL's COG driver can only copy a finished dataset. So blocks first go, in any order, into a plain uncompressed TIFF
beside the target; closing copies that into the COG and renames it. Memory use is one block plus GDAL's cache, a reader
never sees half a file, and equal pixels give equal bytes.

Spec: OGC Cloud Optimized GeoTIFF 1.0 (docs.ogc.org/is/21-026), GDAL "COG -- Cloud Optimized GeoTIFF generator".
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.shutil
from rasterio._err import CPLE_BaseError
from rasterio.windows import Window

from ingest.raster.drivers import limit_raster_drivers
from zarr_store.errors import AccessError, InvalidInput, NoSpace, space_advice
from zarr_store.grid import Grid
from zarr_store.store import check_room, space_number

__all__ = ["CogWriter", "Colour", "write_cog"]

Colour = tuple[int, int, int]
"""Colour as (red, green, blue), each 0…255."""

Block = tuple[int, int, npt.NDArray[Any]]
"""Block as (first row, first column, pixels (height, width) or (count, height, width))."""

OverviewResampling = Literal["mode", "nearest", "average"]

_DEFAULT_BLOCK_PX = 512
"""Side of the internal tiles in pixels; GDAL's own default for COGs."""


class CogWriter:
    """Writer of one COG: write blocks in any order, then leave the `with` block.

    Pixels that are never written hold `nodata` (0 without one). After an exception no file remains.

    Args:
        path: Target file, replaced if it exists.
        grid: Georeference and size.
        dtype: Pixel type, e.g. "uint16".
        count: Number of bands.
        nodata: Value recorded as nodata.
        colours: Class value → colour; stored as the colour table. Single-band uint8 only.
        class_names: Class value → name; stored in the file as band metadata `class_<value>`, and beside it in an
            `.aux.xml` as the GDAL category names that `gdalinfo` lists and, with `colours`, as the raster attribute
            table from which QGIS makes its legend.
        descriptions: One name per band.
        overviews: Resampling of the internal overviews; "mode" for classes and "average" for data by default.
        block_px: Side of the internal tiles, a multiple of 16 and at least 128, which is GDAL's limit for COGs.
        tags: Dataset metadata.
        scales: (scale, offset) per band: physical = stored · scale + offset.
        statistics: Store minimum, maximum, mean, standard deviation and the share of valid pixels of each band
            (`STATISTICS_*`), of all pixels.

    Raises:
        InvalidInput: An argument that a COG cannot hold.
        NoSpace: The disk is full.
    """

    def __init__(
        self,
        path: str | Path,
        grid: Grid,
        *,
        dtype: str,
        count: int = 1,
        nodata: float | None = None,
        colours: Mapping[int, Colour] | None = None,
        class_names: Mapping[int, str] | None = None,
        descriptions: Iterable[str] = (),
        overviews: OverviewResampling | None = None,
        block_px: int = _DEFAULT_BLOCK_PX,
        tags: Mapping[str, str] | None = None,
        scales: Sequence[tuple[float, float]] = (),
        statistics: bool = False,
    ) -> None:
        self.path = Path(path)
        self.grid = grid
        self.dtype = np.dtype(dtype)
        self.count = count
        self._class_names = dict(class_names or {})
        self._colours = dict(colours or {})
        self._statistics = statistics
        is_class = bool(colours or class_names)
        if is_class and (self.dtype != np.uint8 or count != 1):
            raise InvalidInput(
                f"{self.path.name}: colours and class names need one uint8 band, got {count} of {self.dtype}; "
                "write classes as uint8"
            )
        if block_px < 128 or block_px % 16:
            raise InvalidInput(f"{self.path.name}: block_px must be a multiple of 16 from 128 up, got {block_px}")
        self._overviews = overviews or ("mode" if is_class else "average")
        self._block_px = block_px
        # one name per writer: two processes that write the same map must not share an unfinished file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        limit_raster_drivers()
        with _disk_errors(self.path):
            # a folder that only this user can write: GDAL itself would follow a link under the name of the file
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".part", dir=self.path.parent))
        self._part = self._folder / "made.tif"
        self._raw = self._folder / "raw.tif"
        with _disk_errors(self.path, self._folder):
            self._dataset = rasterio.open(
                self._raw,
                "w",
                driver="GTiff",
                width=grid.width,
                height=grid.height,
                count=count,
                dtype=self.dtype.name,
                crs=rasterio.CRS.from_user_input(grid.crs),
                transform=grid.affine,
                nodata=nodata,
                SPARSE_OK="TRUE",
                BIGTIFF="IF_SAFER",
            )
            for number, name in enumerate(descriptions, start=1):
                self._dataset.set_band_description(number, name)
            if scales:
                self._dataset.scales = [scale for scale, _ in scales]
                self._dataset.offsets = [offset for _, offset in scales]
            if tags:
                self._dataset.update_tags(**dict(tags))
            if class_names:
                self._dataset.update_tags(1, **{f"class_{value}": name for value, name in sorted(class_names.items())})
            if colours:
                self._dataset.write_colormap(1, {value: (*colour, 255) for value, colour in sorted(colours.items())})

    def write(self, row: int, col: int, pixels: npt.NDArray[Any]) -> None:
        """Write `pixels` (height, width) or (count, height, width) with their first pixel at (row, col).

        Raises:
            InvalidInput: The block has another type or number of bands, or leaves the grid.
        """
        if pixels.ndim == 2:
            pixels = pixels[np.newaxis]
        bands, height, width = pixels.shape
        if bands != self.count or pixels.dtype != self.dtype:
            raise InvalidInput(
                f"{self.path.name}: expected blocks of {self.count} × {self.dtype}, got {bands} × {pixels.dtype}"
            )
        if row < 0 or col < 0 or row + height > self.grid.height or col + width > self.grid.width:
            raise InvalidInput(
                f"{self.path.name}: block at row {row}, column {col} of {height}×{width} px leaves the grid "
                f"of {self.grid.height}×{self.grid.width} px"
            )
        with _disk_errors(self.path, self._folder):
            self._dataset.write(pixels, window=Window(col, row, width, height))

    def close(self) -> None:
        """Make the COG and rename it to the target."""
        try:
            with _disk_errors(self.path, self._folder):
                self._dataset.close()
                if self._statistics:
                    _add_statistics(self._raw, self._block_px)
            with _disk_errors(self.path, self._folder, copied=self._raw):
                rasterio.shutil.copy(
                    self._raw,
                    self._part,
                    driver="COG",
                    COMPRESS="DEFLATE",
                    PREDICTOR="YES",
                    LEVEL="6",
                    BLOCKSIZE=str(self._block_px),
                    OVERVIEW_RESAMPLING=self._overviews.upper(),
                    OVERVIEWS="IGNORE_EXISTING",
                    BIGTIFF="IF_SAFER",
                    STATISTICS="AUTO" if self._statistics else "NO",  # AUTO keeps those of the source
                )
            with _disk_errors(self.path, self._folder):
                sidecar = self.path.with_name(self.path.name + ".aux.xml")
                if self._class_names:
                    side_part = self._folder / "made.tif.aux.xml"
                    side_part.write_text(_category_xml(self._class_names, self._colours), encoding="utf-8")
                    os.replace(side_part, sidecar)
                else:
                    sidecar.unlink(missing_ok=True)  # names of an earlier file under this path
                os.replace(self._part, self.path)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove all unfinished files; the target stays as it was."""
        if not self._dataset.closed:
            self._dataset.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def write_cog(
    path: str | Path,
    data: npt.NDArray[Any] | Iterable[Block],
    grid: Grid,
    *,
    dtype: str | None = None,
    count: int = 1,
    nodata: float | None = None,
    colours: Mapping[int, Colour] | None = None,
    class_names: Mapping[int, str] | None = None,
    descriptions: Iterable[str] = (),
    overviews: OverviewResampling | None = None,
    block_px: int = _DEFAULT_BLOCK_PX,
    tags: Mapping[str, str] | None = None,
    scales: Sequence[tuple[float, float]] = (),
    statistics: bool = False,
) -> Path:
    """Write an array, or blocks that arrive one by one, as one COG.

    Args:
        path: Target file.
        data: Array (height, width) or (count, height, width), or an iterable of (row, column, block).
        grid: Georeference; an array must have its shape.
        dtype: Pixel type; needed when `data` is an iterable, else the array's.
        count: Bands; taken from a three-dimensional array.
        nodata: Value recorded as nodata; `CogWriter` describes this argument and those below.
        colours: Class value → (r, g, b).
        class_names: Class value → name.
        descriptions: Band names.
        overviews: Resampling of the overviews.
        block_px: Side of internal tiles.
        tags: Dataset metadata.
        scales: (scale, offset) per band.
        statistics: Store the statistics of each band.

    Returns:
        The path written.

    Raises:
        InvalidInput: Shapes or types that do not fit.
        NoSpace: The disk is full.
    """
    if isinstance(data, np.ndarray):
        if data.shape[-2:] != grid.shape:
            raise InvalidInput(f"{Path(path).name}: array has shape {data.shape}, the grid {grid.shape}")
        count = data.shape[0] if data.ndim == 3 else 1
        dtype = data.dtype.name
        blocks: Iterable[Block] = [(0, 0, data)]
    elif dtype is None:
        raise InvalidInput(f"{Path(path).name}: dtype must be given when blocks are written one by one")
    else:
        blocks = data
    writer = CogWriter(
        path,
        grid,
        dtype=dtype,
        count=count,
        nodata=nodata,
        colours=colours,
        class_names=class_names,
        descriptions=descriptions,
        overviews=overviews,
        block_px=block_px,
        tags=tags,
        scales=scales,
        statistics=statistics,
    )
    with writer:
        for row, col, block in blocks:
            writer.write(row, col, block)
    return writer.path


def _add_statistics(path: Path, rows: int) -> None:
    """Store the statistics of each band, strip by strip; GDAL's own need its driver VRT, which is switched off."""
    with rasterio.open(path, "r+") as dataset:
        for band in range(1, dataset.count + 1):
            total, low, high, mean, squares = 0, np.inf, -np.inf, 0.0, 0.0
            for row in range(0, dataset.height, rows):
                window = Window(0, row, dataset.width, min(rows, dataset.height - row))
                strip = dataset.read(band, window=window, masked=True).compressed()
                values = strip[np.isfinite(strip)].astype(np.float64)
                if not values.size:
                    continue
                low, high = min(low, values.min()), max(high, values.max())
                # means of two parts are joined without cancellation (Chan, Golub & LeVeque 1983)
                apart, both = values.mean() - mean, total + values.size
                squares += ((values - values.mean()) ** 2).sum() + apart**2 * total * values.size / both
                mean, total = mean + apart * values.size / both, both
            if total:
                spread = float(np.sqrt(squares / total))
                found = {"MINIMUM": low, "MAXIMUM": high, "MEAN": mean, "STDDEV": spread,
                         "VALID_PERCENT": 100 * total / (dataset.width * dataset.height)}  # fmt: skip
                dataset.update_tags(band, **{f"STATISTICS_{name}": f"{value:.10g}" for name, value in found.items()})


def _category_xml(names: Mapping[int, str], colours: Mapping[int, Colour]) -> str:
    """Return class names as GDAL's sidecar holds them: an entry for each value from 0 up, and a table with colours."""
    entries = "\n".join(f"      <Category>{escape(names.get(v, ''))}</Category>" for v in range(max(names) + 1))
    return (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{entries}\n    </CategoryNames>\n{_attribute_table(names, colours) if colours else ''}"
        "  </PAMRasterBand>\n</PAMDataset>\n"
    )


_COLUMNS = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8))
"""Columns of the raster attribute table: name, GDALRATFieldType, GDALRATFieldUsage."""


def _attribute_table(names: Mapping[int, str], colours: Mapping[int, Colour]) -> str:
    fields = "".join(
        f'      <FieldDefn index="{at}"><Name>{name}</Name><Type>{kind}</Type><Usage>{usage}</Usage></FieldDefn>\n'
        for at, (name, kind, usage) in enumerate(_COLUMNS)
    )
    rows = "".join(
        f'      <Row index="{at}">'
        + "".join(f"<F>{escape(str(cell))}</F>" for cell in (value, names[value], *colours.get(value, (0, 0, 0))))
        + "</Row>\n"
        for at, value in enumerate(sorted(names))
    )
    return f'    <GDALRasterAttributeTable tableType="thematic">\n{fields}{rows}    </GDALRasterAttributeTable>\n'


_WRITE_ERRORS = (rasterio.errors.RasterioError, CPLE_BaseError, OSError, SystemError)
"""Errors of rasterio where GDAL cannot write; a SystemError where GDAL fails without a message."""


class _disk_errors:
    """Context that turns write errors of GDAL into errors of this project; GDAL does not say that a disk is full.

    Args:
        path: The target, for messages.
        folder: The folder of the unfinished files.
        copied: The file that is being copied into a COG, if one is.
    """

    def __init__(self, path: Path, folder: Path | None = None, copied: Path | None = None) -> None:
        self.path = path
        self.folder = folder
        self.copied = copied

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, _WRITE_ERRORS) or isinstance(error, NoSpace):
            return
        try:
            free = shutil.disk_usage(self.path.parent).free
        except OSError:  # the folder is gone: the error itself says more
            raise AccessError(f"cannot write {self.path}: {error}; check the folder and its permissions") from error
        # the `errno` of an error of GDAL is GDAL's own number
        number = (error.errno if isinstance(error, OSError) else None) or space_number(error)
        advice = space_advice(number) or ("free some" if free < 1 << 20 else None)
        if advice:
            raise NoSpace(
                f"no space left to write {self.path}: {free} bytes are free; {advice} and run again"
            ) from error
        if number is None:
            self._check_room()
        raise AccessError(f"cannot write {self.path}: {error}; check the folder and its permissions") from error

    def _check_room(self) -> None:
        """Refuse where there is no room for what was being written.

        Raises:
            NoSpace: There is none.
        """
        sizes: dict[str, int] = {}
        with contextlib.suppress(OSError):  # only a lack of room is worth more than the error itself
            sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()} if self.folder else {}
        size, room = max(sizes.values(), default=0), 0
        if self.copied is not None:  # GDAL removes what it made of the COG; with overviews it is a third larger
            made = sizes.get(self.copied.name, 0) * 4 // 3
            size, room = max(size, made), made
        check_room(self.path.parent, str(self.path), size=size, room=room)
