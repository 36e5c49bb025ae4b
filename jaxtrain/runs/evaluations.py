"""The scores of a run on disk: one file for each part of its own data, and one for each other data.

- `evaluation.json`: the test part of the run's own data
- `evaluation-validation.json`, `evaluation-train.json`: other parts of them
- `evaluation-test-without-s2.json`: a part of them, without some modalities
- `evaluation-NAME-DIGEST.json`: other data, by the name of their folder and a digest of their path

So an evaluation replaces an earlier one of the same part or data, and no other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zarr_store.bounded import MOST_JSON_BYTES, load_json, read_file
from zarr_store.folder import FolderStore

__all__ = ["EVALUATION", "own_evaluation", "read_evaluations", "write_evaluation"]

EVALUATION = "evaluation.json"
_PARTS = ("test", "validation", "train")
_NAME = re.compile(r"evaluation(-[\w.-]+)?\.json")


def write_evaluation(run: Path, scores: Mapping[str, Any], *, own: bool) -> str:
    """Write scores into the run's folder and return the name of the file.

    Args:
        run: The run directory.
        scores: The JSON form of an evaluation.
        own: Whether the data are the run's own.
    """
    store = FolderStore(run.absolute())
    first = _read(run / EVALUATION)
    if first is not None and not _is_of_test(first):
        # earlier releases kept the last evaluation here, whatever it was of
        _write(store, _name_of(first, own=first["split"] in _PARTS), first)
    name = _name_of(scores, own=own)
    _write(store, name, scores)
    if name != EVALUATION and first is not None and not _is_of_test(first):
        (run / EVALUATION).unlink()
    return name


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """Return all scores of a run: of its own data, the test part first, then of other data by name."""
    names = sorted(path.name for path in run.iterdir() if _NAME.fullmatch(path.name)) if run.is_dir() else []
    found = [(name, scores) for name in names if (scores := _read(run / name)) is not None]
    order = {f"evaluation-{part}.json": number for number, part in enumerate(_PARTS)} | {EVALUATION: 0}
    return [scores for _, scores in sorted(found, key=lambda pair: (order.get(pair[0], len(order)), pair[0]))]


def own_evaluation(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the scores of the test part, else of another part of the run's own data; None without any."""
    own = (scores for scores in evaluations if scores.get("own_data", scores["split"] in _PARTS))
    return next((scores for scores in own if not scores.get("without")), None)


def _name_of(scores: Mapping[str, Any], *, own: bool) -> str:
    split = scores["split"]
    without = scores.get("without") or ()
    if own and without:
        return f"evaluation-{split}-without-{'-'.join(sorted(without))}.json"
    if own:
        return EVALUATION if split == "test" else f"evaluation-{split}.json"
    data = str(scores.get("cube", ""))
    stem = re.sub(r"[^\w.-]+", "-", data.rstrip("/").rpartition("/")[2])[:40].strip("-.") or "data"
    which = " ".join([data, split, *without])
    return f"evaluation-{stem}-{hashlib.sha256(which.encode()).hexdigest()[:8]}.json"


def _is_of_test(scores: Mapping[str, Any]) -> bool:
    return scores.get("split") == "test" and not scores.get("without")


def _write(store: FolderStore, name: str, scores: Mapping[str, Any]) -> None:
    store.write(name, json.dumps(scores, indent=1, ensure_ascii=False).encode())


def _read(path: Path) -> dict[str, Any] | None:
    """Return the scores of a file; None where there is none, or something else."""
    try:
        document = load_json(read_file(path, MOST_JSON_BYTES), str(path)) if path.is_file() else None
    except ValueError:
        return None
    return document if isinstance(document, dict) and "split" in document else None
