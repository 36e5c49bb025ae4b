"""`lay_source`: one source laid into a mosaic, where it is the better one. Pure numpy.

Per pixel the first source wins that sees it clear, else the first that sees it at all. The work goes over the pixels
in strips that stay in the processor's cache: whole bands would come from memory once per operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingest.pixels.mask import observed
from zarr_store.spec import STATUS_MASKED, STATUS_NODATA, STATUS_OBSERVED

__all__ = ["harmonise_dn", "lay_source"]

Pixels = npt.NDArray[Any]
Bool = npt.NDArray[np.bool_]

_STRIP_PIXELS = 1 << 18


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
) -> Bool:
    """Lay one source into the views of a shard's arrays.

    Args:
        views: Array name → its view: `kind` (band, y, x), "status", "source_item" if it is kept and the class layers
            (y, x). Where nothing was laid before they hold no data, and the bands may lie there already.
        kind: Name of the main array; bands of it beyond those given are left alone.
        bands: Raw numbers, each (y, x); the very views of the main array, or arrays that are left as they are.
        classes: Class layer → (y, x).
        item: What `source_item` says of these pixels.
        dn_offsets: Per band, what is added to its numbers.
        mask_layer: Class layer in which 0 means that nothing was seen.
        masked: (y, x) pixels that clouds and the like hide.
        inside: (y, x) pixels that are wanted; None for all.
        nodata: Of the main array.
        harmonised: (band, y, x); the harmonised numbers of all pixels go here too.

    Returns:
        (y, x): where this source is clear.
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
        seen = observed(values, seen_classes.get(mask_layer))
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
    """The first source of a shard: its bands are in place, and all that it sees is its own."""
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
        _paste(at["source_item"], np.int16(item), seen, whole)


def _compete(
    at: Mapping[str, Pixels],
    kind: str,
    values: Sequence[Pixels],
    classes: Mapping[str, npt.NDArray[np.uint8]],
    seen: Bool,
    clear: Bool,
    item: int,
) -> None:
    """A further source: it wins where it is clear and none was, or where nothing was seen."""
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
        _paste(at["source_item"], np.int16(item), wins, whole)
    _paste(status, np.where(clear, np.uint8(STATUS_OBSERVED), np.uint8(STATUS_MASKED)), wins, whole)


def _paste(view: Pixels, pixels: Pixels | np.generic, wins: Bool, whole: bool) -> None:
    """Put `pixels` into `view` where they win; most often that is everywhere, which is several times faster."""
    if whole:
        view[...] = pixels
    else:
        np.copyto(view, pixels, where=wins)


def _copied(band: Pixels, out: Pixels | None) -> Pixels:
    if out is not None and out is not band:
        out[...] = band
    return band


def harmonise_dn(
    dn: npt.NDArray[np.uint16], dn_offset: int, out: npt.NDArray[np.uint16] | None = None
) -> npt.NDArray[np.uint16]:
    """Add the radiometric offset to digital numbers: 0 stays nodata, 65535 stays saturated, the rest stays in 1…65535.

    Args:
        dn: As they are in the file.
        dn_offset: Of the item's baseline.
        out: Where the result goes; may be `dn` itself.

    >>> harmonise_dn(np.array([0, 500, 1000, 1001, 65535], np.uint16), -1000).tolist()
    [0, 1, 1, 1, 65535]
    """
    if dn_offset == 0:
        if out is None or out is dn:
            return dn
        out[...] = dn
        return out
    # the extremes say in one pass each whether there are any, which most strips have not
    edges = ((0, dn.min(initial=1)), (65535, dn.max(initial=0)))
    fixed = [(dn == value, value) for value, extreme in edges if value == extreme]
    if dn_offset < 0:  # the common case, without leaving 16 bits
        moved = np.maximum(dn, np.uint16(min(1 - dn_offset, 65535)), out=out)
        moved -= np.uint16(min(-dn_offset, 65534))
    else:
        moved = np.minimum(dn, np.uint16(max(65535 - dn_offset, 0)), out=out)
        moved += np.uint16(min(dn_offset, 65535))
    for where, value in fixed:
        np.copyto(moved, np.uint16(value), where=where)
    return moved
