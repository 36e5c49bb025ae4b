"""A cube from somebody else: no name and no link in it leads out of its folder (FAULTS X01, X02)."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zarr_store import ShardWriter, SourceOutcome, open_cube, temporary, verify_cube
from zarr_store.backends import open_store
from zarr_store.errors import IntegrityError, Locked, TerrashardError
from zarr_store.folder import FolderStore
from zarr_store.keys import check_key
from zarr_store.labels import LabelSpec, find_labels, label_boxes, open_label, write_label
from zarr_store.lock import CubeLock
from zarr_store.samples import Sample, SampleSpec, open_samples, write_samples
from zarr_store.strays import find_strays, remove_strays, sweep_strays
from zarr_store.temporary import OVERWRITE, PARTIAL, STALE, TENSORSTORE_LOCK

from .conftest import NAME, cut

ESCAPES = ("../out", "/etc/passwd", "a/../../out", "a//b", "a/./b", "a\\b", "a\0b", "", "a/", "..")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder beside the cube that has what would be read, written and deleted there."""
    folder = tmp_path / "victim"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "0-0-0.json").write_text("somebody's file")
    (folder / "deep" / "zarr.json").write_text('{"attributes": {"terrashard": {}}}')
    return folder


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    about = document.get("attributes", {}).get("terrashard")
    if isinstance(about, str):  # as text or nested, it is read alike
        document["attributes"]["terrashard"] = json.loads(about)
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("key", ESCAPES)
def test_no_key_leads_out_of_a_store(tmp_path: Path, victim: Path, key: str) -> None:
    before = tree(victim)
    store = open_store(tmp_path / "store")
    calls: list[Callable[[], Any]] = [
        lambda: store.write(key, b""), lambda: store.begin(key, [b""]), lambda: store.create_exclusive(key, b""),
        lambda: store.take(key, b"", b""), lambda: store.delete(key), lambda: store.below(key),
    ]  # fmt: skip
    if key:
        calls += [lambda: store.read(key), lambda: store.list(key), lambda: store.digest(key),
                  lambda: store.exists(key), lambda: store.tensorstore(key)]  # fmt: skip
    for call in calls:
        with pytest.raises(IntegrityError, match="stays inside its store"):
            call()
    assert tree(victim) == before
    assert not (tmp_path / "out").exists()


def test_a_bucket_takes_no_other_keys_than_a_folder() -> None:
    for key in ESCAPES:
        with pytest.raises(IntegrityError, match="stays inside"):
            check_key(key, "s3://bucket/cube")
    assert check_key("a/c/0/0", "s3://bucket/cube") == "a/c/0/0"


@pytest.mark.parametrize(
    "names",
    [["../../../victim/deep"], ["/tmp"], ["a/b"], [""], [".."], [7], "abc", [], ["labels"], [NAME, NAME], ["a\n"]],
    ids=str,
)
def test_collections_that_are_no_names_are_refused_when_a_cube_is_opened(
    cube_path: Path, victim: Path, names: Any
) -> None:
    edit(cube_path / "zarr.json", lambda root: root["attributes"]["terrashard"].update(collections=names))
    before = tree(victim)
    for use in (open_cube, verify_cube):
        with pytest.raises(IntegrityError, match="names"):
            use(cube_path)
    assert tree(victim) == before


@pytest.mark.parametrize("layer", ["../../../victim/deep", "a/b", ".."])
def test_arrays_that_are_no_names_are_refused(cube_path: Path, layer: str) -> None:
    def rename(group: Any) -> None:
        group["attributes"]["terrashard"]["spec"]["class_layers"] = [layer]

    edit(cube_path / NAME / "zarr.json", rename)
    with pytest.raises(IntegrityError, match="cannot name an array"):
        open_cube(cube_path).spec(NAME)


def test_a_group_that_describes_another_collection_is_refused(cube_path: Path) -> None:
    edit(cube_path / NAME / "zarr.json",
         lambda group: group["attributes"]["terrashard"]["spec"].update(collection="other"))  # fmt: skip
    with pytest.raises(IntegrityError, match="describes a collection 'other'"):
        open_cube(cube_path).spec(NAME)


@pytest.mark.parametrize("index", [["../../../../victim/deep/0", 0, 0], [True, 0, 0], [-1, 0, 0], [1, 1, 1], [0, 0]])
def test_a_ledger_row_is_of_the_shard_that_its_name_says(cube_path: Path, victim: Path, index: Any) -> None:
    row = cube_path / "_terrashard/ledger" / NAME / "0-0-0.json"
    edit(row, lambda document: document.update(index=index))
    before = tree(victim)
    with pytest.raises(IntegrityError, match="not a ledger row"):
        open_cube(cube_path).ledger(NAME).rows()
    assert open_cube(cube_path).ledger(NAME).drop_unreadable() == [f"_terrashard/ledger/{NAME}/0-0-0.json"]
    assert tree(victim) == before


def test_checksums_of_arrays_that_are_no_names_are_not_looked_for(cube_path: Path) -> None:
    row = cube_path / "_terrashard/ledger" / NAME / "0-0-0.json"
    edit(row, lambda document: document["checksums"].update({"../../victim/deep": "0" * 64}))
    with pytest.raises(TerrashardError, match="victim"):
        verify_cube(cube_path)


def write_layer(cube_path: Path, name: str = "landuse") -> None:
    cube = open_cube(cube_path)
    boxes = [(box, np.ones(box.shape[1:], np.uint8)) for box in label_boxes(cube)]
    write_label(str(cube_path), LabelSpec(name, "classes", ((1, "field"),), {"made": "here"}), lambda: boxes)


@pytest.mark.parametrize("name", ["../../victim/deep", "a/b", "..", ""])
def test_label_layers_that_are_no_names_are_refused(cube_path: Path, victim: Path, name: str) -> None:
    write_layer(cube_path)
    edit(cube_path / "labels/index.json", lambda index: index.update({name: "0" * 64}))
    before = tree(victim)
    for use in (lambda: find_labels(open_cube(cube_path)), lambda: verify_cube(cube_path)):
        with pytest.raises(IntegrityError, match=r"index\.json"):
            use()
    assert tree(victim) == before


def test_shards_of_a_label_layer_are_its_own(cube_path: Path) -> None:
    write_layer(cube_path)

    def point_outside(group: Any) -> None:
        group["attributes"]["terrashard"]["shards"] = {"../../../victim/deep/zarr.json": None}

    edit(cube_path / "labels/landuse/zarr.json", point_outside)
    with pytest.raises(IntegrityError):
        open_label(open_cube(cube_path), "landuse")


# ---- Links


def link_away(path: Path, victim: Path) -> Path:
    """Put a link to a copy beside the cube in the place of a folder or file; where it leads."""
    target = victim / path.name
    shutil.move(path, target)
    path.symlink_to(target)
    return target


LINKED = ("_terrashard", "_terrashard/ledger", f"_terrashard/ledger/{NAME}", NAME, f"{NAME}/reflectance",
          f"{NAME}/reflectance/c", f"{NAME}/scl/c/0")  # fmt: skip


@pytest.mark.parametrize("what", LINKED)
def test_nothing_is_written_or_deleted_through_a_link(
    cube_path: Path, victim: Path, pixels: dict[str, np.ndarray], spec: Any, what: str
) -> None:
    writer = ShardWriter(cube_path, NAME)
    region = next(iter(spec.shards().values()))
    open_cube(cube_path).spec(NAME)
    writer._open().spec(NAME)  # known before the link is there, so that the write itself is what refuses
    link_away(cube_path / what, victim)
    before = tree(victim)
    with pytest.raises(IntegrityError, match="is a link to"):
        writer.write(region, cut(pixels, region), key="k2", sources=[SourceOutcome(0, "A", "read")])
    if what == "_terrashard":
        with pytest.raises(IntegrityError, match="is a link to"), CubeLock(cube_path, "test"):
            pass
    assert tree(victim) == before


@pytest.mark.parametrize("what", [f"{NAME}/reflectance/c", f"{NAME}/reflectance/c/0/0/0/0", f"{NAME}/reflectance"])
def test_nothing_is_read_through_a_link_that_leads_out(cube_path: Path, victim: Path, spec: Any, what: str) -> None:
    link_away(cube_path / what, victim)
    region = next(iter(spec.shards().values()))
    for use in (
        lambda: open_cube(cube_path).read(NAME, "reflectance", region),
        lambda: open_cube(cube_path).dataset(NAME),
        lambda: verify_cube(cube_path),
    ):
        with pytest.raises(IntegrityError, match="lies outside"):
            use()


def test_links_that_stay_inside_are_read_and_a_cube_may_be_reached_by_a_link(
    cube_path: Path, tmp_path: Path, spec: Any, pixels: dict[str, np.ndarray]
) -> None:
    region = next(iter(spec.shards().values()))
    inside = cube_path / NAME / "status" / "moved"
    shutil.move(cube_path / NAME / "status" / "c", inside)
    (cube_path / NAME / "status" / "c").symlink_to("moved")
    (tmp_path / "elsewhere").symlink_to(cube_path)
    there = open_cube(tmp_path / "elsewhere")
    t, y, x = region.slices
    assert np.array_equal(there.read(NAME, "status", region), pixels["status"][t, y, x])
    ShardWriter(tmp_path / "elsewhere", NAME).fail(region, key="k", sources=[])
    # ... but a link inside that hides one that leads out is found
    (inside / "1").rename(tmp_path / "1")
    (inside / "1").symlink_to(tmp_path / "1")
    with pytest.raises(IntegrityError, match="lies outside"):
        open_cube(cube_path).tensorstore(NAME, "status")


def test_a_pipe_in_place_of_a_file_does_not_hold_up_a_reader(cube_path: Path, spec: Any) -> None:
    row = cube_path / "_terrashard/ledger" / NAME / "0-0-0.json"
    row.unlink()
    os.mkfifo(row)
    with pytest.raises(IntegrityError, match="neither a file nor a folder"):
        open_cube(cube_path).ledger(NAME).get((0, 0, 0))
    shard = next(path for path in (cube_path / NAME / "scl" / "c").rglob("*") if path.is_file())
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(IntegrityError, match="neither a file nor a folder"):
        open_cube(cube_path).tensorstore(NAME, "scl")


@pytest.mark.parametrize("what", ["labels", "labels/landuse"])
def test_label_layers_are_not_written_through_links(cube_path: Path, victim: Path, what: str) -> None:
    write_layer(cube_path)
    link_away(cube_path / what, victim)
    before = tree(victim)
    with pytest.raises(IntegrityError, match="is a link to"):
        write_layer(cube_path, "other" if what == "labels" else "landuse")
    with pytest.raises(IntegrityError, match="is a link to"):
        open_label(open_cube(cube_path), "landuse")
    assert tree(victim) == before


def test_cleaning_up_removes_a_link_and_not_what_it_leads_to(cube_path: Path, victim: Path) -> None:
    shutil.copytree(cube_path, victim / "cube")
    before = tree(victim)
    (cube_path / "a.partial").symlink_to(victim)
    (cube_path / "b.partial").symlink_to(victim / "cube")
    (cube_path / "c.stale").symlink_to(victim / "deep/zarr.json")
    (cube_path / "d.stale").symlink_to(victim / "nothing")
    assert len(find_strays(cube_path, older_than_s=0.0)) == 4, "the fault fired"
    assert len(remove_strays(cube_path, older_than_s=0.0)) == 4
    assert tree(victim) == before
    assert find_strays(cube_path, older_than_s=0.0) == []


def test_sweeping_removes_half_written_files_and_follows_no_link(cube_path: Path, victim: Path, tmp_path: Path) -> None:
    (victim / "x.partial").write_bytes(b"of somebody else")
    theirs, ours = tree(victim), tree(cube_path)
    half = [cube_path / ".zarr.json.1.partial", cube_path / NAME / "scl" / "c.__lock"]
    for path in half:
        path.write_bytes(b"half")
    (cube_path / NAME / "out").symlink_to(victim)
    (cube_path / NAME / "y.partial").symlink_to(victim / "x.partial")
    (cube_path / NAME / "z.partial").symlink_to(victim)
    (cube_path / "lock.json.1.stale").write_bytes(b"a run is taking this over")
    (tmp_path / "by a link").symlink_to(cube_path)
    sweep_strays(tmp_path / "by a link")
    assert not any(path.exists() for path in half)
    assert not (cube_path / NAME / "y.partial").is_symlink()
    assert tree(victim) == theirs
    assert (cube_path / "lock.json.1.stale").exists()
    (cube_path / "lock.json.1.stale").unlink()
    for name in ("out", "z.partial"):
        (cube_path / NAME / name).unlink()
    assert tree(cube_path) == ours
    sweep_strays("s3://bucket/cube.zarr")


def test_a_run_that_is_swept_while_it_asks_for_the_lock_hears_who_holds_it(
    cube_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link
    swept: list[str] = []

    def sweep_first(beside: str, path: Path) -> None:
        if not swept:
            swept.append(beside)
            sweep_strays(cube_path)
        link(beside, path)

    with CubeLock(cube_path, "a run"):
        monkeypatch.setattr(os, "link", sweep_first)
        with pytest.raises(Locked, match="held by a run"), CubeLock(cube_path, "another run"):
            pass
    assert swept, "the fault fired"


def test_what_lies_in_a_stray_is_counted_once(cube_path: Path) -> None:
    inner = cube_path / "a.partial" / "b.partial"
    inner.mkdir(parents=True)
    (inner / "c.partial").write_bytes(b"12345")
    strays = find_strays(cube_path, older_than_s=0.0)
    assert [(stray.path.name, stray.nbytes) for stray in strays] == [("a.partial", 5)]


def test_suffixes_of_temporary_files_stand_in_one_place() -> None:
    suffixes = (PARTIAL, STALE, OVERWRITE, TENSORSTORE_LOCK)
    own = Path(temporary.__file__)
    others = [
        path for room in ("zarr_store", "ingest", "jaxtrain", "cli") for path in (own.parents[1] / room).rglob("*.py")
    ]
    assert own in others
    texts = {
        node.value
        for path in others
        if path != own
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(suffixes)
    }
    assert not texts


def test_a_sample_store_reads_nothing_through_a_link_that_leads_out(tmp_path: Path, victim: Path) -> None:
    spec = SampleSpec(2, ("red",), (4, 4), "uint8", ("a", "b"))
    image = np.ones((1, 4, 4), np.uint8)
    store = tmp_path / "samples.zarr"
    write_samples(store, spec, [Sample(image, np.array(i, np.uint8), 16.0, 45.0, f"s{i}") for i in range(2)])
    assert open_samples(store).names() == ["s0", "s1"]
    link_away(store / "image" / "c", victim)
    with pytest.raises(IntegrityError, match="lies outside"):
        open_samples(store)


def test_what_is_below_a_store_is_closed_as_well(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "labels").symlink_to(victim)
    part = FolderStore(tmp_path / "store").below("labels/deep")
    before = tree(victim)
    for call in (lambda: part.write("a", b""), lambda: part.read("zarr.json"), lambda: part.clear("x/y")):
        with pytest.raises(IntegrityError, match="is a link to"):
            call()
    with pytest.raises(IntegrityError, match="is a link to"), part.beside():
        pass
    assert tree(victim) == before
