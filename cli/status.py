"""`terrashard status` shows which shards of a cube are done, partial, failed or pending, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.session import Session, command

if TYPE_CHECKING:
    from zarr_store import Cube

__all__ = ["examine", "register"]

_MOST_LINES = 200
"""Largest number of unfinished shards that are shown, for each collection; --json lists all."""


def examine(cube: Cube, collection: str) -> dict[str, Any]:
    """Return the counts by state, and each shard that is not done with what was missing."""
    spec, ledger = cube.spec(collection), cube.ledger(collection)
    states = cube.states(collection)
    counts = states.count()
    shards = []
    for index, state in states.unfinished():
        row = ledger.get_stored(index) if state != "pending" else None
        missing = [
            {"item": s.item_id, "asset": s.asset, "reason": s.reason}
            for s in (row.sources if row else ())
            if s.state == "missing"
        ]
        shards.append(
            {
                "index": list(index),
                "time": spec.times[index[0] * spec.layout.shard[0]],
                "state": state,
                "missing": missing,
            }
        )
    return {**counts, "complete": counts["done"] == counts["total"], "unfinished": shards}


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard status zagreb.zarr",
            "terrashard status zagreb.zarr --watch",
            "terrashard status zagreb.zarr --json",
        ),
    )
    def status(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of a cube, or a map.")],
        watch: Annotated[
            bool, typer.Option("--watch", "-w", help="Update every second until no shard is pending.")
        ] = False,
    ) -> None:
        """Show which shards are done, partial, failed or pending, and why; for a map, how many are done."""
        from zarr_store import open_cube
        from zarr_store.read import kind_of

        if kind_of(cube) != "cube" and _show_map(session, cube, watch=watch):
            return
        if watch:
            follow(session, cube)
        opened = open_cube(cube)
        collections = {name: examine(opened, name) for name in opened.collections}
        for name, found in collections.items():
            counts = ", ".join(f"{found[state]} {state}" for state in ("done", "partial", "failed", "pending"))
            session.say(f"{name}: {counts} of {found['total']} shards")
            for shard in found["unfinished"][:_MOST_LINES]:
                session.say(f"  {shard['state']:8} shard {tuple(shard['index'])} {shard['time']}")
                for source in shard["missing"]:
                    session.say(
                        f"           {source['item']} {source['asset'] or ''}: {source['reason'] or 'unreadable'}"
                    )
            if (more := len(found["unfinished"]) - _MOST_LINES) > 0:
                session.say(f"  … and {more} more; --json lists all")
        complete = all(found["complete"] for found in collections.values())
        if not complete:
            session.say("the same `terrashard ingest` command writes the shards that are not done")
        session.emit({"url": opened.url, "complete": complete, "collections": collections})


def _show_map(session: Session, url: str, *, watch: bool) -> bool:
    """Show how much of a map is done; return whether the map exists or is being made."""
    import time

    if "://" in url:
        return False
    from jaxtrain.inference.making import map_progress

    found = map_progress(url)
    while watch and found is not None and found["running"]:
        session.note(f"map: {found['done']}/{found['total']} shards")
        time.sleep(1.0)
        found = map_progress(url)
    if found is None:
        return False
    session.say(f"map: {found['done']} done, {found['pending']} pending of {found['total']} shards")
    if not found["complete"]:
        session.say(
            "a run is making it" if found["running"] else "the same `terrashard predict` command makes the rest"
        )
    session.emit({"url": url, "kind": "map", **found})
    return True


def follow(session: Session, url: str, *, pause_s: float = 1.0) -> None:
    """Show the counts until no shard is pending: a live bar for each collection, or lines without a terminal."""
    import sys
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from zarr_store import open_cube
    from zarr_store.printable import one_line

    cube = open_cube(url)
    live = sys.stderr.isatty() and session.verbosity >= 0
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not live) as bars:
        tasks = {
            name: bars.add_task(one_line(name), total=cube.spec(name).shard_count, detail="")
            for name in cube.collections
        }
        watched = {name: cube.watch_states(name) for name in cube.collections}
        said: dict[str, str] = {}
        while True:
            pending = 0
            for name in cube.collections:
                counts = watched[name].look().count()
                total = counts["total"]
                pending += counts["pending"]
                ended = total - counts["pending"]
                words = ", ".join(f"{counts[state]} {state}" for state in ("partial", "failed") if counts[state])
                bars.update(tasks[name], completed=ended, detail=words)
                line = f"{name}: {ended}/{total} shards" + (f", {words}" if words else "")
                if not live and said.get(name) != line:
                    session.note(line)
                    said[name] = line
            if not pending:
                return
            time.sleep(pause_s)
