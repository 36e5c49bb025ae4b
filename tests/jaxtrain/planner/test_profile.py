"""Profiles of machines: units, sources, names, and what is wrong with one of a user."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxtrain.planner.profile import profile_names, quantity, read_profile
from zarr_store.errors import InvalidInput

TEXT = """
name = "mine"
title = "a machine"
[device]
kind = "gpu"
memory = "10 GB"
bandwidth = "1 TB/s"
peak = { float32 = "10 TFLOP/s" }
elementwise = "1 TFLOP/s"
launch = "2 us"
[[links]]
name = "inside"
devices = 4
bandwidth = "80 Gbit/s"
latency = "1 us"
[[links]]
name = "outside"
bandwidth = "1 GB/s"
latency = "10 us"
"""


def test_every_profile_states_where_its_numbers_come_from():
    assert {"h100-sxm", "h200", "a100", "l4", "v100-ib", "tpu-v5e", "tpu-v5p"} <= set(profile_names())
    for name in profile_names():
        profile = read_profile(name)
        stated = {
            "memory",
            "bandwidth",
            "peak",
            "elementwise",
            "links",
            "reached",
            "reached_bandwidth",
            "launch",
            "overlap",
        }
        assert stated <= set(profile.sources), name
        assert all(profile.sources.values())
        assert 1e9 < profile.device.memory < 1e12
        assert profile.links[0].bandwidth > profile.links[-1].bandwidth, name
    assert read_profile("h100-ib") == read_profile("h100-sxm")


def test_quantities_have_units():
    assert quantity("3.35 TB/s", "bytes a second") == 3.35e12
    assert quantity("400 Gbit/s", "bytes a second") == 50e9
    assert quantity("80 GB", "bytes") == 80e9
    assert quantity("16 GiB", "bytes") == 16 * 2**30
    assert quantity("2.5 us", "seconds") == pytest.approx(2.5e-6)
    assert quantity("67 TFLOP/s", "operations a second") == 67e12
    for value, kind in (
        ("300", "bytes a second"),
        ("80 GB", "bytes a second"),
        ("3 TB/s", "bytes"),
        ("-1 GB", "bytes"),
        (5, "seconds"),
    ):
        with pytest.raises(ValueError, match="number with its unit"):
            quantity(value, kind)


def test_a_profile_of_ones_own_is_a_file(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    mine = read_profile(str(path))
    assert (mine.device.memory, mine.links[0].bandwidth, mine.links[1].devices) == (10e9, 10e9, None)
    assert mine.link(4) == mine.links[0]
    assert mine.link(5) == mine.links[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('bandwidth = "1 TB/s"', "bandwidth = 1000", r"device\.bandwidth must be a number with its unit"),
        ('memory = "10 GB"', "", r"device\.memory is missing; the profiles that come"),
        ("devices = 4", "devices = 4\nspeed = 3", r"links\.0\.speed is not a number of a machine: leave"),
        ("devices = 4\n", "", "links go from the inside out"),
        ("name", "name = ", "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_profile_is_one_line(tmp_path: Path, old: str, new: str, message: str):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(InvalidInput, match=message) as caught:
        read_profile(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_without_a_profile_names_what_may_stand_there(tmp_path: Path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(InvalidInput, match=r"no profile at .*: give the path of a TOML file, or one of a100"):
            read_profile(str(path))
    (tmp_path / "picture.toml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(InvalidInput, match=r"picture\.toml must be TOML in UTF-8"):
        read_profile(str(tmp_path / "picture.toml"))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InvalidInput, match=r"no profile 'h10' \(nearest: h100\): known are a100, .*ends in \.toml"):
        read_profile("h10")
