"""Folders of results: they appear complete, and a run that is stopped while its result is published loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxtrain.tasks import folder
from jaxtrain.tasks.folder import TaskFolder, read_result


def make(out: Path, text: str) -> dict[str, object]:
    """Make a result, and return the state that an earlier run had left."""
    with TaskFolder(out, "kmeans", {"data": text}) as work:
        before = dict(work.state)
        if not before:
            (work.path / "text").write_text(text)
            work.keep({"done": 1})
        work.publish({"k": 3})
    return before


@pytest.mark.parametrize("moment", ["before a result is in its place", "before a result has its name"])
def test_a_result_whose_run_is_stopped_while_it_is_put_in_place_is_put_there_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = tmp_path / "out"
    assert make(out, "first") == {}

    def stop(name: str) -> None:
        if name == moment:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder, "crashpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            make(out, "second")
    assert out.exists() is (moment == "before a result is in its place")
    assert make(out, "second") == {"done": 1}, "what was made is not made again"
    assert (out / "text").read_text() == "second"
    assert sorted(entry.name for entry in out.iterdir()) == ["result.json", "text"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]
    assert read_result(out, "kmeans") == {"terrashard": "kmeans", "k": 3}
