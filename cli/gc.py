"""`terrashard gc` shows what killed runs left beside and inside a cube, and removes it on request."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(app, examples=("terrashard gc zagreb.zarr", "terrashard gc zagreb.zarr --delete --older-than 6"))
    def gc(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path of a cube, complete or not.")],
        delete: Annotated[
            bool, typer.Option("--delete", help="Remove the leftovers; default: only show them.")
        ] = False,
        older_than: Annotated[
            float,
            typer.Option(
                "--older-than", metavar="HOURS", min=0.0, help="Only files that have not changed for this many hours."
            ),
        ] = 24.0,
    ) -> None:
        """Show half-written files and half-made cubes that killed runs left, or remove them. No cube needs them."""
        from zarr_store.strays import find_strays, remove_strays

        strays = (remove_strays if delete else find_strays)(cube, older_than_s=older_than * 3600)
        for stray in strays:
            session.say(f"{stray.path}: {stray.nbytes:,} bytes, unchanged for {stray.age_s / 3600:.1f} h")
        total = sum(stray.nbytes for stray in strays)
        what = "removed" if delete else "would be removed with --delete"
        session.say(f"{len(strays)} leftovers, {total:,} bytes, {what}")
        entries = [{"path": str(s.path), "bytes": s.nbytes, "age_s": round(s.age_s, 1)} for s in strays]
        session.emit({"leftovers": entries, "bytes": total, "deleted": delete})
