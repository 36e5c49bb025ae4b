"""`Access`: the limits of reading one asset: time, attempts, sizes, rates and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from ingest.request.config import IngestConfig
from ingest.request.running import parse_limit
from ingest.trust.buckets import BucketRule
from ingest.trust.providers import PROVIDERS
from ingest.trust.sign import Signing, SignRule

__all__ = ["Access"]


@dataclass(frozen=True)
class Access:
    """Limits of reading one asset.

    Attributes:
        attempts: Number of attempts to open and read an asset before it counts as unreadable.
        deadline_s: Seconds after which no new attempt begins.
        backoff_s: Longest first pause, seconds; the bound of later random pauses doubles, up to 16 times this.
        connect_timeout_s: Seconds to wait for the TCP and TLS handshake.
        low_speed_s: Seconds to wait for the headers of an answer; a transfer below 1 kB/s for as long is ended, too.
        max_pixels: Largest number of pixels; a larger raster is refused before anything is decoded.
        max_block_bytes: Largest decoded block, in bytes; a raster with a larger one is refused.
        sign: Provider whose tokens are added to hrefs right before they are opened.
        sign_rules: Rules for tokens of the user's own providers.
        bucket_rules: Rules for S3 buckets: their endpoint, and the names of the variables that hold keys.
        rates: (host, requests per second) in addition to the providers' rules; all workers share one count.
        private_names: Host names that may lead to a private address; None for any.
        requester_pays: Whether buckets may be read that bill the reader.
        signed_hrefs: Href → the form that the catalogue signed, for files that nobody else can sign. It is neither
            shown nor compared.
    """

    attempts: int = 4
    deadline_s: float = 120.0
    backoff_s: float = 0.5
    connect_timeout_s: float = 10.0
    low_speed_s: int = 15
    max_pixels: int = 1 << 33
    max_block_bytes: int = 256 << 20
    sign: Signing = "none"
    sign_rules: tuple[SignRule, ...] = ()
    bucket_rules: tuple[BucketRule, ...] = tuple(rule.bucket_rule for rule in PROVIDERS if rule.bucket_rule)
    rates: tuple[tuple[str, float], ...] = ()
    private_names: tuple[str, ...] | None = ()
    requester_pays: bool = False
    signed_hrefs: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, config: IngestConfig, source: str = "") -> Self:
        """Make the limits of a config; with on_error "skip" nothing is tried twice.

        Args:
            config: Retries, timeouts and trust.
            source: SOURCE as the user typed it; its own host may be a private one.
        """
        own = (urlsplit(source).hostname or "").lower() if "://" in source else ""
        # an endpoint that the user names is trusted, wherever it is
        named = [rule.bucket_rule.host for rule in config.trust.providers if rule.bucket_rule]
        return cls(
            private_names=None if config.trust.allow_private_hosts else tuple(name for name in (own, *named) if name),
            attempts=1 if config.running.on_error == "skip" else config.running.retries + 1,
            connect_timeout_s=min(10.0, config.running.timeout_s),
            low_speed_s=max(1, round(config.running.timeout_s / 2)),
            sign=config.trust.sign,
            requester_pays=config.trust.requester_pays,
            sign_rules=tuple(rule.sign_rule for rule in config.trust.providers if rule.sign_rule),
            bucket_rules=tuple(rule.bucket_rule for rule in (*config.trust.providers, *PROVIDERS) if rule.bucket_rule),
            rates=(
                *(parse_limit(text) for text in config.running.rate_limits),
                *((host, rule.rate_limit) for rule in config.trust.providers if rule.rate_limit for host in rule.hosts),
            ),
        )
