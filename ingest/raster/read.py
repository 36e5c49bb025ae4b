"""Read one asset on one grid; every pixel of a cube is read here.

`read_on_grid` returns raw numbers, and `SceneReader` gives the same through stackstac's reader protocol. Nothing here
turns an unreadable file into zeros: it raises.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from rasterio.windows import Window

from ingest.pixels.mosaic import harmonise_dn
from ingest.raster.access import Raster, with_raster
from ingest.raster.blocks import BlockReader, check_streams
from ingest.raster.gdal_read import read_window
from ingest.raster.kept import kept_bytes
from ingest.raster.limits import Access
from ingest.raster.overview import Overview, choose_overview
from ingest.raster.ranges import blocks_of
from ingest.raster.resample import pick_resampling, place
from ingest.raster.values import Stated, Values
from ingest.trust.redact import redact_url
from ingest.worker.meters import count_stage
from ingest.worker.slots import computing
from zarr_store.errors import AssetUnreadable, InvalidInput
from zarr_store.grid import Grid

__all__ = [
    "Access",
    "ReadableAsset",
    "SceneReader",
    "check_type",
    "read_on_grid",
    "reads_overviews",
    "values_of",
]

Stored = Literal["uint16", "uint8", "float32"]
Pixels = npt.NDArray[np.generic]

NODATA: Mapping[str, float] = {"uint16": 0, "uint8": 0, "float32": float("nan")}
"""Value of a pixel without data, by stored type."""


_AGAIN = "repeat the `terrashard ingest` command on SOURCE, which finds new ones"


class ReadableAsset(Protocol):
    """The properties of an asset that reading needs.

    `ingest.scenes.scene.AssetRef` and `ingest.plan.task.SourceAsset` have them.
    """

    @property
    def key(self) -> str: ...
    @property
    def href(self) -> str: ...
    @property
    def nodata(self) -> float | None: ...
    @property
    def kind(self) -> Literal["data", "class"]: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def unit(self) -> str | None: ...


def read_on_grid(
    asset: ReadableAsset,
    header: Grid | None,
    target: Grid,
    resampling: str,
    *,
    stored: Stored = "uint16",
    scene: str = "",
    access: Access | None = None,
    out: Pixels | None = None,
    exact_edges: bool = True,
    exact_means: bool = True,
    overview: int | Literal["any"] | None = None,
    on_version: Callable[[str], None] | None = None,
    on_read: Callable[[int, bool], None] | None = None,
) -> Pixels:
    """Read one band of one scene onto `target`, as raw numbers before any offset.

    Args:
        asset: Asset to read.
        header: Grid that the file had at the time of planning; another grid now is an error. None accepts any.
        target: Grid of the result.
        resampling: Kernel that is used where the lattices differ, unless `pick_resampling` overrules it.
        stored: Type of the result: "uint16" (digital numbers), "uint8" (classes) or "float32" (backscatter).
        scene: Item id, for error messages.
        access: Limits and retries.
        out: Array (height, width) of type `stored` that takes the result; its content is undefined if this raises.
        exact_edges: As for `ingest.raster.resample.place`.
        exact_means: The argument of `ingest.raster.resample.place`.
        overview: Factor of the overview that is read in place of the full image, which must be there; "any" chooses the
            one that suits the target, as a plan does, or the full image. None reads the full image.
        on_version: Function that is called with the version of the file that is read.
        on_read: Function that is called at the end with the number of pixels that were read from the file, and whether
            the file says by a mask or by another value than 0 which pixels have no data.

    Returns:
        `out`, or a fresh array: (height, width) of `target`, with 0 (or NaN for float32) where the file has no data or
        does not reach.

    Raises:
        AssetUnreadable: The asset failed on every attempt, or at once where a retry cannot help.
    """

    def use(raster: Raster) -> Pixels:
        stated, file, dataset = raster.header, raster.file, raster.dataset
        if header is not None and stated.grid != header:
            reason = f"the file is not the one that was planned: its grid was {header}, now it is {stated.grid}"
            raise AssetUnreadable.of(scene, asset.key, reason, redact_url(asset.href))
        check_type(stated.dtype, stored, scene, asset)
        if asset.kind == "data" and stated.palette:
            reason = "expected a data band, the file has a palette: its numbers are colours"
            raise AssetUnreadable.of(scene, asset.key, reason, redact_url(asset.href), final=True)
        empty = {value for value in (asset.nodata, stated.nodata) if value is not None}
        values = values_of(stated.stated, stored, asset)
        told = any(value != 0 and np.isfinite(value) for value in empty) or stated.masked
        pixels_read = 0
        if on_version is not None and file is not None:
            on_version(file.version)
        blocks, smaller = None, _pick_overview(raster, asset, stored, target, overview, scene)
        if smaller is not None and file is not None:
            blocks = BlockReader(smaller.packing, file, spans=smaller.spans)
        elif stated.packing is not None and file is not None:
            blocks = BlockReader(stated.packing, file, spans=stated.spans, dataset=dataset)

        def known(row: int, col: int, height: int, width: int) -> Pixels | None:
            if file is None or stated.masked or smaller is not None:
                return None
            return kept_bytes(os.getpid()).pixels(asset.href, file.identity, (row, col, height, width))

        def window(row: int, col: int, height: int, width: int, into: Pixels | None = None) -> Pixels:
            nonlocal pixels_read
            pixels_read += height * width
            begun = time.perf_counter()
            raw = known(row, col, height, width)
            if raw is not None:
                pass  # planning has decoded them
            elif blocks is not None:
                # pixels of another type cannot be decoded straight into the result
                fits = into is not None and into.dtype == stated.dtype
                raw = blocks.read(row, col, height, width, into if fits else None)
            else:
                assert dataset is not None, "a file that needs GDAL is open"
                if file is not None:
                    file.fetch(blocks_of(dataset, (row, col, height, width)))
                    begun = time.perf_counter()
                # the blocks of a TIFF are here now; those of JPEG 2000 GDAL fetches while it decodes
                with computing() if file is not None and dataset.driver == "GTiff" else nullcontext():
                    if file is not None:
                        check_streams(dataset, file, (row, col, height, width))
                    raw = read_window(dataset, window=Window(col, row, width, height))
                if file is not None:
                    file.forget()
            count_stage("read", time.perf_counter() - begun, raw.nbytes)
            return values.store(raw, stored, empty)

        kernel = pick_resampling(asset.kind, stated.grid, target, resampling)
        grid = stated.grid if smaller is None else smaller.grid
        placed = place(
            window, grid, target, kernel, dtype=stored, nodata=NODATA[stored], out=out, exact_edges=exact_edges,
            exact_means=exact_means, block_rows=_block_rows(raster, smaller),
        )  # fmt: skip
        if on_read is not None:
            on_read(pixels_read, told)
        return placed

    try:
        return with_raster(asset.href, use, scene=scene, asset=asset.key, access=access, overviews=overview is not None)
    except AssetUnreadable as error:
        lost = getattr(asset, "presigned", None) and error.reason.startswith(("HTTP 401", "HTTP 403"))
        if not lost or "signature" in error.reason:
            raise
        reason = f"{error.reason} (the catalogue signed this address, and signatures are never stored: {_AGAIN})"
        raise AssetUnreadable.of(scene, asset.key, reason, redact_url(asset.href)) from error


def reads_overviews(asset: ReadableAsset, stored: Stored) -> bool:
    """Return whether overviews of an asset may be read: it is reflectance, and only 0 stands for no data."""
    return asset.kind == "data" and stored == "uint16" and asset.nodata in (None, 0)


def _block_rows(raster: Raster, smaller: Overview | None) -> int:
    packing = raster.header.packing if smaller is None else smaller.packing
    if packing is not None:
        return packing.block[0]
    return int(raster.dataset.block_shapes[0][0]) if raster.dataset is not None else 1


def _pick_overview(
    raster: Raster,
    asset: ReadableAsset,
    stored: Stored,
    target: Grid,
    wanted: int | Literal["any"] | None,
    scene: str,
) -> Overview | None:
    """Return the overview that is read; None for the full image.

    Raises:
        AssetUnreadable: The file does not have the overview that was planned.
    """
    usable = raster.overviews.usable
    if wanted is None:
        return None
    if wanted == "any":
        return choose_overview(usable, raster.header.grid, target) if reads_overviews(asset, stored) else None
    found = next((one for one in usable if one.factor == wanted), None)
    if found is None:
        reason = f"the file is not the one that was planned: it had an overview at 1/{wanted}, now "
        reason += f"1/{', 1/'.join(str(one.factor) for one in usable)}" if usable else "none that can be used"
        reason += f" ({raster.overviews.refusal})" if raster.overviews.refusal else ""
        raise AssetUnreadable.of(scene, asset.key, reason, redact_url(asset.href))
    return found


def check_type(dtype: str, stored: Stored, scene: str, asset: ReadableAsset) -> None:
    """Refuse a file of integers where backscatter is expected, and a file of floats where integers are expected.

    Raises:
        AssetUnreadable: The file has the wrong kind of numbers.
    """
    whole = np.issubdtype(np.dtype(dtype), np.integer)
    if (stored == "float32") == whole:
        expected = "a float band of linear backscatter" if stored == "float32" else "a band of whole numbers"
        raise AssetUnreadable.of(
            scene, asset.key, f"expected {expected}, the file holds {dtype}", redact_url(asset.href), final=True
        )


def values_of(stated: Stated, stored: Stored, asset: ReadableAsset) -> Values:
    """Find how the numbers of a file become those of a cube.

    Raises:
        InvalidInput: The file or its item states something that cannot be applied.
    """
    scale = asset.scale if asset.scale != 1.0 else None  # 1 is what items state that leave the numbers as they are
    return Values.of(stated, stored, asset.kind, item_scale=scale, item_unit=asset.unit)


class SceneReader:
    """stackstac's reader protocol over `read_on_grid`.

    stackstac knows of an asset only its URL. `table` holds the rest, and is set by `functools.partial`:
    `stackstac.stack(…, reader=partial(SceneReader, table={href: asset}))`. `errors_as_nodata` is not honoured: an
    unreadable asset raises.

    Args:
        url: Href of the asset.
        spec: stackstac's `RasterSpec` of the target grid.
        resampling: Kernel for assets that are not in `table`.
        dtype: Type of the result.
        fill_value: Value of pixels without data.
        scale_offset: Must be (1, 0): floats are computed on the device and never stored.
        table: Href → asset with its header grid, kernel and offset.
        access: Limits and retries.
        read_asset: `read_on_grid`, or another function with the same arguments.
    """

    def __init__(
        self,
        *,
        url: str,
        spec: Any,
        resampling: Any,
        dtype: np.dtype[Any],
        fill_value: float,
        scale_offset: tuple[float, float] = (1, 0),
        gdal_env: Any = None,
        errors_as_nodata: tuple[Exception, ...] = (),
        table: Mapping[str, Any] | None = None,
        access: Access | None = None,
        read_asset: Callable[..., Pixels] = read_on_grid,
    ) -> None:
        if tuple(scale_offset) != (1, 0):
            raise InvalidInput(f"stack with rescale=False: stored values stay whole numbers, got {scale_offset}")
        self.url = url
        self.spec = spec
        self.resampling = getattr(resampling, "name", str(resampling))
        self.dtype = np.dtype(dtype)
        self.fill_value = fill_value
        self.asset = (table or {}).get(url)
        self.access = access
        self._read_asset = read_asset
        self._grid = _grid_of_spec(spec)

    def read(self, window: Window, **_: Any) -> Pixels:
        """Read one window of the stack's grid."""
        target = self._grid.window(int(window.row_off), int(window.col_off), int(window.height), int(window.width))
        if self.asset is None:
            plain = _UrlAsset(self.url)
            stored: Stored = "float32" if self.dtype.kind == "f" else "uint16"
            raw = self._read_asset(plain, None, target, self.resampling, stored=stored, access=self.access)
            return raw.astype(self.dtype, copy=False)
        asset = self.asset
        pixels = self._read_asset(
            asset, asset.header, target, asset.resampling,
            stored=asset.stored, scene=asset.scene, access=self.access,
        )  # fmt: skip
        if asset.stored == "uint16":
            pixels = harmonise_dn(pixels.astype(np.uint16, copy=False), asset.dn_offset)
        return pixels.astype(self.dtype, copy=False)

    def close(self) -> None:
        """Do nothing: no file stays open between reads."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _UrlAsset:
    """An asset of which only the URL is known."""

    nodata = scale = unit = None
    kind: Literal["data", "class"] = "data"

    def __init__(self, href: str) -> None:
        self.href = href
        self.key = href.rpartition("/")[2].partition("?")[0]


def _grid_of_spec(spec: Any) -> Grid:
    left, _, _, top = spec.bounds
    rx, ry = spec.resolutions_xy
    height, width = spec.shape
    return Grid(f"EPSG:{spec.epsg}", (float(rx), 0.0, float(left), 0.0, -float(ry), float(top)), (height, width))
