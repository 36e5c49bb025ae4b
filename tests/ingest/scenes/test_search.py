"""Searching files, static catalogues and a scripted API; every answer comes from this machine."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingest.request.config import IngestConfig
from ingest.scenes import documents
from ingest.scenes.dedupe import dedupe
from ingest.scenes.documents import parse_json
from ingest.scenes.geoparquet import read_items, write_items
from ingest.scenes.search import find_scenes
from zarr_store.errors import InvalidInput, NothingFound, UnknownName

Make = Callable[..., dict[str, Any]]
Save = Callable[..., Path]
L2A = IngestConfig(collections=("sentinel-2-l2a",))


# Files and static catalogues


@pytest.mark.real_data
def test_zagreb_is_five_dates_of_two_tiles_in_order(zagreb: Path) -> None:
    scenes = find_scenes(str(zagreb), L2A).scenes
    assert len(scenes) == 10
    assert [s.datetime for s in scenes] == sorted(s.datetime for s in scenes)
    assert {s.tile for s in scenes} == {"33TWL", "33TWM"}
    assert all(Path(asset.href).is_file() for s in scenes for asset in s.assets.values())
    assert find_scenes(os.path.relpath(zagreb), L2A).scenes == scenes
    assert find_scenes(str(zagreb.parent), L2A).scenes == scenes


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"datetime": "2023-08-13/2023-08-15"}, 4),
        ({"datetime": "2023-08-15T09:57:57Z"}, 1),
        ({"query": "eo:cloud_cover<20"}, 6),
        ({"bbox": (15.2, 46.5, 15.4, 46.9)}, 5),
        ({"geometry": {"type": "Point", "coordinates": [15.3, 46.8]}}, 5),
        ({"max_items": 3}, 3),
        ({"bands": ("B02", "SCL")}, 10),
    ],
)
def test_selection(zagreb: Path, config: dict[str, Any], count: int) -> None:
    assert len(find_scenes(str(zagreb), IngestConfig(**config)).scenes) == count


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"collections": ("sentinel-2-l2b",)}, UnknownName, "did you mean 'sentinel-2-l2a'"),
        ({"collections": ("sentinel-1-grd",)}, InvalidInput, "RTC"),
        ({"bands": ("bleu",)}, UnknownName, "did you mean 'blue'"),
        ({"bbox": (0, 0, 1, 1)}, NothingFound, "the items lie in 15,45.06,16.44,46.95"),
        ({"datetime": "2020"}, NothingFound, "they were taken 2023-08-10 to 2023-08-20"),
        ({"query": "eo:cloud_cover<0"}, NothingFound, "eo:cloud_cover<0 turned away 10"),
    ],
)
def test_empty_and_unknown(zagreb: Path, config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        find_scenes(str(zagreb), IngestConfig(**config))
    assert message in str(caught.value)


@pytest.mark.real_data
def test_recorded_answers_of_real_apis_are_item_files(shared_data: Path) -> None:
    folder = shared_data / "stac" / "responses"
    pc = find_scenes(str(folder / "planetarycomputer_sentinel-2-l2a_33items_03.json"), IngestConfig()).scenes
    assert len(pc) == 33
    assert {s.provider for s in pc} == {"planetary-computer"}
    mixed = find_scenes(str(folder / "earth-search_sentinel-1-grd_10items_00.json"), IngestConfig()).scenes
    assert {s.collection for s in mixed} == {"sentinel-2-c1-l2a", "sentinel-2-l2a", "sentinel-2-l1c"}
    with pytest.raises(InvalidInput, match="properties and assets"):  # saved without assets
        find_scenes(str(folder / "earth-search_sentinel-2-c1-l2a_10items_05.json"), IngestConfig())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"type": "FeatureCollection", "features": [{"id": "a"', "cut off at byte 53"),
        (b'{"type": "FeatureCollec', "cut off at byte"),
        (b"", "at byte 0"),
        (b"<html>log in</html>", "HTML"),
        (b'{"a": nope}', "not valid JSON at byte 6"),
        (b'{"a": [1, NaN]}', "NaN at byte 10"),
        ("{'Zürich'".encode("latin-1"), "not UTF-8 text at byte 3"),
        (b"[" * 10_000 + b"]" * 10_000, "levels deep"),
        (b'{"type": "Feature"}', "item with assets, got type 'Feature'"),
        (b"[]", "got a JSON list"),
        (b'{"type": "FeatureCollection", "features": [7]}', "not an object"),
    ],
)
def test_broken_documents_are_named_with_the_byte(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "items.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        find_scenes(str(path), IngestConfig())
    assert message in str(caught.value)


def test_a_byte_is_counted_in_bytes_not_characters() -> None:
    with pytest.raises(InvalidInput, match="byte 7 "):
        parse_json('{"ü": ?}'.encode() + b" ", "here")  # ü is two bytes
    with pytest.raises(InvalidInput, match=r"x\.json: JSON is cut off"):
        parse_json(b'{"a": [1, 2', "https://h/x.json?sig=canary")


def test_absent_sources_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        find_scenes(str(tmp_path / "nothing.json"), IngestConfig())
    with pytest.raises(InvalidInput, match=r"without catalog\.json"):
        find_scenes(str(tmp_path), IngestConfig())


def test_size_is_capped_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_JSON_BYTES", 100)
    path = tmp_path / "big.json"
    path.write_text(json.dumps({"x": "y" * 200}))
    with pytest.raises(InvalidInput, match="at most 100 bytes"):
        find_scenes(str(path), IngestConfig())


def test_packed_documents(tmp_path: Path, make_item: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"type": "FeatureCollection", "features": [make_item()]}).encode()
    path = tmp_path / "items.json.gz"
    path.write_bytes(gzip.compress(text))
    assert [s.id for s in find_scenes(str(path), IngestConfig()).scenes] == [make_item()["id"]]
    path.write_bytes(gzip.compress(text)[:-20])
    with pytest.raises(InvalidInput, match=r"items\.json\.gz: gzip is cut off after"):
        find_scenes(str(path), IngestConfig())
    path.write_bytes(gzip.compress(text)[:20] + b"\xff" * 200)
    with pytest.raises(InvalidInput, match="damaged gzip"):
        find_scenes(str(path), IngestConfig())
    monkeypatch.setattr("ingest.scenes.documents.MAX_JSON_BYTES", 10_000)
    path.write_bytes(gzip.compress(b" " * 5_000_000))
    assert path.stat().st_size < 10_000
    with pytest.raises(InvalidInput, match="at most 10000 bytes of JSON are read"):
        find_scenes(str(path), IngestConfig())


def test_a_static_catalogue_does_not_lead_outside(tmp_path: Path, make_item: Make) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "item.json").write_text(json.dumps(make_item()))
    catalog = tmp_path / "cat" / "catalog.json"
    catalog.write_text(json.dumps({"type": "Catalog", "id": "c", "links": [{"rel": "item", "href": "../item.json"}]}))
    with pytest.raises(InvalidInput, match="--allow-local"):
        find_scenes(str(catalog), IngestConfig())
    assert len(find_scenes(str(catalog), IngestConfig(allow_local=(str(tmp_path),))).scenes) == 1


def test_a_catalogue_that_links_to_itself_ends(tmp_path: Path, make_item: Make) -> None:
    links = [
        {"rel": rel, "href": href} for rel, href in (("child", "catalog.json"), ("child", "b.json"), ("item", "i.json"))
    ]
    (tmp_path / "catalog.json").write_text(json.dumps({"type": "Catalog", "id": "a", "links": links}))
    (tmp_path / "b.json").write_text(json.dumps({"type": "Catalog", "id": "b", "links": links}))
    (tmp_path / "i.json").write_text(json.dumps(make_item()))
    assert len(find_scenes(str(tmp_path / "catalog.json"), IngestConfig()).scenes) == 1
    (tmp_path / "i.json").unlink()
    with pytest.raises(InvalidInput, match=r"i\.json"):
        find_scenes(str(tmp_path / "catalog.json"), IngestConfig())


def test_refused_assets_everywhere_are_an_error_that_names_the_flag(make_item: Make, save: Save) -> None:
    item = make_item()
    for asset in item["assets"].values():
        asset["href"] = f"https://elsewhere.example/{asset['href']}"
    path = save(item)
    with pytest.raises(InvalidInput, match=r"--allow-host elsewhere\.example"):
        find_scenes(str(path), IngestConfig())
    assert find_scenes(str(path), IngestConfig(allow_hosts=("elsewhere.example",))).scenes
    bare = make_item()
    bare["assets"] = {"thumbnail": {"href": "t.png"}}
    with pytest.raises(NothingFound, match="requested band"):
        find_scenes(str(save(bare)), IngestConfig())


# Reprocessings


def _ids(path: Path) -> list[str]:
    return [scene.id for scene in find_scenes(str(path), IngestConfig()).scenes]


def test_newest_baseline_then_newest_creation_wins_in_any_order(make_item: Make, save: Save) -> None:
    old = make_item(
        "old",
        s2__processing_baseline="02.14",
        s2__datatake_id="GS2A_20230815T095031_042547_N02.14",
        created="2024-01-01T00:00:00Z",
    )
    new = make_item("new", s2__processing_baseline="05.09", created="2023-08-15T21:00:00Z")
    newer = make_item("newer", s2__processing_baseline="05.09", created="2023-08-16T21:00:00Z")
    for order in ((old, new, newer), (newer, old, new), (new, newer, old)):
        assert _ids(save(*order)) == ["newer"]
    found = find_scenes(str(save(old, new)), IngestConfig())
    assert [(d.dropped.id, d.kept.id) for d in found.duplicates] == [("old", "new")]
    assert "02.14 is superseded by 05.09" in found.duplicates[0].reason


def test_both_halves_of_a_split_datatake_stay(make_item: Make, save: Save) -> None:
    north, south = make_item("north"), make_item("south", datetime="2023-08-15T09:58:05Z")
    south["geometry"]["coordinates"] = [[[15, 46], [16, 46], [16, 46.4], [15, 46.4], [15, 46]]]
    north["geometry"]["coordinates"] = [[[15, 46.38], [16, 46.38], [16, 47], [15, 47], [15, 46.38]]]
    assert _ids(save(north, south)) == ["north", "south"]


def test_of_equal_baselines_the_copy_made_last_is_kept(make_item: Make, save: Save) -> None:
    """Its time of creation decides, not its id, in whatever order the catalogue lists them."""
    old = make_item("z", created="2023-08-15T21:00:00Z")
    new = make_item("a", created="2023-09-01T00:00:00Z")
    assert _ids(save(old, new)) == ["a"]
    assert _ids(save(new, old)) == ["a"]
    same = make_item("b", created="2023-09-01T00:00:00Z")
    assert _ids(save(new, same)) == _ids(save(same, new)) == ["b"], "then the greatest id does"


def test_other_tiles_orbits_and_platforms_are_no_duplicates(make_item: Make, save: Save) -> None:
    items = [
        make_item("a"),
        make_item("b", grid__code="MGRS-33TWL"),
        make_item("c", platform="sentinel-2b"),
        make_item("d", sat__relative_orbit=22),
        make_item("e", datetime="2023-08-20T09:57:57Z", s2__datatake_id="GS2A_20230820T095031_042619_N05.09"),
    ]
    assert sorted(_ids(save(*items))) == ["a", "b", "c", "d", "e"]


@pytest.mark.real_data
def test_real_halves_at_the_antimeridian_stay(shared_data: Path) -> None:
    folder = shared_data / "stac" / "earth_search_33TWN_2016_2022" / "antimeridian_items"
    halves = [find_scenes(str(path), IngestConfig()).scenes[0] for path in sorted(folder.glob("*01VCG.json"))]
    assert len(halves) == 2
    assert halves[0].datatake == halves[1].datatake
    assert len(dedupe(halves)[0]) == 2
    assert len(dedupe([*halves, *halves])[0]) == 2


# stac-geoparquet


@pytest.mark.real_data
def test_geoparquet_gives_the_same_scenes(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "stac" / "responses" / "earth-search_sentinel-1-grd_10items_00.json"
    items = json.loads(source.read_text())["features"]
    path = tmp_path / "items.parquet"
    write_items(items, path)
    assert [item["id"] for item in read_items(path)] == [item["id"] for item in items]
    assert find_scenes(str(path), IngestConfig()).scenes == find_scenes(str(source), IngestConfig()).scenes


def test_geoparquet_as_other_writers_make_it(tmp_path: Path, make_item: Make) -> None:
    import datetime as dt

    import pyarrow as pa
    import pyarrow.parquet as pq
    import shapely
    from shapely.geometry import shape

    items = [
        make_item("a"),
        make_item("b", datetime="2023-08-20T09:57:57Z", s2__datatake_id="GS2A_20230820T095031_1_N05.09"),
    ]
    del items[1]["assets"]["green"]
    rows = []
    for item in items:
        bounds = dict(zip(("xmin", "ymin", "xmax", "ymax"), item["bbox"], strict=True))
        row = {k: item[k] for k in ("type", "id", "collection", "assets", "links")} | item["properties"]
        row["datetime"] = dt.datetime.fromisoformat(row["datetime"])
        rows.append(row | {"geometry": shapely.to_wkb(shape(item["geometry"])), "bbox": bounds})
    path = tmp_path / "any.name"
    pq.write_table(pa.Table.from_pylist(rows), path)
    scenes = find_scenes(str(path), IngestConfig(allow_local=("/",))).scenes
    assert [s.datetime for s in scenes] == ["2023-08-15T09:57:57Z", "2023-08-20T09:57:57Z"]
    assert [s.lacking for s in scenes] == [(), ("green",)]
    assert scenes[0].assets["blue"].grid is not None
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(InvalidInput, match="assets, geometry"):
        find_scenes(str(path), IngestConfig())
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InvalidInput, match="unreadable Parquet"):
        find_scenes(str(path), IngestConfig())


def test_items_one_a_line_are_a_collection_of_them(tmp_path: Path, make_item: Make) -> None:
    one = make_item()
    two = {**one, "id": "another", "properties": {**one["properties"], "datetime": "2023-08-25T10:07:02Z"}}
    path = tmp_path / "items.ndjson"
    lines = [json.dumps(one), "", json.dumps(two)]
    path.write_text("\n".join(lines) + "\r\n")
    assert {item.id for item in find_scenes(str(path), IngestConfig()).scenes} == {one["id"], "another"}
    path.write_text("\n".join(lines)[:-30])
    with pytest.raises(InvalidInput, match=r"items\.ndjson: line 3 is cut off or not valid JSON at character \d+ \("):
        find_scenes(str(path), IngestConfig())
    path.write_text("\n".join([lines[0], '{"type": "Feature", "id": NaN}']))
    with pytest.raises(InvalidInput, match="NaN at byte"):
        find_scenes(str(path), IngestConfig())
    for other in ('{"type": "Catalog"}\n{"type": "Feature"}', '{"a": 1} {"b": 2}', "1\n2"):
        path.write_text(other)
        with pytest.raises(InvalidInput, match=r"not valid JSON at byte \d+ of \d+ \(Extra data\)"):
            find_scenes(str(path), IngestConfig())
