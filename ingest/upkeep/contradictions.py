"""Refuse options that contradict a cube, before anything is searched, even if there would be nothing to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyproj.exceptions import ProjError

from ingest.pixels.clip import clip_text
from ingest.plan.plan import Plan
from ingest.plan.target import project_bounds, region_lonlat
from ingest.plan.task import Recipe
from ingest.request.config import SETTINGS, IngestConfig
from ingest.request.products import PRODUCTS, ProductRule, choose_bands
from zarr_store.create import list_differences
from zarr_store.errors import CubeMismatch, InvalidInput
from zarr_store.grid import Grid

__all__ = ["refuse_contradictions"]


def refuse_contradictions(old: Plan, config: IngestConfig) -> None:
    """Refuse settings that would make other pixels than those of the cube that is continued.

    Args:
        old: Plan of the cube.
        config: The cube's own settings, with those of the new command over them.

    Raises:
        CubeMismatch: A setting asks for other bands, masks, rules, dates or another grid than the cube has, or for a
            region where the cube is not.
    """
    _refuse_collections(old, config)
    _refuse(old.config, config, ("group", "resampling", "profile", "native", "read_overviews"), "the cube")
    for name in dict.fromkeys(recipe.catalogue for recipe in old.recipes):
        groups = [recipe for recipe in old.recipes if recipe.catalogue == name]
        product = _product_of(groups)
        if product is not None:
            _refuse_rules(groups, product, config)
    _refuse_grid(old.grid, config)


def _refuse_collections(old: Plan, config: IngestConfig) -> None:
    has = list(dict.fromkeys(recipe.catalogue for recipe in old.recipes))
    new = set(config.selection.collections) - set(has) - set(old.config.get("collections", ()))
    if new:
        raise CubeMismatch(
            f"the cube has no collection {', '.join(map(repr, sorted(new)))} (it has {', '.join(has)}); nothing was "
            "changed: select one of these with --collection, or make another cube"
        )


def _refuse(kept: Mapping[str, Any], config: IngestConfig, names: tuple[str, ...], what: str) -> None:
    asked = config.plan_settings()
    defaults = {name: SETTINGS[name].default for name in names}
    there = {name: kept.get(name, defaults[name]) for name in names}
    _refuse_differences(there, {name: asked.get(name, defaults[name]) for name in names}, what)


def _refuse_rules(groups: Sequence[Recipe], product: ProductRule, config: IngestConfig) -> None:
    """Compare the rules of one collection; it has several groups where grids are native."""
    recipe = groups[0]
    spec, pixels = recipe.spec, config.pixels
    choice = choose_bands(product, config.selection.bands, pixels.mask)
    bands = [band for one in groups for band in one.spec.band_names]
    indices = [index.name for one in groups for index in one.spec.derived]
    if recipe.native:  # bands and indices are sorted by group, not as they were asked for
        bands = sorted(bands, key=[*(band.name for band in choice.data), *bands].index)
        indices = sorted(indices, key=[*pixels.indices, *indices].index)
    there = {
        "bands": bands,
        "class layers": list(spec.class_layers),
        "indices": indices,
        "reduce": spec.reduce,
        "mask": recipe.mask_layer,
        "mask classes": sorted(recipe.mask_classes),
        "mask dilation": recipe.mask_dilate_m,
        "clipped": recipe.clip is not None,
    }
    asked = {
        "bands": [band.name for band in choice.data],
        "class layers": [layer.name for layer in choice.layers],
        "indices": list(pixels.indices) if spec.kind == "reflectance" else there["indices"],
        "reduce": pixels.reduce,
        "mask": choice.mask.name if choice.mask else None,
        "mask classes": sorted(pixels.mask_classes) if choice.mask else [],
        "mask dilation": pixels.mask_dilate_m if choice.mask else 0.0,
        "clipped": pixels.clip and clip_text(config.selection.geometry) is not None,
    }
    _refuse_differences(there, asked, f"collection {recipe.catalogue} of the cube")


def _refuse_differences(there: Mapping[str, Any], asked: Mapping[str, Any], what: str) -> None:
    differences = list_differences(dict(there), dict(asked))
    if differences:
        raise CubeMismatch(
            f"{what} was made by other rules (cube → asked for): {'; '.join(differences[:6])}. Nothing was changed: "
            "leave these options out, and those of the cube are used"
        )


def _refuse_grid(grid: Grid, config: IngestConfig) -> None:
    asked = config.grid
    if asked.crs is not None and asked.crs != grid.crs:
        raise _other_grid(f"CRS {grid.crs} → {asked.crs}")
    if asked.resolution is not None and any(abs(asked.resolution - size) > 1e-9 * size for size in grid.resolution):
        raise _other_grid(f"resolution {' × '.join(f'{size:g}' for size in grid.resolution)} → {asked.resolution:g}")
    region = region_lonlat(config)
    if region is None:
        return
    try:
        left, bottom, right, top = project_bounds(region, grid.crs)
    except (InvalidInput, ProjError):
        return
    there = grid.bounds
    turns = (-360.0, 0.0, 360.0) if max(map(abs, there)) <= 540.0 else (0.0,)  # degrees may be counted beyond 180
    if top <= there[1] or bottom >= there[3] or not any(left + t < there[2] and right + t > there[0] for t in turns):
        west, south, east, north = grid.lonlat_bounds()
        raise CubeMismatch(
            f"the region lies outside the cube, which is in {west:.4f}, {south:.4f}, {east:.4f}, {north:.4f} (west, "
            "south, east, north in degrees); nothing was changed: a cube never grows in space, make another one"
        )


def _other_grid(difference: str) -> CubeMismatch:
    return CubeMismatch(
        f"the cube has another grid (cube → asked for): {difference}. Nothing was changed: leave the option out, as "
        "new dates always come onto the grid of the cube, or make another cube"
    )


def _product_of(groups: Sequence[Recipe]) -> ProductRule | None:
    """Return the product of a collection, by its name, else the only one with these bands and kind; else None."""
    named = next((rule for rule in PRODUCTS if groups[0].catalogue in (rule.name, *rule.collections)), None)
    if named is not None:
        return named
    kind = groups[0].spec.kind
    names = {name for one in groups for name in (*one.spec.band_names, *one.classes)}
    fits = [r for r in PRODUCTS if r.kind == kind and names <= set(r.names)]
    return fits[0] if len(fits) == 1 else None
