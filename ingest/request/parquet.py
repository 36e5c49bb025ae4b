"""Reading of Parquet files a few rows at a time, within a limit on memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from zarr_store.errors import InvalidInput

__all__ = ["decoded_batches"]

_MOST_DECODED = 1 << 30
"""Largest size of all decoded rows, bytes; those of 100,000 scenes take about 800 MB."""
_ROWS_AT_ONCE = 32
"""Rows that are decoded at once."""


def decoded_batches(
    file: pq.ParquetFile, path: str | Path, columns: list[str] | None = None, most: int = _MOST_DECODED
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file a few at a time, while they stay within a limit on memory.

    A file may state a false size, and one text of a dictionary may appear in a million rows. So the size is counted as
    rows are decoded.

    Args:
        file: The open file.
        path: Path of the file, for errors.
        columns: Names of the columns to read; None for all.
        most: Largest size of all decoded rows, bytes.

    Raises:
        InvalidInput: The rows take more memory, as the file states or as it turns out.
    """
    wanted = None if columns is None else set(columns)
    metadata = file.metadata
    stated = sum(
        chunk.total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for chunk in (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
        if wanted is None or chunk.path_in_schema.partition(".")[0] in wanted
    )
    came = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns) if stated <= most else ():
        came += batch.get_total_buffer_size() if came == 0 else batch.nbytes
        if came > most:
            break
        yield batch
    if max(stated, came) > most:
        raise InvalidInput(f"{path}: its rows take more than {most >> 20} MiB once decoded; select fewer of them")
