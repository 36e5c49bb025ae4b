"""Redaction of secrets for ingest: the rules of `zarr_store.redact`, and filters for the libraries that ingest uses.

urllib3 and rasterio log whole URLs, and Dask's performance report quotes calls and tracebacks.
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
    """Filter that removes secrets from log messages of libraries, also in a process such as a notebook."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact_text(record.getMessage()), ()
        return True


_redacting = _Redacting()


def redact_logs() -> None:
    """Keep secrets out of the logs of urllib3 and rasterio in this process; call it before either gets a URL."""
    for name in _CHATTY:
        logger = logging.getLogger(name)
        if _redacting not in logger.filters:
            logger.addFilter(_redacting)


def redact_document(html: str) -> str:
    """Redact Dask's performance report, and remove the link to its icon, which lies on another server.

    The data of the report is JSON in elements of its own. It is parsed and written again, so that it stays JSON
    whatever a secret looks like. Data that is not JSON is redacted as text.
    """

    def clean(match: re.Match[str]) -> str:
        try:
            text = json.dumps(_without_secrets(json.loads(match[2])), allow_nan=False).replace("</", "<\\/")
        except ValueError:
            text = redact_text(match[2])
        return match[1] + printable_json(text) + match[3]

    return _DATA.sub(clean, _ICON.sub("", html))


def _without_secrets(value: object) -> object:
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return value
