"""Text becomes typed objects: TOML, --set and options; every problem in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from cli.config import apply_to_options, build, merge, parse_override, read_settings, read_toml
from jaxtrain.config import TrainConfig
from zarr_store.errors import InvalidInput, UnknownName


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    chunk_size: int = Field(1, gt=0)
    name: str = "a"


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner = Inner()
    maybe: Inner | None = None
    needed: int


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", {"a": 1}),
        ("a.b.c=1.5", {"a": {"b": {"c": 1.5}}}),
        ("a=true", {"a": True}),
        ('a=["x", "y"]', {"a": ["x", "y"]}),
        ("a=plain words", {"a": "plain words"}),
        ("path=runs/x=1.zarr", {"path": "runs/x=1.zarr"}),
        ("day=2023-08", {"day": "2023-08"}),
        ("a=", {"a": ""}),
    ],
)
def test_override_reads_toml_values_and_plain_text(text: str, expected: dict[str, object]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", ".=1"])
def test_override_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="KEY=VALUE"):
        parse_override(text)


def test_later_settings_win_and_tables_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[run]\nsteps = 1\nseed = 2\n")
    assert read_settings(path, ["run.steps=3", "run.steps=4"]) == {"run": {"steps": 4, "seed": 2}}
    assert merge({"a": {"b": 1}}, {"a": 2}) == {"a": 2}


def test_unknown_key_names_the_nearest_in_its_table() -> None:
    with pytest.raises(InvalidInput) as caught:
        build(Outer, {"needed": 1, "inner": {"chunk_sise": 3}}, where="x.toml")
    assert str(caught.value) == "x.toml: unknown key 'inner.chunk_sise': did you mean 'inner.chunk_size'?"


def test_unknown_key_inside_an_optional_table() -> None:
    with pytest.raises(InvalidInput, match=r"did you mean 'maybe.name'\?"):
        build(Outer, {"needed": 1, "maybe": {"nam": "b"}}, where="x.toml")


def test_unknown_key_far_from_all_lists_the_known() -> None:
    with pytest.raises(InvalidInput, match=r"'zzz'.*known: inner, maybe, needed"):
        build(Outer, {"needed": 1, "zzz": 1}, where="x.toml")


def test_all_problems_stand_in_one_line() -> None:
    with pytest.raises(InvalidInput) as caught:
        build(Outer, {"inner": {"chunk_size": -1, "nane": "b"}}, where="x.toml")
    message = str(caught.value)
    assert "inner.chunk_size: input should be greater than 0, got -1" in message
    assert "did you mean 'inner.name'" in message
    assert "key 'needed' is needed and absent" in message
    assert "\n" not in message


def test_checks_across_fields_keep_their_words() -> None:
    settings = {"data": {"cube": "c.zarr", "patch": 100}, "run": {"batch_size": 8}}
    with pytest.raises(InvalidInput, match=r"^t.toml: data.patch 100 must be a multiple of 2\^model.depth = 8$"):
        build(TrainConfig, settings, where="t.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "is not TOML"),
        (b"a = 1\na = 2\n", "is not TOML"),
        (b"\xff\xfe", "cannot be read"),
        (b"#" * 1_000_001, "more than"),
    ],
)
def test_a_file_that_is_no_settings_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        read_toml(path)


def test_a_settings_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not exist"):
        read_toml(tmp_path / "x.toml")


def test_settings_fill_options_that_were_not_given() -> None:
    options = {"share": float, "seed": int}
    assert apply_to_options({"share": "0.5", "seed": 3}, options, frozenset({"seed"}), "verify") == {"share": 0.5}
    with pytest.raises(UnknownName, match="did you mean 'share'"):
        apply_to_options({"shar": 1}, options, frozenset(), "verify")
    with pytest.raises(InvalidInput, match="got 'x'"):
        apply_to_options({"seed": "x"}, options, frozenset(), "verify")
