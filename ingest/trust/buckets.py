"""S3 buckets: an s3:// href becomes an https URL, signed with keys that only the environment of the worker holds.

The keys of one provider are never used at another, as each provider has its own variable names. Without keys nothing
is signed, and the user is not asked for any. The signature is part of the query, so redaction of queries removes it.
"""

from __future__ import annotations

import datetime as dt
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import obstore
import urllib3
from obstore.store import S3Store

from zarr_store.errors import AccessError, InvalidInput

__all__ = ["BucketRule", "bucket_url"]

_VALID = dt.timedelta(hours=1)
"""How long a signed URL is valid."""
_REGION = "us-east-1"
"""Region that is named to endpoints other than Amazon's; they accept any."""


@dataclass(frozen=True)
class BucketRule:
    """The rules for reading the buckets of one provider; `ProviderRule` describes the fields."""

    buckets: tuple[str, ...]
    endpoint: str | None = None
    requester_pays: bool = False
    key_prefix: str = "AWS"

    @property
    def address(self) -> str | None:
        """URL of the endpoint; None means Amazon."""
        return self.endpoint if not self.endpoint or "://" in self.endpoint else f"https://{self.endpoint}"

    @property
    def host(self) -> str | None:
        """Host name of the endpoint; None means Amazon."""
        return (urlsplit(self.address).hostname or "").lower() if self.address else None

    def keys(self, environment: Mapping[str, str]) -> _Keys | None:
        """Return the keys that an environment holds for these buckets; None where it holds none."""
        key, secret, token = (
            environment.get(f"{self.key_prefix}_{name}", "")
            for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")
        )
        return _Keys(key, secret, token or None) if key and secret else None


@dataclass(frozen=True, repr=False)
class _Keys:
    key: str
    secret: str
    token: str | None


def bucket_url(
    href: str,
    rules: Sequence[BucketRule],
    pool: urllib3.PoolManager,
    environment: Mapping[str, str] | None = None,
    *,
    pay: bool = False,
) -> str:
    """Return the https URL of an object, signed for one hour where there are keys.

    Args:
        href: Address of the object, s3://BUCKET/KEY.
        rules: Rules of buckets that need an endpoint, keys or payment.
        pool: Connections for asking Amazon for the region of a bucket, once per bucket.
        environment: Variables that hold the keys; None for those of the process.
        pay: Whether the user agrees to pay for buckets that bill their readers.

    Raises:
        InvalidInput: The bucket does not exist; or it bills its readers, and the user has not agreed or has no keys.
        AccessError: Amazon did not name the region of the bucket.
    """
    bucket, _, key = href.removeprefix("s3://").partition("/")
    rule = next((rule for rule in rules if bucket in rule.buckets), BucketRule((bucket,)))
    if rule.requester_pays and not pay:
        raise InvalidInput(
            f"bucket {bucket} bills its readers, so it was not read; if you want to pay, add --requester-pays"
        )
    keys = rule.keys(os.environ if environment is None else environment)
    if keys is None and rule.requester_pays:
        raise InvalidInput(
            f"bucket {bucket} bills its readers and no keys were found: set {rule.key_prefix}_ACCESS_KEY_ID and "
            f"{rule.key_prefix}_SECRET_ACCESS_KEY in the environment of every worker"
        )
    region = _REGION if rule.address else _region_of(bucket, pool)
    base = rule.address or f"https://s3.{region}.amazonaws.com"
    if keys is None:
        return f"{base}/{bucket}/{quote(key)}"
    signed: str = obstore.sign(_client(bucket, base, region, rule.requester_pays, keys), "GET", key, _VALID)
    return signed


_regions: dict[str, str] = {}


def _region_of(bucket: str, pool: urllib3.PoolManager) -> str:
    """Return the region of a bucket at Amazon, which answers this even where it refuses access."""
    if bucket not in _regions:
        try:
            reply = pool.request("HEAD", f"https://s3.amazonaws.com/{quote(bucket)}", redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise AccessError(
                f"the region of bucket {bucket} could not be asked for ({type(error).__name__}); check the network"
            ) from error
        region = reply.headers.get("x-amz-bucket-region", "")
        if not region.replace("-", "").isalnum():
            if reply.status == 404:
                raise InvalidInput(f"there is no bucket {bucket} at Amazon; name its endpoint in a --provider-file")
            raise AccessError(
                f"Amazon did not name the region of bucket {bucket} (HTTP {reply.status}); try again later"
            )
        _regions[bucket] = region
    return _regions[bucket]


@functools.lru_cache(maxsize=16)
def _client(bucket: str, endpoint: str, region: str, requester_pays: bool, keys: _Keys) -> Any:
    """Return a client that only signs; a function gives it the keys, so that it uses none of the environment."""
    given: Any = {"access_key_id": keys.key, "secret_access_key": keys.secret, "token": keys.token, "expires_at": None}
    return S3Store(
        bucket,
        endpoint=endpoint,
        region=region,
        request_payer=requester_pays,
        virtual_hosted_style_request=False,
        client_options={"allow_http": endpoint.startswith("http://")},
        credential_provider=lambda: given,
    )
