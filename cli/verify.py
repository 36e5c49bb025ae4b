"""`terrashard verify` compares the stored bytes with the ledger, and on request with the sources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import TRUST
from cli.session import Session, command

if TYPE_CHECKING:
    from ingest.upkeep.checksums import FilesReport
    from ingest.upkeep.repair import SourcesReport

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        extra=TRUST,
        examples=("terrashard verify zagreb.zarr", "terrashard verify zagreb.zarr --share 0.1 --seed 7 --sources"),
    )
    def verify(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of a cube.")],
        share: Annotated[
            float, typer.Option(min=0.0, max=1.0, help="Share of the shards to read again, above 0 and at most 1.")
        ] = 1.0,
        seed: Annotated[int, typer.Option(help="Seed of the random choice of shards with --share.")] = 0,
        sources: Annotated[
            bool, typer.Option("--sources", help="Also read the scenes again and compare every pixel.")
        ] = False,
        checksums: Annotated[
            bool,
            typer.Option(
                "--checksums", help="Also read whole source files and compare them with the checksums of their items."
            ),
        ] = False,
    ) -> int:
        """Read shards again and compare them with the ledger and with their sources.

        Exit code 6: a shard, an axis or a label layer is damaged.
        """
        from cli.progress import Reporter
        from zarr_store import verify_cube
        from zarr_store.errors import InvalidInput

        if not share > 0:
            raise InvalidInput(f"--share must be above 0 and at most 1, got {share}")
        with Reporter(session, "verify", unit="shards") as progress:
            report = verify_cube(cube, share=share, seed=seed, on_shard=progress.update)
        document = report.to_dict()
        for damage in report.damage:
            session.say(str(damage))
        megabytes = report.checked_bytes / 1e6
        for line in report.damaged_labels:
            session.say(line)
        for line in report.damaged_axes:
            session.say(line)
        if report.damaged_axes and not report.damage:
            session.emit(document)
            session.say(f"`terrashard repair {cube}` writes the axes again")
            session.fail(
                f"{report.damaged_axes[0]}; `terrashard repair {cube}` writes it again, and where that fails, "
                "`terrashard ingest … --overwrite` makes the cube anew; the pixels are intact"
            )
            return 6
        if report.damaged_labels and not report.damage:
            session.emit(document)
            session.fail(
                f"{report.damaged_labels[0]}; make it again with `terrashard labels … --replace`; the pixels are intact"
            )
            return 6
        if report.damage:
            session.emit(document)
            session.say(f"`terrashard repair {cube}` makes the named shards again")
            session.fail(f"{len(report.damage)} of {report.checked_shards} shards damaged; first: {report.damage[0]}")
            return 6
        session.say(f"{report.checked_shards} shards ({megabytes:.1f} MB) are what was written")
        for name, pixels in report.not_finite.items():
            session.warn(
                f"{pixels:,} {'pixel' if pixels == 1 else 'pixels'} of {name} "
                f"{'is' if pixels == 1 else 'are'} marked as observed without a finite number, as earlier releases "
                "wrote them: training, maps and `Cube.dataset(masked=True)` take them as not observed; ingest the cube "
                "anew to have that in its status, too"
            )
        codes = [_compare(session, cube, share, seed, document)] if sources else []
        codes += [_hash(session, cube, share, seed, document)] if checksums else []
        session.emit(document)
        return max(codes, default=0)


def _hash(session: Session, cube: str, share: float, seed: int, document: dict[str, Any]) -> int:
    from cli.progress import Reporter
    from ingest.request.settings import make_config
    from ingest.upkeep.checksums import verify_files

    config = make_config(None, session.options, where="options")
    with Reporter(session, "checksums", unit="files") as progress:
        found = verify_files(cube, config, share=share, seed=seed, on_file=progress.update)
    document["checksums"] = found.to_dict()
    right = f"{found.checked} files are what their items state; {found.unstated} have no checksum"
    return _conclude(session, found, wrong="files are not what their items state", right=right)


def _compare(session: Session, cube: str, share: float, seed: int, document: dict[str, Any]) -> int:
    from cli.progress import Reporter
    from ingest.request.settings import make_config
    from ingest.upkeep.repair import verify_sources

    config = make_config(None, session.options, where="options")
    with Reporter(session, "sources", unit="shards") as progress:
        found = verify_sources(cube, config, share=share, seed=seed, on_shard=progress.update)
    document["sources"] = found.to_dict()
    right = f"{found.checked} shards are what their sources give"
    return _conclude(session, found, wrong="arrays differ from their sources", right=right)


def _conclude(session: Session, found: FilesReport | SourcesReport, *, wrong: str, right: str) -> int:
    """Show what was compared, differences first, and return the exit code."""
    for text in found.unread:
        session.say(f"not compared: {text}")
    doubted = getattr(found, "doubted", ())
    for one in (*found.different, *doubted):
        session.say(str(one))
    if doubted and not found.different:
        session.fail(
            f"{len(doubted)} files were not read as they state themselves; first: {doubted[0]}; ingest them anew"
        )
        return 6
    if found.different:
        session.fail(f"{len(found.different)} {wrong}; first: {found.different[0]}")
        return 6
    session.say(right)
    return 3 if found.unread else 0
