"""The Python code of a documentation page, as a notebook would run it."""

from __future__ import annotations

import re
from pathlib import Path


def code_of(page: Path) -> str:
    """All ```python blocks of a page, in order, as one script."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks, f"{page} has no ```python block"
    return "\n".join(blocks)
