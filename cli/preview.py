"""`terrashard preview` draws what a search found, before anything is ingested."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import COMPOSING, GRID, SELECTION, SOURCE_HELP, TRUST, ingest_config
from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        settings="own",
        extra=SELECTION | GRID | COMPOSING | TRUST,
        examples=(
            "terrashard preview catalog.json found.png --collection sentinel-2-l2a",
            "terrashard preview https://HOST/v1 found.png --collection sentinel-2-l2a --datetime 2023-08 \\",
            "    --bbox 16.0,45.9,16.2,46.1 --bands nir,red,green --max 12",
        ),
    )
    def preview(
        session: Session,
        source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)],
        out: Annotated[Path, typer.Argument(metavar="OUT.png", help="Where the picture goes.")],
        most: Annotated[int, typer.Option("--max", min=1, max=200, help="Largest number of time steps to draw.")] = 24,
        side: Annotated[int, typer.Option(min=32, max=2048, help="Longer side of a thumbnail, pixels.")] = 256,
        width: Annotated[int, typer.Option(min=64, max=16384, help="Largest width of the picture, pixels.")] = 2000,
    ) -> int:
        """Draw the dates that a search finds, with their share of clouds; nothing is ingested.

        Only headers and overviews are read. Exit code 3: some scene could not be read.
        """
        from cli.picture import draw_preview, refuse_other_than_png
        from ingest.scenes.search import find_scenes
        from ingest.thumbnails import add_colours, draw_thumbnails

        refuse_other_than_png(out)
        config = add_colours(ingest_config(session))
        scenes = find_scenes(source, config).scenes
        made = draw_thumbnails(scenes, config, source, side_px=side, most=most)
        picture = draw_preview(made.thumbnails, out, width=width)
        for one in made.thumbnails:
            cloud = "cloud       ?" if one.cloud is None else f"cloud {one.cloud:6.1%}"
            session.say(f"{one.time[:16].replace('T', ' ')}  {cloud}  {one.collection}  {', '.join(one.scenes)}")
        for drop in made.plan.drops:
            session.note(f"left out: {drop.item_id}: {drop.reason}")
        for text in made.unread:
            session.warn(text)
        more = f" ({made.left_out} scenes of later dates left out, see --max)" if made.left_out else ""
        session.say(f"{out}: {picture['width']}×{picture['height']} px, {len(made.thumbnails)} time steps{more}")
        clouds = {row["id"]: row.get("cloud_share") for rows in made.plan.items.values() for row in rows}
        session.emit(
            {
                **picture,
                "steps": [
                    {"collection": one.collection, "time": one.time, "scenes": list(one.scenes), "cloud": one.cloud}
                    for one in made.thumbnails
                ],
                "scenes": [
                    {
                        "id": scene.id,
                        "collection": scene.collection,
                        "datetime": scene.datetime,
                        "cloud_cover": scene.cloud_cover,
                        "cloud_share": clouds.get(scene.id),
                    }
                    for scene in scenes
                ],
                "unread": list(made.unread),
            }
        )
        return 3 if made.unread else 0
