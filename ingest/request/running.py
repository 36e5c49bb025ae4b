"""`Running`: how a plan is run. No setting changes what a complete cube holds, so plans do not keep them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ingest.request.names import Names

__all__ = ["Running", "parse_limit"]

Positive = Annotated[int, Field(gt=0)]


class Running(BaseModel):
    """The settings of a run: handling of errors, workers and cluster, and patience with servers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strict: bool = Field(
        False, description="turn warnings about item counts, absent bands and odd pixel values into errors"
    )
    on_error: Literal["retry", "skip", "fail"] = Field(
        "retry",
        description="unreadable asset: try again before it counts as missing, take it as missing, or end the run",
    )
    limit: Positive | None = Field(None, description="stop after this many shards; the same command continues")
    store: Literal["folder", "icechunk"] | None = Field(
        None,
        description="store of a new cube: plain files or objects, or an Icechunk repository with one commit per run",
    )
    workers: Positive = Field(2, description="number of worker processes; LEAST..MOST adapts it to the work")
    workers_least: Positive | None = Field(
        None, description="least number of workers, set by `workers = LEAST..MOST`; none keeps all of them"
    )
    threads_per_worker: Positive = Field(1, description="threads of each worker process")
    memory: str | None = Field(None, description='memory limit of one worker, e.g. "4GB"')
    scheduler: str | None = Field(None, description="address of a running Dask scheduler")
    cluster: Literal["local", "ssh", "slurm", "pbs", "k8s", "gateway"] = Field(
        "local", description="where workers are started"
    )
    hosts: Names = Field((), description="for cluster ssh: the host of the scheduler, then one host per worker")
    cluster_options: dict[str, Any] = Field(
        {}, description="options of the cluster: queue, account, walltime, image, namespace, address, username, port …"
    )
    tls: str | None = Field(None, description="folder with ca.pem, cert.pem and key.pem for every connection")
    expose: bool = Field(False, description="allow ports that other machines can reach, without TLS")
    rate_limits: Names = Field((), description="HOST=N: at most N requests per second from all workers together")
    dashboard: str | None = Field(None, description='address of the dashboard, e.g. ":8787"; none picks a free port')
    timeout_s: float = Field(30.0, gt=0, le=3600, description="seconds that a server may be silent")
    retries: int = Field(4, ge=0, le=20, description="number of times that a failed request is repeated")

    @model_validator(mode="before")
    @classmethod
    def _worker_range(cls, data: Any) -> Any:
        asked = data.get("workers") if isinstance(data, dict) else None
        if isinstance(asked, str) and (match := re.fullmatch(r"\s*(\d+)\s*\.\.\s*(\d+)\s*", asked)):
            least, most = (int(part) for part in match.groups())
            if not 1 <= least <= most:
                raise ValueError(f"workers is a number or LEAST..MOST with 1 ≤ LEAST ≤ MOST, got {asked}")
            return {**data, "workers": most, "workers_least": least}
        return data

    @field_validator("cluster_options", mode="before")
    @classmethod
    def _parse_options(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        pairs = [str(text).partition("=") for text in value]
        for name, equals, _ in pairs:
            if not equals or not name.strip():
                raise ValueError(f"a cluster option is KEY=VALUE, e.g. queue=short, got {name!r}")
        return {name.strip().replace("-", "_"): text.strip() for name, _, text in pairs}

    @field_validator("rate_limits")
    @classmethod
    def _check_limits(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_limit(text)
        return value

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+(\.\d+)?\s*([kMGT]i?)?B", value.strip()):
            raise ValueError(f"expected a size such as 4GB or 512MiB, got {value!r}")
        return value


def parse_limit(text: str) -> tuple[str, float]:
    """Parse a rate limit of the form HOST=REQUESTS_PER_SECOND.

    >>> parse_limit("eodata=8")
    ('eodata', 8.0)
    """
    host, _, number = text.partition("=")
    if not host.strip() or not re.fullmatch(r"\s*\d+(\.\d+)?\s*", number) or not 0 < float(number) <= 10_000:
        raise ValueError(f"a rate limit is HOST=REQUESTS_PER_SECOND, e.g. eodata=8, got {text!r}")
    return host.strip(), float(number)
