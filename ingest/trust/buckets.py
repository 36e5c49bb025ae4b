"""Reading from S3 buckets: an s3:// href as an https URL, signed with keys from the environment of the worker alone.

Keys of one provider are never used at another: each has its own names in the environment. Where there are none, nothing
is signed, and nobody is asked for some. A signature is part of the URL's query, so it is dropped wherever queries are.
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
_REGION = "us-east-1"
"""Of endpoints that are not Amazon's, which take any."""


@dataclass(frozen=True)
class BucketRule:
    """What some buckets need; see `ProviderRule`."""

    buckets: tuple[str, ...]
    endpoint: str | None = None
    requester_pays: bool = False
    key_prefix: str = "AWS"

    @property
    def address(self) -> str | None:
        """URL of the endpoint; None for Amazon's."""
        return self.endpoint if not self.endpoint or "://" in self.endpoint else f"https://{self.endpoint}"

    @property
    def host(self) -> str | None:
        """Name of the host of the endpoint; None for Amazon's."""
        return (urlsplit(self.address).hostname or "").lower() if self.address else None

    def keys(self, environment: Mapping[str, str]) -> _Keys | None:
        """Those of the environment; None where there are none."""
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
    """The https URL of an object, signed for an hour where there are keys.

    Args:
        href: s3://bucket/key.
        rules: Of buckets that need something.
        pool: Asks Amazon once for the region of a bucket.
        environment: Where keys are; that of the process if not given.
        pay: Whether the user of this command agrees to be billed by buckets that bill whoever reads.

    Raises:
        InvalidInput: The bucket bills its readers, and the user has not agreed or there are no keys; or there is no
            such bucket.
        AccessError: The region of the bucket was not told.
    """
    bucket, _, key = href.removeprefix("s3://").partition("/")
    rule = next((rule for rule in rules if bucket in rule.buckets), BucketRule((bucket,)))
    if rule.requester_pays and not pay:
        raise InvalidInput(
            f"bucket {bucket} bills its readers: nothing was asked of it; if you want to pay, add --requester-pays"
        )
    keys = rule.keys(os.environ if environment is None else environment)
    if keys is None and rule.requester_pays:
        raise InvalidInput(
            f"bucket {bucket} bills its readers: set {rule.key_prefix}_ACCESS_KEY_ID and "
            f"{rule.key_prefix}_SECRET_ACCESS_KEY for every worker"
        )
    region = _REGION if rule.address else _region_of(bucket, pool)
    base = rule.address or f"https://s3.{region}.amazonaws.com"
    if keys is None:
        return f"{base}/{bucket}/{quote(key)}"
    signed: str = obstore.sign(_client(bucket, base, region, rule.requester_pays, keys), "GET", key, _VALID)
    return signed


_regions: dict[str, str] = {}


def _region_of(bucket: str, pool: urllib3.PoolManager) -> str:
    """Where Amazon has a bucket, which it also tells those whom it refuses."""
    if bucket not in _regions:
        try:
            reply = pool.request("HEAD", f"https://s3.amazonaws.com/{quote(bucket)}", redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise AccessError(f"the region of bucket {bucket} is not known ({type(error).__name__})") from error
        region = reply.headers.get("x-amz-bucket-region", "")
        if not region.replace("-", "").isalnum():
            if reply.status == 404:
                raise InvalidInput(f"there is no bucket {bucket} at Amazon; name its endpoint in a --provider-file")
            raise AccessError(f"the region of bucket {bucket} was not told (HTTP {reply.status})")
        _regions[bucket] = region
    return _regions[bucket]


@functools.lru_cache(maxsize=16)
def _client(bucket: str, endpoint: str, region: str, requester_pays: bool, keys: _Keys) -> Any:
    """Signs, and sends nothing. Keys are handed over by a function, or those of the environment would be mixed in."""
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
