"""`ObjectStore`: a cube in a bucket, with the promises that a folder gives.

An object appears whole or not at all, so a write is atomic by itself. What a folder does with links and renames is
done with conditional requests: `create_exclusive` puts only where nothing is (If-None-Match), `take` only over the very
object that was looked at (If-Match). A bucket has no rename, so a new cube's metadata are put key by key, none of them
over anything, and the root's zarr.json last: until then there is no cube. A marker means that the keys before it belong
to an unfinished cube; creating the same cube again continues it.

Endpoint, region and credentials come from the environment, through the readers of obstore and tensorstore; neither a
URL nor a spec ever holds a secret. Reference: docs/stores.md.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self
from urllib.parse import urlsplit

import obstore
import obstore.exceptions
import obstore.store
import tensorstore as ts

from zarr_store.bounded import MOST_METADATA
from zarr_store.crash import crashpoint
from zarr_store.errors import AccessError, CubeMismatch, IntegrityError, InvalidInput
from zarr_store.keys import check_key
from zarr_store.redact import redact_text
from zarr_store.store import Store
from zarr_store.virtual import open_virtual

__all__ = ["ObjectStore"]

_ROOT = "zarr.json"
_BEGUN = "_terrashard/begun"
"""Key of a marker with the digest of the metadata being put, there from before the first key until after the last."""

_READS_AT_ONCE = 16
"""Number of small objects in flight at once; each costs a round trip, and more gain little and get throttled."""
_RETRIES = 6
_RETRY_FOR = timedelta(seconds=60)
_SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "GOOGLE_SERVICE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN", "AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET",
)  # fmt: skip
_SETTINGS = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SKIP_SIGNATURE",
    "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT",
    "AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID", "AZURE_STORAGE_TENANT_ID", "AZURE_TENANT_ID", *_SECRETS,
)  # fmt: skip


@dataclass(frozen=True)
class ObjectStore(Store):
    """A prefix of a bucket that holds one cube.

    Attributes:
        scheme, bucket, prefix: Parts of the URL; the prefix has no slash at either end.
    """

    scheme: str
    bucket: str
    prefix: str
    _client: Any = field(repr=False, compare=False)

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> Self:
        """Return the store at s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.

        Raises:
            InvalidInput: No bucket, or something in the URL that is not bucket or prefix.
        """
        parts = urlsplit(os.fspath(url))
        if not parts.hostname or parts.netloc != parts.hostname or parts.query or parts.fragment:
            raise InvalidInput(
                f"{parts.scheme}://{parts.hostname or ''}…: expected {parts.scheme}://bucket/prefix and nothing "
                "else; account, credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, "
                "AWS_ENDPOINT_URL, AZURE_STORAGE_ACCOUNT_NAME, …)"
            )
        prefix = "/".join(part for part in parts.path.split("/") if part)
        settings = tuple((name, os.environ.get(name, "")) for name in _SETTINGS)
        return cls(parts.scheme, parts.hostname, prefix, _connect(parts.scheme, parts.hostname, prefix, settings))

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")

    def below(self, path: str) -> ObjectStore:
        return ObjectStore.at(f"{self.url}/{check_key(path, self.url)}")

    def where(self, key: str) -> str:
        return f"{self.url}/{key}"

    def exists(self, key: str = "") -> bool:
        if key:
            return self.read(key) is not None
        if self.read(_ROOT) is not None:
            return True
        with self._translated(""):
            found = obstore.list_with_delimiter(self._client)
        return bool(found["objects"] or found["common_prefixes"]) and self.read(_BEGUN) is None

    def read(self, key: str) -> bytes | None:
        with self._translated(key):
            try:
                found = obstore.get(self._client, key)
                if key.endswith(".json") and found.meta["size"] > MOST_METADATA:
                    raise IntegrityError(
                        f"{self.where(key)} has {found.meta['size']} bytes, at most {MOST_METADATA} are read"
                    )
                return bytes(found.bytes())
            except FileNotFoundError as error:
                if any(word in str(error) for word in ("NoSuchBucket", "ContainerNotFound")):
                    raise AccessError(f"{self.url}: there is no bucket {self.bucket}; create it first") from None
                return None

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        if len(keys) < 2:
            return [self.read(key) for key in keys]
        with ThreadPoolExecutor(min(_READS_AT_ONCE, len(keys))) as pool:
            return list(pool.map(self.read, keys))

    def write(self, key: str, data: bytes) -> None:
        crashpoint(f"before {key}")
        with self._translated(key):
            obstore.put(self._client, key, data)
        crashpoint(f"after {key}")

    def create_exclusive(self, key: str, data: bytes) -> bool:
        crashpoint(f"before creating {key}")
        with self._translated(key):
            try:
                obstore.put(self._client, key, data, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                # a put whose answer was lost is sent again, and then meets itself
                return self.read(key) == data
        crashpoint(f"after creating {key}")
        return True

    def take(self, key: str, held: bytes, data: bytes) -> bool:
        with self._translated(key):
            try:
                found = obstore.get(self._client, key)
                if bytes(found.bytes()) != held:
                    return False
                version = {name: found.meta[name] for name in ("e_tag", "version") if found.meta[name]}
                obstore.put(self._client, key, data, mode=version)  # type: ignore[arg-type]
            except FileNotFoundError:
                return False
            except obstore.exceptions.PreconditionError:
                return self.read(key) == data
        return True

    def delete(self, key: str) -> None:
        with self._translated(key), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._client, key)

    def list(self, prefix: str, suffix: str = "") -> list[str]:
        with self._translated(prefix):
            found = obstore.list_with_delimiter(self._client, prefix)["objects"]
        return sorted(entry["path"] for entry in found if entry["path"].endswith(suffix))

    def tensorstore(self, path: str) -> dict[str, Any]:
        check_key(path, self.url)
        at = f"{self.prefix}/{path}/" if self.prefix else f"{path}/"
        if self.scheme not in ("s3", "gs"):
            raise InvalidInput(
                f"{self.where(path)}: tensorstore has no driver for {self.scheme}://; cubes can be read there through "
                "zarr-python, sample stores cannot: give a folder, s3:// or gs://"
            )
        if self.scheme == "gs":
            return {"driver": "gcs", "bucket": self.bucket, "path": at}
        spec: dict[str, Any] = {
            "driver": "s3",
            "bucket": self.bucket,
            "path": at,
            "aws_credentials": {"type": _credentials()},  # the place of the credentials, not the credentials
            "s3_request_retries": {"max_retries": _RETRIES},
        }
        if _endpoint():
            spec["endpoint"] = _endpoint()
        if _region():
            spec["aws_region"] = _region()
        return spec

    def open_array(self, path: str, context: ts.Context) -> ts.TensorStore:
        if self.scheme in ("s3", "gs"):
            return super().open_array(path, context)
        return open_virtual(self.zarr(), path, context, exists=self._has)

    def _has(self, key: str) -> bool:
        with self._translated(key):
            try:
                obstore.head(self._client, key)
            except FileNotFoundError:
                return False
        return True

    def zarr(self) -> Any:
        from zarr.storage import ObjectStore as ZarrObjectStore

        return ZarrObjectStore(self._client, read_only=self.scheme != "memory")

    @contextlib.contextmanager
    def beside(self) -> Iterator[Store]:
        """Yield a store in memory; at the end its keys are put here, the root last and none over an existing one.

        Raises:
            CubeMismatch: Another cube was begun here, or has appeared meanwhile.
        """
        fresh = ObjectStore("memory", "new", "", obstore.store.MemoryStore())
        yield fresh
        keys = sorted(entry["path"] for batch in obstore.list(fresh._client) for entry in batch)
        staged = {key: fresh.read(key) or b"" for key in keys}
        digest = hashlib.sha256(b"".join(key.encode() + b"\0" + value for key, value in staged.items())).hexdigest()
        if not self.create_exclusive(_BEGUN, digest.encode()):
            raise CubeMismatch(
                f"{self.url}: the creation of another cube was begun here and not completed. Nothing was changed: "
                "repeat that command, choose another URL, or remove what is there"
            )
        for key in sorted(staged, key=lambda key: key == _ROOT):
            if not self.create_exclusive(key, staged[key]):
                raise CubeMismatch(
                    f"{self.where(key)} exists and does not belong to this cube. It was not changed: choose another "
                    "URL, or remove what is there"
                )
        self.delete(_BEGUN)

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """Turn the refusal of a bucket into `AccessError` without secrets; the key must be valid."""
        if key:
            check_key(key, self.url)
        try:
            yield
        except (obstore.exceptions.BaseError, PermissionError) as error:
            refused = isinstance(
                error,
                obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError | PermissionError,
            )
            advice = "check the credentials and their rights" if refused else "check endpoint, region and network"
            # not `from error`: its text and cause may quote requests
            raise AccessError(f"{self.where(key)}: {_reason(error)}; {advice}") from None


@functools.lru_cache(maxsize=64)
def _connect(scheme: str, bucket: str, prefix: str, settings: tuple[tuple[str, str], ...]) -> Any:
    """Return a client of one prefix; a changed environment gives a new one."""
    del settings
    options: Any = {"timeout": "300s", "connect_timeout": "10s"}
    retries: Any = {"max_retries": _RETRIES, "retry_timeout": _RETRY_FOR}
    try:
        if scheme == "gs":
            return obstore.store.GCSStore(bucket, prefix=prefix or None, client_options=options, retry_config=retries)
        if scheme == "az":
            there = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT", "")
            options["allow_http"] = there.startswith("http://")  # as with S3
            return obstore.store.AzureStore(bucket, prefix=prefix or None, client_options=options, retry_config=retries)
        config: Any = {}
        if _endpoint():
            config["endpoint"] = _endpoint()
            # the user named it: an http:// endpoint is a store of their own network
            options["allow_http"] = _endpoint().startswith("http://")
        if _region():
            config["region"] = _region()
        return obstore.store.S3Store(
            bucket, prefix=prefix or None, config=config, client_options=options, retry_config=retries
        )
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise AccessError(f"{scheme}://{bucket}: {_reason(error)}; check the settings of the environment") from None


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "")


def _credentials() -> str:
    """Return the provider of tensorstore that finds the credentials that obstore finds."""
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        return "anonymous"
    return "environment" if os.environ.get("AWS_ACCESS_KEY_ID") else "default"


def _reason(error: Exception) -> str:
    """Return the first line of an error, of bounded length, without the body of an answer and without secrets."""
    line = str(error).partition("\n")[0].partition("<?xml")[0].strip()
    return redact_text(line)[:300]
