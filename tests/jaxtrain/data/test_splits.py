"""No ground is in two parts, on any date, whatever the grid, block and patch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.config import DataConfig, SplitConfig
from jaxtrain.data.classes import Classes
from jaxtrain.data.splits import PARTS, Split, block_shape, make_split
from jaxtrain.data.windows import plan_windows
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.index import TrainingIndex
from zarr_store.spec import BandSpec, CubeSpec, Layout

CLASSES = {"1": "one"}


def spec_of(times: int, height: int, width: int, resolution: float, chunk: int) -> CubeSpec:
    grid = Grid("EPSG:32633", (resolution, 0.0, 0.0, 0.0, -resolution, 0.0), (height, width))
    dates = tuple(f"2023-01-{t + 1:02d}T00:00:00" for t in range(times))
    layout = Layout("test", (1, chunk, chunk), (1, chunk, chunk))
    return CubeSpec("c", "reflectance", (BandSpec("red"),), grid, dates, ("scl",), layout)


def index_of(spec: CubeSpec, labelled: np.ndarray) -> TrainingIndex:
    """An index whose chunks are all written; `labelled` (T, CY, CX) says whether they hold class 1 or nothing."""
    empty = TrainingIndex.from_rows(spec, {})
    pixels = np.full(labelled.shape, int(np.prod(spec.layout.chunk)), np.int64)
    counts = np.zeros((*labelled.shape, 256), np.int64)
    counts[..., 1] = pixels * labelled
    return TrainingIndex(
        chunk=spec.layout.chunk,
        present=np.ones(labelled.shape, bool),
        pixels=pixels,
        observed=pixels * labelled,
        masked=empty.masked,
        missing=empty.missing,
        band_mean=empty.band_mean,
        band_m2=empty.band_m2,
        class_counts={"scl": counts},
    )


@given(
    times=st.integers(1, 3),
    height=st.integers(40, 260),
    width=st.integers(40, 260),
    patch=st.sampled_from([8, 16]),
    chunk=st.sampled_from([16, 24, 64]),
    block_m=st.floats(20, 900),
    resolution=st.sampled_from([10.0, 20.0]),
    seed=st.integers(0, 2**32),
    filled=st.floats(0.4, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_parts_never_share_ground(
    times: int, height: int, width: int, patch: int, chunk: int, block_m: float, resolution: float, seed: int,
    filled: float,
) -> None:  # fmt: skip
    spec = spec_of(times, height, width, resolution, chunk)
    shape = TrainingIndex.from_rows(spec, {}).present.shape
    index = index_of(spec, np.random.default_rng(seed).random(shape) < filled)
    config = DataConfig(cube="c", classes=CLASSES, patch=patch, split=SplitConfig(block_m=block_m, seed=seed))
    try:
        plan = plan_windows(config, spec, index, Classes.of(config))
    except (InvalidInput, LookupError) as error:
        # only a cube with hardly any ground may be refused
        assert "block" in str(error) or "no window" in str(error)  # noqa: PT017
        return
    owner = np.full((height, width), -1)
    for code, part in enumerate(PARTS):
        assert len(plan.parts[part]) > 0, part
        for t, y, x in plan.parts[part].rows.tolist():
            assert 0 <= t < times
            assert 0 <= y < height
            assert 0 <= x < width
            here = owner[y : y + patch, x : x + patch]
            assert np.isin(here, [-1, code]).all(), f"ground at {(y, x)} is in two parts"
            here[:] = code
    # a pixel with a label is in a window of its block, up to the last row and column
    labelled = index.class_counts["scl"][..., 1].any(axis=0).repeat(chunk, axis=0).repeat(chunk, axis=1)
    of_block = plan.blocks.parts.repeat(plan.blocks.block[0], axis=0).repeat(plan.blocks.block[1], axis=1)
    held_out = (of_block[:height, :width] > 0) & labelled[:height, :width]
    assert (owner[held_out] == of_block[:height, :width][held_out]).all()
    # and every window lies within one block, so that a neighbour across a block's edge shares no pixel
    assert isinstance(plan.split, Split)
    for windows in plan.parts.values():
        for axis, side in ((1, plan.split.block[0]), (2, plan.split.block[1])):
            first = windows.rows[:, axis]
            assert (first // side == (first + patch - 1) // side).all()


def test_small_numbers_of_blocks_fill_every_part_in_their_shares() -> None:
    for side in (2, 3, 5, 10):
        split = make_split(SplitConfig(validation=0.15, test=0.15, seed=side), (32, 32), np.ones((side, side), bool))
        counts = split.counts()
        total = side * side
        assert counts["test"] == counts["validation"] == max(1, round(0.15 * total))
        assert sum(counts.values()) == total


def test_seed_decides_and_the_shape_of_the_grid_does_not() -> None:
    usable = np.ones((6, 7), bool)
    one = make_split(SplitConfig(seed=1), (8, 8), usable)
    assert (one.parts == make_split(SplitConfig(seed=1), (8, 8), usable).parts).all()
    assert (one.parts != make_split(SplitConfig(seed=2), (8, 8), usable).parts).any()
    wider = np.zeros((9, 11), bool)
    wider[:6, :7] = True
    assert (make_split(SplitConfig(seed=1), (8, 8), wider).parts[:6, :7] == one.parts).all()


def test_golden_split() -> None:
    """Runs of earlier releases keep their test ground: these codes are for ever."""
    split = make_split(SplitConfig(seed=0, validation=0.25, test=0.25), (8, 8), np.ones((4, 4), bool))
    assert split.parts.tolist() == [[0, 2, 0, 0], [1, 0, 1, 1], [2, 0, 2, 0], [0, 1, 0, 2]]


def test_too_few_blocks_say_what_to_do() -> None:
    with pytest.raises(InvalidInput, match=r"1 blocks of 32×32 pixels.*lower data\.split\.block_m \(now 10000 m\)"):
        make_split(SplitConfig(), (32, 32), np.ones((1, 1), bool))
    alone = make_split(SplitConfig(validation=0, test=0), (32, 32), np.ones((1, 1), bool))
    assert alone.counts() == {"train": 1, "validation": 0, "test": 0}


@pytest.mark.parametrize(
    ("crs", "resolution", "block_m", "patch", "expected"),
    [
        ("EPSG:32633", (10.0, 10.0), 1280, 64, (128, 128)),
        ("EPSG:32633", (10.0, 10.0), 100, 64, (64, 64)),  # never less than a patch
        ("EPSG:32633", (120.0, 60.0), 15360, 64, (256, 128)),
        ("EPSG:4326", (0.0001, 0.0001), 1113.1949, 50, (100, 100)),
        ("EPSG:2263", (32.80833, 32.80833), 1000, 50, (100, 100)),  # US survey feet
    ],
)
def test_blocks_are_metres(
    crs: str, resolution: tuple[float, float], block_m: float, patch: int, expected: tuple[int, int]
) -> None:
    grid = Grid(crs, (resolution[0], 0.0, 0.0, 0.0, -resolution[1], 0.0), (1000, 1000))
    assert block_shape(SplitConfig(block_m=block_m), grid, patch) == expected


def test_split_survives_json() -> None:
    split = make_split(SplitConfig(), (8, 16), np.eye(9, dtype=bool))
    again = Split.from_dict(split.to_dict())
    assert again.block == (8, 16)
    assert (again.parts == split.parts).all()
    assert set(Split.whole((8, 16), (20, 20)).parts.ravel()) == {PARTS.index("test")}
