"""Results of odc-stac and stackstac for real Sentinel-2 scenes, by default and as documented, compared with terrashard.

    python benchmarks/why_reflectance.py [SCENES]        # needs the extra: pip install terrashard[bench]

SCENES holds `zagreb` (two tiles, five dates, Earth Search items over 120 m files) and `major_tom` (two cells at 10 m).
Prints the table of docs/why-reflectance.md. Every number is computed here, in one run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import odc.stac
import pystac
import rasterio
import stackstac

from ingest.plan.making import make_plan
from ingest.request.config import IngestConfig
from ingest.run.shard import fill_shard
from ingest.scenes.offsets import OFFSET_DN, baseline_has_offset, read_offset
from zarr_store.grid import Grid

warnings.filterwarnings("ignore")
SCRATCH = tempfile.TemporaryDirectory()
ODC: dict[str, Any] = {"groupby": "solar_day", "chunks": {}}


def say(what: str, who: str, value: str) -> None:
    print(f"| {what} | {who} | {value} |", flush=True)


def plain_copy(href: str) -> str:
    """The same pixels as a plain GeoTIFF: the files are JPEG 2000 codestreams, which stackstac cannot open."""
    target = Path(SCRATCH.name) / Path(href).parent.name / Path(href).name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with rasterio.open(href) as dataset:
            profile = {"driver": "GTiff", "count": 1, "dtype": dataset.dtypes[0], "nodata": 0, "crs": dataset.crs}
            height, width = dataset.shape
            with rasterio.open(target, "w", height=height, width=width, transform=dataset.transform, **profile) as copy:
                copy.write(dataset.read(1), 1)
    return str(target)


def zagreb_items(scenes: Path, *, day: str = "2023-08-13", truthful: bool = False) -> list[pystac.Item]:
    """The real items of one day with absolute hrefs; `truthful` corrects proj:shape and proj:transform by the files."""
    found = []
    for path in sorted((scenes / "zagreb" / "sentinel-2-l2a").glob("*/*_L2A.json")):
        item = pystac.Item.from_file(str(path))
        if not item.properties["datetime"].startswith(day):
            continue
        for key in list(item.assets):
            asset = item.assets[key]
            asset.href = str((path.parent / asset.href).resolve()) if "://" not in asset.href else asset.href
            if not asset.href.endswith(".tif") or not Path(asset.href).is_file():
                del item.assets[key]
            elif truthful and key in ("red", "scl"):
                asset.href = plain_copy(asset.href)
                with rasterio.open(asset.href) as dataset:
                    shape, transform = list(dataset.shape), list(dataset.transform)[:6]
                asset.extra_fields |= {"proj:shape": shape, "proj:transform": transform}
        found.append(item)
    return found


def as_projection_v1(items: list[pystac.Item]) -> list[dict[str, Any]]:
    """With proj:epsg, which stackstac reads; pystac turns it into proj:code, which stackstac does not know."""
    documents = [item.to_dict(transform_hrefs=False) for item in items]
    for document in documents:
        document["properties"]["proj:epsg"] = 32633
    return documents


def ours(catalogue: str, **settings: Any) -> tuple[dict[str, np.ndarray], Any]:
    plan = make_plan(catalogue, IngestConfig(**settings))
    recipe = plan.recipes[0]
    whole = {a.name: np.full(recipe.spec.array_shape(a.name), a.fill, a.dtype) for a in recipe.spec.arrays()}
    for task in plan.tasks:
        t, y, x = task.region.slices
        for name, part in fill_shard(task, recipe).arrays.items():
            whole[name][(t, slice(None), y, x) if part.ndim == 4 else (t, y, x)] = part
    return whole, plan


def median(values: np.ndarray, valid: np.ndarray) -> str:
    return f"{np.median(values[valid]):.4f}"


def grid_of(array: Any) -> str:
    y, x = array.y.values, array.x.values
    step = abs(float(x[1] - x[0]))
    return f"{len(y)} × {len(x)} px at {step:g}"


def real_scene(scenes: Path) -> None:
    """Zagreb: items promise 10 m over files of 120 m, and offset -0.1 over pixels from which it is gone."""
    catalogue = str(scenes / "zagreb" / "catalog.json")
    cube, plan = ours(catalogue, bands=("red", "scl"), datetime="2023-08-13", mask="none")
    red = cube["reflectance"][0, 0]
    say("grid", "terrashard", f"{plan.grid.height} × {plan.grid.width} px at 120, from the file headers")
    told = zagreb_items(scenes)
    stacked = stackstac.stack(as_projection_v1(told), assets=["red"], epsg=32633, dtype="float64", rescale=True)
    say(
        "grid",
        "stackstac, default",
        f"{grid_of(stacked)}: 1.7 megapixels of files spread over {stacked.sizes['y'] * stacked.sizes['x'] / 1e6:.0f}",
    )
    loaded = odc.stac.load(told, bands=["red"], **ODC)
    say("grid", "odc-stac, default", grid_of(loaded.red))

    truth = red.astype(float) / 10_000
    seen = red > 0
    share = (cube["reflectance"][0, 0][seen] < 1000).mean()
    say(
        "red, median reflectance",
        "terrashard",
        f"{median(truth, seen)} ({share:.0%} of the DN below 1000: nothing left to subtract)",
    )
    g = plan.grid
    fixed = zagreb_items(scenes, truthful=True)
    for name, options in (
        ("default", {}),
        ("rescale=False", {"rescale": False, "fill_value": np.uint16(0), "dtype": "uint16"}),
    ):
        array = stackstac.stack(
            as_projection_v1(fixed),
            assets=["red"],
            epsg=32633,
            resolution=120,
            bounds=g.bounds,
            snap_bounds=False,
            **options,
        ).compute()
        values = stackstac.mosaic(array, dim="time", **({"nodata": 0} if options else {})).values[0]
        values = values / 10_000 if options else values
        valid = seen & np.isfinite(values) & (values != 0)
        wrong = (np.abs(values - truth)[valid] > 0.05).mean()
        say(
            "red, median reflectance",
            f"stackstac, {name}",
            f"{median(values, valid)}; {(values[valid] < 0).mean():.0%} negative; {wrong:.0%} off by more than 0.05",
        )
    from odc.geo.geobox import GeoBox

    box = GeoBox(g.shape, g.affine, g.crs)
    raw = odc.stac.load(fixed, bands=["red", "scl"], geobox=box, groupby="solar_day").isel(time=0)
    dn = raw.red.values.astype(float)
    valid = seen & (dn > 0)
    say("red, median reflectance", "odc-stac, default", f"DN {np.median(dn[valid]):.0f}: no scale is applied")
    meta = dn * 0.0001 - 0.1
    say(
        "red, median reflectance",
        "odc-stac, scale and offset of the item applied by hand",
        f"{median(meta, valid)}; {(meta[valid] < 0).mean():.0%} negative",
    )

    scl = cube["scl"][0]
    legal = set(np.unique(scl))
    kernels: dict[str, dict[str, Any]] = {"resampling='bilinear'": {"resampling": "bilinear"}, "default": {}}
    for name, options in kernels.items():
        loose = odc.stac.load(fixed, bands=["scl"], geobox=box.zoom_out(0.7), groupby="solar_day", **options).scl.values
        same = odc.stac.load(
            fixed, bands=["scl"], geobox=box.zoom_out(0.7), groupby="solar_day", resampling="nearest"
        ).scl.values
        say(
            "class layer on a grid of 84 m",
            f"odc-stac, {name}",
            f"{(loose != same).mean():.1%} of the pixels in another class than nearest",
        )
    bilinear = rasterio.enums.Resampling.bilinear
    arrays = [
        stackstac.stack(
            as_projection_v1(fixed),
            assets=["scl"],
            epsg=32633,
            resolution=84,
            resampling=r,
            rescale=False,
            fill_value=np.uint8(0),
            dtype="uint8",
        ).values
        for r in (bilinear, rasterio.enums.Resampling.nearest)
    ]
    say(
        "class layer on a grid of 84 m",
        "stackstac, resampling=bilinear",
        f"{(arrays[0] != arrays[1]).mean():.1%} of the pixels in another class than nearest",
    )
    fine, _ = ours(
        catalogue, bands=("red", "scl"), datetime="2023-08-13", mask="none", resolution=84, resampling="bilinear"
    )
    odd = set(np.unique(fine["scl"])) - legal - {0}
    say(
        "class layer on a grid of 84 m",
        "terrashard, --resampling bilinear",
        f"classes that no file holds: {sorted(odd) or 'none'}; classes are never interpolated",
    )


def lost_file(scenes: Path) -> None:
    """One of the files of a day answers "not found"."""
    with tempfile.TemporaryDirectory() as folder:
        import shutil

        copy = Path(folder) / "zagreb"
        shutil.copytree(scenes / "zagreb", copy)
        for path in [copy, *copy.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        victim = next(copy.glob("sentinel-2-l2a/*33TWL_20230813*/B04.tif"))
        victim.unlink()
        item = json.loads(next(victim.parent.glob("*_L2A.json")).read_text())
        cube, _ = ours(str(copy / "catalog.json"), bands=("red", "scl"), datetime="2023-08-13", mask="none", retries=0)
        status = cube["status"][0]
        say(
            "a file is gone",
            "terrashard",
            f"{(status == 3).mean():.0%} of the pixels have status missing, scene {item['id']} is named",
        )
        items = zagreb_items(scenes, truthful=True)
        lost = next(one for one in items if "33TWL" in one.id).assets["red"]
        lost.href = lost.href.replace("B04", "gone")
        for who, read in (
            (
                "odc-stac, default",
                lambda: (
                    odc.stac.load(
                        items, bands=["red"], crs="EPSG:32633", resolution=120, groupby="solar_day"
                    ).red.values
                ),
            ),
            (
                "odc-stac, fail_on_error=False",
                lambda: (
                    odc.stac.load(
                        items, bands=["red"], crs="EPSG:32633", resolution=120, groupby="solar_day", fail_on_error=False
                    ).red.values
                ),
            ),
            (
                "stackstac, default",
                lambda: stackstac.stack(as_projection_v1(items), assets=["red"], epsg=32633, resolution=120).values,
            ),
        ):
            try:
                values = read()
            except Exception as error:  # noqa: BLE001
                say("a file is gone", who, f"raises {type(error).__name__}; nothing of the day is there")
            else:
                empty = ~np.isfinite(values) if values.dtype.kind == "f" else values == 0
                say("a file is gone", who, f"no warning; {empty.mean():.0%} of the pixels look like outside the swath")


def native_cells(scenes: Path) -> None:
    """Two cells at 10 m with a baseline each: by date, by metadata that is not there, and by pixels."""

    for cell in sorted((scenes / "major_tom" / "S2L2A").glob("*/*/S2*")):
        baseline = f"{cell.name.split('_')[3][1:3]}.{cell.name.split('_')[3][3:]}"
        with rasterio.open(cell / "B02.tif") as dataset:
            dn = dataset.read(1)
        clouds = cell / "cloud_mask.tif"
        with rasterio.open(clouds) as dataset:
            clear = dataset.read(1) == 0
        reading = read_offset(dn)
        stated = baseline_has_offset(baseline)  # None for 99.99, then the pixels decide
        offset = OFFSET_DN if stated or (stated is None and reading.state == "raised") else 0
        use = clear & (dn > 0) if (clear & (dn > 0)).any() else dn > 0
        low = np.median(dn[use])
        right = (low + offset) / 10_000
        say(
            f"blue of {cell.name[38:44]}, baseline {baseline}",
            "DN / 10000, as a loader without the rule gives it",
            f"{low / 10_000:.4f}",
        )
        say(
            f"blue of {cell.name[38:44]}, baseline {baseline}",
            "terrashard",
            f"{right:.4f} (offset {offset:+d}; pixels: {reading.state}, {reading.share_below_1000:.1%} below 1000)",
        )


def shifted_grid(scenes: Path) -> None:
    """proj:code instead of proj:epsg, as STAC 1.1 has it."""
    items = zagreb_items(scenes, truthful=True)
    assert all("proj:epsg" not in item.properties for item in items), "this pystac does not migrate items"
    grid = Grid("EPSG:32633", (120.0, 0.0, 499_980.0, 0.0, -120.0, 5_200_080.0), (1749, 915))
    try:
        array = stackstac.stack(items, assets=["red"], epsg=32633, resolution=120)
        left, top = float(array.x[0]), float(array.y[0])
        say(
            "proj:code only",
            "stackstac, default",
            f"{grid_of(array)} from ({left:g}, {top:g}); "
            f"the files are {grid.height} × {grid.width} from (499980, 5.20008e+06)",
        )
    except Exception as error:  # noqa: BLE001
        say("proj:code only", "stackstac, default", f"raises {type(error).__name__}: {str(error)[:90]}")


def run() -> None:
    scenes = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "shared" / "data" / "scenes")
    print(f"odc-stac {odc.stac.__version__}, stackstac {stackstac.__version__}, rasterio {rasterio.__version__}\n")
    print("| question | asked of | answer |\n|---|---|---|")
    for part in (real_scene, shifted_grid, lost_file, native_cells):
        part(scenes)


if __name__ == "__main__":
    run()
