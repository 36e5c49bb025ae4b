"""Items, polygons, plans, metadata of a cube and pictures, damaged: each is read, or refused by an error of ours."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .conftest import ITEM

POLYGON = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "properties": {"name": "field"},
            "geometry": {"type": "Polygon", "coordinates": [[[15, 46], [16, 46], [16, 47], [15, 47], [15, 46]]]},
        }
    ],
}
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1e308, 10**30, 2**63, "", "a" * 3000, "../../x", "2023-99-99T00:00:00Z", "0001-01-01T00:00:00Z",
    "NaN", "\x1b[2J", [], {}, [[]], [None], {"a": {}}, [1e400], float("nan"), "EPSG:0", "\ud800",
)  # fmt: skip


class Documents:
    """The good documents, and how each kind is read; everything lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good: dict[str, bytes] = {}
        self._readers: dict[str, Callable[[Path], object]] = {}
        self._add_items()
        self._add_polygons()
        self._add_pictures()
        self._add_cube()

    def mutated(self, number: int) -> tuple[str, bytes]:
        """The document of a number: its name, and its bytes."""
        rng = random.Random(number)
        name = rng.choice(sorted(self.good))
        data = self.good[name]
        if name.endswith((".json", ".geojson")) and rng.random() < 0.7:
            return name, _changed_tree(rng, data)
        return name, _changed_bytes(rng, data)

    def check(self, number: int) -> str:
        """Read the document of a number: "read", or "error" where it is refused."""
        from zarr_store.errors import TerrashardError

        name, data = self.mutated(number)
        try:
            return self.read(name, data)
        except TerrashardError:
            return "error"

    def read(self, name: str, data: bytes) -> str:
        path = self.folder / name
        was = path.read_bytes() if path.exists() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        try:
            self._readers[name](path)
        finally:
            if was is None:
                path.unlink()
            else:
                path.write_bytes(was)
        return "read"

    def _add(self, name: str, data: bytes | str, reader: Callable[[Path], object]) -> None:
        self.good[name] = data.encode() if isinstance(data, str) else data
        self._readers[name] = reader

    def _add_items(self) -> None:
        from ingest.request.config import IngestConfig
        from ingest.scenes.geoparquet import write_items
        from ingest.scenes.search import find_scenes

        def find(path: Path) -> object:
            return find_scenes(str(path), IngestConfig(collections=("sentinel-2-l2a",), bands=("red",))).scenes

        other = json.loads(json.dumps(ITEM))
        other["id"] = "S2A_33TWM_20230820_0_L2A"
        other["properties"]["datetime"] = "2023-08-20T09:57:57.246Z"
        collection = json.dumps({"type": "FeatureCollection", "features": [ITEM, other]})
        self._add("items.json", collection, find)
        self._add("item.json", json.dumps(ITEM), find)
        self._add("items.ndjson", "\n".join(json.dumps(item) for item in (ITEM, other)), find)
        path = self.folder / "made.parquet"
        write_items([ITEM, other], path)
        self._add("items.parquet", path.read_bytes(), find)

    def _add_polygons(self) -> None:
        import shapely

        from ingest.request.geometry import load_geometry

        self._add("area.geojson", json.dumps(POLYGON), load_geometry)
        shape = shapely.geometry.shape(POLYGON["features"][0]["geometry"])  # type: ignore[index]
        self._add("area.wkt", shape.wkt, load_geometry)

    def _add_pictures(self) -> None:
        from ingest.labels.patches import read_patch

        from .fuzz_files import good_files

        pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
        for name, form in (("a.png", "PNG"), ("a.jpg", "JPEG")):
            made = io.BytesIO()
            Image.fromarray(pixels).save(made, form)
            self._add(name, made.getvalue(), read_patch)
        self._add("a.tif", good_files()["tiles-deflate-uint16-2"], read_patch)

    def _add_cube(self) -> None:
        from ingest.plan.plan import Plan
        from ingest.plan.stored import PLAN_KEY, kept_plan
        from ingest.run.loop import run
        from zarr_store.read import open_cube

        from .clusters import worker_here
        from .growing import plan_of, scene

        plan = plan_of([scene(self.folder / "scenes", 1)])
        self._add("plan.json", plan.to_json(), Plan.load)
        made = self.folder / "made.zarr"
        with worker_here(1) as client:
            run(plan, made, client=client)
        shutil.copytree(made, self.folder / "cube.zarr")

        def look(_: Path) -> object:
            cube = open_cube(self.folder / "cube.zarr")
            for name in cube.collections:
                spec = cube.spec(name)
                rows = cube.ledger(name).rows()
                cube.ledger(name).counts(len(rows))
                cube.items(name)
                cube.index(name)
                cube.dataset(name)
                for array in spec.arrays():
                    cube.tensorstore(name, array.name)
            return cube

        def look_from_afar(_: Path) -> object:
            cube = open_cube(self.folder / "cube.zarr")
            return [cube.overview(name) for name in cube.collections]

        def look_at_plan(_: Path) -> object:
            return kept_plan(self.folder / "cube.zarr")

        for path in sorted(made.rglob("*.json")):
            if path.name != "lock.json":
                key = str(path.relative_to(made))
                reader = look_from_afar if key.startswith("overview/") else look_at_plan if key == PLAN_KEY else look
                self._add(f"cube.zarr/{key}", path.read_bytes(), reader)


def _changed_tree(rng: random.Random, data: bytes) -> bytes:
    """A document with some of its values replaced, left out or said twice."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        _walk(document, places)
        if not places:
            break
        holder, key = rng.choice(places)
        what = rng.random()
        if what < 0.2:
            del holder[key]
        elif what < 0.3 and isinstance(holder, list):
            holder.append(holder[key])
        elif what < 0.4:
            _, other = rng.choice(places)
            holder[key] = other
        elif what < 0.5 and isinstance(holder[key], int | float):
            holder[key] = rng.choice((-1, 1, 0.5, 1e9)) * holder[key] + rng.choice((0, 1, -1))
        else:
            holder[key] = rng.choice(_VALUES)
    if rng.random() < 0.02:
        return b"[" * 100_000 + b"]" * 100_000
    return json.dumps(document).encode()


def _walk(value: Any, places: list[tuple[Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        places.append((value, key))
        _walk(inner, places)


def _changed_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 10))):
        if not changed:
            break
        at = rng.randrange(len(changed))
        what = rng.random()
        if what < 0.5:
            changed[at] ^= 1 << rng.randrange(8)
        elif what < 0.7:
            changed[at] = rng.choice((0, 0x22, 0x2C, 0x5B, 0x7B, 0x7D, 0x7F, 0x80, 0xFF))
        elif what < 0.8:
            del changed[at:]
        else:
            start = rng.randrange(len(changed))
            changed[at:at] = changed[start : start + rng.randrange(60)]
    return bytes(changed)
