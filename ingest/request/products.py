"""The rules of each product, as data: collection ids, bands and their asset keys, nodata, scale, class layers.

A *product* is what the instrument teams publish, such as Sentinel-2 L2A. The rules of the services that publish it are
in `ingest.trust.providers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.lookup import BAND_CODES, find_band

__all__ = [
    "PRODUCTS",
    "BandChoice",
    "BandRule",
    "ProductRule",
    "choose_bands",
    "find_product",
    "refuse_unsupported",
]


@dataclass(frozen=True)
class BandRule:
    """One band of a product.

    Attributes:
        name: Name of the band in cubes.
        aliases: Other names that people type, in lower case.
        keys: Keys of its asset at the providers, in order of preference.
        resolution_m: Pixel size, metres.
        wavelength_um: Centre wavelength, micrometres; None for bands without one.
    """

    name: str
    aliases: tuple[str, ...]
    keys: tuple[str, ...]
    resolution_m: float
    wavelength_um: float | None = None


@dataclass(frozen=True)
class ProductRule:
    """The rules of one product, the same for all its providers.

    Attributes:
        name: Name of the cube's group where the catalogue gives no collection id.
        collections: Collection ids of this product at the providers.
        kind: Name of the main array in a cube.
        bands: Data bands in spectral order.
        classes: Class layers (uint8, never scaled).
        usual: Bands that are read when the user names none.
        dtype: Type of the data bands in files.
        nodata: Value of pixels without data in files, where the item states none.
        scale: Factor to physical units, where the item states none.
        offsets: Whether the -1000 offset of baseline 04.00 applies to this product.
        mask_layer: Class layer that `mask="scl"` reads.
    """

    name: str
    collections: tuple[str, ...]
    kind: Literal["reflectance", "backscatter"]
    bands: tuple[BandRule, ...]
    classes: tuple[BandRule, ...]
    usual: tuple[str, ...]
    dtype: str
    nodata: float
    scale: float
    offsets: bool
    mask_layer: str | None = None

    def band(self, name: str) -> BandRule | None:
        """Return the band or class layer that `name` means: "blue", "B02", "b2" …; None if there is none."""
        found = find_band(name, self.names)
        return next((b for b in (*self.bands, *self.classes) if b.name == found), None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all bands and class layers."""
        return tuple(band.name for band in (*self.bands, *self.classes))


def _s2(name: str, code: str, resolution: int, wavelength: float) -> BandRule:
    """Make a Sentinel-2 band; its keys are common name (Earth Search), code (Planetary Computer), code_10m (CDSE)."""
    short = code.replace("B0", "B")
    keys = (name, code, f"{code}_{resolution}m", f"{name}_{resolution}m", short)
    return BandRule(name, BAND_CODES[name], keys, resolution, wavelength)


_S2_BANDS = (
    _s2("coastal", "B01", 60, 0.443),
    _s2("blue", "B02", 10, 0.490),
    _s2("green", "B03", 10, 0.560),
    _s2("red", "B04", 10, 0.665),
    _s2("rededge1", "B05", 20, 0.704),
    _s2("rededge2", "B06", 20, 0.740),
    _s2("rededge3", "B07", 20, 0.783),
    _s2("nir", "B08", 10, 0.842),
    _s2("nir08", "B8A", 20, 0.865),
    _s2("nir09", "B09", 60, 0.945),
    _s2("cirrus", "B10", 60, 1.374),
    _s2("swir16", "B11", 20, 1.610),
    _s2("swir22", "B12", 20, 2.190),
)
_SCL = BandRule("scl", (), ("scl", "SCL", "SCL_20m", "scl_20m"), 20)
# labels that lie beside the scenes as an asset of their own: the simulator's truth, or a reference map of the user
_LANDCOVER = BandRule("landcover", (), ("landcover", "land_cover"), 10)


def _rtc(name: str) -> BandRule:
    upper = name.upper()
    return BandRule(name, BAND_CODES[name], (name, upper, f"gamma0_{name}", f"Gamma0_{upper}"), 10)


PRODUCTS: tuple[ProductRule, ...] = (
    ProductRule(
        name="sentinel-2-l2a",
        collections=(
            "sentinel-2-l2a",
            "sentinel-2-c1-l2a",
            "sentinel-s2-l2a-cogs",
            "sentinel-s2-l2a",
            "sentinel-2-pre-c1-l2a",
            "sentinel2-l2a-example",
        ),
        kind="reflectance",
        bands=tuple(band for band in _S2_BANDS if band.name != "cirrus"),
        classes=(_SCL, _LANDCOVER),
        usual=("blue", "green", "red", "nir", "scl"),
        dtype="uint16",
        nodata=0,
        scale=1e-4,
        offsets=True,
        mask_layer="scl",
    ),
    ProductRule(
        name="sentinel-2-l1c",
        collections=("sentinel-2-l1c", "sentinel-s2-l1c", "sentinel2-l1c-example"),
        kind="reflectance",
        bands=_S2_BANDS,
        classes=(),
        usual=("blue", "green", "red", "nir"),
        dtype="uint16",
        nodata=0,
        scale=1e-4,
        offsets=True,
    ),
    ProductRule(
        name="sentinel-1-rtc",
        collections=("sentinel-1-rtc", "sentinel1-rtc-aws", "sentinel-s1-rtc-indigo"),
        kind="backscatter",
        bands=(_rtc("vv"), _rtc("vh"), _rtc("hh"), _rtc("hv")),
        classes=(),
        usual=("vv", "vh"),
        dtype="float32",
        nodata=-32768,  # Planetary Computer; items that state another value win
        scale=1.0,
        offsets=False,
    ),
)


def find_product(item: Mapping[str, Any], collection: str | None = None) -> ProductRule | None:
    """Find the product of an item by its collection id, else by its properties; None if it is not supported."""
    name = collection or item.get("collection")
    for rule in PRODUCTS:
        if name in rule.collections:
            return rule
    properties = item.get("properties") or {}
    kind = str(
        properties.get("s2:product_type")
        or properties.get("sentinel2:product_type")
        or properties.get("product:type")
        or properties.get("sar:product_type")
        or ""
    ).upper()
    uri = str(properties.get("s2:product_uri") or item.get("id") or "").upper()
    platform = str(properties.get("platform") or properties.get("constellation") or "").lower()
    if kind in ("S2MSI2A", "S2MSIL2A") or (platform.startswith("sentinel-2") and ("L2A" in uri)):
        return PRODUCTS[0]
    if kind in ("S2MSI1C", "S2MSIL1C") or (platform.startswith("sentinel-2") and ("L1C" in uri)):
        return PRODUCTS[1]
    if kind == "RTC" and platform.startswith("sentinel-1"):
        return PRODUCTS[2]
    return None


def refuse_unsupported(collection: str, item: Mapping[str, Any] | None = None) -> None:
    """Refuse Sentinel-1 products without terrain correction.

    Raises:
        InvalidInput: The collection or item is GRD, SLC or OCN.
    """
    words = collection.lower().replace("_", "-").split("-")
    kind = str(((item or {}).get("properties") or {}).get("sar:product_type") or "").upper()
    bad = kind if kind in ("GRD", "SLC", "OCN") else next((w.upper() for w in words if w in ("grd", "slc", "ocn")), "")
    if bad:
        raise InvalidInput(
            f"collection {collection!r} is Sentinel-1 {bad}, which has no terrain correction: its pixels do not lie "
            "where the catalogue says; use a radiometrically terrain corrected (RTC) collection such as sentinel-1-rtc"
        )


@dataclass(frozen=True)
class BandChoice:
    """The layers of a product that are read.

    Attributes:
        data: Data bands in the order in which they were named.
        layers: Class layers that the cube keeps.
        mask: Class layer for masking; None without masking.
    """

    data: tuple[BandRule, ...]
    layers: tuple[BandRule, ...]
    mask: BandRule | None

    @property
    def all(self) -> tuple[BandRule, ...]:
        """All layers that must be read, each once."""
        extra = (self.mask,) if self.mask and self.mask not in self.layers else ()
        return (*self.data, *self.layers, *extra)


def choose_bands(product: ProductRule, bands: Iterable[str], mask: str = "scl") -> BandChoice:
    """Split names into data bands and class layers of a product.

    With two collections, each name belongs to one of them ("vv" beside "blue"). So a name is refused only when no
    product has it. Where none of the names belongs to this product, its usual bands are taken.

    Args:
        product: The product.
        bands: Names that the user gave; none for the usual bands.
        mask: "scl" to read the product's mask layer, or "none".

    Raises:
        UnknownName: No product has the name; the nearest one of this product is named.
        InvalidInput: The names are all class layers.
    """
    names = tuple(bands)
    unknown = [name for name in names if not any(rule.band(name) for rule in PRODUCTS)]
    if unknown:
        raise UnknownName.of("band", unknown, _spellings(product), product.name)
    rules = [rule for rule in map(product.band, names or product.usual) if rule]
    chosen = list(dict.fromkeys(rules))
    if names and not chosen:
        chosen = [rule for rule in map(product.band, product.usual) if rule]
    layer = product.band(product.mask_layer) if mask == "scl" and product.mask_layer else None
    data = tuple(rule for rule in chosen if rule in product.bands)
    if not data:
        raise InvalidInput(
            f"{product.name}: expected at least one data band beside the class layers, got {', '.join(names)}; "
            f"choose from {', '.join(band.name for band in product.bands)}"
        )
    return BandChoice(data, tuple(rule for rule in chosen if rule in product.classes), layer)


def _spellings(product: ProductRule) -> list[str]:
    return [*product.names, *(alias.upper() for band in product.bands for alias in band.aliases[:1])]
