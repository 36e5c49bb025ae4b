"""`terrashard verify`: do the stored bytes still hash to what the ledger says was written?"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(app, examples=("terrashard verify zagreb.zarr", "terrashard verify zagreb.zarr --share 0.1 --seed 7"))
    def verify(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of a cube.")],
        share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Part of the shards that is re-read.")] = 1.0,
        seed: Annotated[int, typer.Option(help="Which shards a partial check draws.")] = 0,
    ) -> int:
        """Re-read shards and compare them with the checksums of the ledger. Exit code 6 names what is damaged."""
        from cli.progress import Reporter
        from zarr_store import verify_cube
        from zarr_store.errors import InvalidInput

        if not share > 0:
            raise InvalidInput(f"--share must lie above 0 and at most at 1, got {share}")
        with Reporter(session, "verify", unit="shards") as progress:
            report = verify_cube(cube, share=share, seed=seed, on_shard=progress.update)
        session.emit(report.to_dict())
        for damage in report.damage:
            session.say(str(damage))
        megabytes = report.checked_bytes / 1e6
        if report.damage:
            session.say("remove the named shard's files and repeat the ingest: what is absent is written again")
            session.fail(f"{len(report.damage)} of {report.checked_shards} shards damaged; first: {report.damage[0]}")
            return 6
        session.say(f"{report.checked_shards} shards ({megabytes:.1f} MB) are what was written")
        return 0
