"""`terrashard search` lists the scenes of a source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import SELECTION, SOURCE_HELP, TRUST, ingest_config
from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        settings="own",
        extra=SELECTION | TRUST,
        examples=(
            "terrashard search catalog.json --collection sentinel-2-l2a --bbox 16.0,45.9,16.2,46.1",
            "terrashard search https://HOST/v1 --collection sentinel-2-l2a --datetime 2023-08 \\",
            "    --bbox 16.0,45.9,16.2,46.1 --query 'eo:cloud_cover<40' -o items.json",
        ),
    )
    def search(
        session: Session,
        source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)],
        out: Annotated[
            Path | None,
            typer.Option("--out", "-o", metavar="FILE", help="Write the items: items.json or items.parquet."),
        ] = None,
    ) -> None:
        """List the scenes of a source: deduplicated, in order, with cloud cover, baseline and offset."""
        from cli.item_files import check_suffix, portable, write_items
        from ingest.scenes.search import find_scenes

        config = ingest_config(session)
        if out is not None:
            check_suffix(out)
        found = find_scenes(source, config)
        for scene in found.scenes:
            cloud = "" if scene.cloud_cover is None else f"cloud {scene.cloud_cover:5.1f} %"
            lacking = f"  lacks {', '.join(scene.lacking)}" if scene.lacking else ""
            session.say(
                f"{scene.datetime}  {scene.tile or '':6} {scene.id:32} {cloud:13} "
                f"baseline {scene.baseline or '?':6} offset {scene.dn_offset:+d}{lacking}"
            )
        session.say(
            f"{len(found.scenes)} scenes"
            + (f", {len(found.duplicates)} older copies left out" if found.duplicates else "")
        )
        for copy in found.duplicates:
            session.say(f"left out: {copy.dropped.id}: {copy.reason}")
        for one in found.unusable:
            session.warn(f"item {one.item_id!r} is left out: {one.reason}")
        if out is not None:
            write_items([portable(item) for item in found.items], out)
            session.say(f"written to {out}")
        session.emit(
            {
                "count": len(found.scenes),
                "out": out,
                "scenes": [scene.to_dict() for scene in found.scenes],
                "unusable": [one._asdict() for one in found.unusable],
                "duplicates": [
                    {"id": d.dropped.id, "collection": d.dropped.collection, "reason": d.reason}
                    for d in found.duplicates
                ],
            }
        )
