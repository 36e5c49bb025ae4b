"""`terrashard audit` compares a cube with the current catalogue."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import SELECTION, TRUST
from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        settings="own",
        extra=SELECTION | TRUST,
        examples=("terrashard audit zagreb.zarr", "terrashard audit zagreb.zarr --datetime 2023-08/.. --json"),
    )
    def audit(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of a cube.")],
        source: Annotated[
            str | None,
            typer.Option(
                metavar="SOURCE", help="Catalogue to compare with; default: the API that the scenes came from."
            ),
        ] = None,
        files: Annotated[
            bool,
            typer.Option("--files/--no-files", help="Check for each file whether it is still the one that was read."),
        ] = True,
    ) -> int:
        """Compare a cube with today's catalogue: scenes that are missing, superseded, removed or replaced.

        Exit code 3 means that they differ.
        """
        from cli.ingesting import cube_config
        from ingest.upkeep.audit import audit as compare_with_catalogue

        report = compare_with_catalogue(cube, cube_config(session, cube), source=source, files=files)
        for row in report.missing:
            session.say(f"missing     {row['datetime']} {row['id']}")
        for row in report.superseded:
            session.say(f"superseded  {row['id']} by {row['by']} (baseline {row['baseline']}, {row['created']})")
        for row in report.replaced:
            session.say(f"replaced    {row['id']}: {', '.join(row['assets'])} changed under the same name")
        for row in report.removed:
            session.say(f"removed     {row['id']}: the catalogue no longer lists it")
        session.say(
            f"{report.scenes} scenes in the cube; in {report.source} {len(report.missing)} more, "
            f"{len(report.superseded)} newer copies, {len(report.replaced)} replaced, {len(report.removed)} gone"
        )
        if report.missing:
            session.say("`terrashard ingest SOURCE CUBE --append` adds what is missing after the last date")
        if report.superseded or report.replaced:
            session.say("`terrashard ingest SOURCE CUBE --refresh` takes them in")
        session.emit(report.to_dict())
        return report.exit_code
