"""The demo on a small world: every file it promises, a truth that the map can be held against, and safe repetition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image

Run = Callable[..., Any]

SMALL = (
    "simulate.tile_px=256",
    "simulate.overlap_px=32",
    "simulate.radar_dates=[]",
    "train.data.patch=32",
    "train.data.split.block_m=640",
    "train.run.steps=100",
    "train.run.batch_size=8",
    "train.model.width=8",
    "train.optim.learning_rate=0.01",
    "train.optim.warmup_steps=5",
)


@pytest.mark.slow
def test_demo_makes_what_it_promises_and_repeats(run: Run, tmp_path: Path, snapshot: Callable[[Path], Any]) -> None:
    out = tmp_path / "demo"
    command = ["demo", "--out", out, "--json", *(part for text in SMALL for part in ("--set", text))]
    outcome = run(*command)
    assert outcome.code == 0, outcome.err
    result = outcome.json
    for name in ("map", "quicklook", "report", "cube"):
        assert Path(result[name]).exists(), name
        assert result[name] in outcome.err, "the person is told where it is"
    assert [Path(result[n]).name for n in ("map", "quicklook", "report")] == ["map.tif", "quicklook.png", "report.html"]

    # the offsets of four kinds of scene are right: one cube, one radiometry
    facts = run("info", result["cube"], "--json").json["collections"]["sentinel-2-l2a"]
    assert facts["complete"]
    assert {verdict["verdict"] for verdict in facts["offset_verdicts"].values()} == {"confirmed"}

    # the map agrees with the truth about as well as it was said to on held-out ground, far above the commonest class
    with rasterio.open(result["map"]) as raster, rasterio.open(out / "world" / "truth.tif") as truth:
        classes, names = raster.read(1), [raster.tags(1)[f"class_{i}"] for i in range(7)]
        assert (raster.crs, raster.transform, raster.shape) == (truth.crs, truth.transform, truth.shape)
        ground = truth.read(1)
    legend = {c["value"]: c["name"] for c in json.loads((out / "world" / "truth.json").read_text())["classes"]}
    assert names == list(legend.values())
    seen = classes != 255
    agreement = float((classes[seen] + 1 == ground[seen]).mean())
    commonest = np.bincount(ground[seen]).max() / seen.sum()
    assert agreement > commonest + 0.1
    assert agreement == pytest.approx(result["accuracy"], abs=0.15)

    with Image.open(result["quicklook"]) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 5000

    # again: the cube is not touched, training has nothing left to do, the same numbers come out
    before = snapshot(out / "cube.zarr"), snapshot(out / "world")
    again = run(*command)
    assert again.code == 0, again.err
    assert (snapshot(out / "cube.zarr"), snapshot(out / "world")) == before
    assert again.json["accuracy"] == result["accuracy"]
    assert "is complete" in again.err
