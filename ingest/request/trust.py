"""`Trust`: the places that the user trusts, and the keys to read them with.

Plans and cubes do not keep these settings, as they may come from somebody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ingest.request.names import Names
from ingest.trust.hrefs import HrefPolicy
from ingest.trust.providers import ProviderRule

__all__ = ["Trust"]


class Trust(BaseModel):
    """The hosts and folders that may be opened, and the keys for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sign: Literal["planetary-computer", "none"] = Field(
        "none", description="planetary-computer: add its tokens to hrefs right before they are opened"
    )
    providers: tuple[ProviderRule, ...] = Field(
        (), description="rules of more providers, or (command line, TOML, keywords) the paths of TOML files of them"
    )
    allow_hosts: Names = Field((), description="more hosts (or s3 buckets) that hrefs may name; *.example.org works")
    allow_local: Names = Field((), description="more folders that local hrefs may lie in")
    allow_private_hosts: bool = Field(False, description="allow private, loopback and link-local addresses")
    requester_pays: bool = Field(False, description="read buckets that bill their readers, with your keys")

    @field_validator("providers", mode="before")
    @classmethod
    def _refuse_paths(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str | Path) else value
        paths = [str(one) for one in given if isinstance(one, str | Path)] if isinstance(given, Sequence) else []
        if paths:
            raise ValueError(
                f"expected rules of providers, got {', '.join(map(repr, paths))}; read a file with "
                "ingest.trust.providers.load_provider_file, or give its path to find_scenes or make_plan"
            )
        return value

    def href_policy(self, source: str, provider_hosts: Iterable[str] = ()) -> HrefPolicy:
        """Return the policy for hrefs of `source`: its own place, places of these settings, its provider's hosts."""
        return HrefPolicy.around(
            source,
            hosts=(*self.allow_hosts, *provider_hosts),
            roots=self.allow_local,
            allow_private=self.allow_private_hosts,
        )
