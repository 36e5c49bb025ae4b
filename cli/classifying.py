"""Images become a table of labels; `jaxtrain.inference.classify` and `ingest.labels` meet here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.progress import Reporter
from cli.session import Session
from zarr_store.errors import InvalidInput
from zarr_store.samples import Sample, SampleSpec
from zarr_store.store import translate_os_errors

if TYPE_CHECKING:
    import pyarrow as pa

    from jaxtrain.inference.classify import Answers, Classifier

__all__ = ["classify_images"]

_LIKELY = 0.5
"""Probability from which an image has a class, where it may have several."""


def classify_images(
    session: Session,
    run: Path,
    images: str,
    out: Path,
    *,
    bands: Sequence[str] = (),
    skip_bad: bool = False,
    allow_mismatch: bool = False,
) -> dict[str, Any]:
    """Classify the images of a folder or a store and write the table; it appears whole or not at all.

    Args:
        session: The running command.
        run: The run directory.
        images: The folder or the sample store.
        out: The table, .parquet.
        bands: Names of the bands of a folder.
        skip_bad: Leave out files that cannot be used.
        allow_mismatch: Use images of another size or unit, and warn.

    Returns:
        The counts as JSON.

    Raises:
        InvalidInput: The run, the images or the target cannot be used; nothing was written.
        NothingFound: The folder holds no image.
    """
    from ingest.products.vector_file import beside
    from jaxtrain.inference.classify import Classifier

    if out.suffix.lower() != ".parquet" or out.is_dir():
        raise InvalidInput(f"the labels go into a .parquet file, got {out}")
    began = time.monotonic()
    spec, samples, left_out = _open(session, images, bands, skip_bad=skip_bad)
    classifier = Classifier.open(run, spec, images, allow_mismatch=allow_mismatch)
    warnings = (*left_out, *classifier.warnings)
    for line in warnings:
        session.warn(line)
    with Reporter(session, "classify", unit="images") as progress, translate_os_errors(str(out)), beside(out) as part:
        counts, without = _write(part, classifier, classifier.answers(samples, spec.count, progress.update), run)
    session.say(f"{out}: {spec.count:,} images, {len(classifier.classes)} classes, step {classifier.step}")
    for name, count in counts.items():
        session.say(f"  {name:32} {count:,}")
    if without:
        session.say(f"  {without:,} images hold no data and have no class")
    return {
        "out": str(out), "images": spec.count, "classes": counts, "without_data": without,
        "several": classifier.several,
        "step": classifier.step, "seconds": round(time.monotonic() - began, 3), "warnings": list(warnings),
    }  # fmt: skip


def _open(
    session: Session, images: str, bands: Sequence[str], *, skip_bad: bool
) -> tuple[SampleSpec, Iterator[Sample], tuple[str, ...]]:
    """Open a store, or check a folder; return what the images are, the images, and lines about those left out."""
    from jaxtrain.inference.classify import samples_of
    from zarr_store.samples import is_sample_store, open_samples

    if "://" in images or is_sample_store(images):
        if bands or skip_bad:
            raise InvalidInput("--bands and --skip-bad are for a folder of files; a sample store has named bands")
        store = open_samples(images)
        return store.spec, samples_of(store), ()
    from ingest.labels.unlabelled import open_folder

    with Reporter(session, "check", unit="images") as progress:
        found = open_folder(Path(images), bands=bands, skip_bad=skip_bad, on_progress=progress.update)
    lines = (*(f"left out: {line}" for line in found.left_out), *(f"passed over: {line}" for line in found.passed_over))
    return found.spec, found.samples(), lines


def _write(path: Path, classifier: Classifier, answers: Iterator[Answers], run: Path) -> tuple[dict[str, int], int]:
    """Write the rows batch by batch; return the number of images of each class, and those without data."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = classifier.classes
    kind = pa.list_(pa.string()) if classifier.several else pa.string()
    schema = pa.schema([
        ("image", pa.string()), ("longitude", pa.float64()), ("latitude", pa.float64()),
        ("classes" if classifier.several else "class", kind), ("probability", pa.float32()),
        *((f"probability_{name}", pa.float32()) for name in names),
    ], metadata={"terrashard": json.dumps({
        "run": run.name, "step": classifier.step, "classes": list(names), "several": classifier.several,
    }, sort_keys=True)})  # fmt: skip
    counts, without = np.zeros(len(names), np.int64), 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in answers:
            table, chosen, absent = _rows(batch, schema, names, several=classifier.several)
            writer.write_table(table)
            counts += chosen
            without += absent
    return dict(zip(names, counts.tolist(), strict=True)), without


def _rows(
    batch: Answers, schema: pa.Schema, names: Sequence[str], *, several: bool
) -> tuple[pa.Table, np.ndarray, int]:
    import pyarrow as pa

    seen = np.asarray(np.isfinite(batch.probability).all(axis=1))
    safe = np.where(seen[:, None], batch.probability, 0)
    chosen = (safe >= _LIKELY) if several else np.eye(len(names), dtype=bool)[safe.argmax(axis=1)]
    chosen = np.asarray(chosen & seen[:, None])
    words: list[Any] = []
    for row, there in zip(chosen, seen, strict=True):
        own = [names[i] for i in np.flatnonzero(row).tolist()]
        words.append(None if not there else own if several else own[0])
    arrays = [
        pa.array(batch.names, pa.string()),
        *(pa.array(values, pa.float64(), from_pandas=True) for values in (batch.longitude, batch.latitude)),
        pa.array(words, schema.field(3).type),
        pa.array(np.where(seen, safe.max(axis=1), np.nan).astype(np.float32), pa.float32(), from_pandas=True),
        *(pa.array(column, pa.float32(), from_pandas=True) for column in batch.probability.T.copy()),
    ]  # fmt: skip
    return pa.table(arrays, schema=schema), chosen.sum(axis=0), int((~seen).sum())
