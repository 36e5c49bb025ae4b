"""`Selection`: which items a request wants, by collection, time, region and conditions, and why none is left."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping
from typing import Any

from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from ingest.request.config import IngestConfig
from ingest.scenes.footprint import LonLatBox, box_region, meets
from ingest.scenes.place import mirrored_footprint, place_of
from zarr_store.errors import InvalidInput

__all__ = ["Selection"]


class Selection:
    """Filter of items by the settings of a request; it also counts the items that it turns away.

    APIs get the same conditions, but some ignore those that they do not know. So their answers are filtered here, too.

    Attributes:
        config: Settings of the request.
        region: Requested region in lon/lat; None for everywhere.
    """

    def __init__(self, config: IngestConfig) -> None:
        self.config = config
        self._conditions = config.selection.conditions
        self.region: BaseGeometry | None = None
        if config.selection.bbox:
            self.region = box_region(config.selection.bbox)
        elif config.selection.geometry:
            self.region = shape(config.selection.geometry)
        self._turned_away: Counter[str] = Counter()
        self._seen = 0
        self._extents: list[LonLatBox] = []
        self._times: list[str] = []

    def keeps(self, item: Mapping[str, Any]) -> bool:
        """Return whether an item matches the request.

        Raises:
            InvalidInput: The item has no usable time or footprint, and the request needs one.
        """
        where = f"item {item.get('id')!r}"
        properties = item.get("properties")
        if not isinstance(properties, Mapping):
            raise InvalidInput(f"{where}: expected a STAC item with properties; leave it out")
        self._seen += 1
        collection = item.get("collection")
        if (
            self.config.selection.collections
            and collection is not None
            and collection not in self.config.selection.collections
        ):
            return self._turn_away("collection")
        if self.config.selection.datetime and not self._in_time(properties, where):
            return self._turn_away("datetime")
        if self.region is not None:
            place = place_of(item, where)
            self._extents.append(place.bounds)
            if not meets(place.reach, self.region) and not self._mirrored(item, where):
                return self._turn_away("region")
        values = {"id": item.get("id"), "collection": collection, **properties}
        if not all(condition.holds(values) for condition in self._conditions):
            return self._turn_away("query")
        return True

    def explain(self, source: str) -> str:
        """Explain why no item matches the request, for the error message."""
        config = self.config
        asked = {
            "collection": f"collection {' or '.join(config.selection.collections)}",
            "datetime": f"datetime {config.selection.datetime}",
            "region": f"bbox {','.join(f'{v:g}' for v in config.selection.bbox)}"
            if config.selection.bbox
            else "the geometry",
            "query": f"query {' and '.join(config.selection.query)}",
        }
        if not self._seen:
            wanted = [
                config.selection.collections and asked["collection"],
                config.selection.datetime and asked["datetime"],
                (config.selection.bbox or config.selection.geometry) and asked["region"],
                config.selection.query and asked["query"],
            ]
            asked_for = ", ".join(str(w) for w in wanted if w)
            if not asked_for:
                return f"{source} lists no item, and links to none; give the catalogue or API that has its items"
            return f"no item in {source} for {asked_for}; ask for less"
        reasons = [f"{asked[kind]} turned away {count}" for kind, count in self._turned_away.most_common()]
        text = f"no item in {source} matches: of {self._seen} items, {', '.join(reasons)}"
        if self._turned_away["region"]:
            west, south = min(b[0] for b in self._extents), min(b[1] for b in self._extents)
            east, north = max(b[2] for b in self._extents), max(b[3] for b in self._extents)
            text += f"; the items lie in {west:.4g},{south:.4g},{east:.4g},{north:.4g} (west,south,east,north)"
        if self._turned_away["datetime"] and self._times:
            text += f"; they were taken {min(self._times)[:10]} to {max(self._times)[:10]}"
        return text

    def _mirrored(self, item: Mapping[str, Any], where: str) -> bool:
        """Return whether an item with swapped coordinates would lie in the region; its files decide later."""
        mirrored = mirrored_footprint(item, where)
        return mirrored is not None and meets(mirrored, self.region)

    def _turn_away(self, reason: str) -> bool:
        self._turned_away[reason] += 1
        return False

    def _in_time(self, properties: Mapping[str, Any], where: str) -> bool:
        raw = properties.get("datetime") or properties.get("start_datetime")
        try:
            moment = dt.datetime.fromisoformat(str(raw))
        except ValueError as error:
            raise InvalidInput(f"{where}: datetime {raw!r} is not an RFC 3339 time; leave the item out") from error
        moment = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
        self._times.append(moment.isoformat())
        start, end = self.config.selection.interval
        # whole seconds: 2023-08-31 ends at 23:59:59.999
        moment = moment.replace(microsecond=0)
        return (start is None or moment >= start.replace(microsecond=0)) and (end is None or moment <= end)
