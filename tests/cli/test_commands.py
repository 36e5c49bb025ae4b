"""What the commands that only look at a cube say, in words and as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli import picture
from zarr_store import BandSpec, CubeSpec, Grid, Layout, ShardWriter, create_cube, open_cube
from zarr_store.errors import IntegrityError

Run = Callable[..., Any]


def test_info_has_the_promised_keys(run: Run, cube: Path) -> None:
    outcome = run("info", cube, "--json")
    assert outcome.code == 0
    facts = outcome.json["collections"]["sentinel-2-l2a"]
    assert facts["dims"] == {"time": 3, "band": 3, "y": 64, "x": 96}
    assert facts["bands"] == ["blue", "green", "red"]
    assert facts["dtype"] == "uint16"
    assert facts["crs"] == "EPSG:32633"
    assert facts["transform"] == [10, 0, 500_000, 0, -10, 5_000_000]
    assert facts["shape"] == [3, 3, 64, 96]
    assert [t[:10] for t in facts["times"]] == ["2023-08-10", "2023-08-15", "2023-08-18"]
    assert (facts["chunks"], facts["shards"]) == ([1, 3, 32, 32], [1, 3, 64, 96])
    assert len(facts["items"]) == 3
    assert (facts["complete"], facts["shards_done"], facts["shards_total"]) == (True, 3, 3)
    assert {"resampled_share", "offset_verdicts"} <= set(facts)
    assert facts["observed_share"] == pytest.approx(48 / 64)
    assert facts["masked_share"] == pytest.approx(8 / 64)
    assert "complete" in outcome.err, "with --json the human text goes to stderr"


def test_info_counts_what_is_there(run: Run, tmp_path: Path, make_cube: Callable[..., Any]) -> None:
    make_cube(tmp_path / "c.zarr", skip=(2,), partial=(1,))
    outcome = run("info", tmp_path / "c.zarr")
    assert outcome.code == 0
    assert "1 of 3 shards done, 1 partial, 0 failed" in outcome.out


def test_status_names_the_scene_that_was_unreadable(run: Run, tmp_path: Path, make_cube: Callable[..., Any]) -> None:
    make_cube(tmp_path / "c.zarr", skip=(2,), partial=(1,))
    outcome = run("status", tmp_path / "c.zarr", "--json")
    assert outcome.code == 0
    found = outcome.json["collections"]["sentinel-2-l2a"]
    assert {k: found[k] for k in ("done", "partial", "failed", "pending", "total")} == {
        "done": 1, "partial": 1, "failed": 0, "pending": 1, "total": 3,
    }  # fmt: skip
    assert outcome.json["complete"] is False
    partial, pending = found["unfinished"]
    assert partial["missing"] == [{"item": "S2_1", "asset": "B04", "reason": "HTTP 404"}]
    assert (partial["state"], partial["time"][:10], pending["state"]) == ("partial", "2023-08-15", "pending")
    assert "S2_1 B04: HTTP 404" in outcome.err


def test_status_shows_some_of_many_unfinished_shards_and_lists_all_as_json(
    run: Run, tmp_path: Path, make_cube: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli import status

    monkeypatch.setattr(status, "_MOST_LINES", 1)
    make_cube(tmp_path / "c.zarr", skip=(1, 2))
    outcome = run("status", tmp_path / "c.zarr", "--json")
    assert len(outcome.json["collections"]["sentinel-2-l2a"]["unfinished"]) == 2
    assert outcome.err.count("pending  shard") == 1
    assert "… and 1 more; --json lists all" in outcome.err


def test_verify_passes_a_sound_cube(run: Run, cube: Path) -> None:
    outcome = run("verify", cube, "--json")
    assert outcome.code == 0
    assert outcome.json["checked_shards"] == 3
    assert outcome.json["damage"] == []


@pytest.mark.parametrize(("damage", "state"), [("flip", "corrupt"), ("remove", "missing")])
def test_verify_names_the_damaged_shard(run: Run, cube: Path, damage: str, state: str) -> None:
    shard = next(
        path
        for path in sorted((cube / "sentinel-2-l2a" / "reflectance").rglob("*"))
        if path.is_file() and "c" in path.parts
    )
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    else:
        shard.unlink()
    outcome = run("verify", cube, "--json")
    assert outcome.code == 6
    assert [(d["array"], d["state"]) for d in outcome.json["damage"]] == [("reflectance", state)]
    assert outcome.json["damage"][0]["path"] == str(shard)
    assert "sentinel-2-l2a/reflectance shard" in outcome.error_line()


def test_verify_takes_its_options_from_a_file(run: Run, cube: Path, tmp_path: Path) -> None:
    (tmp_path / "v.toml").write_text("share = 0.34\n")
    assert run("verify", cube, "--config", tmp_path / "v.toml", "--json").json["checked_shards"] == 1
    assert run("verify", cube, "--config", tmp_path / "v.toml", "--share", 1, "--json").json["checked_shards"] == 3
    assert run("verify", cube, "--share", 0).code == 2


def test_looking_changes_nothing(run: Run, cube: Path, tmp_path: Path, snapshot: Callable[[Path], Any]) -> None:
    before = snapshot(cube)
    for name in ("info", "status", "verify"):
        assert run(name, cube).code == 0
    assert run("quicklook", cube, tmp_path / "q.png").code == 0
    assert snapshot(cube) == before


def test_quicklook_shows_every_date(run: Run, cube: Path, tmp_path: Path) -> None:
    outcome = run("quicklook", cube, tmp_path / "q.png", "--json")
    assert outcome.code == 0
    with Image.open(tmp_path / "q.png") as image:
        assert len(image.getcolors(1 << 24) or ()) > 100
        assert (image.width, image.height) == (outcome.json["width"], outcome.json["height"])
    assert "3 dates" in outcome.json["what"]


def test_quicklook_is_true_to_the_pixels(run: Run, cube: Path, tmp_path: Path) -> None:
    """One date at one pixel each: order of rows, columns and bands, and the colour of nodata."""
    assert run("quicklook", cube, tmp_path / "q.png", "--time", "2023-08-18", "--width", 128).code == 0
    with Image.open(tmp_path / "q.png") as image:
        panel = np.asarray(image)[-8 - 64 : -8, 8 : 8 + 96].astype(int)
    spec = open_cube(cube).spec("sentinel-2-l2a")
    assert spec.shape == (3, 64, 96)
    assert (panel[:8] == (32, 32, 36)).all(), "rows outside the swath have the nodata colour"
    clear = panel[20:60]
    assert (np.diff(clear[:, :, 2], axis=0) >= 0).all(), "blue grows downwards"
    assert (np.diff(clear[:, :, 1], axis=1) >= 0).all(), "green grows to the right"
    assert clear[-1, 0, 2] > clear[0, 0, 2]
    assert clear[0, -1, 1] > clear[0, 0, 1]


@pytest.mark.parametrize(
    ("bands", "channel"),
    [(None, {"red": 0, "green": 1, "blue": 2}), ("blue,red,green", {"blue": 0, "red": 1, "green": 2})],
)
def test_quicklook_shows_each_band_in_its_own_channel(
    run: Run, cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bands: str | None, channel: dict[str, int]
) -> None:
    """Three stripes, each bright in one band alone: red ground is red, whatever the order in which bands are stored."""
    names = ("blue", "green", "red")  # as the cube stores them
    values = np.full((3, 3, 64, 96), 500, np.uint16)
    for stripe, name in enumerate(names):
        values[:, names.index(name), :, 32 * stripe : 32 * (stripe + 1)] = 5000
    opened = open_cube(cube).dataset("sentinel-2-l2a").load()
    opened["reflectance"] = (opened.reflectance.dims, values)
    opened["status"] = (opened.status.dims, np.ones((3, 64, 96), np.uint8))
    monkeypatch.setattr(picture, "_coarse", lambda *_: opened)
    options = ("--bands", bands) if bands else ()
    assert run("quicklook", cube, tmp_path / "q.png", "--time", "0", "--width", 128, *options).code == 0
    with Image.open(tmp_path / "q.png") as image:
        panel = np.asarray(image)[-8 - 64 : -8, 8 : 8 + 96]
    for stripe, name in enumerate(names):
        colour = [0, 0, 0]
        colour[channel[name]] = 255
        assert (panel[:, 32 * stripe : 32 * (stripe + 1)] == colour).all(), name


def test_large_cubes_are_drawn_from_their_overview(cube: Path) -> None:
    opened = open_cube(cube)
    full = opened.dataset("sentinel-2-l2a").reflectance.to_numpy()
    shutil.rmtree(cube / "sentinel-2-l2a" / "reflectance" / "c")
    for step in (8, 16, 20):
        every = step // 8  # the overview keeps the middle pixel of each 8 × 8
        thinned = picture._coarse(opened, "sentinel-2-l2a", step).reflectance.to_numpy()
        np.testing.assert_array_equal(thinned, full[..., 4::8, 4::8][..., ::every, ::every])


@pytest.mark.parametrize("width", [64, 96, 100, 128, 150, 300, 2000])
def test_quicklook_draws_a_large_cube_at_every_width(run: Run, tmp_path: Path, width: int) -> None:
    """Wide pictures come from the arrays and narrow ones from the overview; neither is wider than was asked for."""
    path = tmp_path / "large.zarr"
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (500, 1100))
    bands = tuple(BandSpec(name, 0, 1e-4) for name in ("blue", "green", "red"))
    layout = Layout("train", (1, 32, 32), (1, 256, 256))
    spec = CubeSpec("sentinel-2-l2a", "reflectance", bands, grid, ("2023-08-10T10:00:00Z",), (), layout)
    create_cube(path, [spec], items={spec.collection: [{"id": "A", "datetime": spec.times[0]}]}, provenance={})
    writer = ShardWriter(str(path), spec.collection)
    for region in spec.shards().values():
        rows, columns = np.mgrid[region.y0 : region.y1, region.x0 : region.x1]
        image = np.stack([rows + 100, columns + 200, rows + columns + 300])[np.newaxis].astype(np.uint16)
        status = np.ones(region.shape, np.uint8)
        status[0, columns >= 700] = 0
        sources = np.where(status == 1, 0, -1).astype(np.int16)
        writer.write(region, {"reflectance": image, "status": status, "source_item": sources}, key="k", sources=[])
    outcome = run("quicklook", path, tmp_path / "q.png", "--width", width, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["width"] <= max(width, 64)
    with Image.open(tmp_path / "q.png") as drawn:
        picture = np.asarray(drawn)
    dark = (picture == (32, 32, 36)).all(axis=-1)
    share = dark[dark.any(axis=1)][:, 8:-8].mean()
    assert share == pytest.approx(400 / 1100, abs=0.06), "the columns outside the swath"


def test_quicklook_reads_no_overview_that_promises_too_much(run: Run, cube: Path, tmp_path: Path) -> None:
    file = cube / "overview" / "sentinel-2-l2a" / "reflectance" / "zarr.json"
    document = json.loads(file.read_text())
    document["chunk_grid"]["configuration"]["chunk_shape"] = [1, 3, 1 << 16, 1 << 16]
    file.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="differs from the spec of its collection"):
        open_cube(cube).overview("sentinel-2-l2a")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bands", "rad"), "did you mean 'red'"),
        (("--bands", "gren,rad,blue"), "unknown bands 'gren', 'rad' in"),
        (("--bands", "red,green"), "one band or three"),
        (("--time", "2024"), "unknown time '2024'"),
        (("--collection", "sentinel-2-l1c"), "did you mean 'sentinel-2-l2a'"),
    ],
)
def test_quicklook_of_what_is_not_there(
    run: Run, cube: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    outcome = run("quicklook", cube, tmp_path / "q.png", *arguments)
    assert outcome.code == 2
    assert words in outcome.error_line()
    assert not (tmp_path / "q.png").exists()


def test_quicklook_writes_png_only(run: Run, cube: Path, tmp_path: Path) -> None:
    assert "must be a .png file" in run("quicklook", cube, tmp_path / "q.jpg").error_line()


def test_doctor_knows_the_machine(run: Run) -> None:
    outcome = run("doctor", "--json")
    assert outcome.code == 0
    found = outcome.json
    assert found["versions"]["zarr"]
    assert found["disk"]["free_bytes"] > 0
    assert found["devices"][0]["platform"] == "cpu"
    assert found["ports"]["loopback"] is True
    assert any(i["version"].startswith("3.") for i in found["interpreters"])


def test_doctor_warns_of_what_spoils_reads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDAL_NUM_THREADS", "4")
    outcome = run("doctor")
    assert "warning: GDAL_NUM_THREADS is set" in outcome.err


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("terrashard ")


def test_json_is_one_document(run: Run, cube: Path) -> None:
    for name in ("info", "status", "verify", "doctor"):
        arguments = () if name == "doctor" else (cube,)
        assert isinstance(json.loads(run(name, *arguments, "--json", "-v").out), dict)
