"""What replicas must have in common, as digests: any difference that changes numbers shows, and no other does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxtrain.config import TrainConfig
from jaxtrain.data.windows import Windows
from jaxtrain.hetero import identity
from jaxtrain.hetero.identity import identify

from ..cube_factory import tiny_config


def config_of(**sections: Any) -> TrainConfig:
    values = tiny_config(Path("/somewhere/cube.zarr")).model_dump(exclude_unset=True)
    values["hetero"] = {"enabled": True, "chunk": 2}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return TrainConfig.model_validate(values)


def data_of(**changes: Any) -> Any:
    rows = changes.pop("rows", np.arange(12, dtype=np.int32).reshape(4, 3))
    known = {"digest": "d", "bands": ("red", "nir"), "classes": SimpleNamespace(to_list=lambda: ["field", "water"])}
    plan = SimpleNamespace(parts={"train": Windows(16, rows)})
    return SimpleNamespace(**{**known, "plan": plan, **changes})


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"seed": 7}},
        {"optim": {"learning_rate": 0.5}},
        {"model": {"width": 16}},
        {"data": {"jitter": 0.2}},
        {"hetero": {"chunk": 4}},
        {"hetero": {"compare_every": 7}},
    ],
    ids=str,
)
def test_another_configuration_has_another_digest(sections: dict[str, Any]) -> None:
    one, other = identify(config_of(), data_of()), identify(config_of(**sections), data_of())
    assert one.configuration != other.configuration
    assert (one.data, one.code) == (other.data, other.code)


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"cube": "/elsewhere/the-same.zarr"}},
        {"mesh": {"data": 2}},
        {"run": {"prefetch": 3, "read_threads": 1}},
        {"hetero": {"silence_s": 30.0}},
    ],
    ids=str,
)
def test_what_belongs_to_a_machine_may_differ(sections: dict[str, Any]) -> None:
    assert identify(config_of(), data_of()) == identify(config_of(**sections), data_of())


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "of other bytes"},
        {"rows": np.arange(12, dtype=np.int32).reshape(4, 3)[::-1]},
        {"rows": np.arange(9, dtype=np.int32).reshape(3, 3)},
        {"bands": ("nir", "red")},
        {"classes": SimpleNamespace(to_list=lambda: ["water", "field"])},
    ],
    ids=["bytes", "order", "split", "bands", "classes"],
)
def test_other_data_have_another_digest(changes: dict[str, Any]) -> None:
    one, other = identify(config_of(), data_of()), identify(config_of(), data_of(**changes))
    assert one.data != other.data
    assert (one.configuration, one.code) == (other.configuration, other.code)


def test_other_code_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed line in any folder that computes, or another version of a library."""
    folders = ("data", "hetero", "learn", "models", "parallel")
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.py").write_text("x = 1\n")
    digest = identity._code.__wrapped__
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "hetero" / "identity.py"))
    found = [digest()]
    assert digest() == found[0]
    for folder in folders:
        (tmp_path / folder / "one.py").write_text("x = 2\n")
        found.append(digest())
    (tmp_path / "learn" / "two.py").write_text("")
    found.append(digest())
    for library in ("jax", "flax", "optax"):
        monkeypatch.setattr(getattr(identity, library), "__version__", "0.0.1")
        found.append(digest())
    assert len(set(found)) == len(found)
