"""Planning 1,825 items over 25 tiles, compared with building the graph of `odc.stac.load` for the same items.

Items and file headers are in memory on both sides, so what is measured is the planning alone: selection, grouping,
grid, sources of each shard, keys, digest.
"""

from __future__ import annotations

import datetime as dt
import gc
import sys
import tracemalloc
from typing import Any

from harness import BANDS, Row, arguments, medians, publish

_SIDE, _PX, _STEP = 5, 10_980, 100_000.0


def made_up_items(dates: int) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """(scenes, what their headers say, the same as pystac items) of 25 tiles on each date."""
    import pystac
    from shapely.geometry import box, mapping

    from ingest.plan.probe import AssetProbe, SceneProbe
    from ingest.request.config import IngestConfig
    from ingest.scenes.harmonise import harmonise
    from zarr_store.grid import Grid

    scenes, probes, items = [], {}, []
    config = IngestConfig(collections=("sentinel-2-l2a",), bands=BANDS, mask="none")
    first = dt.datetime(2023, 1, 2, 10, 0, 31, tzinfo=dt.UTC)
    for tile in range(_SIDE * _SIDE):
        row, col = divmod(tile, _SIDE)
        left, top = 300_000.0 + col * _STEP, 5_300_040.0 - row * _STEP
        grid = Grid("EPSG:32633", (10.0, 0.0, left, 0.0, -10.0, top), (_PX, _PX))
        west, south, east, north = grid.lonlat_bounds()
        for day in range(dates):
            name = f"S2A_33T{chr(65 + row)}{chr(65 + col)}_{day:04d}"
            item = pystac.Item(
                name,
                mapping(box(west, south, east, north)),
                [west, south, east, north],
                first + dt.timedelta(days=5 * day),
                {"proj:code": "EPSG:32633", "s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True,
                 "s2:mgrs_tile": f"33T{chr(65 + row)}{chr(65 + col)}", "platform": "sentinel-2a",
                 "proj:shape": [_PX, _PX], "proj:transform": list(grid.transform)},
                stac_extensions=["https://stac-extensions.github.io/projection/v2.0.0/schema.json"],
                collection="sentinel-2-l2a",
            )  # fmt: skip
            for band in BANDS:
                item.add_asset(
                    band,
                    pystac.Asset(
                        f"https://files.invalid/{name}/{band}.tif",
                        media_type="image/tiff; application=geotiff; profile=cloud-optimized",
                        roles=["data"],
                        extra_fields={"eo:bands": [{"common_name": band}]},
                    ),
                )
            items.append(item)
    documents = [item.to_dict(include_self_link=False) for item in items]
    scenes = [harmonise(document, base="https://files.invalid/items.json", config=config) for document in documents]
    for scene in scenes:
        headers = {
            band: AssetProbe(grid=asset.grid, dtype="uint16", nodata=0.0, overviews=(2, 4), block=(512, 512))
            for band, asset in scene.assets.items()
        }
        probes[scene.id] = SceneProbe(headers, 0, "confirmed")
    return scenes, probes, items


def main() -> int:
    asked = arguments(__doc__ or "")
    import odc.stac

    from ingest.plan.making import plan_scenes
    from ingest.request.config import IngestConfig

    dates = 73 if asked.full else 7
    scenes, probes, items = made_up_items(dates)
    config = IngestConfig(collections=("sentinel-2-l2a",), bands=BANDS, mask="none")
    kept: dict[str, Any] = {}

    def ours() -> None:
        kept["plan"] = plan_scenes(scenes, probes, config)

    def theirs() -> None:
        loaded = odc.stac.load(
            items, bands=BANDS, crs="EPSG:32633", resolution=10, chunks={"x": 2048, "y": 2048}, groupby="solar_day",
            stac_cfg={"sentinel-2-l2a": {"assets": {"*": {"data_type": "uint16", "nodata": 0}}}},
        )  # fmt: skip
        kept["keys"] = len(loaded.__dask_graph__())

    took = medians({"terrashard": ours, "odc-stac": theirs}, asked.repeats)
    shards = sum(len(spec.shards()) for spec in kept["plan"].specs)
    gc.collect()
    tracemalloc.start()
    ours()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows = [
        Row(f"planning {len(scenes)} items, times faster than odc-stac", took["odc-stac"] / took["terrashard"], 5),
        Row(
            "tasks per shard", len(kept["plan"].tasks) / shards, 1, at_most=True, note=f"odc-stac: {kept['keys']} keys"
        ),
        Row("peak of Python memory while planning, kB per shard", peak / 1e3 / shards),
    ]
    return 0 if publish("ingest-plan", rows, full=asked.full) else 1


if __name__ == "__main__":
    sys.exit(main())
