"""`ModalityReader` reads the windows of several modalities as one batch, each on its own grid.

A label counts where any modality of the run saw the pixel, also one that is hidden (`without`): so scores with and
without a modality are of the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxtrain.data.arrays import HostBatch, Rows
from jaxtrain.data.modality_source import ModalitySource
from jaxtrain.data.reader import WindowReader
from zarr_store.errors import InvalidInput, UnknownName

__all__ = ["ModalityReader", "enlarge", "hide"]


@dataclass(frozen=True)
class ModalityReader:
    """Reads windows (time, y, x) of the finest grid.

    Attributes:
        sources: The modalities.
        patch: Side of a window on the finest grid, pixels.
        labels: Reads the labels; None where only images are read.
        without: Modalities that the network does not get.
        images: False reads labels and what was observed, without images.
    """

    sources: tuple[ModalitySource, ...]
    patch: int
    labels: WindowReader | None = None
    without: frozenset[str] = frozenset()
    images: bool = True

    @property
    def shows(self) -> Literal["windows", "images"]:
        """Kind of a row: a window of the cube."""
        return "windows"

    @property
    def target(self) -> Any:
        """The label; None where only images are read."""
        return None if self.labels is None else self.labels.target

    def read(self, rows: Rows) -> HostBatch:
        """Read windows; see `begin`."""
        return self.begin(rows)()

    def begin(self, rows: Rows) -> Callable[[], HostBatch]:
        """Start to read windows, and return a function that waits for them.

        Returns:
            Of each modality `image_NAME`, `observed_NAME`, of series `day_NAME`, and the label; without labels `seen`
            and `clear` (B, H, W): 1 where any modality saw the pixel, and saw it clearly.
        """
        begun = []
        for source in self.sources:
            hidden = source.modality.name in self.without
            begun.append(source.begin(rows, self.patch, images=self.images and not hidden))
        label = None if self.labels is None else self._begin_label(rows)

        def finish() -> HostBatch:
            batch: HostBatch = {}
            shape = (len(rows), self.patch, self.patch)
            seen, clear = np.zeros(shape, bool), np.zeros(shape, bool)
            dated = any(source.reader is not None for source in self.sources)
            for source, wait in zip(self.sources, begun, strict=True):
                one, found = source.modality, wait()
                observed = found["observed"]
                hidden = one.name in self.without
                if (source.reader is not None or not dated) and (label is not None or not hidden):
                    any_date = observed.max(axis=1) if one.dates else observed
                    seen |= enlarge(any_date, one.ratio).astype(bool)
                    clear |= enlarge(found["clear"], one.ratio).astype(bool)
                if self.images:
                    side = (self.patch // one.ratio,) * 2
                    series = (one.dates,) if one.dates else ()
                    batch[f"image_{one.name}"] = (
                        np.zeros((len(rows), *series, len(one.bands), *side), source_dtype(source))
                        if hidden
                        else found["image"]
                    )
                    batch[f"observed_{one.name}"] = np.zeros_like(observed) if hidden else observed
                    if series:
                        batch[f"day_{one.name}"] = found["day"]
            if label is None:
                return batch | {"seen": seen.view(np.uint8), "clear": clear.view(np.uint8)}
            found_label = label()
            self.target.hide(found_label, seen)
            return batch | {"label": found_label}

        return finish

    def _begin_label(self, rows: Rows) -> Callable[[], npt.NDArray[Any]]:
        assert self.labels is not None
        if self.target.place == "label":
            return self.labels.begin_labels(rows)
        wait = replace(self.labels, images=False).begin(rows)
        return lambda: wait()["label"]


def source_dtype(source: ModalitySource) -> Any:
    """Return the number type of the images of a modality."""
    if source.decibel or source.conversion is not None or source.reader is None:
        return np.dtype(np.float32)
    spec = source.reader.cube.spec(source.reader.collection)
    return np.dtype(spec.array(spec.kind).dtype)


def enlarge(array: npt.NDArray[Any], ratio: int) -> npt.NDArray[Any]:
    """Repeat the pixels of (B, h, w) on a finer grid."""
    return array if ratio == 1 else array.repeat(ratio, axis=1).repeat(ratio, axis=2)


def hide(reader: Any, without: Sequence[str]) -> Any:
    """Return the reader without some modalities, as `--without` asks.

    Raises:
        InvalidInput: The run has no modalities, or none would be left.
        UnknownName: The run has no modality of this name.
    """
    if not without:
        return reader
    if not isinstance(reader, ModalityReader):
        raise InvalidInput("--without leaves out modalities, and this run has one kind of data: leave the option out")
    known = [source.modality.name for source in reader.sources]
    for name in without:
        if name not in known:
            raise UnknownName.of("modality", name, known, "the run (--without)")
    if set(known) <= set(without):
        raise InvalidInput(f"--without {','.join(without)} leaves no modality: leave one of {', '.join(known)}")
    return replace(reader, without=frozenset(without))
