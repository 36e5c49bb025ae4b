"""Product and provider rules."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from ingest.request.asset_choice import choose_asset
from ingest.request.products import PRODUCTS, BandRule, choose_bands, find_product, refuse_unsupported
from ingest.trust.providers import PROVIDERS, find_provider
from zarr_store.errors import InvalidInput, UnknownName

L2A, L1C, RTC = PRODUCTS


@pytest.mark.parametrize(
    ("typed", "name"),
    [("blue", "blue"), ("B02", "blue"), ("b2", "blue"), ("B8A", "nir08"), ("nir", "nir"), ("B12", "swir22"),
     ("SCL", "scl"), ("rededge3", "rededge3")],
)  # fmt: skip
def test_both_spellings_of_a_band_are_understood(typed: str, name: str) -> None:
    band = L2A.band(typed)
    assert band is not None
    assert band.name == name


def test_unknown_bands_name_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'blue'"):
        choose_bands(L2A, ["bleu"])
    with pytest.raises(UnknownName, match="B8A"):
        choose_bands(L2A, ["B8B"])


def test_bands_of_two_products_are_shared_out() -> None:
    asked = ["vv", "red", "scl", "B02", "blue"]
    choice = choose_bands(L2A, asked)
    assert [band.name for band in choice.data] == ["red", "blue"]
    assert [band.name for band in choice.layers] == ["scl"]
    assert [band.name for band in choose_bands(RTC, asked).data] == ["vv"]
    assert [band.name for band in choose_bands(RTC, ["red"]).data] == ["vv", "vh"]


def test_the_mask_layer_is_read_without_being_kept() -> None:
    choice = choose_bands(L2A, ["red"])
    assert not choice.layers
    assert [band.name for band in choice.all] == ["red", "scl"]
    assert [band.name for band in choose_bands(L2A, ["red"], mask="none").all] == ["red"]
    assert [band.name for band in choose_bands(L1C, ["red"]).all] == ["red"]
    with pytest.raises(InvalidInput, match="at least one data band"):
        choose_bands(L2A, ["scl"])


def _key(band: BandRule | None, assets: Mapping[str, Any]) -> str | None:
    assert band is not None
    chosen = choose_asset(band, assets)
    return chosen.key if chosen else None


def test_asset_keys_differ_per_provider() -> None:
    blue, nir08 = L2A.band("blue"), L2A.band("nir08")
    assert blue is not None
    assert nir08 is not None
    assert _key(blue, {"blue": {}, "blue-jp2": {}, "blue_20m": {}}) == "blue"
    assert _key(blue, {"B02_20m": {}, "B02_10m": {}}) == "B02_10m"
    assert _key(nir08, {"B08": {}, "B8A": {}}) == "B8A"
    strange = {
        "thumb": {"eo:bands": [{"name": "B02"}, {"name": "B03"}]},
        "coarse": {"gsd": 60, "eo:bands": [{"name": "B02", "common_name": "blue"}]},
        "fine": {"gsd": 10, "bands": [{"name": "x", "eo:common_name": "blue"}]},
    }
    assert _key(blue, strange) == "fine"
    assert choose_asset(nir08, strange) is None


@pytest.mark.parametrize("collection", ["sentinel-1-grd", "sentinel1-grd", "sentinel-1-slc", "S1_GRD"])
def test_products_without_terrain_correction_are_refused(collection: str) -> None:
    with pytest.raises(InvalidInput, match=r"terrain.*RTC"):
        refuse_unsupported(collection)


def test_products_are_known_by_their_properties_too() -> None:
    def item(**properties: Any) -> dict[str, Any]:
        return {"id": "x", "collection": "mine", "properties": properties}

    assert find_product(item(**{"s2:product_type": "S2MSI2A"})) is L2A
    assert find_product(item(**{"s2:product_uri": "S2A_MSIL1C_X", "platform": "sentinel-2a"})) is L1C
    assert find_product(item(**{"sar:product_type": "RTC", "platform": "SENTINEL-1A"})) is RTC
    assert find_product(item(platform="landsat-8")) is None
    with pytest.raises(InvalidInput, match="GRD"):
        refuse_unsupported("mine", item(**{"sar:product_type": "GRD"}))


def test_every_product_names_itself_and_every_host_once() -> None:
    for product in PRODUCTS:
        assert product.name in product.collections
        assert set(product.usual) <= set(product.names)
        assert len(set(product.names)) == len(product.names)
    for provider in PROVIDERS:
        assert len(set(provider.hosts)) == len(provider.hosts)


def test_provider_comes_from_the_item_before_the_source() -> None:
    item = {"properties": {"earthsearch:payload_id": "x"}, "assets": {}, "links": []}
    assert find_provider(item, "/some/folder/catalog.json").name == "earth-search"
    plain: dict[str, Any] = {"properties": {}, "assets": {}, "links": []}
    assert find_provider(plain, "https://planetarycomputer.microsoft.com/api/stac/v1").name == "planetary-computer"
    assert find_provider(plain | {"assets": {"B02_10m": {"href": "s3://eodata/x.jp2"}}}).name == "cdse"
    assert find_provider(plain).name == "generic"


def test_import_costs_nothing_and_never_brings_jax() -> None:
    code = (
        "import sys, ingest; print(*sys.modules);"
        "import ingest.scenes.search, ingest.plan.probe, ingest.scenes.harmonise; print(*sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    package, working = (set(line.split()) for line in printed.stdout.splitlines())
    assert not {"rasterio", "dask", "pystac_client", "numpy"} & package
    assert {"rasterio", "numpy"} <= working
    assert "jax" not in working
