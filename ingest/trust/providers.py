"""The rules of each provider, as data: how its items are recognised, its hosts, and where it states the -1000 offset.

A *provider* is a service that publishes a product. It is looked up for each item, so a local copy of Earth Search items
is still read by the rules of Earth Search. A user adds a provider in a TOML file with the same fields
(`--provider-file`); rules of users are looked at first.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ingest.trust.buckets import BucketRule
from ingest.trust.hrefs import is_loopback
from ingest.trust.sign import STORAGE_HOSTS, TOKEN_URL, SignRule
from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.regular import check_regular

__all__ = ["GENERIC", "PROVIDERS", "OffsetRule", "ProviderRule", "find_provider", "load_provider_file", "trusted_hosts"]

_MAX_FILE_BYTES = 1_000_000
Words = tuple[Annotated[str, Field(min_length=1, max_length=300)], ...]

OffsetRule = Literal["flag", "metadata", "baseline"]


class ProviderRule(BaseModel):
    """The rules of one provider.

    Attributes:
        name: Name of the provider, e.g. "earth-search".
        marks: Prefixes of item properties that only this provider's items have.
        hosts: Hosts and buckets of its API and assets; its items may name them.
        offset: Collection ("*" for all others) → where the -1000 offset is stated: in a flag of the item ("flag"), in
            its raster metadata ("metadata"), or only through the processing baseline ("baseline").
        flag: Item property of the offset rule "flag"; true means that 1000 has already been subtracted.
        evidence: Source of the offset rule.
        rate_limit: Largest number of requests per second from all workers together; None where it states no limit.
        token_url: Address of its token service: TOKEN_URL/ACCOUNT/CONTAINER gives a document with `token` and
            `msft:expiry`. Tokens are requested right before a file is opened.
        token_hosts: Storage hosts that get these tokens, and no others; ".suffix" stands for all hosts below it.
        token_margin_s: Seconds before its expiry from which on a token is no longer used.
        buckets: Those of `hosts` that are S3 buckets and need the settings below.
        endpoint: S3 endpoint of the buckets; None means Amazon. "http://…" is allowed for this machine only.
        requester_pays: Whether the buckets bill their readers; they are read only with --requester-pays.
        key_prefix: Prefix of the environment variables of each worker that hold the keys of the buckets,
            PREFIX_ACCESS_KEY_ID and PREFIX_SECRET_ACCESS_KEY. Keys never stand in a file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9\-]{0,63}$")
    marks: Words = ()
    hosts: Words = ()
    offset: dict[str, OffsetRule] = Field(default_factory=dict)
    flag: str | None = None
    evidence: str = ""
    rate_limit: float | None = Field(None, gt=0, le=10_000)
    token_url: str | None = None
    token_hosts: Words = ()
    token_margin_s: float = Field(300.0, ge=0, le=86_400)
    buckets: Words = ()
    endpoint: str | None = None
    requester_pays: bool = False
    key_prefix: str = Field("AWS", pattern=r"^[A-Z][A-Z0-9_]{1,40}$")

    @field_validator("token_url", "endpoint")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value if "://" in value else f"https://{value}")
        if not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                f"expected a host or an https URL without user name and query, got one of host {parts.hostname!r}"
            )
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname)):
            raise ValueError(f"expected https, as secrets are sent there, got {parts.scheme}://{parts.hostname}")
        return value.rstrip("/")

    def offset_rule(self, collection: str) -> OffsetRule:
        """Return where the items of a collection state the -1000 offset."""
        return self.offset.get(collection, self.offset.get("*", "metadata"))

    @property
    def sign_rule(self) -> SignRule | None:
        """The rule for signing its hrefs; None where they need no token."""
        if self.token_url is None:
            return None
        return SignRule(self.token_url, self.token_hosts or self.hosts, self.token_margin_s)

    @property
    def bucket_rule(self) -> BucketRule | None:
        """The rule for reading its buckets; None where it has none that need one."""
        if not self.buckets:
            return None
        return BucketRule(self.buckets, self.endpoint, self.requester_pays, self.key_prefix)


PROVIDERS: tuple[ProviderRule, ...] = (
    ProviderRule(
        name="terrashard",
        marks=("terrashard:",),
        # the simulator can imitate the errors of real providers: the flag is looked at first, then raster metadata
        offset={"*": "flag"},
        flag="earthsearch:boa_offset_applied",
        evidence="ingest.simulate",
    ),
    ProviderRule(
        name="sinergise",
        hosts=("sentinel-s2-l2a", "sentinel-s2-l1c", "sentinel-s2-l2a-stac", "sentinel-s2-l1c-stac"),
        buckets=("sentinel-s2-l2a", "sentinel-s2-l1c"),
        requester_pays=True,
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
        # the flag is more reliable than raster:bands, which keeps -0.1 after the subtraction
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
        token_url=TOKEN_URL,  # asked where --sign planetary-computer is given
        token_hosts=(STORAGE_HOSTS,),
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
        buckets=("eodata",),
        endpoint="eodata.dataspace.copernicus.eu",
        key_prefix="CDSE_S3",
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


def load_provider_file(path: str | Path) -> ProviderRule:
    """Read the rules of one provider from a TOML file with the fields of `ProviderRule`.

    Raises:
        InvalidInput: The file is unreadable, too large, not TOML, or has a value that cannot be used.
        UnknownName: The file has a key that no rule has; the nearest one is named.
    """
    try:
        if check_regular(path).st_size > _MAX_FILE_BYTES:
            raise InvalidInput(
                f"provider file {path} has more than {_MAX_FILE_BYTES} bytes; expected a short TOML file"
            )
        table = tomllib.loads(read_file(path, _MAX_FILE_BYTES, f"provider file {path}").decode("utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot read provider file {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"provider file {path} is not TOML: {error}") from error
    for key in table:
        if key not in ProviderRule.model_fields:
            raise UnknownName.of("key", key, ProviderRule.model_fields, f"provider file {path}")
    try:
        return ProviderRule.model_validate(table)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors()
        )
        raise InvalidInput(f"provider file {path}: {problems}") from error


def find_provider(item: Mapping[str, Any], source: str = "", own: Iterable[ProviderRule] = ()) -> ProviderRule:
    """Find the provider of an item by the prefixes of its properties, else by the hosts of SOURCE, links and assets.

    Rules in `own` come first, so that a user can overrule the built-in ones.
    """
    properties = item.get("properties") or {}
    rules = (*own, *PROVIDERS)
    for rule in rules:
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
        match = next((rule for rule in rules if hosts.intersection(rule.hosts)), None)
        if match:
            return match
    return GENERIC


def trusted_hosts(rule: ProviderRule, source: str, own: Iterable[ProviderRule] = ()) -> tuple[str, ...]:
    """Return the hosts that items of a provider may name, given where the user searched.

    An item itself states whose it is, and any server can copy that. So items from a server that is not the provider's
    may not name buckets that are read with the user's keys.

    Args:
        rule: The provider, from `find_provider`.
        source: SOURCE as the user gave it. A local file of items counts as the provider's.
        own: Rules that the user added.
    """
    if "://" not in source or set(_hosts([source])).intersection(rule.hosts):
        return rule.hosts
    with_keys = {bucket for one in (*own, *PROVIDERS) for bucket in one.buckets}
    return tuple(host for host in rule.hosts if host not in with_keys)


def _hosts(hrefs: Iterable[object]) -> Iterable[str]:
    for href in hrefs:
        if isinstance(href, str) and "://" in href:
            yield urlsplit(href).netloc.rpartition("@")[2].lower()
