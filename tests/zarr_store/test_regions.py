"""Regions against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_store import Region
from zarr_store.errors import InvalidInput
from zarr_store.regions import iterate_boxes

sides = st.integers(1, 9)
triples = st.tuples(sides, sides, sides)


@given(shape=triples, box=triples)
def test_boxes_tile_the_shape_exactly_once(shape: tuple[int, int, int], box: tuple[int, int, int]) -> None:
    hits = np.zeros(shape, int)
    for index, region in iterate_boxes(shape, box):
        assert (region.t0, region.y0, region.x0) == tuple(i * b for i, b in zip(index, box, strict=True))
        hits[region.slices] += 1
    assert (hits == 1).all()


@st.composite
def regions(draw: st.DrawFn) -> Region:
    edges = [sorted(draw(st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True))) for _ in range(3)]
    return Region(*(v for pair in edges for v in pair))


@given(a=regions(), b=regions())
def test_intersection_and_within_match_masks(a: Region, b: Region) -> None:
    canvas = np.arange(9**3).reshape(9, 9, 9)
    mask = np.zeros((2, 9, 9, 9), bool)
    mask[0][a.slices] = True
    mask[1][b.slices] = True
    common = a.intersect(b)
    assert (mask.all(axis=0).sum() == 0) == (common is None)
    if common is not None:
        np.testing.assert_array_equal(canvas[a.slices][common.within(a)], canvas[common.slices])
        assert mask.all(axis=0).sum() == np.prod(common.shape)


def test_halo_stops_at_the_edge() -> None:
    assert Region(0, 1, 2, 5, 7, 9).halo(3, (6, 20)) == Region(0, 1, 0, 6, 4, 12)


def test_order_json_and_emptiness() -> None:
    a, b = Region(0, 1, 0, 2, 0, 2), Region(0, 1, 0, 2, 2, 4)
    assert sorted([b, a]) == [a, b]
    assert Region.from_list(a.to_list()) == a
    with pytest.raises(InvalidInput, match="non-empty"):
        Region(0, 1, 3, 3, 0, 1)
