"""Reading from S3 buckets: endpoint, who pays, and keys, which come from the environment of the worker alone.

Keys of one provider are never used at another: each has its own names in the environment. Where there are none, GDAL is
told not to sign, so that it does not ask the machine's metadata service for some.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rasterio.session import Session

from zarr_store.errors import InvalidInput

__all__ = ["BucketKeys", "BucketRule", "bucket_options"]


@dataclass(frozen=True)
class BucketRule:
    """What some buckets need; see `ProviderRule`."""

    buckets: tuple[str, ...]
    endpoint: str | None = None
    requester_pays: bool = False
    key_prefix: str = "AWS"


class BucketKeys(Session):  # type: ignore[misc]
    """rasterio's session over keys that are given: it refuses them as plain options, and its own needs boto3."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._options = dict(options)

    @property
    def credentials(self) -> dict[str, str]:
        return dict(self._options)

    def get_credential_options(self) -> dict[str, str]:
        return dict(self._options)


def bucket_options(
    href: str, rules: Sequence[BucketRule], environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], BucketKeys]:
    """(GDAL options, session) for an s3 href.

    Raises:
        InvalidInput: The bucket bills its readers, and there are no keys.
    """
    found = os.environ if environment is None else environment
    bucket = href.removeprefix("s3://").partition("/")[0]
    rule = next((rule for rule in rules if bucket in rule.buckets), BucketRule((bucket,)))
    names = (f"{rule.key_prefix}_ACCESS_KEY_ID", f"{rule.key_prefix}_SECRET_ACCESS_KEY")
    key, secret = (found.get(name) for name in names)
    options: dict[str, Any] = {}
    if rule.endpoint:
        scheme, _, host = rule.endpoint.rpartition("://")
        options |= {"AWS_S3_ENDPOINT": host, "AWS_VIRTUAL_HOSTING": "FALSE"}
        options["AWS_HTTPS"] = "NO" if scheme == "http" else "YES"
    if not (key and secret):
        if rule.requester_pays:
            raise InvalidInput(f"bucket {bucket} bills its readers: set {' and '.join(names)} for every worker")
        return options | {"AWS_NO_SIGN_REQUEST": "YES"}, BucketKeys({})
    if rule.requester_pays:
        options["AWS_REQUEST_PAYER"] = "requester"
    keys = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    if token := found.get(f"{rule.key_prefix}_SESSION_TOKEN"):
        keys["AWS_SESSION_TOKEN"] = token
    return options, BucketKeys(keys)
