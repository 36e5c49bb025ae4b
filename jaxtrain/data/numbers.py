"""`BandNumbers` is the meaning of the stored numbers of a band; `convert_to` turns other data into the model's numbers.

A network is trained on stored numbers. The same ground may be stored with another scale or offset, and then the same
number means something else. So the model card keeps the meaning of each band, and whatever is evaluated or mapped later
is converted to it, or refused where no conversion is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from jaxtrain.data.mismatch import refuse_mismatch
from jaxtrain.data.units import unit_factor
from zarr_store.index import TrainingIndex
from zarr_store.samples import SampleSpec
from zarr_store.spec import CubeSpec

__all__ = [
    "BandNumbers",
    "Conversion",
    "convert_to",
    "cube_numbers",
    "sample_numbers",
    "unlike_moments",
    "unlike_training",
]

_FAR_STD, _OTHER_SPREAD = 6.0, 20.0
"""Standard deviations between means, and ratio of spreads, beyond which numbers can hardly have the same unit."""


@dataclass(frozen=True)
class BandNumbers:
    """The meaning of the stored numbers of one band: physical = stored · scale + offset.

    Attributes:
        band: Name of the band.
        kind: "reflectance" or "backscatter" of a cube, "layer" of a static layer, "image" of a sample store.
        dtype: Type of the stored numbers.
        unit: Unit of the physical numbers; empty where it is not stated.
        scale, offset: The factors.
    """

    band: str
    kind: str
    dtype: str
    unit: str = ""
    scale: float = 1.0
    offset: float = 0.0

    @property
    def stated(self) -> bool:
        """Whether physical numbers are known: a cube states them, floats are, whole numbers need a scale."""
        return self.kind != "image" or self.dtype.startswith("float") or (self.scale, self.offset) != (1.0, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(data["band"], data["kind"], data["dtype"], data["unit"], float(data["scale"]), float(data["offset"]))

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit not in ("", "1") else ""
        return f"{self.kind} as {self.dtype} · {self.scale:g} {self.offset:+g}{unit}"


@dataclass(frozen=True)
class Conversion:
    """Conversion of stored numbers of other data into those of training: stored · gain + shift, by band."""

    gain: tuple[float, ...]
    shift: tuple[float, ...]

    def apply(self, image: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Convert images whose last axes are (band, y, x) to float32."""
        gain, shift = (np.array(values, np.float32)[:, None, None] for values in (self.gain, self.shift))
        converted: npt.NDArray[np.float32] = image.astype(np.float32) * gain + shift
        return converted


def cube_numbers(spec: CubeSpec, positions: Sequence[int]) -> tuple[BandNumbers, ...]:
    """Describe bands of a cube by their positions."""
    dtype = spec.array(spec.kind).dtype
    bands = [spec.bands[position] for position in positions]
    return tuple(BandNumbers(b.name, spec.kind, dtype, b.unit, b.scale, b.offset) for b in bands)


def sample_numbers(spec: SampleSpec, positions: Sequence[int]) -> tuple[BandNumbers, ...]:
    """Describe bands of a sample store by their positions."""
    scales = spec.scales or ((1.0, 0.0, ""),) * len(spec.bands)
    return tuple(
        BandNumbers(spec.bands[i], "image", spec.dtype, scales[i][2], scales[i][0], scales[i][1]) for i in positions
    )


def convert_to(
    trained: Sequence[BandNumbers], there: Sequence[BandNumbers], url: str, *, insist: bool = False
) -> tuple[Conversion | None, list[str]]:
    """Return how other data become numbers of the training data, with a line for the user; None where they are alike.

    Units of one quantity are converted, such as degrees Celsius and kelvin (`jaxtrain.data.units`).

    Args:
        trained: Bands of the model card; none of runs that did not keep them, which are used as they are.
        there: The same bands of the other data.
        url: The other data, for the message.
        insist: Take the stored numbers of a band as they are where no conversion is known, and warn.

    Raises:
        InvalidInput: No conversion is known, as between quantities or between types without a stated scale.
    """
    if not trained:
        return None, []
    gain, shift, notes = [], [], []
    for ours, theirs in zip(trained, there, strict=True):
        factor = unit_factor(theirs.unit, ours.unit)
        why = _incomparable(ours, theirs, factor)
        if why:
            notes.append(refuse_mismatch(
                f"{url}: band {theirs.band} holds {theirs}, the model was trained on {ours}; {why}, so the numbers "
                "cannot be converted", "give data of the same kind, or train on these", insist=insist,
            ))  # fmt: skip
            gain.append(1.0)
            shift.append(0.0)
            continue
        # nothing where both have the same unit, so that equal data are not touched
        times, plus = (1.0, 0.0) if factor is None else factor
        gain.append(theirs.scale * times / ours.scale)
        shift.append((theirs.offset * times + plus - ours.offset) / ours.scale)
    changed = [i for i in range(len(gain)) if gain[i] != 1 or shift[i] != 0]
    if not changed:
        return None, notes
    first = changed[0]
    notes.append(
        f"numbers of {url} are converted: band {there[first].band} holds {there[first]}, trained on {trained[first]}"
    )
    return Conversion(tuple(gain), tuple(shift)), notes


def _incomparable(ours: BandNumbers, theirs: BandNumbers, factor: tuple[float, float] | None) -> str:
    """Return why numbers cannot be converted; empty where they can.

    Args:
        ours: The band of the model.
        theirs: The same band of the other data.
        factor: Conversion of the units; None where none is known.
    """
    if ours.kind != theirs.kind:
        return "these are different quantities"
    if ours.unit and theirs.unit and factor is None:
        return f"the units are {theirs.unit} and {ours.unit}"
    if ours.kind == "layer" and ours.dtype != theirs.dtype:
        # a layer of values is float32, one of classes uint8
        return "one holds numbers, the other codes of classes"
    alike = (ours.dtype, ours.scale, ours.offset) == (theirs.dtype, theirs.scale, theirs.offset)
    if not alike and not (ours.stated and theirs.stated):
        return "one of them states no scale"
    return ""


def unlike_training(
    mean: npt.ArrayLike,
    std: npt.ArrayLike,
    index: TrainingIndex,
    bands: Sequence[int],
    conversion: Conversion | None,
    url: str,
) -> list[str]:
    """Warn where the numbers of a cube are so unlike those of training that they can hardly have the same unit.

    No pixel is read: the counts of the chunks have the moments.
    """  # fmt: skip
    if not index.observed.any():
        return []
    there, spread = (values[list(bands)] for values in index.statistics())
    if conversion is not None:
        gain, shift = np.array(conversion.gain), np.array(conversion.shift)
        there, spread = there * gain + shift, spread * np.abs(gain)
    return unlike_moments(mean, std, there, spread, url)


def unlike_moments(
    mean: npt.ArrayLike, std: npt.ArrayLike, there: npt.ArrayLike, spread: npt.ArrayLike, url: str
) -> list[str]:
    """Warn where means and spreads of bands are so unlike those of training that they can hardly have the same unit.

    Args:
        mean: Mean of each band in training.
        std: Its spread there.
        there: Mean of each band of the other data.
        spread: Its spread there.
        url: The other data, for the message.
    """
    trained, ours = np.asarray(mean), np.asarray(std)
    there, spread = np.asarray(there), np.asarray(spread)
    with np.errstate(invalid="ignore", divide="ignore"):
        far = np.abs(there - trained) > _FAR_STD * np.maximum(ours, spread)
        other = np.maximum(spread / ours, ours / spread) > _OTHER_SPREAD
    if not (far | other).any():
        return []
    band = int(np.argmax(far | other))
    return [
        f"the numbers of {url} are unlike those of training: mean {there[band]:.4g} and spread {spread[band]:.4g} in "
        f"the network's channel {band}, trained on {trained[band]:.4g} and {ours[band]:.4g}; compare their units"
    ]
