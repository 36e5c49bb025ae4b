"""`Table` is the one form in which tasks read their data: rows of features, in blocks of bounded size.

A row is a pixel of a cube, a pixel of a sample, or a vector of `terrashard embed`. Blocks come in a fixed order that
depends on the data alone, so that whatever is summed over them does not depend on who has read which block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from zarr_store.errors import InvalidInput, NothingFound

__all__ = ["Block", "Feature", "Kind", "Table", "check_features"]

Kind = Literal["cube", "samples", "vectors"]


@dataclass(frozen=True)
class Feature:
    """One column of a table.

    Attributes:
        name: Name of the band, index or value.
        unit: Unit of the physical numbers; "dB" for backscatter.
        time: ISO time of the date it is of; empty where it is of all dates.
        wavelength_um: Centre of the band, where it is known.
    """

    name: str
    unit: str = "1"
    time: str = ""
    wavelength_um: float | None = None

    @property
    def label(self) -> str:
        """Name and date as one word."""
        return f"{self.name} {self.time[:10]}" if self.time else self.name


@dataclass(frozen=True)
class Block:
    """The rows of one block that hold numbers in every feature.

    Attributes:
        values: float32 (feature, row).
        kept: int32 (row,): position of each row in the block, in row-major order of `shape`; None where all are there.
        shape: Shape of the block; (height, width) of a cube's.
        numbering: (first, pitch): number of the first position in the whole table, and from one line of the last axis
            of `shape` to the next.
        finite: int64 (feature,): rows of the block in which each feature is a number, of `observed` rows.
        observed: Number of observed rows, with or without numbers.
        dates: Number of dates that show the same ground; with more than one they are the first axis of `shape`.
    """

    values: npt.NDArray[np.float32]
    kept: npt.NDArray[np.int32] | None
    shape: tuple[int, ...]
    numbering: tuple[int, int]
    finite: npt.NDArray[np.int64]
    observed: int
    dates: int = 1

    @property
    def at(self) -> npt.NDArray[np.int64]:
        """int64 (row,): position of each row in the block."""
        rows = self.values.shape[1]
        return np.arange(rows, dtype=np.int64) if self.kept is None else self.kept.astype(np.int64)

    @property
    def ids(self) -> npt.NDArray[np.uint64]:
        """uint64 (row,): number of the ground of each row in the whole table, the same on each of several dates."""
        at = self.at if self.dates == 1 else self.at % self._ground
        line, place = np.divmod(at, self.shape[-1])
        first, pitch = self.numbering
        return (line * pitch + place + first).astype(np.uint64)

    @property
    def turns(self) -> npt.NDArray[np.uint64]:
        """uint64 (row,): which of the dates each row is of."""
        return (self.at // self._ground).astype(np.uint64)

    @property
    def _ground(self) -> int:
        return math.prod(self.shape) // self.dates

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.values.nbytes + (0 if self.kept is None else self.kept.nbytes)


class Table(Protocol):
    """Rows of features in blocks.

    Attributes:
        url: URL of the data.
        kind: Where the rows come from.
        features: The columns.
        digest: Digest of the data and of what was selected from it.
        warnings: Warnings about limits of results.
        remedy: Advice on how to choose other features, for errors.
    """

    @property
    def url(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def features(self) -> tuple[Feature, ...]: ...
    @property
    def digest(self) -> str: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...
    @property
    def remedy(self) -> str: ...
    @property
    def description(self) -> dict[str, Any]:
        """Arguments of `open_table` that open the same table again, in another process."""

    def __len__(self) -> int:
        """Return the number of blocks."""

    def read(self, number: int) -> Block:
        """Read one block."""

    def features_without_numbers(self) -> tuple[str, ...]:
        """Return the features that hold no number anywhere; it reads everything, to explain why there is no row."""


def check_features(table: Table, rows: int, finite: npt.NDArray[np.int64], observed: int) -> None:
    """Refuse a table without rows, and name the features that hold no number.

    Args:
        table: The table.
        rows: Number of rows with numbers in every feature.
        finite: Number of rows in which each feature is a number.
        observed: Number of observed rows.

    Raises:
        InvalidInput: A feature holds no number anywhere.
        NothingFound: Nothing was observed, or no row is whole.
    """
    if rows:
        return
    empty = tuple(feature.label for feature, count in zip(table.features, finite, strict=True) if not count)
    # a cube counts a pixel as observed only where all its bands hold numbers
    empty = empty if observed else table.features_without_numbers()
    others = f"other dates with --time, or {table.remedy}" if table.kind == "cube" else table.remedy
    if empty and len(empty) < len(table.features):
        raise InvalidInput(
            f"{table.url}: {', '.join(empty[:8])} {'holds' if len(empty) == 1 else 'hold'} no number anywhere; "
            f"choose {others}"
        )
    if not observed:
        raise NothingFound(f"{table.url} has no observed pixel in what was chosen: all is masked or without data")
    raise NothingFound(
        f"{table.url}: none of {observed:,} observed rows has a number in all of {len(table.features)} features; "
        f"choose {others}"
    )
