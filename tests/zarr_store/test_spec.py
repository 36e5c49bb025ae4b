"""Specs: what is refused, how shards and chunks tile, JSON."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from zarr_store import LAYOUTS, BandSpec, CubeSpec, Layout
from zarr_store.errors import InvalidInput, UnknownName


def test_round_trip(spec: CubeSpec) -> None:
    assert CubeSpec.from_dict(spec.to_dict()) == spec


def test_shards_never_exceed_the_grid(spec: CubeSpec) -> None:
    fitted = replace(spec, layout=LAYOUTS["train"])
    assert fitted.layout.shard == (1, 256, 256)
    assert fitted.layout.chunk == (1, 256, 256)


def test_chunks_of_shards_tile_the_cube(spec: CubeSpec) -> None:
    hits = np.zeros(spec.shape, int)
    for region in spec.shards().values():
        for box in spec.chunks(region).values():
            hits[box.slices] += 1
    assert (hits == 1).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"collection": "../evil"}, "cannot name a group"),
        ({"bands": ()}, "named once each"),
        ({"bands": (BandSpec("a"), BandSpec("a"))}, "named once each"),
        ({"times": ("2023-02-01", "2023-01-01")}, "strictly ascending"),
        ({"layout": Layout("x", (1, 16, 16), (1, 40, 32))}, "multiple of the chunk"),
        ({"layout": Layout("x", (1, 12, 12), (1, 24, 24))}, "multiples of 8"),
    ],
)
def test_bad_specs_are_refused(spec: CubeSpec, change: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        replace(spec, **change)  # type: ignore[arg-type]


def test_unknown_array_names_the_nearest(spec: CubeSpec) -> None:
    with pytest.raises(UnknownName, match="did you mean 'reflectance'"):
        spec.array("reflectence")
