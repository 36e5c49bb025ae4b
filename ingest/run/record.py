"""`RunRecord` keeps what only the cluster knows of a run, for the report that is written after the cluster has ended.

The scheduler makes Dask's performance report. Workers count the time and bytes of each stage, and the page of
`dashboard.py` gathers them. Nothing here may stop an ingest: what cannot be obtained is absent from the report, with
the reason.
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
    """Facts about the cluster of a run, for the report; give an empty record to `run` or `extend`, which fill it.

    Attributes:
        plan: The plan that was run; for an extension, the merged plan.
        performance: Dask's performance report as one HTML document that loads nothing; None without one.
        why_none: Reason why there is no performance report.
        stages: Seconds and bytes of each stage, all workers together.
        workers: Number of workers and of their threads at the end.
        seconds: Wall time of the work on the cluster.
    """

    plan: Plan | None = None
    performance: str | None = None
    why_none: str = "there was nothing to do, so no cluster was started"
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    workers: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    @contextmanager
    def watching(self, client: Client) -> Iterator[None]:
        """Record what happens on a cluster during the block; errors of the block are passed on."""
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
            cause = redact_text(f"{type(error).__name__}: {error}")[:300]
            self.why_none = f"the scheduler could not make the performance report: {cause}"
            log.warning("the report will have no performance report of Dask: %s", self.why_none)
            return False
        return True

    def _rates(self, client: Client, before: Mapping[str, list[float]]) -> None:
        page = client.run_on_scheduler(_page_document)  # type: ignore[no-untyped-call]
        counted = page.get("rates", {}).get("stages", {})
        now = _totals(client)
        self.workers = (int(page.get("workers", 0)), int(page.get("threads", 0)))
        self.seconds = float(page.get("elapsed", 0.0))
        for name in dict.fromkeys((*counted, *now)):
            zero = [0.0, 0.0]
            fresh = [a - b for a, b in zip(now.get(name, zero), before.get(name, zero), strict=True)]
            kept = counted.get(name, {})
            # the page has the counts of workers that died, the workers those since their last heartbeat
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
    """Return the [seconds, bytes] of each stage, summed over the workers that answer."""
    totals: dict[str, list[float]] = {}
    try:
        answers = client.run(stage_totals, on_error="ignore")
    except Exception as error:  # noqa: BLE001  # as above
        log.debug("the workers could not be asked for their counters: %s", error)
        return totals
    for counted in answers.values():
        for name, (seconds, nbytes) in counted.items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += seconds
            total[1] += nbytes
    return totals


def _page_document(dask_scheduler: Any) -> dict[str, Any]:
    """Get what the page shows; this runs on the scheduler."""
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
