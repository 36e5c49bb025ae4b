"""Bands of one scene whose metadata or files state different offsets: each band's own is used, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio

from ingest.plan.making import make_plan
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.shard import fill_shard
from ingest.testing import write_raster
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid

Dn = npt.NDArray[np.uint16]
SIDE = 64
GRID = Grid("EPSG:32633", (10, 0, 500_000, 0, -10, 5_200_000), (SIDE, SIDE))
CONFIG = IngestConfig(bands=("blue", "nir"), mask="none")
NOTHING = {"s2__processing_baseline": None, "s2__product_uri": None, "s2__datatake_id": None}
"""Properties of an item that names no baseline."""


def ground(low: int, high: int) -> Dn:
    return np.random.default_rng(low).integers(low, high, (SIDE, SIDE)).astype(np.uint16)


RAISED, SUBTRACTED, BRIGHT = ground(1050, 3500), ground(60, 2500), ground(1900, 4000)


@pytest.fixture
def plan_of(tmp_path: Path, make_item: Callable[..., Any]) -> Callable[..., Plan]:
    """The plan of one item; `stated` are the offsets of its bands, `tags` those of its files, None for none."""

    def make(
        pixels: tuple[Dn, Dn],
        stated: tuple[float | None, float | None] = (None, None),
        tags: tuple[float | None, float | None] = (None, None),
        config: IngestConfig = CONFIG,
        **properties: Any,
    ) -> Plan:
        item = make_item(**properties)
        for number, (key, name) in enumerate((("blue", "B02"), ("nir", "B08"))):
            item["assets"][key]["raster:bands"] = [{"scale": 1e-4}]
            if stated[number] is not None:
                item["assets"][key]["raster:bands"][0]["offset"] = stated[number]
            write_raster(tmp_path / f"{name}.tif", GRID, pixels[number])
            if tags[number] is not None:
                with rasterio.open(tmp_path / f"{name}.tif", "r+") as file:
                    file.scales, file.offsets = (1e-4,), (tags[number],)
        (tmp_path / "item.json").write_text(json.dumps(item))
        return make_plan(str(tmp_path / "item.json"), config)

    return make


def stored(plan: Plan) -> tuple[npt.NDArray[np.int64], set[int]]:
    """(band, y, x) of the one shard, and its statuses; the plan goes through its file first."""
    plan = Plan.from_json(plan.to_json())
    (task,) = plan.tasks
    filled = fill_shard(task, plan.recipes[0])
    whole: npt.NDArray[np.int64] = filled.arrays["reflectance"][0].astype(np.int64)
    return whole, set(np.unique(filled.arrays["status"]).tolist())


@pytest.mark.parametrize("known", [{}, NOTHING])
@pytest.mark.parametrize("where", ["stated", "tags"])
@pytest.mark.parametrize("pixels", [(RAISED, SUBTRACTED), (RAISED, BRIGHT)])
def test_each_band_has_the_offset_that_it_states(
    plan_of: Callable[..., Plan], where: str, known: dict[str, None], pixels: tuple[Dn, Dn]
) -> None:
    plan = plan_of(pixels, **{where: (-0.1, 0.0)}, **known)
    values, status = stored(plan)
    assert status == {1}
    np.testing.assert_array_equal(values[0], pixels[0].astype(int) - 1000)
    np.testing.assert_array_equal(values[1], pixels[1])
    (verdict,) = plan.statistics["sentinel-2-l2a"]["offset_verdicts"].values()
    assert (verdict["dn_offset"], verdict["band_offsets"]) == (-1000, {"nir": 0})
    assert any("each band" in text for text in plan.warnings), plan.warnings


def test_pixels_overrule_what_a_band_states_of_itself(plan_of: Callable[..., Plan]) -> None:
    # blue states 0 against its baseline and still carries the 1000; near infrared states -1000 and is subtracted
    values, _ = stored(plan_of((RAISED, SUBTRACTED), (0.0, -0.1)))
    np.testing.assert_array_equal(values[0], RAISED.astype(int) - 1000)
    np.testing.assert_array_equal(values[1], SUBTRACTED)
    with pytest.raises(InvalidInput, match=r"nothing is to be subtracted|1000 is still in them"):
        plan_of((RAISED, SUBTRACTED), (0.0, -0.1), config=IngestConfig(
            bands=("blue", "nir"), mask="none", offset_policy="fail"))  # fmt: skip


@pytest.mark.parametrize(
    ("given", "known", "words"),
    [
        ({"stated": (-0.1, -0.05)}, {}, "nir: refused, as its offset is stated as -500"),
        ({"tags": (-0.1, None)}, NOTHING, "nir: nothing states the offset of nir"),
    ],
)
def test_a_band_whose_offset_nobody_knows_is_refused_by_name(
    plan_of: Callable[..., Plan], given: dict[str, Any], known: dict[str, None], words: str
) -> None:
    plan = plan_of((RAISED, BRIGHT), **given, **known)
    assert any(words in text for text in plan.warnings), plan.warnings
    _, status = stored(plan)
    assert status == {3}


def test_a_flag_of_the_provider_holds_for_all_bands(plan_of: Callable[..., Plan]) -> None:
    # catalogues keep -0.1 in some assets after the subtraction that their flag reports
    plan = plan_of((SUBTRACTED, SUBTRACTED), (-0.1, 0.0), earthsearch__boa_offset_applied=True)
    values, _ = stored(plan)
    np.testing.assert_array_equal(values, np.stack([SUBTRACTED, SUBTRACTED]))
    (verdict,) = plan.statistics["sentinel-2-l2a"]["offset_verdicts"].values()
    assert "band_offsets" not in verdict
