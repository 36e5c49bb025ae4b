"""`Classes` maps values of a class layer to class indices, names and colours."""

from __future__ import annotations

import colorsys
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from jaxtrain.config import DataConfig
from zarr_store.errors import InvalidInput, UnknownName

__all__ = ["UNLABELLED", "Classes"]

UNLABELLED = 255
"""Class index of a pixel without a class to train on; also the nodata value of maps."""

# Colours people know from Sentinel-2 scene classification (Sen2Cor) and from CORINE-like land-cover maps.
_KNOWN_COLOURS = {
    "agriculture": "#e8d36b",
    "bare": "#c49a6c",
    "bare soil": "#c49a6c",
    "built-up": "#c4281b",
    "cloud": "#d9d9d9",
    "cloud shadow": "#5b4a3f",
    "cropland": "#f096ff",
    "dark or shadow": "#3a3a4a",
    "field": "#e8d36b",
    "fields": "#e8d36b",
    "forest": "#1b6b2f",
    "grassland": "#a6d96a",
    "lake": "#2b7bba",
    "not vegetated": "#e6c35c",
    "pasture": "#a6d96a",
    "river": "#4fa8e0",
    "shadow": "#3a3a4a",
    "snow": "#bdf3ff",
    "snow or ice": "#bdf3ff",
    "soil": "#c49a6c",
    "thin cirrus": "#a9d5e5",
    "town": "#c4281b",
    "unclassified": "#8a8a8a",
    "urban": "#c4281b",
    "vegetation": "#2ca02c",
    "water": "#1f5fbf",
    "wetland": "#5fb3a1",
}
# For other names: Okabe & Ito (2008), told apart with every common colour vision; then Tableau's further hues.
_OTHER_COLOURS = (
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#8c564b", "#9467bd", "#17becf",
    "#bcbd22", "#7f7f7f", "#e377c2", "#2ca02c", "#1f77b4", "#ff9896", "#98df8a", "#c5b0d5", "#c49c94", "#dbdb8d",
)  # fmt: skip
_HEX = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class Classes:
    """Names, colours and the layer values behind them, by class index.

    Attributes:
        names: Class names; the position is the class index.
        values: Layer values that mean each class; several values may share a class.
        colours: "#rrggbb" of each class.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    colours: tuple[str, ...]

    @classmethod
    def of(cls, config: DataConfig) -> Self:
        """Read `data.classes` and `data.colours`; the order of classes is that of their first value.

        Raises:
            InvalidInput: No class, a value outside 0…255, more than 254 classes, a colour that is not #rrggbb
                or that two classes have.
            UnknownName: A colour for a class that is not there.

        >>> Classes.of(DataConfig(cube="c", classes={"4": "green", "8": "cloud", "9": "cloud"})).values
        ((4,), (8, 9))
        """
        if not config.classes:
            raise InvalidInput(
                'data.classes is empty: name the values of the label layer to learn, e.g. {"4" = "vegetation"}'
            )
        by_name: dict[str, list[int]] = {}
        numbers: dict[int, str] = {}
        for text, name in config.classes.items():
            if not (text.isdecimal() and int(text) <= 255) or not name.strip():
                raise InvalidInput(
                    f"data.classes: {text!r} = {name!r} must be a whole number 0…255 and a name that is not empty"
                )
            if int(text) in numbers:
                raise InvalidInput(f"data.classes names {int(text)} twice, as {numbers[int(text)]!r} and {name!r}")
            numbers[int(text)] = name
            by_name.setdefault(name, []).append(int(text))
        if len(by_name) > 254:
            raise InvalidInput(f"data.classes: {len(by_name)} classes, at most 254 fit a uint8 map with nodata")
        unknown = [name for name in config.colours if name not in by_name]
        if unknown:
            raise UnknownName.of("class", unknown, by_name, "data.colours")
        for name, colour in config.colours.items():
            if not _HEX.fullmatch(colour):
                raise InvalidInput(f"data.colours: {name!r} has colour {colour!r}, expected e.g. '#2ca02c'")
            alike = [other for other, its in config.colours.items() if its.lower() == colour.lower() and other != name]
            if alike:
                raise InvalidInput(
                    f"data.colours: {name!r} and {alike[0]!r} both have {colour}, so a map could not tell them apart; "
                    "give each class its own colour"
                )
        names = tuple(by_name)
        return cls(names, tuple(tuple(by_name[n]) for n in names), _pick_colours(names, config.colours))

    def __len__(self) -> int:
        return len(self.names)

    def table(self) -> npt.NDArray[np.uint8]:
        """Return the look-up table, uint8 (256,): layer value → class index, `UNLABELLED` for other values."""
        table = np.full(256, UNLABELLED, np.uint8)
        for index, values in enumerate(self.values):
            table[list(values)] = index
        return table

    def rgb(self) -> npt.NDArray[np.uint8]:
        """Return the colours as uint8 (classes, 3)."""
        return np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in self.colours], np.uint8)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the JSON form, one entry per class index."""
        return [
            {"index": i, "name": name, "colour": colour, "values": list(values)}
            for i, (name, colour, values) in enumerate(zip(self.names, self.colours, self.values, strict=True))
        ]

    @classmethod
    def from_list(cls, data: Sequence[Mapping[str, Any]]) -> Self:
        """Make the classes from their JSON form, which `to_list` returns."""
        return cls(
            tuple(str(entry["name"]) for entry in data),
            tuple(tuple(int(v) for v in entry["values"]) for entry in data),
            tuple(str(entry["colour"]) for entry in data),
        )


def _pick_colours(names: Sequence[str], given: Mapping[str, str]) -> tuple[str, ...]:
    """Give each class its own colour: the given one, else the usual one of its name, else a free one.

    Several names may be known for one colour; the first of them in `names` gets it.
    """
    picked = dict(given)
    taken = {colour.lower() for colour in given.values()}
    for name in names:
        known = _KNOWN_COLOURS.get(name.lower().replace("_", " "))
        if name not in picked and known is not None and known not in taken:
            picked[name] = known
            taken.add(known)
    free = (colour for colour in itertools.chain(_OTHER_COLOURS, _further_colours()) if colour not in taken)
    return tuple(picked[name] if name in picked else next(free) for name in names)


def _further_colours() -> Iterator[str]:
    """Yield colours beyond the tables: hues a golden angle apart, each round of 32 darker than the one before."""
    for number in range(1 << 12):
        hue, value = number * 0.618034 % 1, 0.95 - 0.055 * (number // 32 % 12)
        yield "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hsv_to_rgb(hue, 0.65, value))
