"""`MapLayers` says which layers a map has, and turns mean probabilities or values of pixels into them.

Letters: H, W pixels of a block, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_store.errors import InvalidInput

__all__ = ["MOST_CLASSES", "NODATA", "MapLayers"]

NODATA = 255
"""Value of layers in per cent, and of classes as uint8, where the cube has no data."""
_NODATA_16 = 65_535
_NODATA_SCALED = -32_768
_MOST_SCALED = 32_767
MOST_CLASSES = _NODATA_16
"""Largest number of classes of a map."""
_SPREAD = 10.0
"""Standard deviations of the training values on either side of their mean that a scaled value can hold."""
_AT_ONCE = 1 << 18
"""Numbers that are worked on at once: temporary arrays stay in the processor's cache, with many classes, too."""


@dataclass(frozen=True)
class MapLayers:
    """The layers of a map.

    Attributes:
        classes: Number of classes; 1 for values.
        values: Whether the map holds values, not classes.
        probabilities: Whether it has the probability of each class.
        entropy: Whether it has the entropy of the probabilities.
        modalities: Names of the modalities of a network of several; none of other networks.
        scale: (scale, offset) of values that are stored as int16: value = stored · scale + offset; None for float32.

    Raises (when made):
        InvalidInput: The layers contradict each other, or there are too many classes.

    >>> MapLayers(3, entropy=True).names, MapLayers(1, values=True).names, MapLayers(300).dtype("class")
    (('class', 'confidence', 'entropy'), ('value',), 'uint16')
    """

    classes: int
    values: bool = False
    probabilities: bool = False
    entropy: bool = False
    scale: tuple[float, float] | None = None
    modalities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, given in (("--probabilities", self.probabilities), ("--entropy", self.entropy)):
            if self.values and given:
                raise InvalidInput(f"values have no probabilities: leave {option} out")
        if self.scale is not None and not self.values:
            raise InvalidInput("a map of classes has no values to scale: leave --scaled out")
        if self.classes > MOST_CLASSES:
            raise InvalidInput(f"{self.classes} classes do not fit a map: at most {MOST_CLASSES} do")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays."""
        used = ("modalities",) if self.modalities else ()
        if self.values:
            return ("value", *used)
        more = (("probability", self.probabilities), ("entropy", self.entropy))
        return ("class", "confidence", *(name for name, given in more if given), *used)

    @property
    def channels(self) -> int:
        """Number of channels that are joined: the answer of each class, and the presence of each modality."""
        return self.classes + len(self.modalities)

    def dtype(self, name: str) -> str:
        """Return the type of a layer as Zarr names it."""
        if name == "value":
            return "float32" if self.scale is None else "int16"
        if name == "modalities":
            return "uint16"
        return "uint16" if name == "class" and self.classes > NODATA else "uint8"

    def nodata(self, name: str) -> float | int:
        """Return the value of a layer where there is nothing to map."""
        if name == "modalities":
            return 0
        return {"float32": np.nan, "int16": _NODATA_SCALED, "uint16": _NODATA_16, "uint8": NODATA}[self.dtype(name)]

    def of(self, mean_HWK: npt.NDArray[np.float32], seen_HW: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[Any]]:
        """Return the layers of a block by name: (H, W), or (K, H, W) for probability.

        Args:
            mean_HWK: Probabilities, or values (H, W, 1); then a channel for each modality, above 0 where it was there.
            seen_HW: Pixels that have data.
        """
        made = self._answers(mean_HWK[..., : self.classes], seen_HW)
        if self.modalities:
            there = (mean_HWK[..., self.classes :] > 0) & seen_HW[..., None]
            made["modalities"] = (there << np.arange(len(self.modalities))).sum(axis=-1).astype(np.uint16)
        return made

    def _answers(
        self, mean_HWK: npt.NDArray[np.float32], seen_HW: npt.NDArray[np.bool_]
    ) -> dict[str, npt.NDArray[Any]]:
        if self.values:
            value = mean_HWK[..., 0] if self.scale is None else self._scaled(mean_HWK[..., 0])
            return {"value": np.where(seen_HW, value, np.array(self.nodata("value"), self.dtype("value")))}
        height, width, classes = mean_HWK.shape
        made = {
            name: np.full((classes, height, width) if name == "probability" else (height, width),
                          self.nodata(name), self.dtype(name))
            for name in self.names
            if name != "modalities"
        }  # fmt: skip
        rows = max(1, _AT_ONCE // max(width * classes, 1))
        for y in range(0, height, rows):
            self._fill(made, slice(y, y + rows), mean_HWK[y : y + rows], seen_HW[y : y + rows])
        return made

    def _fill(
        self,
        made: dict[str, npt.NDArray[Any]],
        rows: slice,
        mean_HWK: npt.NDArray[np.float32],
        seen_HW: npt.NDArray[np.bool_],
    ) -> None:
        chosen, largest = _largest(mean_HWK, made["class"].dtype)
        np.copyto(made["class"][rows], chosen, where=seen_HW)
        np.copyto(made["confidence"][rows], _percent(np.clip(largest, 0, 1)), where=seen_HW)
        if not (self.probabilities or self.entropy):
            return
        share = np.clip(mean_HWK, 0, 1)
        if self.probabilities:
            np.copyto(made["probability"][:, rows], np.moveaxis(_percent(share), -1, 0), where=seen_HW[None])
        if self.entropy:
            np.copyto(made["entropy"][rows], _percent(_entropy(share)), where=seen_HW)

    def _scaled(self, value: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
        assert self.scale is not None
        scale, offset = self.scale
        stored = np.rint((value.astype(np.float64) - offset) / scale)
        held: npt.NDArray[np.int16] = np.nan_to_num(np.clip(stored, _NODATA_SCALED + 1, _MOST_SCALED)).astype(np.int16)
        return held

    @staticmethod
    def scale_for(mean: float, std: float) -> tuple[float, float]:
        """Return (scale, offset) that hold values up to ten standard deviations from the mean of training."""
        return (_SPREAD * (std or 1.0) / _MOST_SCALED, mean)


def _largest(mean_HWK: npt.NDArray[np.float32], dtype: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Return the first class with the largest probability and that probability; plane by plane, not pixel by pixel."""
    largest = mean_HWK[..., 0].copy()
    chosen = np.zeros(largest.shape, dtype)
    for number in range(1, mean_HWK.shape[-1]):
        plane = mean_HWK[..., number]
        np.copyto(chosen, dtype.type(number), where=plane > largest)
        np.maximum(largest, plane, out=largest)
    return chosen, largest


def _percent(share: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    percent: npt.NDArray[np.uint8] = np.rint(share * 100).astype(np.uint8)
    return percent


def _entropy(share_HWK: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return Shannon's entropy as a share of its largest value: 0 for one sure class, 1 where all are alike."""
    log = np.log(np.maximum(share_HWK, np.float32(1e-30)))
    entropy: npt.NDArray[np.float32] = -(share_HWK * log).sum(axis=-1)
    share: npt.NDArray[np.float32] = np.clip(entropy / np.float32(np.log(max(share_HWK.shape[-1], 2))), 0, 1)
    return share
