"""`map_item` describes a map as a STAC item: its layers and classes, the network that made it, and its cube."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.inference.layers import MapLayers
from jaxtrain.inference.making import digest_of
from jaxtrain.inference.model_item import class_list, input_shapes, model_bands, network_fields
from jaxtrain.inference.opening import OpenScene
from jaxtrain.runs.rundir import CARD
from zarr_store.redact import redact_url
from zarr_store.stac_item import ZARR_TYPE, item_of
from zarr_store.store import ITEM_KEY

__all__ = ["map_item"]

_TITLES = {
    "class": "class of each pixel",
    "confidence": "probability of the class, per cent",
    "probability": "probability of each class, per cent",
    "entropy": "entropy of the probabilities, per cent of its largest value",
    "value": "predicted value",
    "modalities": "modalities that were there, as bits",
}


def map_item(opened: OpenScene, target: Path) -> dict[str, Any]:
    """Return the STAC item of a map.

    The network and the cube are named by paths from the item, or by the URL of a bucket without credentials.

    Args:
        opened: The run and the cube.
        target: Where the map goes.
    """
    card, kind = opened.card, opened.kind
    dates = [] if opened.times else list(opened.dates)  # a map of each date keeps its id while it grows
    patch = card.config.data.patch
    parameters = sum(int(np.size(leaf)) for leaf in jax.tree_util.tree_leaves(opened.state.params))
    network = network_fields(
        card, input_shapes(card, opened.program, 1, patch), (1, patch, patch, kind.classes), parameters
    )
    assets = {name: _layer_asset(name, opened, kind) for name in kind.names}
    assets["model"] = {
        "href": _relative(opened.run / CARD, target), "type": "application/json",
        "title": "the network that made the map", "roles": ["mlm:model", "metadata"], "bands": model_bands(card),
    }  # fmt: skip
    cube = opened.cube.url
    source = f"{redact_url(cube)}/{ITEM_KEY}" if "://" in cube else _relative(Path(cube) / ITEM_KEY, target)
    return item_of(
        f"map-{digest_of([opened.identity, dates])[:12]}",
        opened.spec.grid,
        opened.dates,
        {
            "title": f"Map of {', '.join(card.answers.names[:12])}",
            "bands": model_bands(card),
            "terrashard:dates": len(opened.dates),
            **network,
        },
        assets,
        [{"rel": "derived_from", "href": source, "type": "application/geo+json"}],
    )


def _layer_asset(name: str, opened: OpenScene, kind: MapLayers) -> dict[str, Any]:
    nodata = kind.nodata(name)
    asset = {
        "href": f"./{name}", "type": ZARR_TYPE, "title": _TITLES[name],
        "roles": ["data"] if name in ("class", "value") else ["metadata"],
        "data_type": kind.dtype(name), "nodata": "nan" if math.isnan(nodata) else nodata,
        "raster:spatial_resolution": round(min(opened.spec.grid.resolution) / opened.spec.grid.units_per_metre, 6),
    }  # fmt: skip
    if name in ("class", "probability"):
        asset |= class_list(opened.card.answers)
    if name == "value":
        unit = opened.card.task.unit
        asset |= {"unit": unit} if unit else {}
    if name == "value" and kind.scale is not None:
        asset |= {"raster:scale": kind.scale[0], "raster:offset": kind.scale[1]}
    if name in ("confidence", "probability", "entropy"):
        asset |= {"unit": "%"}
    return asset


def _relative(path: Path, target: Path) -> str:
    """Return a path as it is seen from the folder of the map."""
    return Path(os.path.relpath(path.absolute(), target.absolute())).as_posix()
