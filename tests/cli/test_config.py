"""Text becomes typed objects: TOML, --set and options; every problem in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ConfigDict, Field

from cli.config import apply_to_options, build, merge, parse_override, read_settings, read_toml
from cli.journey import _training_config
from jaxtrain.config import TrainConfig
from jaxtrain.settings import read_train_config
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


def test_a_table_that_is_set_replaces_the_one_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        '[data]\ncube = "c.zarr"\npatch = 32\n[data.classes]\n4 = "land"\n6 = "water"\n[data.split]\ntest = 0.3\n'
    )
    over = tmp_path / "b.toml"
    over.write_text('[data.classes]\n5 = "bare"\n[data.split]\nvalidation = 0.1\n')

    def read(*overrides: str, files: tuple[Path, ...] = (path,)) -> TrainConfig:
        return read_train_config(files, overrides)

    assert read('data.classes={5 = "bare"}').data.classes == {"5": "bare"}, "set as a whole"
    assert read("data.classes={}").data.classes == {}, "cleared"
    assert read("data.classes.5=bare").data.classes == {"4": "land", "6": "water", "5": "bare"}, "one entry"
    assert read("data.split={validation = 0.1}").data.split.test == 0.15, "a section that is set has its defaults"
    assert read("data.split.validation=0.1").data.split.test == 0.3
    both = read(files=(path, over))
    assert both.data.classes == {"5": "bare"}, "a setting of a later file"
    assert both.data.split.test == 0.3, "sections of files are joined"
    assert read_settings(path, ['data.classes={5 = "bare"}'])["data"]["classes"] == {"5": "bare"}


@pytest.mark.parametrize("word", ["none", '"none"', "None", "inf"])
def test_no_clipping_is_written_as_the_help_says(word: str) -> None:
    assert read_train_config([], ["data.cube=c", f"optim.clip_norm={word}"]).optim.clip_norm is None


def test_a_value_is_named_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        read_train_config([], ["data.cube=c", "data.split.test=0.9", "data.split.validation=0.2", "run.steps=-1"])
    message = str(caught.value)
    assert message.count("got 0.2 + 0.9") == 1
    assert message.count(" got ") == 2, "one value for each problem"
    with pytest.raises(InvalidInput, match=r"run\.steps: .*, got 'abc'"):
        read_train_config([], ["data.cube=c", "run.steps=abc"])


@pytest.mark.parametrize(
    ("file", "later", "overrides", "message"),
    [
        ("[mesh]\ndata = 2\n", "", ["mesh=auto"], r"\(--set mesh=auto\), and mesh\.data is named too \(.*a\.toml\)"),
        ("[mesh]\nzero = 1\ndata = 2\n", "", ["mesh={auto = true}"], r"and mesh\.zero, mesh\.data is named too"),
        ('mesh = "auto"\n', "", ["mesh={data = 2}"], r"\(.*a\.toml\), and mesh\.data is named too \(--set mesh={data"),
        ("", "", ["mesh.data=2", "mesh=auto"], r"\(--set mesh=auto\), and mesh\.data .*\(--set mesh\.data=2\)"),
        ("[mesh]\ndata = 2\n", 'mesh = "auto"\n', [], r"\(.*b\.toml\), and mesh\.data is named too \(.*a\.toml\)"),
        ('mesh = "auto"\n', "[mesh]\nmodel = 2\n", [], r"\(.*a\.toml\), and mesh\.model is named too \(.*b\.toml\)"),
        ("[mesh]\nauto = true\ndata = 2\n", "", [], r"mesh\.data is named too: leave one of the two out"),
    ],
)  # fmt: skip
def test_a_mesh_is_named_or_chosen_in_whichever_order(
    tmp_path: Path, file: str, later: str, overrides: list[str], message: str
) -> None:
    files = [tmp_path / "a.toml", tmp_path / "b.toml"]
    for path, text in zip(files, (file, later), strict=True):
        path.write_text(text)
    with pytest.raises(InvalidInput, match=message) as caught:
        read_train_config(files, ["data.cube=c", *overrides])
    assert str(caught.value).endswith("leave one of the two out")
    assert "\n" not in str(caught.value)


def test_a_mesh_that_is_not_named_can_be_chosen(tmp_path: Path) -> None:
    empty = tmp_path / "a.toml"
    empty.write_text("[mesh]\n")
    assert read_train_config([empty], ["data.cube=c", "mesh=auto"]).mesh.auto
    assert read_train_config([empty], ["data.cube=c", "mesh.auto=false", "mesh.data=2"]).mesh.data == 2


def test_the_training_of_the_demo_has_one_mesh_too(tmp_path: Path) -> None:
    given = SimpleNamespace(config=None, overrides=("train.mesh.data=2", "train.mesh=auto"))
    given.settings = lambda: read_settings(given.config, given.overrides)
    with pytest.raises(InvalidInput, match=r"mesh\.data is named too \(--set train\.mesh\.data=2\)"):
        _training_config(given, tmp_path)  # type: ignore[arg-type]  # what it takes of a session
