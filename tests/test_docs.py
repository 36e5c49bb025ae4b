"""What the documentation says of tests and results is there: a page must not name a test or a file that is gone."""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")

SETTING = "test_dates"
"""Of a run: the one word that looks like the name of a test."""


def pages(repository: Path) -> list[Path]:
    """Every page of prose, but none that was built."""
    own = [repository / name for name in PAGES]
    return [*own, *(path for path in sorted((repository / "docs").rglob("*.md")) if "_build" not in path.parts)]


@pytest.fixture(scope="module")
def tests(repository: Path) -> dict[str, set[str]]:
    """Module → names of its tests; modules of several folders may have one name."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in (repository / "tests").rglob("test_*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found[path.stem] |= {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}
    return dict(found)


def named_tests(text: str) -> set[tuple[str, str | None]]:
    """(module, test or None) of every `test_module::test_name`, `test_module` and tests/…/test_module.py in a page."""
    found: set[tuple[str, str | None]] = {
        (module, name) for module, name in re.findall(r"(test_\w+)::(test_\w+)", text)
    }
    found |= {(module, None) for module in re.findall(r"`(test_\w+)`", text) if module != SETTING}
    found |= {(module, None) for module in re.findall(r"tests/(?:\w+/)*(test_\w+)\.py", text)}
    return found


def test_the_search_for_names_finds_them() -> None:
    text = "`test_a::test_b` and `test_c`, see tests/ingest/test_d.py, not test_e"
    assert named_tests(text) == {("test_a", "test_b"), ("test_c", None), ("test_d", None)}


def test_every_test_that_a_page_names_exists(repository: Path, tests: dict[str, set[str]]) -> None:
    everything = set().union(*tests.values())
    named = 0
    for page in pages(repository):
        for module, name in sorted(named_tests(page.read_text(encoding="utf-8")), key=str):
            named += 1
            if name is None:
                assert module in tests or module in everything, f"{page.name} names {module}, which is not there"
            else:
                assert name in tests.get(module, set()), f"{page.name} names {module}::{name}, which is not there"
    assert named > 120, "the pages of faults and runs name a test in nearly every row"


def test_every_benchmark_and_result_that_a_page_names_exists(repository: Path) -> None:
    named = set()
    for page in pages(repository):
        named |= {
            (page.name, found)
            for found in re.findall(r"(?:benchmarks|examples)/[\w/-]+\.(?:py|toml|json)", page.read_text())
        }
    assert len(named) > 10
    assert {(page, found) for page, found in named if not (repository / found).exists()} == set()


def test_a_result_that_no_run_printed_says_so(repository: Path) -> None:
    """One run of a script writes topic, size, machine and rows; what was put together by hand says so inside."""
    kept = sorted((repository / "benchmarks" / "results").glob("*.json"))
    assert len(kept) > 10
    for path in kept:
        document = json.loads(path.read_text(encoding="utf-8"))
        assert set(document) - {"by_hand"} == {"topic", "size", "machine", "rows"}, path.name
        assert path.name == f"{document['topic']}-{document['size']}.json"
        mixed = any(re.search(r"\brun [12]\b", row["note"]) for row in document["rows"])
        assert mixed == ("by_hand" in document), f"{path.name}: rows of several runs are said to be so, and only those"
