"""The text of a fault in a message: the deepest cause, with its type only where the text needs it."""

from __future__ import annotations

import pytest
from rasterio.errors import RasterioIOError
from urllib3.exceptions import MaxRetryError, ProtocolError

from ingest.raster.faults import describe_fault


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (caused(RasterioIOError("Read failed. See previous exception for details."), RasterioIOError("cut")), "cut"),
        (
            caused(ProtocolError("Connection aborted."), ConnectionResetError(104, "reset by peer")),
            "[Errno 104] reset by peer",
        ),
        (MaxRetryError(None, "/b.tif", ProtocolError("closed")), "closed"),  # type: ignore[arg-type]
        (caused(ProtocolError("Connection aborted."), TimeoutError()), "TimeoutError"),
        (ValueError("4"), "ValueError: 4"),
        (caused(RasterioIOError("Read failed."), KeyError("crs")), "KeyError: 'crs'"),
        (RasterioIOError("/vsiriopener_0af1/9b3c/raster:Using code not yet in table"), "Using code not yet in table"),
        (RasterioIOError("'/vsiriopener_0af1/9b3c/raster' is cut"), "'the file' is cut"),
    ],
    ids=["GDAL", "socket", "retries", "no text", "value", "key", "name for GDAL", "name for GDAL, quoted"],
)
def test_a_fault_is_described_by_its_deepest_cause(error: Exception, text: str) -> None:
    assert describe_fault(error) == text
