"""`Modality` describes what one branch of the network `multimodal` gets, and `Encoded` what the branch returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import jax

if TYPE_CHECKING:
    from jaxtrain.config import ModelConfig

__all__ = ["Encoded", "Modality", "finest", "powers_of_two", "view_count", "views_of"]


@dataclass(frozen=True)
class Modality:
    """One modality of a run, once the data are known.

    Attributes:
        name: As `data.modalities` has it.
        bands: Names of the bands, in the order of the channels.
        ratio: Side of its pixels in pixels of the finest grid: 2 for 20 m where that has 10 m.
        dates: Length of the time axis; 0 where there is none.
    """

    name: str
    bands: tuple[str, ...]
    ratio: int = 1
    dates: int = 0

    @property
    def inputs(self) -> int:
        """Channels of its array: the bands, one that says what was observed, and of series two for the day."""
        return len(self.bands) + (3 if self.dates else 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(str(data["name"]), tuple(data["bands"]), int(data["ratio"]), int(data["dates"]))


class Encoded(NamedTuple):
    """The result of a branch."""

    features: tuple[jax.Array, ...]
    """Features (B, h, w, F) of each level, finest first; one level for late and early fusion."""
    seen: jax.Array
    """Share of each pixel that was observed, (B, H, W, 1) on the grid of the modality, in the type of the features."""


def finest(modalities: Sequence[Modality]) -> Modality:
    """Return the first modality of the finest grid, whose image stands for all in pictures."""
    return min(modalities, key=lambda one: one.ratio)


def view_count(modalities: Sequence[Modality], config: ModelConfig) -> int:
    """Return the merges of branches in a training step: of all together, and with `model.alone` each by itself."""
    return 1 + len(modalities) if config.alone and len(modalities) > 1 else 1


def powers_of_two(ratio: int) -> tuple[int, int]:
    """Return how often 2 divides a ratio of pixels, and what is left.

    >>> powers_of_two(1), powers_of_two(6), powers_of_two(4)
    ((0, 1), (1, 3), (2, 1))
    """
    halvings = (ratio & -ratio).bit_length() - 1
    return halvings, ratio >> halvings


def views_of(logits: jax.Array, samples: int) -> tuple[jax.Array, ...]:
    """Return the logits (B, …, K) of each view of `samples` samples; the views of a sample follow each other.

    >>> import jax.numpy as jnp
    >>> [view.shape for view in views_of(jnp.zeros((6, 4, 4, 5)), 2)]
    [(2, 4, 4, 5), (2, 4, 4, 5), (2, 4, 4, 5)]
    """
    if logits.shape[0] == samples:
        return (logits,)
    wide = logits.reshape(samples, -1, *logits.shape[1:])
    return tuple(wide[:, i] for i in range(wide.shape[1]))
