"""docs/survey.md is what its numbers and its table of frameworks give; every cell of the table has a source."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def maker(repository: Path) -> Iterator[Any]:
    """The script that writes the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "benchmarks")
        import survey_page

        yield survey_page


def test_every_cell_of_the_table_has_a_source(maker: Any) -> None:
    document = maker.read_frameworks()
    used = set()
    names = [one["name"] for one in document["frameworks"]]
    assert len(names) == len(set(names)) >= 11
    for one in document["frameworks"]:
        assert set(one) == {"name", *document["columns"]}, one["name"]
        for column in document["columns"]:
            cell = one[column]
            where = f"{one['name']}, {column}"
            assert cell["sources"], f"{where}: no source"
            assert set(cell["sources"]) <= set(document["sources"]), where
            assert (cell["mark"] == maker.NO_CLAIM) == ("says" not in cell), f"{where}: a claim says what was read"
            used |= set(cell["sources"])
    assert used == set(document["sources"]), "sources that no cell names"
    for name, source in document["sources"].items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source["repository"]), name
        assert re.fullmatch(r"[0-9a-f]{40}", source["commit"]), name
        assert re.fullmatch(r"[\w.][\w./-]*", source["path"]), name


def test_the_page_is_what_its_files_give(maker: Any, repository: Path) -> None:
    numbers, document = maker.survey_numbers.read(), maker.read_frameworks()
    page = (repository / "docs" / "survey.md").read_text(encoding="utf-8")
    assert maker.render(numbers, document) == page, "run: make docs-figures"
    for picture in set(re.findall(r"\]\((images/[\w.-]+)\)", page)):
        assert (repository / "docs" / picture).stat().st_size > 1000, picture
    assert len(re.findall(r"\[\\\[\d+\\\]\]\[s\d+\]", page)) >= 11 * 8, "each cell has a link to what was read"


@pytest.mark.parametrize("path", ["curves", "links", "tile", "wide", "remat"])
def test_a_number_that_changes_changes_the_page(maker: Any, path: str) -> None:
    numbers, document = maker.survey_numbers.read(), maker.read_frameworks()

    def halved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one if key == "devices" else halved(one) for key, one in value.items()}
        if isinstance(value, list):
            return [halved(one) for one in value]
        return value / 2 if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    changed = copy.deepcopy(numbers)
    changed[path] = halved(changed[path])
    assert maker.render(changed, document) != maker.render(numbers, document)
