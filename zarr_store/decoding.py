"""`decoding` turns what a codec raises about bytes that it cannot decode into an error of the store.

Codecs are named by metadata, and their bytes may be anything. Which exception a codec raises then is its own affair:
ValueError by crc32c and vlen-utf8, RuntimeError by zstd and blosc, MemoryError or SystemError where a size is wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from zarr_store.errors import IntegrityError, TerrashardError

__all__ = ["DECODING_FAULTS", "decoding"]

DECODING_FAULTS: tuple[type[Exception], ...] = (
    ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, MemoryError,
    SystemError,
)  # fmt: skip
"""What zarr-python and its codecs raise about metadata and bytes that do not fit together."""
_FAULTS: tuple[type[Exception], ...] = (*DECODING_FAULTS, FileNotFoundError)


@contextlib.contextmanager
def decoding(where: str) -> Iterator[None]:
    """Turn errors of a block that opens or decodes an array into `IntegrityError`.

    Args:
        where: The place of the array or group, for people.

    Raises:
        IntegrityError: Its metadata or its bytes cannot be used.
    """
    try:
        yield
    except TerrashardError:
        raise
    except _FAULTS as error:
        raise IntegrityError(
            f"{where}: unusable metadata or damaged bytes ({type(error).__name__}: {str(error)[:300]}); restore it "
            "from a copy, or make it again"
        ) from error
