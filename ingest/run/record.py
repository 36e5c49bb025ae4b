"""`RunRecord`: what only the cluster knows of a run and takes with it when it ends, for the report on it.

Dask's performance report is made by the scheduler; times and bytes of each stage are counted by workers and gathered by
the page of `dashboard.py`. Nothing here may stop an ingest: what cannot be had is absent from the report, and the
report says why.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client, performance_report

from ingest.run.dashboard import PAGE
from ingest.trust.redact import redact_document, redact_text
from ingest.worker.meters import stage_totals

if TYPE_CHECKING:
    from ingest.plan.plan import Plan

__all__ = ["RunRecord"]

log = logging.getLogger(__name__)

_HTML_HEAD = re.compile(r"\s*(<!DOCTYPE|<html)", re.IGNORECASE)


@dataclass
class RunRecord:
    """Filled while a plan is run; give it to `run` or `extend`.

    Attributes:
        plan: What was run in the end; of an extension, the merged plan.
        performance: Dask's performance report as one HTML document that loads nothing; None without one.
        why_none: Why there is no performance report.
        stages: Stage → seconds and bytes, all workers together.
        workers: Workers and threads at the end.
        seconds: Wall time of the work on the cluster.
    """

    plan: Plan | None = None
    performance: str | None = None
    why_none: str = "nothing was to do, so no cluster was started"
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    workers: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    @contextmanager
    def watching(self, client: Client) -> Iterator[None]:
        """Record what happens on a cluster; what the block raises goes on."""
        before = _totals(client)
        with tempfile.TemporaryDirectory(prefix="terrashard-report-") as folder:
            file = Path(folder, "dask.html")
            report: Any = performance_report(str(file), mode="inline")  # type: ignore[no-untyped-call]
            begun = self._attempt(lambda: _sync(client, report.__aenter__()))
            try:
                yield
            finally:
                self._attempt(lambda: self._rates(client, before))
                code = "one task for each shard; docs/ingest.md"
                if begun and self._attempt(lambda: _sync(client, report.__aexit__(None, None, None, code=code))):
                    text = file.read_text(encoding="utf-8") if file.exists() else ""
                    if _HTML_HEAD.match(text):
                        self.performance = redact_document(text)

    def _attempt(self, what: Any) -> bool:
        try:
            what()
        except Exception as error:  # noqa: BLE001  # a report is no reason to stop an ingest
            self.why_none = f"the scheduler could not make it: {redact_text(f'{type(error).__name__}: {error}')[:300]}"
            log.warning("no performance report: %s", self.why_none)
            return False
        return True

    def _rates(self, client: Client, before: Mapping[str, list[float]]) -> None:
        page = client.run_on_scheduler(_page_document)  # type: ignore[no-untyped-call]
        told = page.get("rates", {}).get("stages", {})
        now = _totals(client)
        self.workers = (int(page.get("workers", 0)), int(page.get("threads", 0)))
        self.seconds = float(page.get("elapsed", 0.0))
        for name in dict.fromkeys((*told, *now)):
            zero = [0.0, 0.0]
            fresh = [a - b for a, b in zip(now.get(name, zero), before.get(name, zero), strict=True)]
            kept = told.get(name, {})
            # the page knows of workers that have died, the workers know of the seconds since their last heartbeat
            self.stages[name] = {
                "seconds": max(float(kept.get("seconds", 0.0)), fresh[0]),
                "bytes": max(float(kept.get("bytes", 0.0)), fresh[1]),
            }


def _sync(client: Client, coroutine: Any) -> None:
    async def wait() -> None:
        await coroutine

    with client.as_current():
        client.sync(wait)  # type: ignore[no-untyped-call]


def _totals(client: Client) -> dict[str, list[float]]:
    """Stage → [seconds, bytes] over the workers that answer."""
    totals: dict[str, list[float]] = {}
    try:
        answers = client.run(stage_totals, on_error="ignore")
    except Exception as error:  # noqa: BLE001  # as above
        log.debug("the workers were not asked: %s", error)
        return totals
    for counted in answers.values():
        for name, (seconds, nbytes) in counted.items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += seconds
            total[1] += nbytes
    return totals


def _page_document(dask_scheduler: Any) -> dict[str, Any]:
    """On the scheduler: what the page shows."""
    page = dask_scheduler.plugins.get(PAGE)
    if page is None:
        return {}
    document: dict[str, Any] = page.document()
    end = document.get("finished") or document["now"]
    return {
        "rates": document["rates"],
        "workers": document["workers"],
        "threads": document["threads"],
        "elapsed": max(0.0, end - document.get("started", end)),
    }
