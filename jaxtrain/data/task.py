"""`Task` describes the output of a network, which the training data and the model decide together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """The output of a network.

    Attributes:
        per_image: One answer for an image, not one for each pixel.
        several: A sample may have several classes.
        value: (mean, std) of the value that is the target instead of classes; the network predicts in these units.
        rebuild: The network reconstructs the image itself and uses no labels.
        unit: Unit of the value; empty where it is not stated.
    """

    per_image: bool = False
    several: bool = False
    value: tuple[float, float] | None = None
    rebuild: bool = False
    unit: str = ""

    @property
    def values(self) -> bool:
        """Whether the output is a value, not a class."""
        return self.value is not None or self.rebuild

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"per_image": self.per_image, "several": self.several, "value": self.value,
                "rebuild": self.rebuild, **({"unit": self.unit} if self.unit else {})}  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Task:
        """Make the object from its JSON form, which `to_dict` returns."""
        value = data["value"]
        return cls(bool(data["per_image"]), bool(data["several"]), None if value is None else (value[0], value[1]),
                   bool(data.get("rebuild", False)), str(data.get("unit", "")))  # fmt: skip
