"""Rows of Parquet files, a few at a time and within bounds of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from zarr_store.errors import InvalidInput

__all__ = ["decoded_batches"]

_MOST_DECODED = 1 << 30
"""Bytes of all rows in memory; those of 100,000 scenes take about 800 MB."""
_ROWS_AT_ONCE = 32


def decoded_batches(
    file: pq.ParquetFile, path: str | Path, columns: list[str] | None = None, most: int | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, a few at a time, until they take more memory than they may.

    What a file says of its own size may be a lie, and one text of a dictionary may stand in a million rows. So the size
    is counted as rows are decoded.

    Args:
        file: That is open.
        path: Of it, for the error.
        columns: Those wanted; None for all.
        most: Bytes of memory; a bound that no file of scenes comes near if not given.

    Raises:
        InvalidInput: It says, or is found, to hold more.
    """
    most = _MOST_DECODED if most is None else most
    wanted = None if columns is None else set(columns)
    about = file.metadata
    stated = sum(
        chunk.total_uncompressed_size
        for group in range(about.num_row_groups)
        for chunk in (about.row_group(group).column(i) for i in range(about.num_columns))
        if wanted is None or chunk.path_in_schema.partition(".")[0] in wanted
    )
    came = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns) if stated <= most else ():
        came += batch.get_total_buffer_size() if came == 0 else batch.nbytes
        if came > most:
            break
        yield batch
    if max(stated, came) > most:
        raise InvalidInput(f"{path}: its rows take more than {most >> 20} MiB once decoded; select fewer items")
