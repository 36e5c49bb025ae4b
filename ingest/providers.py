"""What is known of each provider, as data: whose items they are, which hosts they use, where the -1000 offset is told.

A *provider* is who serves a product and how. It is looked up per item, so a local copy of Earth Search items is still
read by Earth Search's rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from ingest.sign import Signing

__all__ = ["GENERIC", "PROVIDERS", "OffsetRule", "ProviderRule", "find_provider"]

OffsetRule = Literal["flag", "metadata", "baseline"]


@dataclass(frozen=True)
class ProviderRule:
    """What holds for one provider.

    Attributes:
        name: "earth-search" …
        marks: Property prefixes that only this provider's items have.
        hosts: Hosts and buckets that its API and assets live on; allowed for its items.
        offset: Where the truth about the -1000 offset is: in a flag of the item, in the item's raster metadata, or
            nowhere but in the processing baseline.
        flag: The property of offset rule "flag": true means that 1000 has been subtracted already.
        evidence: The source of the offset rule.
        sign: Whose tokens its hrefs need; set by the rule, `--sign` overrules it.
        rate_limit: Requests per second that it bears from all workers together; None where it states no limit.
        requester_pays: Whether its buckets bill whoever reads.
        endpoint: S3 endpoint of its buckets, where that is not Amazon's.
    """

    name: str
    marks: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    offset: Mapping[str, OffsetRule] = field(default_factory=dict)
    flag: str | None = None
    evidence: str = ""
    sign: Signing = "none"
    rate_limit: float | None = None
    requester_pays: bool = False
    endpoint: str | None = None

    def offset_rule(self, collection: str) -> OffsetRule:
        return self.offset.get(collection, self.offset.get("*", "metadata"))


PROVIDERS: tuple[ProviderRule, ...] = (
    ProviderRule(
        name="terrashard",
        marks=("terrashard:",),
        # the simulator can be told to lie like the real ones: the flag first, then raster metadata
        offset={"*": "flag"},
        flag="earthsearch:boa_offset_applied",
        evidence="ingest.simulate",
    ),
    ProviderRule(
        name="sinergise",
        hosts=("sentinel-s2-l2a", "sentinel-s2-l1c", "sentinel-s2-l2a-stac", "sentinel-s2-l1c-stac"),
        offset={"*": "metadata"},
        evidence="SAFE product format, BOA_ADD_OFFSET",
    ),
    ProviderRule(
        name="earth-search",
        marks=("earthsearch:",),
        hosts=(
            "earth-search.aws.element84.com",
            "sentinel-cogs.s3.us-west-2.amazonaws.com",
            "sentinel-cogs",
            "e84-earth-search-sentinel-data.s3.us-west-2.amazonaws.com",
            "e84-earth-search-sentinel-data",
            "sentinel-s2-l2a",
            "sentinel-s2-l1c",
            "earthsearch-data",
        ),
        # the flag is right more often than raster:bands, which keeps -0.1 after the subtraction
        offset={"sentinel-2-l2a": "flag", "sentinel-2-c1-l2a": "metadata", "*": "metadata"},
        flag="earthsearch:boa_offset_applied",
        evidence="Element84/earth-search#9, #66, #71",
    ),
    ProviderRule(
        name="earth-search-v0",
        marks=("sentinel:boa_offset_applied", "sentinel:valid_cloud_cover"),
        hosts=(
            "earth-search.aws.element84.com",
            "sentinel-cogs.s3.us-west-2.amazonaws.com",
            "sentinel-cogs",
            "sentinel-s2-l2a",
            "sentinel-s2-l1c",
        ),
        offset={"*": "flag"},
        flag="sentinel:boa_offset_applied",
        evidence="Element84/earth-search#9",
    ),
    ProviderRule(
        name="planetary-computer",
        hosts=(
            "planetarycomputer.microsoft.com",
            "sentinel2l2a01.blob.core.windows.net",
            "sentinel1euwestrtc.blob.core.windows.net",
        ),
        offset={"*": "baseline"},  # never applied, and the items carry no raster offset
        evidence="microsoft/PlanetaryComputer#134",
    ),
    ProviderRule(
        name="cdse",
        marks=("eopf:",),
        hosts=(
            "stac.dataspace.copernicus.eu",
            "catalogue.dataspace.copernicus.eu",
            "eodata.dataspace.copernicus.eu",
            "zipper.dataspace.copernicus.eu",
            "download.dataspace.copernicus.eu",
            "eodata",
        ),
        offset={"*": "baseline"},  # SAFE semantics
        evidence="SAFE product format, BOA_ADD_OFFSET",
        rate_limit=5.0,  # its documented quota of requests, shared by everything that one account runs
        endpoint="eodata.dataspace.copernicus.eu",
    ),
    ProviderRule(
        name="indigo",
        marks=("sentinel:mgrs", "sentinel:product_ids"),
        hosts=("sentinel-s1-rtc-indigo.s3.us-west-2.amazonaws.com", "sentinel-s1-rtc-indigo"),
    ),
)

GENERIC = ProviderRule(
    name="generic", offset={"*": "flag"}, flag="earthsearch:boa_offset_applied", evidence="STAC raster extension"
)


def find_provider(item: Mapping[str, Any], source: str = "") -> ProviderRule:
    """The provider whose item this is: by its own property prefixes, else by SOURCE, its links, its asset hosts."""
    properties = item.get("properties") or {}
    for rule in PROVIDERS:
        if any(name.startswith(mark) for mark in rule.marks for name in properties):
            return rule
    links = [link for link in item.get("links") or [] if isinstance(link, Mapping)]
    assets = [asset for asset in (item.get("assets") or {}).values() if isinstance(asset, Mapping)]
    for hrefs in (
        [source],
        [link.get("href") for link in links if link.get("rel") in ("self", "root", "parent", "collection")],
        [asset.get("href") for asset in assets],
    ):
        hosts = set(_hosts(hrefs))
        found = next((rule for rule in PROVIDERS if hosts.intersection(rule.hosts)), None)
        if found:
            return found
    return GENERIC


def _hosts(hrefs: Iterable[object]) -> Iterable[str]:
    for href in hrefs:
        if isinstance(href, str) and "://" in href:
            yield urlsplit(href).netloc.rpartition("@")[2].lower()
