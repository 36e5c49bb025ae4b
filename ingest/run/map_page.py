"""`publish_map` shows a map that is being made on the page `/terrashard` of a Dask cluster, shard by shard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from distributed import Client

from ingest.run.dashboard import PAGE, STATES, ShardPage, page_url
from ingest.trust.redact import redact_url
from zarr_store.grid import Grid
from zarr_store.printable import one_line

__all__ = ["publish_map"]

log = logging.getLogger(__name__)

Index = tuple[int, int, int]


def publish_map(
    client: Client, url: str, digest: str, grid: Grid, side: int, times: Sequence[str], done: Collection[Index]
) -> tuple[str, Callable[[Index | None], None]]:
    """Put the shards of a map on the page of the client's scheduler.

    Args:
        client: A client of the cluster that makes the map.
        url: The map, for the heading.
        digest: Digest of what is made.
        grid: Grid of the map.
        side: Side of a shard, pixels.
        times: Dates of the map; one of a map without an axis `time`.
        done: Shards that are complete already.

    Returns:
        (Address of the page, function that takes each shard that is complete, and None at the end). Where the scheduler
        cannot show the page, the address is that of Dask's own page: a map does not stop for it.
    """
    try:
        client.register_plugin(ShardPage())
    except Exception as error:  # noqa: BLE001  # whatever a foreign scheduler lacks
        log.warning("there is no page at /%s, as the scheduler cannot load it (%s)", PAGE, error)
        return client.dashboard_link, lambda _: None

    def put(message: dict[str, Any]) -> None:
        try:
            client.log_event(PAGE, message)
        except Exception as error:  # noqa: BLE001  # the run itself reports a scheduler that is gone
            log.debug("the page did not get an event: %s", error)

    def tell(index: Index | None) -> None:
        if index is None:
            put({"event": "end"})
        else:
            put({"event": "shard", "collection": "map", "index": list(index), "state": "done"})

    shape = (len(times), -(-grid.height // side), -(-grid.width // side))
    letters = [STATES["pending"]] * (shape[0] * shape[1] * shape[2])
    for t, y, x in done:
        letters[(t * shape[1] + y) * shape[2] + x] = STATES["done"]
    about = {
        "name": "map",
        "shards": list(shape),
        "times": list(times),
        "size": [grid.height / side, grid.width / side],
        "crs": grid.crs if grid.crs.startswith("EPSG:") else "a CRS without a code",
        "lonlat": list(grid.lonlat_bounds()),
        "outlines": [],
    }
    put({
        "event": "begin", "cube": one_line(redact_url(url)), "plan": digest[:12], "collections": [about],
        "states": {"map": "".join(letters)},
    })  # fmt: skip
    return page_url(client.dashboard_link), tell
