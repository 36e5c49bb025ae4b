"""Every check of the config has its message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ingest.request.config import EXECUTION_FIELDS, IngestConfig, parse_interval
from ingest.request.query import Comparison, parse_comparison


def test_defaults_are_the_documented_ones() -> None:
    config = IngestConfig()
    assert config.mask_classes == (0, 1, 3, 8, 9, 10)
    assert (config.mask, config.group, config.reduce, config.offset_policy) == ("scl", "solar-day", "first", "repair")
    assert set(IngestConfig.model_fields) >= EXECUTION_FIELDS


def test_text_is_split_and_json_comes_back_equal() -> None:
    config = IngestConfig(bands="blue, red", bbox="15,45,17,47", query="eo:cloud_cover<40", crs="epsg:32633")
    assert config.bands == ("blue", "red")
    assert config.bbox == (15.0, 45.0, 17.0, 47.0)
    assert config.crs == "EPSG:32633"
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
        ({"datetime": "yesterday"}, "is no date"),
        ({"datetime": "../.."}, "at least one date"),
        ({"datetime": "2023-13"}, "is no date"),
        ({"query": "cloudy"}, "PROPERTY<VALUE"),
        ({"reduce": "sum"}, "first"),
        ({"mask": "sclx"}, "scl"),
        ({"profile": "fast"}, "timeseries"),
        ({"crs": "EPSG:1"}, "unknown CRS"),
        ({"resolution": 0}, "greater than 0"),
        ({"max_items": 0}, "greater than 0"),
        ({"mask_classes": (300,)}, "255"),
        ({"memory": "lots"}, "4GB"),
        ({"bands": ("red", "red")}, "once"),
        ({"chunk_sise": 3}, "Extra inputs"),
        (
            {"geometry": {"type": "Polygon", "coordinates": [[[5e5, 5e6], [6e5, 5e6], [6e5, 6e6], [5e5, 5e6]]]}},
            "degrees",
        ),
        ({"geometry": {"type": "Circle"}}, "GeoJSON"),
        ({"geometry": "/no/such/file.geojson"}, "cannot read geometry file"),
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
    config = IngestConfig(geometry=str(path))
    path.unlink()
    assert config.geometry is not None
    assert config.geometry["type"] == "Polygon"
    assert IngestConfig(**config.model_dump()) == config


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
