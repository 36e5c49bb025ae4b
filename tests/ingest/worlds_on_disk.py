"""Files of made-up worlds: the same numbers under masks, scales, types, strips and names that some providers use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import rasterio

from ingest.scenes.scene import Scene
from ingest.testing import write_raster
from ingest.trust.hrefs import HrefPolicy, resolve_href

__all__ = ["write_scene"]

_STEP = 64
"""All numbers of a world are multiples of this, so that a scale of it is exact."""
_TABLE_SCALE = 1e-4
_JUNK = 2752
_VOID = 9
"""Nodata value of some files; no number of a world, divided by the step or not."""
_NAMES = ("{}_{}.tif", "{} {}.tif", "{}%20{}.tif", "{}#{}.tif", "{}+{}%.tif", "{}?band={}")


def write_scene(
    scene: Scene, pixels: dict[str, np.ndarray], lost: str | None, folder: Path, seed: int
) -> tuple[Scene, frozenset[str]]:
    """Write the files of a scene, each in a way that `seed` draws, and give the scene that names them.

    Args:
        scene: The scene as its catalogue has it.
        pixels: Band → numbers that a cube must get before any offset.
        lost: Band whose file is not there.
        folder: Folder of the catalogue.
        seed: What is drawn.

    Returns:
        The scene, and the bands whose files say by a mask or by another nodata value than 0 where they have no data.
    """
    rng = np.random.default_rng(seed)
    (folder / "items.json").touch()
    policy = HrefPolicy.around(str(folder / "items.json"))
    assets, told = {}, set()
    for band, ref in scene.assets.items():
        name = str(rng.choice(_NAMES)).format(scene.id, band)
        path = folder / name
        changes: dict[str, Any] = {}
        if band != lost:
            changes, tells = _write(path, ref.grid, pixels[band], rng, is_class=ref.kind == "class")
            told |= {band} if tells else set()
        href = quote(name) if rng.random() < 0.5 else name
        if not path.exists() or "%" in name:  # an escape that is meant as such has no other file beside it here
            href = name
        assets[band] = replace(ref, href=resolve_href(href, base=str(folder / "items.json"), policy=policy), **changes)
    return replace(scene, assets=assets), frozenset(told)


def _write(
    path: Path, grid: Any, values: np.ndarray, rng: np.random.Generator, *, is_class: bool
) -> tuple[dict[str, Any], bool]:
    """Write one file; gives what its item has to state, and whether the file tells where it has no data."""
    stated: dict[str, Any] = {}
    numbers, tag = values, 1.0
    if not is_class:
        way = rng.choice(["plain", "tag", "item"])
        if way != "plain":
            numbers = values // _STEP
            tag, stated = (_STEP * _TABLE_SCALE, {}) if way == "tag" else (1.0, {"scale": _STEP * _TABLE_SCALE})
        numbers = numbers.astype(str(rng.choice(["uint16", "uint32", "int32"])))
    way = rng.choice(["zero", "zero", "mask", "number"])
    hidden, void = way == "mask", _VOID if way == "number" and not is_class else 0
    profile: dict[str, Any] = {"compress": str(rng.choice(["deflate", "lzw", "none", "zstd"]))}
    if rng.random() < 0.5:
        profile |= {"tiled": False, "blockxsize": grid.width, "blockysize": int(rng.integers(1, 9))}
    if hidden:
        profile["nodata"] = None
    elif void:
        profile["nodata"] = void
        numbers = np.where(values == 0, void, numbers).astype(numbers.dtype)
    shown = np.where(values == 0, _JUNK if not is_class else 4, numbers).astype(numbers.dtype) if hidden else numbers
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_raster(path, grid, shown, **profile)
        with rasterio.open(path, "r+") as file:
            if hidden:
                file.write_mask(np.where(values == 0, 0, 255).astype(np.uint8))
            if tag != 1.0:
                file.scales = (tag,)
    return stated, hidden or void != 0
