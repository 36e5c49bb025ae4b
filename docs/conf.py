"""Sphinx: pages from Markdown, the command reference from the commands themselves. Nothing is fetched."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard, get_args

from pydantic import BaseModel

project = "terrashard"
author = "The terrashard developers"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
napoleon_google_docstring, napoleon_numpy_docstring = True, False
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "generated/settings_*.md"]
html_theme = "furo"
html_title = "terrashard"
myst_heading_anchors = 3


def write_command_reference(folder: Path) -> None:
    """The `--help` of every command, as one page: it cannot disagree with the program."""
    os.environ.update(COLUMNS="100", NO_COLOR="1", TERM="dumb")
    from cli.main import app, main

    pages = ["# Commands", "What `terrashard COMMAND --help` prints."]
    for command in app.registered_commands:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            main([str(command.name), "--help"])
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
        body = "\n".join(line.rstrip() for line in plain.strip().splitlines())
        pages.append(f"## terrashard {command.name}\n\n```text\n{body}\n```")
    (folder / "commands.md").write_text("\n\n".join(pages) + "\n", encoding="utf-8")


def write_settings(folder: Path) -> None:
    """A table of every field of each configuration model: key, default, meaning."""
    from ingest.request.config import SECTIONS
    from ingest.simulate.config import SimulateConfig
    from jaxtrain.config import TrainConfig

    # the sections of an ingest: its settings are written without them
    for name, models in (("ingest", SECTIONS.values()), ("train", [TrainConfig]), ("simulate", [SimulateConfig])):
        rows = "\n".join(f"| `{k}` | {default} | {text} |" for m in models for k, default, text in settings_of(m))
        table = f"| key | default | meaning |\n|---|---|---|\n{rows}\n"
        (folder / f"settings_{name}.md").write_text(table, encoding="utf-8")


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of each field, with the fields of nested models under their dotted names."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
            continue
        inner = next((part for part in get_args(field.annotation) if _is_model(part)), None)
        if inner is not None:  # a table for each name
            yield from settings_of(inner, f"{prefix}{name}.NAME.")
            continue
        default = "needed" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
        yield f"{prefix}{name}", default, (field.description or _from_docstring(model, name)).replace("|", "\\|")


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_shown(v) for v in value) + "]"
    return "none" if value is None else str(value)


def _from_docstring(model: type[BaseModel], name: str) -> str:
    found = re.search(rf"^\s+{name}: (.+?)(?=\n\s+\w+: |\n\s*$|\Z)", model.__doc__ or "", re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


generated = Path(__file__).parent / "generated"
generated.mkdir(exist_ok=True)
write_command_reference(generated)
write_settings(generated)
