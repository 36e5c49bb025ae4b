"""`ShardPage` is the page `/terrashard` beside Dask's own: the state of each shard, the rates, and the failures.

A plugin of the scheduler holds the state. It gets events from the client, and the scheduler knows which tasks are at a
worker. It serves three paths: the page itself, which loads nothing from elsewhere; `data.json`, which the page asks for
once a second; and `metrics`, for Prometheus. Names from catalogues are data: the page sets them as text.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.http.utils import RequestHandler

from ingest.plan.outlines import outlines_of
from ingest.trust.hosts import machine_names, why_refused
from ingest.trust.hrefs import is_loopback
from ingest.trust.redact import redact_url
from ingest.worker.meters import STAGES
from zarr_store.printable import one_line, printable, printable_value

if TYPE_CHECKING:
    from ingest.plan.plan import Plan
    from ingest.run.outcome import IngestEvent
    from zarr_store.ledger import LedgerRow
from zarr_store.states import ShardStates

__all__ = ["PAGE", "ShardPage", "page_url", "publish"]

log = logging.getLogger(__name__)

PAGE = "terrashard"
"""Path of the page, and name of the plugin and of the topic of its events."""
STATES = {"pending": ".", "running": "r", "done": "d", "partial": "m", "failed": "f"}
"""The letter that is sent for each shard, as a cube may have a hundred thousand; "m" has something missing."""

_SHARD_KEY = re.compile(r"shard-(?P<collection>.+)-(?P<t>\d+)-(?P<y>\d+)-(?P<x>\d+)-[0-9a-f]+-[0-9a-f]+")
_MOST_FAILURES = 500
"""Largest number of failures that the page lists, the latest ones."""
_RATE_WINDOW_S = 15.0
"""Seconds over which the present rates are averaged."""


class ShardPage(SchedulerPlugin):
    """The state of an ingest on the scheduler, where `publish` registers it."""

    name = PAGE
    idempotent = True

    def __init__(self) -> None:
        self.run: dict[str, Any] = {}
        self.states: dict[str, bytearray] = {}
        self.failures: deque[dict[str, Any]] = deque(maxlen=_MOST_FAILURES)
        self.ended: deque[float] = deque(maxlen=4096)
        self.counters = {"done": 0, "partial": 0, "failed": 0}
        self.lost: dict[str, list[float]] = {}
        self.seen: dict[str, dict[str, list[float]]] = {}
        self.base: dict[str, list[float]] = {}
        self.samples: deque[tuple[float, dict[str, list[float]]]] = deque(maxlen=64)
        self.scheduler: Any = None

    async def start(self, scheduler: Any) -> None:
        """Add the paths of the page; a second run on the same scheduler uses them again."""
        self.scheduler = scheduler
        routes = [
            (rf"/{PAGE}", _Page, {"dask_server": scheduler}),
            (rf"/{PAGE}/data\.json", _Data, {"dask_server": scheduler}),
            (rf"/{PAGE}/metrics", _Metrics, {"dask_server": scheduler}),
        ]
        scheduler.http_application.add_handlers(r".*", routes)

    def log_event(self, topic: str, msg: Any) -> None:
        """Take an event from the client: a run began, a shard ended, or a run ended."""
        if topic != PAGE or not isinstance(msg, Mapping):
            return
        if msg.get("event") == "begin":
            self._begin(msg)
        elif msg.get("event") == "shard":
            self._ended(msg)
        elif msg.get("event") == "end":
            self.run["finished"] = time.time()

    def remove_worker(self, scheduler: Any, worker: str, **_: Any) -> None:
        """Keep the counters of a worker that is gone."""
        for stage, total in self.seen.pop(worker, {}).items():
            _add(self.lost, stage, total)

    def _begin(self, msg: Mapping[str, Any]) -> None:
        self.run = {name: value for name, value in msg.items() if name not in ("event", "states")}
        self.run |= {"started": time.time(), "finished": None}
        self.states = {name: bytearray(text, "ascii") for name, text in msg["states"].items()}
        self.failures.clear()
        self.failures.extend(printable_value(msg.get("failures", ())))
        self.ended.clear()
        self.samples.clear()
        self.counters = dict.fromkeys(self.counters, 0)
        self.base = self._totals()

    def _ended(self, msg: Mapping[str, Any]) -> None:
        place = self._place(msg["collection"], msg["index"])
        if place is None:
            return
        self.states[msg["collection"]][place] = ord(STATES[msg["state"]])
        self.counters[msg["state"]] += 1
        self.ended.append(time.time())
        self.failures.extend(printable_value(msg.get("failures", ())))

    def _place(self, collection: str, index: Any) -> int | None:
        found = next((c for c in self.run.get("collections", ()) if c["name"] == collection), None)
        if found is None:
            return None
        (t, y, x), (nt, ny, nx) = index, found["shards"]
        return (t * ny + y) * nx + x if 0 <= t < nt and 0 <= y < ny and 0 <= x < nx else None

    def _totals(self) -> dict[str, list[float]]:
        """Return the [seconds, bytes] of each stage, summed over all workers, also over those that are gone."""
        for address, worker in self.scheduler.workers.items():
            counted = worker.metrics.get(PAGE)
            if isinstance(counted, Mapping):
                self.seen[address] = {str(name): [float(v) for v in total] for name, total in counted.items()}
        totals = {name: list(total) for name, total in self.lost.items()}
        for counts in self.seen.values():
            for stage, total in counts.items():
                _add(totals, stage, total)
        return totals

    def _since_begin(self) -> dict[str, list[float]]:
        zero = [0.0, 0.0]
        return {
            name: [max(0.0, value - first) for value, first in zip(total, self.base.get(name, zero), strict=True)]
            for name, total in self._totals().items()
        }

    def document(self) -> dict[str, Any]:
        """Make the document of everything that the page shows."""
        now = time.time()
        states = {name: bytearray(text) for name, text in self.states.items()}
        for worker in self.scheduler.workers.values():
            for task in worker.processing:
                found = _SHARD_KEY.fullmatch(str(task.key))
                place = found and self._place(found["collection"], [int(found[axis]) for axis in "tyx"])
                if found and place is not None and states[found["collection"]][place] == ord(STATES["pending"]):
                    states[found["collection"]][place] = ord(STATES["running"])
        collections = [
            {
                **c,
                "name": one_line(c["name"]),
                "states": states[c["name"]].decode(),
                "counts": _counts(states[c["name"]]),
            }
            for c in self.run.get("collections", ())
        ]
        end = self.run.get("finished") or now
        return {
            **self.run,
            "now": now,
            "collections": collections,
            "workers": len(self.scheduler.workers),
            "threads": sum(worker.nthreads for worker in self.scheduler.workers.values()),
            "ended": sum(self.counters.values()),
            "rates": self._rates(now, end),
            "failures": list(self.failures)[::-1],
        }

    def _rates(self, now: float, end: float) -> dict[str, Any]:
        totals = self._since_begin()
        if not self.samples or now - self.samples[-1][0] > 0.5:
            self.samples.append((now, totals))
        before, past = next((s for s in self.samples if now - s[0] <= _RATE_WINDOW_S), (now, totals))
        elapsed = max(1e-9, end - self.run.get("started", now))
        recent = sum(moment > now - _RATE_WINDOW_S for moment in self.ended)
        stages = {}
        for name in [*STAGES, *sorted(set(totals) - set(STAGES))]:
            seconds, nbytes = totals.get(name, [0.0, 0.0])
            span = now - before
            stages[name] = {
                "seconds": round(seconds, 3),
                "bytes": int(nbytes),
                "mb_s": round(nbytes / 1e6 / elapsed, 3),
                "mb_s_now": round((nbytes - past.get(name, [0, 0])[1]) / 1e6 / span, 3) if span > 1 else None,
            }
        return {
            "shards_s": round(sum(self.counters.values()) / elapsed, 3),
            "shards_s_now": round(recent / max(1e-9, min(_RATE_WINDOW_S, elapsed)), 3),
            "stages": stages,
        }

    def metrics(self) -> str:
        """Write the counters in the text format of Prometheus."""
        lines = [
            "# HELP terrashard_shards_total Shards that ended in this run, by outcome.",
            "# TYPE terrashard_shards_total counter",
        ]
        lines += [f'terrashard_shards_total{{state="{state}"}} {count}' for state, count in self.counters.items()]
        lines += ["# HELP terrashard_shards Shards of the cube, by state.", "# TYPE terrashard_shards gauge"]
        for collection in self.document()["collections"]:
            label = _label(collection["name"])
            lines += [
                f'terrashard_shards{{collection="{label}",state="{state}"}} {count}'
                for state, count in collection["counts"].items()
            ]
        totals = self._since_begin()
        for at, unit in enumerate(("seconds", "bytes")):
            metric = f"terrashard_stage_{unit}_total"
            lines += [f"# HELP {metric} {unit.capitalize()} of each stage, all workers.", f"# TYPE {metric} counter"]
            lines += [f'{metric}{{stage="{_label(name)}"}} {total[at]:.6g}' for name, total in sorted(totals.items())]
        return "\n".join(lines) + "\n"


class _Handler(RequestHandler):
    """The checks and headers of every answer."""

    def set_default_headers(self) -> None:
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-store")

    def prepare(self) -> None:
        """Refuse requests from other hosts and origins on loopback; elsewhere a proxy may use a name of its own."""
        connection: Any = self.request.connection
        if is_loopback(connection.stream.socket.getsockname()[0]):
            reason = why_refused(self.request.headers.get("Host"), self.request.headers.get("Origin"), machine_names())
            if reason is not None:
                self.set_status(403)
                self.finish(f"refused: {reason}\n")

    @property
    def page(self) -> ShardPage:
        found: ShardPage = self.server.plugins[PAGE]
        return found


class _Page(_Handler):
    def get(self) -> None:
        nonce = secrets.token_urlsafe(12)
        self.set_header(
            "Content-Security-Policy",
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
        )
        self.set_header("Content-Type", "text/html; charset=utf-8")
        text = (Path(__file__).parent / "templates" / "dashboard.html").read_text(encoding="utf-8")
        self.write(text.replace("{{nonce}}", nonce))


class _Data(_Handler):
    def get(self) -> None:
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.write(json.dumps(self.page.document()).replace("</", "<\\/"))


class _Metrics(_Handler):
    def get(self) -> None:
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.write(self.page.metrics())


def publish(
    client: Client,
    plan: Plan,
    url: str,
    known: Mapping[str, ShardStates],
    tell: Callable[[IngestEvent], None],
) -> tuple[str, Callable[[IngestEvent], None]]:
    """Put the page on the client's scheduler.

    Args:
        client: A client of the cluster that does the work.
        plan: The plan of the cube.
        url: The cube, for the heading.
        known: States of the shards of each collection, as they are before the run.
        tell: Function that also gets the events.

    Returns:
        (Address of the page, function that takes the events from now on). Where the scheduler cannot show the page,
        the address is that of Dask's own page and events go to `tell` alone: an ingest does not stop for it.
    """
    try:
        client.register_plugin(ShardPage())
    except Exception as error:  # noqa: BLE001  # the ingest continues, whatever a foreign scheduler lacks
        log.warning("there is no page at /%s, as the scheduler cannot load it (%s)", PAGE, error)
        return client.dashboard_link, tell
    where = {task.key: (task.collection, task.index) for task in plan.tasks}
    times = {spec.collection: spec.times[:: spec.layout.shard[0]] for spec in plan.specs}

    def put(message: dict[str, Any]) -> None:
        try:
            client.log_event(PAGE, message)
        except Exception as error:  # noqa: BLE001  # as above; the run itself reports a scheduler that is gone
            log.debug("the page did not get an event: %s", error)

    def problems(collection: str, row: LedgerRow, words: str = "") -> list[dict[str, Any]]:
        base = {
            "collection": collection,
            "index": list(row.index),
            "time": times[collection][row.index[0]],
            "state": row.state,
        }
        named = [
            {**base, "item": s.item_id, "asset": s.asset or "", "reason": s.reason or "unreadable"}
            for s in row.sources
            if s.state == "missing"
        ]
        if not named and row.state == "failed":
            named = [{**base, "item": "", "asset": "", "reason": words or "the shard could not be made"}]
        return named

    def tell_both(event: IngestEvent) -> None:
        if event.kind == "shard" and event.row is not None and event.row.key in where:
            collection, index = where[event.row.key]
            row = event.row
            put(
                {
                    "event": "shard",
                    "collection": collection,
                    "index": list(index),
                    "state": row.state,
                    "failures": problems(collection, row, event.message),
                }
            )
            if event.done >= event.total:  # the event "finished" comes after the cluster has ended
                put({"event": "end"})
        tell(event)

    letters: dict[str, bytearray] = {}
    for spec in plan.specs:
        letters[spec.collection] = bytearray(STATES["pending"].encode() * spec.shard_count)
    for task in plan.tasks:
        there = known.get(task.collection)
        if there and there.state(task.index) == "done" and there.has_key(task.index, task.key):
            (t, y, x), (_, tall, wide) = task.index, there.spec.shard_counts
            letters[task.collection][(t * tall + y) * wide + x] = ord(STATES["done"])
    collections, states = [], {}
    for spec in plan.specs:
        shape = list(spec.shard_counts)
        states[spec.collection] = letters[spec.collection].decode()
        _, rows, columns = spec.layout.shard
        collections.append(
            {
                "name": spec.collection,
                "shards": shape,
                "times": list(times[spec.collection]),
                # size of the grid in shards; the last ones are cut at its edge
                "size": [spec.grid.shape[0] / rows, spec.grid.shape[1] / columns],
                "crs": spec.grid.crs if spec.grid.crs.startswith("EPSG:") else "a CRS without a code",
                "lonlat": list(spec.grid.lonlat_bounds()),
                "outlines": outlines_of(plan, spec),
            }
        )
    put(
        {
            "event": "begin",
            "cube": one_line(redact_url(url)),
            "plan": plan.digest[:12],
            "collections": collections,
            "states": states,
        }
    )
    return page_url(client.dashboard_link), tell_both


def page_url(dashboard: str) -> str:
    """Make the address of the page from that of Dask's status page.

    >>> page_url("http://127.0.0.1:8787/status")
    'http://127.0.0.1:8787/terrashard'
    """
    return f"{dashboard.removesuffix('/status').rstrip('/')}/{PAGE}"


def _add(totals: dict[str, list[float]], stage: str, more: list[float]) -> None:
    old = totals.get(stage, [0.0, 0.0])
    totals[stage] = [a + b for a, b in zip(old, more, strict=True)]


def _counts(states: bytearray) -> dict[str, int]:
    return {name: states.count(letter.encode()) for name, letter in STATES.items()}


def _label(text: str) -> str:
    """Escape text as the value of a label in Prometheus' format."""
    return printable(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
