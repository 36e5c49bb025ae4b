"""Commands that plant, find and date what is unusual: their files, and one line for what they cannot use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Outcome

TINY = ("--set", "tiles=1", "--set", "tile_px=64", "--set", "overlap_px=0", "--set", "block_px=128",
        "--set", "dates=['2022-06-16']", "--set", "radar_dates=[]")  # fmt: skip


def test_simulate_plants_what_a_file_lists(run: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "planted.toml").write_text('[[anomaly]]\nkind = "cloud"\ndate = 2022-06-16\nsize_m = 80\n')
    done = run("simulate", tmp_path / "world", "--anomalies", tmp_path / "planted.toml", *TINY, "--json")
    assert done.code == 0, done.err
    assert Path(done.json["anomalies"]).is_file()
    assert (tmp_path / "world/anomalies.tif").is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[anomalies]]\nkind = "cloud"\n', "expected tables [[anomaly]]"),
        ('[[anomaly]]\nkind = "crater"\ndate = 2022-06-16\n', "anomalies.0.kind"),
        ('[[anomaly]]\nkind = "cloud"\ndate = 2022-06-17\n', "is none of the dates"),
    ],
)
def test_simulate_refuses_a_file_in_one_line_and_writes_nothing(
    run: Callable[..., Outcome], tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "planted.toml").write_text(text)
    done = run("simulate", tmp_path / "world", "--anomalies", tmp_path / "planted.toml", *TINY)
    assert done.code == 2
    assert words in done.error_line()
    assert [path.name for path in tmp_path.iterdir()] == ["planted.toml"]
