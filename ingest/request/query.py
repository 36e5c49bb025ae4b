"""Conditions on items: `eo:cloud_cover<40`, or CQL2 text with AND, OR, NOT, IN, BETWEEN, LIKE and IS NULL.

The `cql2` package parses the text. A condition is sent to an API as far as the API claims to support it, and is always
evaluated here too, as some support less than they claim. An item without a property fulfils no comparison with it, as
in SQL; the exception is a simple comparison with `!=`.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import cql2

from zarr_store.errors import InvalidInput

__all__ = ["Comparison", "Condition", "Cql2", "conjuncts", "parse_comparison", "parse_condition", "split_conditions"]

Operator = Literal["<=", ">=", "!=", "<", ">", "="]

_COMPARISONS = {"<", "<=", ">", ">=", "=", "<>"}
_LOGIC = {"and", "or", "not"}
_ADVANCED = {"in", "between", "like"}
_MAX_TEXT = 4096
"""Longest condition, characters."""
_MAX_DEPTH = 64
"""Largest number of opening brackets, and of NOTs, in a condition."""


class Comparison(NamedTuple):
    """A comparison of one item property with a value, e.g. ("eo:cloud_cover", "<", 40.0)."""

    name: str
    operator: Operator
    value: float | str

    def holds(self, properties: Mapping[str, Any]) -> bool:
        """Return whether an item with these properties passes; an item without the property passes only "!=".

        >>> Comparison("eo:cloud_cover", "<", 40.0).holds({"eo:cloud_cover": 12})
        True
        """
        present = properties.get(self.name)
        if present is None:
            return self.operator == "!="
        if isinstance(self.value, float) and isinstance(present, int | float) and not isinstance(present, bool):
            order = (present > self.value) - (present < self.value)
        else:
            left, right = str(present).lower(), str(self.value).lower()
            order = (left > right) - (left < right)
        return _ordered(self.operator, order)

    def tree(self) -> dict[str, Any]:
        """Return the comparison as CQL2 JSON."""
        return {"op": "<>" if self.operator == "!=" else self.operator, "args": [{"property": self.name}, self.value]}


@dataclass(frozen=True)
class Cql2:
    """A condition in CQL2 text.

    >>> Cql2("platform IN ('a', 'b') AND NOT gsd BETWEEN 5 AND 9").holds({"platform": "a", "gsd": 10})
    True
    """

    text: str

    def __post_init__(self) -> None:
        _parsed(self.text)

    def holds(self, properties: Mapping[str, Any]) -> bool:
        """Return whether an item with these properties passes; where the result is unknown, it does not."""
        return _truth(_parsed(self.text), properties) is True

    def tree(self) -> dict[str, Any]:
        """Return the condition as CQL2 JSON."""
        return _parsed(self.text)


Condition = Comparison | Cql2


def parse_condition(text: str) -> Condition:
    """Parse a condition: a simple comparison where the text is one, else CQL2.

    Raises:
        ValueError: The text is neither; the message names the character where parsing failed.

    >>> parse_condition("eo:cloud_cover < 40 OR platform = 'sentinel-2a'").text
    "eo:cloud_cover < 40 OR platform = 'sentinel-2a'"
    """
    if re.fullmatch(r"\s*[A-Za-z_][\w:.\-]*\s*(<=|>=|!=|==|<|>|=)\s*([^\s'\"()<>=]+|'[^']*'|\"[^\"]*\")\s*", text):
        return parse_comparison(text)
    return Cql2(text.strip())


def parse_comparison(text: str) -> Comparison:
    """Parse "eo:cloud_cover<40".

    >>> parse_comparison("eo:cloud_cover <= 40")
    Comparison(name='eo:cloud_cover', operator='<=', value=40.0)
    """
    found = re.fullmatch(r"\s*([A-Za-z_][\w:.\-]*)\s*(<=|>=|!=|==|<|>|=)\s*(\S.*?)\s*", text)
    if not found:
        raise ValueError(f"query {text!r} must be PROPERTY<VALUE with one of < <= > >= = !=, e.g. eo:cloud_cover<40")
    name, operator, raw = found.groups()
    value: float | str
    try:
        value = float(raw)
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        value = raw.strip("'\"")
    return Comparison(name, "=" if operator == "==" else operator, value)  # type: ignore[arg-type]


def split_conditions(text: str) -> tuple[str, ...]:
    """Split a text into conditions at the commas outside of quotes and brackets.

    >>> split_conditions("eo:cloud_cover<40, platform IN ('a','b')")
    ('eo:cloud_cover<40', "platform IN ('a','b')")
    """
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "," and not depth:
            parts.append("")
            continue
        parts[-1] += char
    return tuple(part.strip() for part in parts if part.strip())


def conjuncts(tree: Mapping[str, Any], *, advanced: bool) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of a condition that are sent to an API; no part refuses an item that the whole would accept.

    Args:
        tree: The condition as CQL2 JSON.
        advanced: Whether the API supports IN, BETWEEN and LIKE.
    """
    if tree["op"] == "and":
        for part in tree["args"]:
            yield from conjuncts(part, advanced=advanced)
    elif (advanced or not _ADVANCED & _operators(tree)) and "casei" not in _operators(tree):
        yield tree


def _operators(node: Any) -> set[str]:
    if not isinstance(node, Mapping):
        return set().union(*map(_operators, node)) if isinstance(node, list) else set()
    own = {node["op"]} if "op" in node else set()
    return own.union(*map(_operators, node.get("args", [])))


@lru_cache(maxsize=256)
def _parsed(text: str) -> dict[str, Any]:
    shown = text if len(text) < 80 else f"{text[:77]}…"
    if len(text) > _MAX_TEXT or text.count("(") > _MAX_DEPTH or text.lower().count("not") > _MAX_DEPTH:
        raise ValueError(
            f"query {shown!r} is too long or nested too deeply: expected at most {_MAX_TEXT} characters, {_MAX_DEPTH} "
            "brackets and as many NOTs; split it into several --query"
        )
    try:
        tree: dict[str, Any] = cql2.parse_text(text).to_json()
    except cql2.ParseError as error:
        place = re.search(r"--> \d+:(\d+)", str(error))
        where = f"; it fails at character {place.group(1)}" if place else ""
        raise ValueError(
            f"query {shown!r} must be PROPERTY<VALUE with one of < <= > >= = !=, e.g. eo:cloud_cover<40, or CQL2 text "
            f"such as eo:cloud_cover<40 AND platform IN ('sentinel-2a'){where}"
        ) from error
    try:
        _check(tree)
    except InvalidInput as error:
        raise ValueError(f"query {shown!r}: {error}") from error
    return tree


def _check(node: Any) -> None:
    """Refuse expressions that this module cannot evaluate, so that none is evaluated wrongly."""
    op = node.get("op") if isinstance(node, Mapping) else None
    if op in _LOGIC:
        for part in node["args"]:
            _check(part)
    elif op in _COMPARISONS | _ADVANCED | {"isNull"}:
        for part in node["args"]:
            for value in part if isinstance(part, list) else [part]:
                _check_value(value)
    elif isinstance(op, str) and op.startswith("s_"):
        raise InvalidInput(f"{op.upper()} is not supported in a query; give the region with --bbox or --geometry")
    else:
        raise InvalidInput(f"expected PROPERTY<VALUE, IN, BETWEEN, LIKE or IS NULL, got {op or node!r}")


def _check_value(value: Any) -> None:
    if isinstance(value, Mapping):
        if value.get("op") == "casei":
            _check_value(value["args"][0])
        elif "timestamp" in value or "date" in value:
            _moment(value)
        elif "property" not in value:
            raise InvalidInput(f"{value.get('op', value)!r} is not supported; compare a property with a value")


def _truth(node: Mapping[str, Any], properties: Mapping[str, Any]) -> bool | None:
    """Evaluate a condition in SQL's three-valued logic; None means unknown."""
    op, args = node["op"], node["args"]
    if op == "not":
        inner = _truth(args[0], properties)
        return None if inner is None else not inner
    if op in ("and", "or"):
        known = [_truth(part, properties) for part in args]
        decisive = op == "or"
        return decisive if decisive in known else None if None in known else not decisive
    if op == "isNull":
        return _value(args[0], properties) is None
    left = _value(args[0], properties)
    if op == "in":
        matches = [_compare("=", left, _value(value, properties)) for value in args[1]]
        return True if True in matches else None if None in matches else False
    if op == "between":
        low = _compare(">=", left, _value(args[1], properties))
        high = _compare("<=", left, _value(args[2], properties))
        return None if None in (low, high) else bool(low and high)
    right = _value(args[1], properties)
    if op == "like":
        return None if left is None or right is None else _like(str(left), str(right))
    return _compare("!=" if op == "<>" else op, left, right)


def _value(node: Any, properties: Mapping[str, Any]) -> Any:
    if not isinstance(node, Mapping):
        return node
    if "property" in node:
        return properties.get(node["property"])
    if "op" in node:  # casei
        inner = _value(node["args"][0], properties)
        return inner.casefold() if isinstance(inner, str) else inner
    return _moment(node)


def _compare(operator: str, left: Any, right: Any) -> bool | None:
    if left is None or right is None:
        return None
    if isinstance(left, dt.datetime) or isinstance(right, dt.datetime):
        left, right = _moment(left), _moment(right)
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (left, right)]
    if numbers[0] != numbers[1] or (type(left) is not type(right) and not all(numbers)):
        left, right = str(left), str(right)
    return _ordered(operator, (left > right) - (left < right))


def _ordered(operator: str, order: int) -> bool:
    return {
        "<": order < 0,
        "<=": order <= 0,
        ">": order > 0,
        ">=": order >= 0,
        "=": order == 0,
        "!=": order != 0,
    }[operator]


def _like(text: str, pattern: str) -> bool:
    tokens = re.findall(r"\\.|.", pattern, re.DOTALL)
    parts = {"%": ".*", "_": "."}
    regex = "".join(parts.get(token) or re.escape(token[1:] if len(token) > 1 else token) for token in tokens)
    return re.fullmatch(regex, text, re.DOTALL) is not None


def _moment(value: Any) -> dt.datetime:
    raw = (value.get("timestamp") or value.get("date")) if isinstance(value, Mapping) else value
    if isinstance(raw, dt.datetime):
        return raw
    try:
        moment = dt.datetime.fromisoformat(str(raw))
    except ValueError as error:
        raise InvalidInput(f"expected a time such as TIMESTAMP('2023-08-10T10:00:00Z'), got {raw!r}") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
