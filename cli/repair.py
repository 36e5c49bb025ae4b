"""`terrashard repair` and `retry-failed` make the broken, absent, partial or failed shards of a cube again."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import RUNNING, TRUST, ingest_config
from cli.session import Session, command

__all__ = ["register"]

_CUBE = typer.Argument(metavar="CUBE", help="Path or URL of a cube.")
_OPTIONS = TRUST | RUNNING


def register(app: typer.Typer) -> None:
    @command(app, settings="own", extra=_OPTIONS, examples=("terrashard repair zagreb.zarr",))
    def repair(session: Session, cube: Annotated[str, _CUBE]) -> int:
        """Check every shard against its checksum, and make broken or absent shards again."""
        from cli.ingesting import watching
        from ingest.upkeep.repair import repair as repair_cube

        with watching(session, "repair") as show:
            report = repair_cube(cube, ingest_config(session), on_event=show)
        for damage in report.damage:
            session.say(str(damage))
        for row in report.rows:
            session.say(f"ledger row {row} could not be read")
        session.say_lines(report.ingest.summary())
        session.emit(report.to_dict())
        return report.ingest.exit_code

    @command(app, settings="own", extra=_OPTIONS, examples=("terrashard retry-failed zagreb.zarr",))
    def retry_failed(session: Session, cube: Annotated[str, _CUBE]) -> int:
        """Try partial and failed shards again, and no others."""
        from cli.ingesting import watching
        from ingest.upkeep.repair import retry_failed as retry

        with watching(session, "retry") as show:
            report = retry(cube, ingest_config(session), on_event=show)
        session.say_lines(report.summary())
        session.emit(report.to_dict())
        return report.exit_code
