"""A file leads its reader nowhere else: every path and address that is touched while hostile files are read."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.labels import vectors
from ingest.raster.access import with_asset
from ingest.raster.drivers import (
    RASTER_DRIVERS,
    VECTOR_DRIVERS,
    limit_raster_drivers,
    limit_vector_drivers,
    open_drivers,
)
from zarr_store.errors import AssetUnreadable, InvalidInput

from .. import hostile

ROOT = Path(__file__).resolve().parents[3]
_IN_ACCESS, _IN_OPEN, _IN_CREATE = 0x1, 0x20, 0x100


@pytest.fixture
def corpus(tmp_path: Path, make_server: Callable[[], Any]) -> tuple[list[Path], Path, Any]:
    """Hostile files, the folder that they lead to, and the server that they lead to."""
    folder, beside, server = tmp_path / "given", tmp_path / "elsewhere", make_server()
    folder.mkdir()
    beside.mkdir()
    made = [*hostile.write_rasters(folder, server.url, beside), *hostile.write_vectors(folder, server.url, beside)]
    return made, beside, server


def read_in_child(paths: list[Path], *before: str, timeout_s: float = 240) -> dict[str, dict[str, str]]:
    """Read files in a process of its own, so that one that never ends is ended."""
    names = paths[0].parent / "names.json"
    names.write_text(json.dumps([str(path) for path in paths]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GDAL_MEM_ENABLE_OPEN": "YES"}
    done = subprocess.run(
        [*before, sys.executable, str(Path(hostile.__file__)), str(names)],
        capture_output=True, text=True, timeout=timeout_s, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    came: dict[str, dict[str, str]] = json.loads(done.stdout)
    return came


class Watch:
    """Accesses to the files of a folder, as the kernel tells them (inotify); there where no tracer is."""

    def __init__(self, folder: Path) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._descriptor = library.inotify_init1(os.O_NONBLOCK)
        assert library.inotify_add_watch(self._descriptor, os.fsencode(folder), _IN_ACCESS | _IN_OPEN | _IN_CREATE) > 0

    def seen(self) -> set[str]:
        found = set()
        try:
            data = os.read(self._descriptor, 1 << 20)
        except BlockingIOError:
            data = b""
        while data:
            _, _, _, length = struct.unpack_from("iIII", data)
            found.add(data[16 : 16 + length].rstrip(b"\0").decode())
            data = data[16 + length :]
        return found


def own_files(path: Path) -> set[str]:
    """What may be touched for a file: itself, and what belongs to its format."""
    allowed = {path.name}
    if path.name.startswith("raw-"):
        allowed.add(f"{path.name}.aux.xml")
    if path.suffix == ".shp":
        allowed |= {path.with_suffix(end).name for end in (".shx", ".dbf", ".prj", ".cpg")}
        allowed |= {path.with_suffix(end).name for end in (".SHX", ".DBF", ".PRJ", ".CPG")}
    if path.suffix == ".gpkg":
        allowed |= {f"{path.name}-wal", f"{path.name}-journal"}
    return allowed


def check_outcomes(came: dict[str, dict[str, str]]) -> None:
    """Files that lead elsewhere are refused and say why; those with neighbours are read without them.

    Of labels and samples, a mask beside the file would say which pixels count, so they are refused by its name alone.
    """
    assert hostile.SECRET not in json.dumps(came)
    for name, by_door in came.items():
        stem = Path(name).stem
        for door, text in by_door.items():
            if name == "neighbours.tif" and door in ("geotiff", "patch"):
                assert text.startswith("refused"), (name, door, text)
                assert ".msk" in text, (name, door, text)
            elif stem.endswith("neighbours") and (door in ("asset", "read") or not name.startswith("raw")):
                assert text.startswith("read"), (name, door, text)
            elif name.startswith("raw-") and door in ("asset", "read"):
                assert text.startswith("read"), (name, door, text)  # its overviews are simply not there
            elif name == "linked.shp" and door == "features":
                assert text == "read: [1, ['field']]", text
            elif name == "crs-second.geojson" and door == "geometry":
                assert text == "read: Polygon", text  # this door is not OGR's, and takes the one spelling alone
            else:
                assert text.startswith("refused"), (name, door, text)
                if (
                    name.endswith((".tif", ".jp2"))
                    and door in ("asset", "read")
                    and stem in hostile.names_elsewhere("", Path())
                ):
                    assert "overviews are in another file" in text, (name, door, text)


def test_nothing_is_touched_but_the_file_that_was_named(corpus: tuple[list[Path], Path, Any]) -> None:
    """What the kernel tells of the folders: this needs no tracer, and is never skipped on Linux."""
    if not sys.platform.startswith("linux"):
        pytest.skip("inotify is Linux's")
    paths, beside, server = corpus
    given, elsewhere, cache = Watch(paths[0].parent), Watch(beside), Watch(beside / "cache")
    (beside / "canary.tif").read_bytes()
    assert elsewhere.seen() == {"canary.tif"}, "the watch sees a file that is opened"
    came = read_in_child(paths)
    check_outcomes(came)
    assert len(came) == len(paths) > 40
    assert elsewhere.seen() == cache.seen() == set()
    assert given.seen() <= {"names.json", *(name for path in paths for name in own_files(path))}
    assert list((beside / "cache").iterdir()) == []
    assert server.requests == []


def test_a_crs_that_is_a_link_is_not_fetched_even_if_it_reaches_gdal(
    tmp_path: Path, make_server: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server()
    path = tmp_path / "link.geojson"
    link = {"type": "link", "properties": {"href": f"{server.url}/crs", "type": "proj4"}}
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": link, "features": []}))
    seen: list[object] = []
    monkeypatch.setattr(vectors, "check_stated_crs", seen.append)
    with contextlib.suppress(InvalidInput):
        vectors.read_table(path, None, None)
    assert seen == [path]
    assert server.requests == []


@pytest.mark.parametrize("member", [
    '"crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}',
    '"crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}',
    '"crs": {"type": "EPSG", "properties": {"code": 32633}}',
    '"crs": null',
    '"name": "crs"',
])  # fmt: skip
def test_a_crs_that_is_stated_plainly_is_read(tmp_path: Path, member: str) -> None:
    path = tmp_path / "plain.geojson"
    feature = '{"type": "Feature", "properties": {"crs": "none", "a": ["crs"]}, "geometry": null}'
    path.write_text(f'{{"type": "FeatureCollection", {member}, "features": [{feature}]}}')
    table = vectors.read_table(path, "crs", None)
    assert table.values is not None
    assert list(table.values) == ["none"]
    assert ("32633" in table.crs) == ("32633" in member)


def test_every_path_and_address_of_a_hostile_corpus_is_listed(
    corpus: tuple[list[Path], Path, Any], tmp_path: Path
) -> None:
    """The system calls of the reading process, file by file: only that file, and no connection at all."""
    probe = shutil.which("strace") and subprocess.run(
        ["strace", "-o", str(tmp_path / "probe"), "true"], capture_output=True, timeout=20, check=False
    )
    if not probe or probe.returncode:
        pytest.skip("no strace, or it may trace nothing here (.ci/run installs it); the test above needs none")
    paths, beside, server = corpus
    log = tmp_path / "trace"
    came = read_in_child(
        paths, "strace", "-f", "-qq", "-s", "4096", "-e", "trace=%file,%network", "-o", str(log), timeout_s=500
    )
    check_outcomes(came)
    touched = _by_file(log.read_text(errors="replace"))
    assert set(touched) == {path.name for path in paths}, "each file's calls were seen"
    strange: dict[str, list[str]] = {}
    for path in paths:
        calls = touched[path.name]
        assert any(str(path) in call for call in calls), f"{path.name} was looked at"
        bad = [call for call in calls if not _is_expected(call, path, beside.parent)]
        if bad:
            strange[path.name] = bad
    assert strange == {}
    assert server.requests == []


def _by_file(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        mark = re.search(rf'"{hostile.MARK}([^"]+)"', line)
        if mark:
            current = None if hostile.DONE in line else found.setdefault(mark.group(1), [])
        elif current is not None and "resumed>" not in line:
            current.append(line)
    return found


def _is_expected(call: str, path: Path, corpus: Path) -> bool:
    """The file, Python's and the system's own files, and the folder that polygons are read in."""
    if re.search(r"\b(connect|sendto|sendmsg|bind|listen)\(", call) and "AF_UNIX" not in call:
        return False
    if re.search(r"\bsocket\(AF_INET", call):
        return False
    allowed = {str(path.parent), *(str(path.parent / name) for name in own_files(path))}
    temporary = f"{tempfile.gettempdir()}/"
    programs = [Path(sys.prefix), Path(sys.base_prefix), ROOT, Path("/usr"), Path("/lib"), Path("/etc"), Path("/proc"),
                Path("/sys"), Path("/dev/null"), Path("/dev/urandom"), Path.home() / ".gdal"]  # fmt: skip
    for named in re.findall(r'"((?:[^"\\]|\\.)*)"', call):
        if not named.startswith("/"):  # in a folder that is open already, or GDAL's own data
            if str(corpus) in named or "://" in named:
                return False
        elif f"{path.parent}/".startswith(f"{named.rstrip('/')}/"):
            continue  # a folder above, looked at for links
        elif named.startswith(str(corpus)):
            # a mask beside a file is refused, so it is asked whether there is one; it is never opened
            is_there = named == f"{path}.msk" and re.search(r"\b(newfstatat|statx?|access)\(", call) is not None
            if named not in allowed and not is_there:
                return False
        elif not named.startswith(f"{temporary}terrashard-") and not any(
            Path(named).is_relative_to(place) or place.is_relative_to(named) for place in programs
        ):
            return False
    return True


def test_only_what_is_read_is_registered_in_both_gdals(tmp_path: Path, make_server: Callable[[], Any]) -> None:
    """Also where the refusal of foreign overviews is not asked: GDAL alone can follow none of the names."""
    import rasterio

    limit_raster_drivers()
    limit_vector_drivers()
    assert open_drivers("raster") == RASTER_DRIVERS | {"MEM"}
    assert open_drivers("vector") == VECTOR_DRIVERS | {"MEM"}
    server = make_server()
    tmp_path.joinpath("given").mkdir()
    tmp_path.joinpath("elsewhere").mkdir()
    hostile.write_rasters(tmp_path / "given", server.url, tmp_path / "elsewhere")
    for kind, name in hostile.names_elsewhere(server.url, tmp_path / "elsewhere").items():
        if kind in ("local", "directory"):  # a GeoTIFF beside: the refusal alone keeps it closed
            continue
        with pytest.raises(rasterio.errors.RasterioError):
            rasterio.open(name)
        with rasterio.open(tmp_path / "given" / f"{kind}.tif", driver="GTiff") as dataset:
            assert dataset.overviews(1) == []
    assert server.requests == []
    assert list((tmp_path / "elsewhere" / "cache").iterdir()) == []
    # the warper registers VRT where it is absent; it stays unable to open one
    from ingest.raster.resample import place
    from zarr_store.grid import Grid

    source = Grid("EPSG:32633", (10.0, 0, 500_000.0, 0, -10.0, 5_000_000.0), (64, 64))
    target = Grid("EPSG:3035", (10.0, 0, 4_634_000.0, 0, -10.0, 2_448_000.0), (64, 64))
    place(lambda *_, **__: np.ones((64, 64), np.uint16), source, target, "bilinear", dtype=np.uint16, nodata=0)
    assert open_drivers("raster") == RASTER_DRIVERS | {"MEM"}
    seen = []
    other = threading.Thread(target=lambda: seen.append(_drivers_in_a_new_environment()))
    other.start()
    other.join()
    assert seen == [RASTER_DRIVERS | {"MEM"}]


def _drivers_in_a_new_environment() -> frozenset[str]:
    import rasterio

    with rasterio.Env(GDAL_CACHEMAX=64):
        return open_drivers("raster")


def test_workers_open_nothing_else_either(tmp_path: Path) -> None:
    """A worker is a process that has only ever read an asset."""
    from ingest.testing import write_raster
    from zarr_store.grid import Grid

    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (256, 256))
    path = write_raster(tmp_path / "a.tif", grid, np.ones(grid.shape, np.uint16))
    program = (
        "import sys; from ingest.raster.drivers import open_drivers; from ingest.raster.access import with_asset;"
        "with_asset(sys.argv[1], lambda d: d.read(1), scene='s', asset='a'); print(sorted(open_drivers('raster')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == str(sorted(RASTER_DRIVERS | {"MEM"}))


def test_a_codestream_whose_server_answers_every_name_ends(tmp_path: Path, make_server: Callable[[], Any]) -> None:
    """The server gives the file for .ovr, .ovr.ovr, …: GDAL asked for ever."""
    made = tmp_path / "given"
    made.mkdir()
    (tmp_path / "elsewhere").mkdir()
    server = make_server()
    hostile.write_rasters(made, server.url, tmp_path / "elsewhere")
    codestream = (made / "raw-neighbours.tif").read_bytes()
    sidecar = (made / "raw-neighbours.tif.aux.xml").read_bytes()

    class Anything(dict[str, Any]):
        def get(self, path: str, default: Any = None) -> Any:
            data = sidecar if path.startswith("/good") and path.endswith(".aux.xml") else codestream

            def answer(request: Any) -> tuple[int, dict[str, str], bytes]:
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
                if span is None:
                    return 200, {}, data
                start, stop = int(span[1]), min(len(data), int(span[2]) + 1)
                return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]

            return answer

    server.answer = Anything()
    program = (
        "import sys; from ingest.raster.access import Access, with_asset\n"
        "from zarr_store.errors import AssetUnreadable\n"
        "try: print(with_asset(sys.argv[1], lambda d: (d.overviews(1), int(d.read(1, out_shape=(16, 16)).sum()) > 0, "
        "d.read_masks(1).shape), scene='s', asset='a', access=Access(private_names=None)))\n"
        "except AssetUnreadable as error: print(error)"
    )
    said = []
    for name in ("good.tif", "bad.tif"):
        done = subprocess.run(
            [sys.executable, "-c", program, f"{server.url}/{name}"],
            capture_output=True, text=True, timeout=60, check=True, cwd=ROOT,
        )  # fmt: skip
        said.append(done.stdout)
    assert "True, (256, 256)" in said[0]
    assert "NAME.aux.xml" in said[1]
    assert set(server.paths()) == {f"/{name}{end}" for name in ("good.tif", "bad.tif") for end in ("", ".aux.xml")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><PAMDataset/>", "declares a document type"),
        ("<PAMDataset><SRS>/etc/passwd</SRS></PAMDataset>", "coordinate reference system as WKT"),
        ("<PAMDataset><SRS>http://127.0.0.1/x</SRS></PAMDataset>", "coordinate reference system as WKT"),
        ('<PAMDataset><SRS>PROJCS["a",PARAMETERFILE["b","/x"]]</SRS></PAMDataset>', "names a file"),
        ("<PAMDataset><GeoTransform>1,2,3</GeoTransform></PAMDataset>", "six numbers"),
        ("<PAMDataset><GeoTransform>1,2,3,4,5,nan</GeoTransform></PAMDataset>", "six numbers"),
        ("<PAMDataset", "cannot be read"),
        ("<PAMDataset>" + " " * (1 << 20) + "</PAMDataset>", "more than"),
    ],
)
def test_a_sidecar_that_is_no_georeference_is_refused(text: str, message: str) -> None:
    from ingest.raster.sidecar import georeference_only

    with pytest.raises(InvalidInput, match=message):
        georeference_only(text.encode())


def _doors_of_paths(path: Path) -> dict[str, Callable[[], Any]]:
    """Everything that opens a file which a user or a catalogue named, by the name that the file should have."""
    from ingest.labels.features import read_features
    from ingest.labels.labelled_scene import import_scene
    from ingest.labels.patch_files import read_csv
    from ingest.labels.patches import read_patch
    from ingest.labels.source_file import digest_of
    from ingest.plan.plan import Plan
    from ingest.raster.opening import open_geotiff
    from ingest.request.config import IngestConfig
    from ingest.request.geometry import load_geometry
    from ingest.scenes.documents import Documents
    from ingest.scenes.geoparquet import is_parquet, read_items
    from ingest.trust.providers import load_provider_file
    from jaxtrain.settings import read_train_config
    from zarr_store.grid import Grid

    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (256, 256))

    def geotiff() -> None:
        with open_geotiff(path.with_suffix(".tif")):
            pass

    def refused_parquet() -> None:
        assert not is_parquet(path.with_suffix(".parquet"))
        raise InvalidInput("said no")

    return {
        "asset.tif": lambda: with_asset(str(path.with_suffix(".tif")), lambda d: d, scene="s", asset="a"),
        "label.tif": geotiff,
        "digest.tif": lambda: digest_of(path.with_suffix(".tif")),
        "patch.tif": lambda: read_patch(path.with_suffix(".tif")),
        "patch.png": lambda: read_patch(path.with_suffix(".png")),
        "scene.npy": lambda: import_scene(path.with_suffix(".npy"), path.with_suffix(".npy"), path / "store"),
        "labels.csv": lambda: read_csv(path.with_suffix(".csv"), ("file",)),
        "p.geojson": lambda: read_features(path.with_suffix(".geojson"), grid, attribute=None),
        "p.gpkg": lambda: read_features(path.with_suffix(".gpkg"), grid, attribute=None),
        "p.parquet": lambda: read_features(path.with_suffix(".parquet"), grid, attribute=None),
        "region.json": lambda: load_geometry(path.with_suffix(".json")),
        "items.json": lambda: Documents("", IngestConfig(collections=("a",))).read(str(path.with_suffix(".json"))),
        "items.parquet": lambda: read_items(path.with_suffix(".parquet")),
        "source.parquet": refused_parquet,
        "settings.toml": lambda: read_train_config([path.with_suffix(".toml")]),
        "train.toml": lambda: read_train_config([path.with_suffix(".toml")]),
        "provider.toml": lambda: load_provider_file(path.with_suffix(".toml")),
        "plan.json": lambda: Plan.load(path.with_suffix(".json")),
    }


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    place = Path(tempfile.mkdtemp(prefix="t-")) if kind == "socket" else tmp_path  # the name of a socket must be short
    target, listening = place / "target", socket.socket(socket.AF_UNIX)
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "device":
        target.symlink_to("/dev/zero")
    elif kind == "folder":
        target.mkdir()
    else:
        listening.bind(str(target))
    path = tmp_path / "named"
    for end in (".tif", ".png", ".npy", ".csv", ".geojson", ".gpkg", ".parquet", ".json", ".toml"):
        path.with_suffix(end).symlink_to(target)
    came: dict[str, BaseException | None] = {}

    def attempt(name: str, read: Callable[[], Any]) -> None:
        came[name] = None
        try:
            read()
        except BaseException as error:  # noqa: BLE001 - looked at below, in the test's own thread
            came[name] = error

    wanted = _doors_of_paths(path)
    for name, read in wanted.items():
        thread = threading.Thread(target=attempt, args=(name, read), daemon=True)
        thread.start()
        thread.join(20)
        hangs = thread.is_alive()
        if hangs and kind == "pipe":
            os.close(os.open(target, os.O_WRONLY | os.O_NONBLOCK))  # let it go
        assert not hangs, f"{name} waits for a {kind}"
    listening.close()
    if kind == "socket":
        shutil.rmtree(place)
    assert set(came) == set(wanted)
    for name, error in came.items():
        assert isinstance(error, InvalidInput | AssetUnreadable), (name, error)
        if name != "source.parquet":
            assert re.search("regular file|Is a directory", str(error)), (name, error)


def test_a_polygons_file_must_begin_as_its_name_says(tmp_path: Path) -> None:
    from ingest.labels.features import read_features
    from zarr_store.grid import Grid

    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (256, 256))
    for suffix, said in ((".geojson", "a JSON object"), (".fgb", "FlatGeobuf"), (".shp", "a shapefile")):
        path = tmp_path / f"p{suffix}"
        path.write_bytes(b"SQLite format 3\0" + bytes(100))
        with pytest.raises(InvalidInput, match=f"expected {said}, as its name says"):
            read_features(path, grid, attribute=None)


def test_a_hostile_asset_is_an_error_of_its_own_and_the_plan_goes_on(
    tmp_path: Path, make_server: Callable[[], Any], make_item: Callable[..., Any], save: Callable[..., Path]
) -> None:
    """`terrashard plan` sent requests and wrote files of the attacker's choice."""
    from ingest.plan.probe import probe_scenes
    from ingest.request.config import IngestConfig
    from ingest.scenes.search import find_scenes

    server = make_server()
    (tmp_path / "given").mkdir()
    (tmp_path / "elsewhere").mkdir()
    hostile.write_rasters(tmp_path / "given", server.url, tmp_path / "elsewhere")
    item = make_item()
    (tmp_path / "given" / "vsicurl.jp2").rename(tmp_path / "given" / "boxed.tif")
    files = {"blue": "wms.tif", "green": "boxed.tif", "red": "raw-local.tif", "nir": "neighbours.tif"}
    item["assets"] = {key: {**item["assets"][key], "href": f"given/{name}"} for key, name in files.items()}
    config = IngestConfig(collections=("sentinel-2-l2a",), bands=("blue", "green", "red", "nir"))
    scenes = find_scenes(str(save(item)), config).scenes
    (probe,) = probe_scenes(scenes, config).values()
    assert {band: bool(asset.error) for band, asset in probe.assets.items()} == {
        "blue": True, "green": True, "red": False, "nir": False,
    }  # fmt: skip
    assert probe.assets["red"].overviews == probe.assets["nir"].overviews == ()
    assert server.requests == []
    assert list((tmp_path / "elsewhere" / "cache").iterdir()) == []
