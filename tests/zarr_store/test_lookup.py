"""Bands and time steps by name: one rule, the same wherever somebody names them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from zarr_store import CubeSpec
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.lookup import BAND_CODES, find_band, find_bands, find_time, find_times, picture_bands

BANDS = ("blue", "green", "red", "nir", "nir08")
TIMES = (
    "2022-12-31T10:07:51",
    "2023-08-10T09:57:57",
    "2023-08-10T10:07:51",
    "2023-08-18T09:57:57",
    "2023-09-02T09:57:58",
)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((), (0, 1, 2, 3, 4)),
        ("", (0, 1, 2, 3, 4)),
        ("nir,red", (3, 2)),
        (" nir , red ,", (3, 2)),
        (["NIR", "Red"], (3, 2)),
        (["B04", "b4", "red"], (2, 2, 2)),
        ("B8,B8A", (3, 4)),
    ],
)
def test_bands_are_found_by_name_in_any_case_and_by_code(asked: str | list[str], expected: tuple[int, ...]) -> None:
    assert find_bands(asked, BANDS) == expected


def test_what_a_store_calls_its_bands_comes_first() -> None:
    """A name of the store is never taken for the code of another band, and a code never for another sensor's band."""
    assert find_band("b4", ("red", "b4")) == "b4"
    assert find_band("red", ("B3", "B4")) is None
    assert find_band("B4", ("b4", "B4")) == "B4"
    assert find_band("b4", ("B4",)) == "B4"
    assert find_band("RED", ("Red", "rED")) is None, "two names that differ in case alone: it must be written out"


def test_no_code_stands_for_two_bands() -> None:
    codes = [code for of_band in BAND_CODES.values() for code in of_band]
    assert len(set(codes)) == len(codes)
    assert all(code == code.casefold() for code in codes)


def test_unknown_bands_are_all_listed() -> None:
    words = r"unknown bands 'rad', 'swir16' in here: did you mean 'red'\? \(known: blue, green, nir, nir08, red\)"
    with pytest.raises(UnknownName, match=words):
        find_bands("rad,blue,swir16,rad", BANDS, "here")
    with pytest.raises(UnknownName, match="unknown band 'GREN': did you mean 'green'"):
        find_bands("GREN", BANDS)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("2023-08-18", (3,)),
        ("2023-08-1", (1, 2, 3)),
        ("2023", (1, 2, 3, 4)),
        ("2023-08-10T10", (2,)),
        ("2023-08-10 10:07:51", (2,)),
        ("2023-08-10T10:07:51Z", (2,)),
        ("2023-08-10T10:07:51+00:00", (2,)),
        (str(np.datetime64("2023-08-10T10:07:51", "ns")), (2,)),
        ("0", (0,)),
        ("004", (4,)),
        ("2023-08/2023-09", (1, 2, 3, 4)),
        ("2023-08-10T10/2023-08-18", (2, 3)),
        ("../2023-08-10", (0, 1, 2)),
        ("/2022", (0,)),
        ("2023-08-18/..", (3, 4)),
        ("2023-09,0,2023-09-02", (0, 4)),
        (["2023-08-18", "2022-12"], (0, 3)),
    ],
)
def test_times_are_found_by_date_range_and_position(asked: str | list[str], expected: tuple[int, ...]) -> None:
    assert find_times(asked, TIMES) == expected
    assert find_times(asked, [f"{time}Z" for time in TIMES]) == expected


@pytest.mark.parametrize(
    "asked", ["2024", "5", "999", "-1", "foo", "../foo", "foo/..", "../..", "/", "2024/2025", "2023-09/2023-08", ""]
)
def test_a_time_that_no_step_has_is_unknown(asked: str) -> None:
    with pytest.raises(UnknownName, match="unknown time"):
        find_times(asked, TIMES, "here")


def test_unknown_times_are_all_listed_and_days_are_known_once() -> None:
    with pytest.raises(UnknownName) as raised:
        find_times("2023-08-19,2023-08,31", TIMES, "here")
    assert str(raised.value) == (
        "unknown times '2023-08-19', '31' in here: did you mean '2023-08-18'? "
        "(known: 2022-12-31, 2023-08-10, 2023-08-18, 2023-09-02)"
    )


def test_one_time_must_be_one() -> None:
    assert find_time("2023-08-18", TIMES) == 3
    with pytest.raises(
        InvalidInput, match=r"time '2023-08-10' in here means 2023-08-10T09:57:57, 2023-08-10T10:07:51;"
    ):
        find_time("2023-08-10", TIMES, "here")
    with pytest.raises(InvalidInput, match=r"2023-08-08, …; give one of them"):
        find_time("2023", [f"2023-08-{day:02}" for day in range(1, 31)])


def test_a_picture_is_true_colour_where_it_can_be() -> None:
    assert picture_bands(BANDS) == (2, 1, 0)
    assert picture_bands(("nir", "green", "red")) == (0, 2, 1), "colour infrared: vegetation is red, not blue"
    assert picture_bands(("green", "red", "nir")) == (2, 1, 0)
    assert picture_bands(("B03", "B04", "B8A")) == (2, 1, 0)
    assert picture_bands(("B3", "B4", "B5")) == (0, 1, 2), "another sensor's names keep their order"
    assert picture_bands(("red", "nir08", "swir16")) == (2, 1, 0)
    assert picture_bands(("green", "nir")) == (1, 0, 0)
    assert picture_bands(("rededge1", "blue", "swir22")) == (2, 0, 1)
    assert picture_bands([f"band{i}" for i in range(101)]) == (60, 30, 10), "of a spectrometer, bands far apart"
    assert picture_bands(("vv", "vh")) == (0, 1, 0)
    assert picture_bands(("vv",)) == (0, 0, 0)


def test_a_spec_names_its_collection_and_the_option(spec: CubeSpec) -> None:
    assert spec.find_bands("B8") == (1,)
    assert spec.find_bands() == (0, 1)
    assert spec.find_times("2023-08") == (0, 1)
    assert spec.find_time("2023-08-13") == 1
    with pytest.raises(UnknownName, match=r"in collection sentinel-2-l2a \(--bands\): "):
        spec.find_bands("x", option="--bands")
    with pytest.raises(UnknownName, match=r"in collection sentinel-2-l2a \(--time\): "):
        spec.find_times("2024", option="--time")
    with pytest.raises(InvalidInput, match=r"in collection sentinel-2-l2a \(--time\) means"):
        spec.find_time("2023", option="--time")


@pytest.mark.parametrize("asked", ["2023-08-13", "1", "2023-08-13T10:07:53Z", "2023-08-12/..", "2024", "2023", "foo"])
def test_commands_and_python_agree_on_a_time(asked: str, spec: CubeSpec) -> None:
    """Export, quick-look and the split of a run resolve the same text to the same step, or all refuse it."""
    from cli.exporting import _pick_time
    from jaxtrain.data.windows import _held_dates

    def outcome(find: Callable[[], object]) -> object:
        try:
            return find()
        except (InvalidInput, UnknownName) as error:
            return type(error)

    ours = outcome(lambda: spec.find_time(asked))
    assert outcome(lambda: _pick_time(spec, asked)) == ours
    held = outcome(lambda: _held_dates(spec, [asked]))
    assert held == ((ours,) if isinstance(ours, int) else ours)


def test_ingest_and_the_cube_agree_on_a_band() -> None:
    from ingest.request.products import PRODUCTS, choose_bands

    for product in PRODUCTS:
        for band in product.bands:
            for asked in (band.name, band.name.upper(), *band.aliases, *map(str.upper, band.aliases)):
                assert [rule.name for rule in choose_bands(product, [asked], mask="none").data] == [band.name]
                assert find_band(asked, product.names) == band.name
    with pytest.raises(UnknownName, match="unknown bands 'rad', 'B13' in sentinel-2-l2a: did you mean 'red', 'B"):
        choose_bands(PRODUCTS[0], ["rad", "blue", "B13"])
