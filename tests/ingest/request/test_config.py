"""Every check of the config has its message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ingest.request.config import SECTIONS, SETTINGS, IngestConfig
from ingest.request.query import Comparison, parse_comparison
from ingest.request.selection import parse_interval
from ingest.request.settings import make_config
from zarr_store.errors import InvalidInput, UnknownName


def test_defaults_are_the_documented_ones() -> None:
    config = IngestConfig()
    assert config.pixels.mask_classes == (0, 1, 3, 8, 9, 10)
    pixels = config.pixels
    assert (pixels.mask, pixels.group, pixels.reduce, pixels.offset_policy) == ("scl", "solar-day", "first", "repair")


def test_text_is_split_and_json_comes_back_equal() -> None:
    config = IngestConfig(bands="blue, red", bbox="15,45,17,47", query="eo:cloud_cover<40", crs="epsg:32633")
    assert config.selection.bands == ("blue", "red")
    assert config.selection.bbox == (15.0, 45.0, 17.0, 47.0)
    assert config.grid.crs == "EPSG:32633"
    assert IngestConfig(**json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bbox": (16, 46, 17, 45)}, "south must be below north"),
        ({"bbox": (500000, 5100000, 600000, 5200000)}, "not projected metres"),
        ({"bbox": (-190, 1, 2, 3)}, "-180…180"),
        ({"bbox": (3, 1, 3, 2)}, "must differ"),
        ({"bbox": (1, 2, float("nan"), 4)}, "finite"),
        ({"bbox": (1, 2, 3)}, "bbox"),
        ({"datetime": "2023-09-01/2023-08-01"}, "reversed"),
        ({"datetime": "yesterday"}, "is not a date"),
        ({"datetime": "../.."}, "at least one date"),
        ({"datetime": "2023-13"}, "is not a date"),
        ({"query": "cloudy"}, "PROPERTY<VALUE"),
        ({"reduce": "sum"}, "first"),
        ({"mask": "sclx"}, "scl"),
        ({"profile": "quick"}, "timeseries"),
        ({"read_overviews": True, "resampling": "nearest"}, "--overviews takes averages"),
        ({"crs": "EPSG:1"}, "unknown CRS"),
        ({"resolution": 0}, "greater than 0"),
        ({"max_items": 0}, "greater than 0"),
        ({"mask_classes": (300,)}, "255"),
        ({"memory": "lots"}, "4GB"),
        ({"bands": ("red", "red")}, "once"),
        ({"chunk_sise": 3}, "unknown setting 'chunk_sise'"),
        (
            {"geometry": {"type": "Polygon", "coordinates": [[[5e5, 5e6], [6e5, 5e6], [6e5, 6e6], [5e5, 5e6]]]}},
            "degrees",
        ),
        ({"geometry": {"type": "Circle"}}, "GeoJSON"),
        ({"geometry": "/no/such/file.geojson"}, "load_geometry"),
        ({"providers": ("mine.toml",)}, "load_provider_file"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        IngestConfig(**wrong)
    assert message in str(caught.value)


def test_bbox_and_geometry_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="not both"):
        IngestConfig(bbox=(1, 2, 3, 4), geometry={"type": "Point", "coordinates": [1, 2]})


def test_geometry_file_becomes_part_of_the_config(tmp_path: Path) -> None:
    ring = [[[1, 1], [2, 1], [2, 2], [1, 1]]]
    path = tmp_path / "field.geojson"
    features = [{"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": ring}}]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    config = make_config(None, {"geometry": str(path)})
    path.unlink()
    assert config.selection.geometry is not None
    assert config.selection.geometry["type"] == "Polygon"
    assert IngestConfig(**config.model_dump()) == config


def test_every_setting_has_one_section() -> None:
    assert {name: field.annotation for name, field in IngestConfig.model_fields.items()} == SECTIONS
    names = [name for model in SECTIONS.values() for name in model.model_fields]
    assert len(names) == len(set(names)) == len(SETTINGS)
    assert not set(names) & set(SECTIONS)


def test_flat_settings_come_back_as_they_went_in() -> None:
    flat: dict[str, Any] = {
        "bands": ("red",),
        "resolution": 20.0,
        "mask": "none",
        "allow_hosts": ("a.b",),
        "retries": 1,
    }
    config = IngestConfig.from_flat(flat)
    assert config == IngestConfig(**flat)
    assert config.to_flat() == flat
    assert IngestConfig.from_flat({}).to_flat() == {}
    assert repr(config) == f"IngestConfig({', '.join(f'{name}={value!r}' for name, value in flat.items())})"
    assert IngestConfig(running=config.running, bands="red").to_flat() == {"bands": ("red",), "retries": 1}
    with pytest.raises(ValidationError, match="section running as a whole, or workers"):
        IngestConfig(running=config.running, workers=3)


def test_a_plan_keeps_neither_trust_nor_running_nor_defaults() -> None:
    settings = {"bands": "red", "mask": "scl", "mask_dilate_m": 20, "sign": "planetary-computer", "strict": True}
    assert make_config(None, settings).plan_settings() == {"bands": ["red"], "mask_dilate_m": 20.0}


def test_a_copy_is_checked() -> None:
    config = IngestConfig(bands="red", workers="1..4")
    assert config.model_copy(update={"crs": "epsg:32633"}).grid.crs == "EPSG:32633"
    assert config.model_copy(update={"running": IngestConfig().running}).to_flat() == {"bands": ("red",)}
    with pytest.raises(UnknownName, match="did you mean 'bands'"):
        config.model_copy(update={"band": "red"})
    assert make_config(config, {"workers": 2}).running.workers_least is None


def test_every_problem_is_listed_under_the_name_that_was_typed() -> None:
    settings = {"bandz": "red", "geometry": "/no/such.geojson", "bbox": "1,2,3,x", "workers": 0, "query": "cloudy"}
    with pytest.raises(InvalidInput) as caught:
        make_config(None, settings, where="my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: geometry: cannot read geometry file /no/such.geojson")
    for words in (
        "unknown setting 'bandz': did you mean 'bands'?",
        "bbox: expected four numbers in degrees, west,south,east,north, got x in '1,2,3,x'",
        "workers: input should be greater than 0, got 0",
        "query: ",
    ):
        assert words in message
    for section in SECTIONS:
        assert f"{section}." not in message
    with pytest.raises(UnknownName, match="unknown setting 'running'"):
        IngestConfig.from_flat({"running": {"workers": 2}})
    with pytest.raises(InvalidInput, match=r"^workers is a number or LEAST..MOST .* got 3..1$"):
        make_config(None, {"workers": "3..1"})


def test_interval_bounds_are_inclusive() -> None:
    assert [str(v) for v in parse_interval("2024-02")] == ["2024-02-01 00:00:00+00:00", "2024-02-29 23:59:59+00:00"]
    assert parse_interval("../2023")[0] is None
    assert str(parse_interval("2023-08-10T12:00:00+02:00/..")[0]) == "2023-08-10 10:00:00+00:00"


def test_conditions_compare_numbers_as_numbers() -> None:
    assert parse_comparison("eo:cloud_cover<40").holds({"eo:cloud_cover": 9})
    assert not parse_comparison("eo:cloud_cover<40").holds({"eo:cloud_cover": 100})
    assert not parse_comparison("eo:cloud_cover<40").holds({})
    assert parse_comparison("platform='Sentinel-2A'").holds({"platform": "sentinel-2a"})
    assert Comparison("a", "!=", 1.0).holds({})
