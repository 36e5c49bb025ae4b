"""`Space` says which settings a search may change, and between which values; it is read from a TOML file.

    "optim.learning_rate" = { low = 1e-4, high = 1e-2, log = true }
    "model.width" = { low = 8, high = 32, step = 8 }
    "optim.name" = ["adamw", "sgd"]
    "optim.momentum" = { low = 0.8, high = 0.99, when = { "optim.name" = "sgd" } }

A key may name any setting of a run. A list gives choices: numbers, texts, true or false, lists and tables. Dates
and times are refused, as no setting has such a value. `when` makes a part conditional.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import optuna
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from jaxtrain.config import TrainConfig
from jaxtrain.settings import build, read_toml
from zarr_store.errors import InvalidInput

__all__ = ["Parameter", "Space", "parse_space", "read_space", "trial_config"]

_SPEC = ("low", "high", "log", "step", "choices", "when")
_FIXED = (
    "data.cube",
    "data.label",
    "data.classes",
    "data.split",
    "run.monitor",
    "run.track",
    "mesh",
    "placement",
    "hetero",
)
"""Settings that a search must not change: trials would not be comparable, or would run at other places."""


@dataclass(frozen=True)
class Parameter:
    """One setting of a space.

    Attributes:
        name: Dotted name of the setting.
        low, high: Ends of a range, both included; None of choices.
        log: Whether the range is searched by its logarithm.
        step: Distance of the values of a range; None for all.
        whole: Whether the setting is a whole number.
        choices: Values to choose from; none of a range.
        when: Settings of the space or of the configuration, and the value that each must have.
    """

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    whole: bool = False
    choices: tuple[Any, ...] = ()
    when: Mapping[str, Any] | None = None

    def suggest(self, trial: optuna.Trial) -> Any:
        """Return the value that the sampler gives a trial."""
        if self.choices:
            return json.loads(trial.suggest_categorical(self.name, [_text(choice) for choice in self.choices]))
        assert self.low is not None
        assert self.high is not None
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def decode(self, value: Any) -> Any:
        """Return the value of the setting for what a study keeps."""
        return json.loads(value) if self.choices else value

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(_text(choice) for choice in self.choices)
        by = f" by {self.step:g}" if self.step else ""
        return f"{self.low:g} … {self.high:g}{by}{', logarithmic' if self.log else ''}"


@dataclass(frozen=True)
class Space:
    """The settings that a search may change, each after those that its `when` names."""

    parameters: tuple[Parameter, ...]
    source: Mapping[str, Any]
    """The tables of the file."""

    def suggest(self, trial: optuna.Trial, base: TrainConfig) -> dict[str, Any]:
        """Return a value for each setting of a trial whose conditions hold."""
        values: dict[str, Any] = {}
        for one in self.parameters:
            if all(_same(values.get(name, _absent), wanted, base, name) for name, wanted in (one.when or {}).items()):
                values[one.name] = one.suggest(trial)
        return values

    def values_of(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a trial for the parameters that a study keeps."""
        return {one.name: one.decode(kept[one.name]) for one in self.parameters if one.name in kept}

    @property
    def conditional(self) -> tuple[str, ...]:
        """Names of settings that not every trial has."""
        return tuple(one.name for one in self.parameters if one.when)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of settings with choices."""
        return tuple(one.name for one in self.parameters if one.choices)


_absent = object()


def _same(value: Any, wanted: Any, base: TrainConfig, name: str) -> bool:
    if value is _absent:
        value = _setting(base, name)
    return bool(value == wanted) or (isinstance(wanted, list) and value in wanted)


def read_space(path: Path, base: TrainConfig) -> Space:
    """Read a space from a TOML file.

    Args:
        path: The file.
        base: Configuration of the trials; settings must be known to it.

    Raises:
        InvalidInput: A setting is unknown (the nearest is named), a range is empty or not legal, or a condition can
            never hold.
    """
    return parse_space(read_toml(path), base, where=str(path))


def parse_space(source: Mapping[str, Any], base: TrainConfig, *, where: str = "space") -> Space:
    """Make a space of tables, as `read_space` does of a file."""
    flat = _flatten(source)
    if not flat:
        raise InvalidInput(
            f"{where} names no setting: give lines such as "
            '"optim.learning_rate" = { low = 1e-4, high = 1e-2, log = true }'
        )
    known = {name: _parameter(name, spec, where) for name, spec in flat.items()}
    ordered: list[Parameter] = []
    for one in known.values():
        _add(one, known, base, ordered, (), where)
    return Space(tuple(ordered), dict(source))


def _add(
    one: Parameter, known: Mapping[str, Parameter], base: TrainConfig, ordered: list[Parameter],
    above: tuple[str, ...], where: str,
) -> None:  # fmt: skip
    """Append a parameter after those that its condition names."""
    if one in ordered:
        return
    if one.name in above:
        raise InvalidInput(f"{where}: the conditions of {', '.join(above)} wait for each other: leave out one `when`")
    for name, wanted in (one.when or {}).items():
        field = _field(name, where)
        other = known.get(name)
        values = wanted if isinstance(wanted, list) else [wanted]
        if other is not None:
            _add(other, known, base, ordered, (*above, one.name), where)
            never = [value for value in values if other.choices and value not in other.choices]
            if never:
                raise InvalidInput(f"{where}: {one.name} waits for {name} = {_text(never[0])}, which is none of its "
                                   f"choices: {other}")  # fmt: skip
        for value in values:
            _check_value(field, value, f"{where}: the condition of {one.name}, {name} =")
    ordered.append(one)


def _flatten(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return dotted name → specification; nested tables and dotted keys mean the same."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{above}.{key}" if above else key
        if isinstance(value, Mapping) and not set(value) & set(_SPEC):
            flat |= _flatten(value, name)
        else:
            flat[name] = value
    return flat


def _parameter(name: str, spec: Any, where: str) -> Parameter:
    field = _field(name, where)
    if any(name == fixed or name.startswith(f"{fixed}.") for fixed in _FIXED):
        raise InvalidInput(f"{where}: {name} is the same for all trials of a search: set it in the configuration")
    if isinstance(spec, list):
        spec = {"choices": spec}
    if not isinstance(spec, Mapping):
        raise InvalidInput(
            f"{where}: {name} = {spec!r} is one value: expected a list of choices, or {{ low = …, high = … }}; a fixed "
            "value belongs into the configuration"
        )
    for key in spec:
        if key not in _SPEC:
            near = difflib.get_close_matches(key, _SPEC, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_SPEC)}"
            raise InvalidInput(f"{where}: {name}.{key} is unknown: {hint}")
    when = spec.get("when")
    if when is not None and (not isinstance(when, Mapping) or not when):
        raise InvalidInput(
            f'{where}: {name}.when expects settings and their values, such as {{ "optim.name" = "sgd" }}'
        )
    when = None if when is None else _flatten(when)
    if "choices" in spec:
        return _choices(name, spec, when, field, where)
    return _range(name, spec, when, field, where)


def _choices(name: str, spec: Mapping[str, Any], when: Any, field: Any, where: str) -> Parameter:
    choices = spec["choices"]
    extra = [key for key in spec if key not in ("choices", "when")]
    if extra:
        raise InvalidInput(f"{where}: {name} has choices and {extra[0]}: give a list, or a range")
    if not isinstance(choices, list) or not choices:
        raise InvalidInput(f"{where}: {name}.choices expects a list with at least one value")
    for value in choices:
        _check_value(field, value, f"{where}: {name} =")
    if len({_text(value) for value in choices}) < len(choices):
        raise InvalidInput(f"{where}: {name} has a choice twice: {', '.join(map(_text, choices))}")
    return Parameter(name, choices=tuple(choices), when=when)


def _range(name: str, spec: Mapping[str, Any], when: Any, field: Any, where: str) -> Parameter:
    for end in ("low", "high"):
        value = spec.get(end)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidInput(
                f"{where}: {name}.{end} expects a number, got {'nothing' if value is None else repr(value)}"
            )
    low, high, log, step = spec["low"], spec["high"], spec.get("log", False), spec.get("step")
    if low >= high:
        raise InvalidInput(f"{where}: {name}: low {low:g} must be below high {high:g}")
    if not isinstance(log, bool):
        raise InvalidInput(f"{where}: {name}.log expects true or false, got {log!r}")
    if log and low <= 0:
        raise InvalidInput(f"{where}: {name}: a logarithmic range begins above 0, got low {low:g}")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step <= high - low):
        raise InvalidInput(f"{where}: {name}.step expects a number above 0 and at most {high - low:g}, got {step!r}")
    if log and step is not None:
        raise InvalidInput(f"{where}: {name} has log and step: leave one of them out")
    for value in (low, high):
        _check_value(field, value, f"{where}: {name} =")
    whole = _takes(field, low + 0.3719 * (high - low)) is not None  # a setting that takes no fraction
    if whole and not all(isinstance(value, int) for value in (low, high, 1 if step is None else step)):
        raise InvalidInput(f"{where}: {name} is a whole number: low, high and step must be whole, too")
    return Parameter(name, low=low, high=high, log=log, step=step, whole=whole, when=when)


def _field(name: str, where: str) -> Any:
    """Return the type of a setting, as an `Annotated` type that pydantic checks."""
    model: Any = TrainConfig
    parts = name.split(".")
    for number, part in enumerate(parts):
        if _is_table(model):
            return Any  # an entry of a table such as data.classes, which is checked when a trial begins
        is_section = isinstance(model, type) and issubclass(model, BaseModel)
        info = model.model_fields.get(part) if is_section else None  # a plain setting has no settings below it
        if info is None:
            every = _names(TrainConfig)
            near = difflib.get_close_matches(name, every, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"sections: {', '.join(TrainConfig.model_fields)}"
            raise InvalidInput(f"{where}: unknown setting {name!r}: {hint}")
        if number == len(parts) - 1:
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                raise InvalidInput(f"{where}: {name} is a section: name one of its settings, such as "
                                   f"{name}.{next(iter(info.annotation.model_fields))}")  # fmt: skip
            return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
        model = info.annotation
    raise AssertionError(name)


def _is_table(kind: Any) -> bool:
    """Return whether a setting of this type, or of this type or none, takes keys of any name."""
    origin = get_origin(kind) or kind
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return True
    return kind is Any or (origin in (Union, UnionType) and any(map(_is_table, get_args(kind))))


def _names(model: type[BaseModel], above: str = "") -> list[str]:
    found = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found += _names(info.annotation, f"{above}{name}.")
        else:
            found.append(f"{above}{name}")
    return found


def _takes(field: Any, value: Any) -> str | None:
    """Return why a setting cannot have a value; None if it can."""
    try:
        TypeAdapter(field, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        return str(error.errors(include_url=False)[0]["msg"])
    return None


def _check_value(field: Any, value: Any, what: str) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{what} {_text(value)} is not legal: no setting has a date or time as its value") from error
    why = _takes(field, value)
    if why is not None and not (value == "none" and _takes(field, None) is None):
        raise InvalidInput(f"{what} {_text(value)} is not legal: {why[:1].lower()}{why[1:]}")


def _setting(config: TrainConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def trial_config(settings: Mapping[str, Any], values: Mapping[str, Any], *, where: str) -> TrainConfig:
    """Return the configuration of a trial.

    Args:
        settings: Tables of the configuration of all trials.
        values: Dotted name of a setting → its value.
        where: Name of the trial in messages.

    Raises:
        InvalidInput: The values do not fit together.
    """
    tables = json.loads(json.dumps(settings))
    for name, value in values.items():
        *above, last = name.split(".")
        inner = tables
        for part in above:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise InvalidInput(f"{where}: {name} cannot be set, as {part} is no table: {_text(inner)[:200]}")
        inner[last] = value
    return build(TrainConfig, tables, where=where)
