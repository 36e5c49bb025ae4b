"""Redaction for ingest: the rules of `zarr_store.redact`, and what only the libraries of an ingest need.

urllib3 and rasterio log addresses as they are, and Dask's performance report quotes calls and tracebacks.
"""

from __future__ import annotations

import json
import logging
import re

from zarr_store.printable import printable_json
from zarr_store.redact import redact_text, redact_url, redact_value, strip_signature

__all__ = ["redact_document", "redact_logs", "redact_text", "redact_url", "redact_value", "strip_signature"]

_CHATTY = (
    "urllib3.connection", "urllib3.connectionpool", "urllib3.util.retry", "rasterio._env", "rasterio._err",
    "rasterio._base", "rasterio._io", "rasterio._vsiopener", "rasterio.env", "rasterio.session",
)  # fmt: skip
_ICON = re.compile(r'<link rel="shortcut icon"[^>]*>')
_DATA = re.compile(r'(<script type="application/json"[^>]*>)(.*?)(</script>)', re.DOTALL)


class _Redacting(logging.Filter):
    """Takes secrets out of the messages of libraries, also where the process is not ours (a notebook)."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact_text(record.getMessage()), ()
        return True


_redacting = _Redacting()


def redact_logs() -> None:
    """Keep secrets out of what urllib3 and rasterio log in this process; called before either sees a URL."""
    for name in _CHATTY:
        logger = logging.getLogger(name)
        if _redacting not in logger.filters:
            logger.addFilter(_redacting)


def redact_document(html: str) -> str:
    """Dask's page without its icon, which lies elsewhere, and with the texts of its data redacted.

    The data is JSON in elements of its own. It is read and written again, so that it stays JSON whatever a secret
    looks like; data that is no JSON is redacted as text.
    """

    def clean(found: re.Match[str]) -> str:
        try:
            kept = json.dumps(_without_secrets(json.loads(found[2])), allow_nan=False).replace("</", "<\\/")
        except ValueError:
            kept = redact_text(found[2])
        return found[1] + printable_json(kept) + found[3]

    return _DATA.sub(clean, _ICON.sub("", html))


def _without_secrets(value: object) -> object:
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return value
