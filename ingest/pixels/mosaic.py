"""Mosaicking: `lay_source` puts one source into the arrays of a shard, where it wins over the sources before it.

A pixel comes from the first source that sees it clear, else from the first that sees it at all. Pixels are processed in
strips that stay in the processor's cache; whole bands would be fetched from memory once per operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingest.pixels.mask import clipped_pixels, observed
from zarr_store.spec import STATUS_MASKED, STATUS_NODATA, STATUS_OBSERVED

__all__ = ["harmonise_dn", "lay_source"]

Pixels = npt.NDArray[Any]
Bool = npt.NDArray[np.bool_]

_STRIP_PIXELS = 1 << 18
"""Pixels of one strip."""


def lay_source(
    views: Mapping[str, Pixels],
    kind: str,
    bands: Sequence[Pixels],
    classes: Mapping[str, npt.NDArray[np.uint8]],
    *,
    item: int,
    dn_offsets: Sequence[int],
    mask_layer: str,
    masked: Bool,
    inside: Bool | None = None,
    nodata: float = 0,
    harmonised: Pixels | None = None,
    told: Sequence[bool] | None = None,
    finest: Sequence[bool] | None = None,
) -> Bool:
    """Put one source into the arrays of a shard.

    Args:
        views: Array name → view of the array: `kind` (band, y, x), "status", "source_item" if it is kept, and the class
            layers (y, x). Pixels without an earlier source hold no data.
        kind: Name of the main array; its bands beyond those given stay as they are.
        bands: Raw numbers of each band (y, x). For the first source they may be the views of the main array itself,
            which are then changed in place; other arrays are not changed.
        classes: Class layer → array (y, x).
        item: Row of the source in the item table, which `source_item` stores.
        dn_offsets: Offset that is added to the numbers of each band.
        mask_layer: Class layer in which 0 means no data.
        masked: Pixels (y, x) that clouds and the like hide.
        inside: Pixels (y, x) of the area that is wanted; None for all.
        nodata: No-data value of the main array.
        harmonised: Array (band, y, x) that also gets the harmonised numbers of all pixels; None to keep none.
        told: Whether the file of each band says by a mask or another value than 0 where it has no data; None for none.
        finest: Whether each band has the finest pixels of the source; None for all.

    Returns:
        (y, x): the pixels that this source sees clear.
    """
    status, main = views["status"], views[kind]
    fresh = bool(bands) and np.may_share_memory(bands[0], main)
    clear = np.empty(status.shape, bool)
    rows = max(1, _STRIP_PIXELS // max(1, status.shape[1]))
    for top in range(0, status.shape[0], rows):
        strip = slice(top, top + rows)
        at = {name: view[..., strip, :] for name, view in views.items()}
        raw = [band[strip] for band in bands]
        seen_classes = {name: layer[strip] for name, layer in classes.items()}
        outs = raw if fresh else [None] * len(raw) if harmonised is None else list(harmonised[:, strip])
        values = [
            harmonise_dn(band, offset, out) if band.dtype == np.uint16 else _copied(band, out)
            for band, offset, out in zip(raw, dn_offsets, outs, strict=True)
        ]
        scl = seen_classes.get(mask_layer)
        seen = observed(values, scl)
        if len(values) > 1 and values[0].dtype == np.uint16 and not seen.all():
            # without classes, 0 is no number of a band that still carries the offset: it would be far below black
            may = [not t and (scl is not None or o == 0) for t, o in zip(told or [False] * len(values), dn_offsets,
                                                                         strict=True)]  # fmt: skip
            clipped = clipped_pixels(values, scl, may_be_zero=may, finest=finest or [True] * len(values))
            if clipped.any():
                own = fresh or harmonised is not None
                values = [_raised(band, clipped, in_place=own or o != 0) for band, o in zip(values, dn_offsets,
                                                                                          strict=True)]  # fmt: skip
                seen |= clipped
        if inside is not None:
            seen &= inside[strip]
        here = np.greater(seen, masked[strip], out=clear[strip])  # seen and not masked
        if fresh:
            _cover(at, kind, seen_classes, seen, here, item, nodata)
        else:
            _compete(at, kind, values, seen_classes, seen, here, item)
    return clear


def _cover(
    at: Mapping[str, Pixels],
    kind: str,
    classes: Mapping[str, npt.NDArray[np.uint8]],
    seen: Bool,
    clear: Bool,
    item: int,
    nodata: float,
) -> None:
    """Finish the first source of a shard: its bands are in place, and every pixel that it sees comes from it."""
    status = at["status"]
    np.multiply(seen, np.uint8(STATUS_MASKED), out=status)
    status -= clear.view(np.uint8) * np.uint8(STATUS_MASKED - STATUS_OBSERVED)
    whole = bool(seen.all())
    hidden = None if whole else ~seen
    if hidden is not None:
        for band in at[kind]:
            np.copyto(band, nodata, where=hidden, casting="unsafe")
    for name, layer in classes.items():
        if name in at:
            if not np.may_share_memory(layer, at[name]):
                at[name][...] = layer
            if hidden is not None:
                np.copyto(at[name], np.uint8(0), where=hidden)
    if "source_item" in at:
        _paste(at["source_item"], at["source_item"].dtype.type(item), seen, whole)


def _compete(
    at: Mapping[str, Pixels],
    kind: str,
    values: Sequence[Pixels],
    classes: Mapping[str, npt.NDArray[np.uint8]],
    seen: Bool,
    clear: Bool,
    item: int,
) -> None:
    """Put in a further source where it is clear and no source was, or where no source saw anything."""
    status = at["status"]
    wins = (clear & (status != STATUS_OBSERVED)) | (seen & (status == STATUS_NODATA))
    if not wins.any():
        return
    whole = bool(wins.all())
    for view, band in zip(at[kind], values, strict=False):
        _paste(view, band, wins, whole)
    for name, layer in classes.items():
        if name in at:
            _paste(at[name], layer, wins, whole)
    if "source_item" in at:
        _paste(at["source_item"], at["source_item"].dtype.type(item), wins, whole)
    _paste(status, np.where(clear, np.uint8(STATUS_OBSERVED), np.uint8(STATUS_MASKED)), wins, whole)


def _paste(view: Pixels, pixels: Pixels | np.generic, wins: Bool, whole: bool) -> None:
    """Copy `pixels` into `view` where they win; the frequent case of everywhere is several times faster."""
    if whole:
        view[...] = pixels
    else:
        np.copyto(view, pixels, where=wins)


def _raised(band: Pixels, clipped: Bool, *, in_place: bool) -> Pixels:
    """Return the band with 1, its smallest number, at clipped pixels: a stored 0 always means "no data"."""
    zero = clipped & (band == 0)
    if not zero.any():
        return band
    raised = band if in_place else band.copy()
    raised[zero] = 1
    return raised


def _copied(band: Pixels, out: Pixels | None) -> Pixels:
    if out is not None and out is not band:
        out[...] = band
    return band


def harmonise_dn(
    dn: npt.NDArray[np.uint16], dn_offset: int, out: npt.NDArray[np.uint16] | None = None
) -> npt.NDArray[np.uint16]:
    """Add the radiometric offset to digital numbers: 0 stays nodata, 65535 stays saturated, the rest stays in 1…65535.

    Args:
        dn: Digital numbers as the file has them.
        dn_offset: Offset of the item's processing baseline, or 0.
        out: Array for the result, which may be `dn` itself; None for a new one.

    >>> harmonise_dn(np.array([0, 500, 1000, 1001, 65535], np.uint16), -1000).tolist()
    [0, 1, 1, 1, 65535]
    """
    if dn_offset == 0:
        if out is None or out is dn:
            return dn
        out[...] = dn
        return out
    # minimum and maximum tell in one pass each whether a strip has such pixels; most have none
    edges = ((0, dn.min(initial=1)), (65535, dn.max(initial=0)))
    fixed = [(dn == value, value) for value, extreme in edges if value == extreme]
    if dn_offset < 0:  # the common case, computed within 16 bits
        moved = np.maximum(dn, np.uint16(min(1 - dn_offset, 65535)), out=out)
        moved -= np.uint16(min(-dn_offset, 65534))
    else:
        moved = np.minimum(dn, np.uint16(max(65535 - dn_offset, 0)), out=out)
        moved += np.uint16(min(dn_offset, 65535))
    for where, value in fixed:
        np.copyto(moved, np.uint16(value), where=where)
    return moved
