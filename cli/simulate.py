"""`terrashard simulate` makes a small world with known truth as COGs and STAC items, and serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        settings="own",
        examples=(
            "terrashard simulate world",
            "terrashard simulate world --set seed=7 --set tiles=2 --serve",
            "terrashard simulate world --anomalies planted.toml",
        ),
    )
    def simulate(
        session: Session,
        out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the simulated scenes.")],
        anomalies: Annotated[
            Path | None,
            typer.Option(
                metavar="FILE",
                help="TOML file of the anomalies to plant, as tables [[anomaly]]; their truth is written, too.",
            ),
        ] = None,
        serve: Annotated[
            bool, typer.Option("--serve", help="Afterwards, serve a STAC API and the files until Ctrl-C.")
        ] = False,
        host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0 picks a free one.")] = 0,
    ) -> None:
        """Simulate Sentinel-2 and Sentinel-1 scenes over ground whose classes are known; same seed, same bytes."""
        from cli.config import build, read_toml
        from cli.progress import Reporter
        from ingest.simulate import SimulateConfig
        from ingest.simulate import serve as start
        from ingest.simulate import simulate as make

        settings, where = session.settings(), str(session.config or "--set")
        if anomalies is not None:
            settings, where = {**settings, "anomalies": read_anomalies(read_toml(anomalies), anomalies)}, str(anomalies)
        config = build(SimulateConfig, settings, where=where)
        with Reporter(session, "simulate", unit="%") as progress:
            world = make(out, config, on_progress=lambda share: progress.update(round(100 * share), 100))
        session.say(
            f"{world.catalog}: {world.items} items of {', '.join(world.collections)}, {world.bytes / 1e6:.1f} MB"
            + ("" if world.created else " (was there already)")
        )
        session.say(f"{world.truth}: the ground they show, classes in {world.legend.name}")
        if world.anomalies is not None:
            session.say(f"{world.anomalies}: {sum(one.count for one in config.anomalies)} planted anomalies")
        document = {
            "out": world.path, "catalog": world.catalog, "truth": world.truth, "legend": world.legend,
            "collections": world.collections, "items": world.items, "bytes": world.bytes, "created": world.created,
            "anomalies": world.anomalies,
        }  # fmt: skip
        if not serve:
            session.emit(document)
            return
        with start(out, host=host, port=port) as server:
            session.say(f"STAC API  {server.stac_url}")
            session.say(f"files     {server.url}")
            session.say("stop with Ctrl-C")
            session.emit(document | {"stac_url": server.stac_url, "url": server.url})
            wait_for_interrupt()


def read_anomalies(document: dict[str, Any], path: Path) -> Any:
    """Return the tables [[anomaly]] of a file, which holds nothing else."""
    from zarr_store.errors import InvalidInput

    if list(document) != ["anomaly"]:
        held = ", ".join(document) or "nothing"
        raise InvalidInput(f"{path}: expected tables [[anomaly]] with kind and date, and nothing else; it holds {held}")
    return document["anomaly"]


def wait_for_interrupt() -> None:
    """Sleep until Ctrl-C, which is the normal end of serving and not an error."""
    import threading

    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return
