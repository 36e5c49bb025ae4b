"""Streaming counts and their scores: for classes, for several classes at once, for values.

Rows are truth, columns are prediction. All sums are exact (int64); scores are computed once, at the end, so they do not
depend on how the pixels were cut into batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zarr_store.errors import InvalidInput

__all__ = ["ConfusionMatrix", "SeveralCounts", "ValueErrors", "counts_for"]


class ConfusionMatrix:
    """Counts of (truth, prediction) over labelled pixels.

    A score that is 0/0 is nan for one class and left out of means: `macro_f1` and `miou` are means over the classes
    that occur, in truth or in prediction. A class that is neither in the truth nor predicted does not enter.

    >>> matrix = ConfusionMatrix(["water", "forest"]).update([0, 0, 1, 255], [0, 1, 1, 0])
    >>> matrix.total, round(matrix.accuracy, 3), round(matrix.miou, 3)
    (3, 0.667, 0.5)
    """

    def __init__(self, classes: Sequence[str], counts: ArrayLike | None = None) -> None:
        self.classes = tuple(classes)
        size = len(self.classes)
        self.counts: NDArray[np.int64] = np.zeros((size, size), np.int64)
        self.calibration: NDArray[np.float64] | None = None
        """(bins, 3): number, sum of confidence and hits, by confidence; None if it was not counted."""
        if counts is not None:
            self.add(counts)

    def add(self, counts: ArrayLike) -> Self:
        """Add a (K, K) matrix of counts, such as the one of an evaluation step."""
        counts = np.asarray(counts)
        if counts.shape != self.counts.shape or not np.issubdtype(counts.dtype, np.integer):
            raise InvalidInput(
                f"expected an integer confusion matrix of shape {self.counts.shape} (one row per class), "
                f"got {counts.dtype} {counts.shape}"
            )
        self.counts += counts.astype(np.int64)
        return self

    def add_sums(self, sums: Mapping[str, Any]) -> Self:
        """Add the sums of an evaluation step: `confusion` and, if present, `calibration`."""
        if "calibration" in sums:
            bins = np.asarray(sums["calibration"], np.float64)
            self.calibration = bins if self.calibration is None else self.calibration + bins
        return self.add(sums["confusion"])

    def update(self, truth: ArrayLike, prediction: ArrayLike) -> Self:
        """Count pairs of class indices; a truth outside 0 … K-1 (such as 255) is not labelled and is left out.

        Raises:
            InvalidInput: the shapes differ, or a prediction for a labelled pixel is not a class.
        """
        truth, prediction = np.asarray(truth), np.asarray(prediction)
        if truth.shape != prediction.shape:
            raise InvalidInput(f"truth {truth.shape} and prediction {prediction.shape} must have the same shape")
        size = len(self.classes)
        labelled = (truth >= 0) & (truth < size)
        t, p = truth[labelled].astype(np.int64), prediction[labelled].astype(np.int64)
        if p.size and (p.min() < 0 or p.max() >= size):
            raise InvalidInput(f"predictions must be class indices 0 … {size - 1}, got {p.min()} … {p.max()}")
        self.counts += np.bincount(t * size + p, minlength=size * size).reshape(size, size)
        return self

    @property
    def total(self) -> int:
        """Number of labelled pixels."""
        return int(self.counts.sum())

    @property
    def support(self) -> NDArray[np.int64]:
        """Labelled pixels of each class, by truth."""
        return np.asarray(self.counts.sum(axis=1))

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Labelled pixels of each class, by prediction."""
        return np.asarray(self.counts.sum(axis=0))

    @property
    def hits(self) -> NDArray[np.int64]:
        """Pixels of each class that were predicted as it."""
        return np.diagonal(self.counts).copy()

    @property
    def precision(self) -> NDArray[np.float64]:
        """Share of the pixels predicted as a class that are of it."""
        return _ratio(self.hits, self.predicted)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Share of the pixels of a class that were found."""
        return _ratio(self.hits, self.support)

    @property
    def f1(self) -> NDArray[np.float64]:
        """Harmonic mean of precision and recall: 2 hits / (support + predicted)."""
        return _ratio(2 * self.hits, self.support + self.predicted)

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union: hits / (support + predicted - hits)."""
        return _ratio(self.hits, self.support + self.predicted - self.hits)

    @property
    def accuracy(self) -> float:
        """Share of labelled pixels that are right; nan where there are none."""
        return float(self.hits.sum() / self.total) if self.total else math.nan

    @property
    def average_accuracy(self) -> float:
        """Mean recall over the classes that occur in truth; accuracy is overall, this is for each class alike."""
        return _mean(self.recall)

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur."""
        return _mean(self.f1)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean distance of confidence from the share of hits (Guo et al. 2017,
        arXiv:1706.04599), over bins of confidence weighted by number; nan where it was not counted.
        """
        if self.calibration is None or not self.calibration[:, 0].sum():
            return math.nan
        number, confidence, hits = self.calibration.T
        return float(np.abs(confidence - hits).sum() / number.sum())

    @property
    def miou(self) -> float:
        """Mean intersection over union over the classes that occur."""
        return _mean(self.iou)

    @property
    def kappa(self) -> float:
        """Agreement beyond chance (Cohen 1960); nan where chance alone agrees fully."""
        if not self.total:
            return math.nan
        share = self.counts / self.total
        chance = float(share.sum(axis=1) @ share.sum(axis=0))
        # one class in truth and prediction: the quotient is 0/0 up to rounding
        return (self.accuracy - chance) / (1 - chance) if chance < 1 - 1e-12 else math.nan

    def per_class(self) -> dict[str, dict[str, float | int | None]]:
        """Return the scores of each class by name; none where a score is 0/0."""
        columns = {"precision": self.precision, "recall": self.recall, "f1": self.f1, "iou": self.iou}
        return {
            name: {**{score: _number(values[row]) for score, values in columns.items()}, "support": int(support)}
            for row, (name, support) in enumerate(zip(self.classes, self.support, strict=True))
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: scores, per_class, confusion_matrix, classes, pixels, and reliability by confidence."""
        names = ("accuracy", "average_accuracy", "macro_f1", "miou", "kappa", "calibration_error")
        scores: dict[str, Any] = {name: _number(getattr(self, name)) for name in names}
        if self.calibration is not None:
            number, confidence, hits = self.calibration.T
            scores["reliability"] = [
                {"confidence": round(c / n, 4), "accuracy": round(h / n, 4), "pixels": int(n)}
                for n, c, h in zip(number, confidence, hits, strict=True)
                if n
            ]
        return {
            **scores,
            "per_class": self.per_class(),
            "confusion_matrix": self.counts.tolist(),
            "classes": list(self.classes),
            "pixels": self.total,
        }


class SeveralCounts:
    """Counts of a task in which a sample may have several classes: hits, false alarms, misses, true negatives."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.counts: NDArray[np.int64] = np.zeros((len(self.classes), 4), np.int64)

    def add_sums(self, sums: Mapping[str, Any]) -> Self:
        """Add the `counts` of an evaluation step, (K, 4)."""
        self.counts += np.asarray(sums["counts"]).astype(np.int64)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: accuracy (over all pairs of sample and class), the other scores, classes and pixels."""
        hits, false, missed, absent = self.counts.T
        f1 = _ratio(2 * hits, 2 * hits + false + missed)
        iou = _ratio(hits, hits + false + missed)
        columns = {"precision": _ratio(hits, hits + false), "recall": _ratio(hits, hits + missed), "f1": f1, "iou": iou}
        total = int(self.counts.sum())
        micro = _ratio(np.array([2 * hits.sum()]), np.array([(2 * hits + false + missed).sum()]))
        return {
            "accuracy": float((hits + absent).sum() / total) if total else None,
            "average_accuracy": _number(_mean(columns["recall"])),
            "macro_f1": _number(_mean(f1)),
            "micro_f1": _number(float(micro[0])),
            "miou": _number(_mean(iou)),
            "kappa": None,
            "per_class": {
                name: {**{key: _number(v[k]) for key, v in columns.items()}, "support": int(hits[k] + missed[k])}
                for k, name in enumerate(self.classes)
            },
            "confusion_matrix": None,
            "classes": list(self.classes),
            "pixels": total // max(len(self.classes), 1),
        }


class ValueErrors:
    """Sums of the errors of predicted values."""

    def __init__(self) -> None:
        self.sums: NDArray[np.float64] = np.zeros(6)

    def add_sums(self, sums: Mapping[str, Any]) -> Self:
        """Add the `errors` of an evaluation step, see `Objective.sums`."""
        self.sums += np.asarray(sums["errors"], np.float64)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: mae, rmse, bias, r2 (share of the variance that is explained), pixels."""
        n, error, size, square, spread, shift = self.sums.tolist()
        none: dict[str, Any] = {"accuracy": None, "macro_f1": None, "miou": None, "per_class": {},
                                "confusion_matrix": None, "classes": []}  # fmt: skip
        if not n:
            return {**none, "mae": None, "rmse": None, "bias": None, "r2": None, "pixels": 0}
        variance = spread - shift * shift / n
        r2 = 1 - square / variance if variance > 0 else None
        return {**none, "mae": size / n, "rmse": math.sqrt(square / n), "bias": error / n, "r2": r2, "pixels": int(n)}


def counts_for(
    classes: Sequence[str], *, several: bool = False, values: bool = False
) -> ConfusionMatrix | SeveralCounts | ValueErrors:
    """Return empty counts for a task."""
    if values:
        return ValueErrors()
    return SeveralCounts(classes) if several else ConfusionMatrix(classes)


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return ratio


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
