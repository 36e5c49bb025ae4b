"""A process that works on a search: `python -m jaxtrain.tuning.process`, which `run_workers` starts."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxtrain.tuning.lanes import work_together
from jaxtrain.tuning.study import StudyFolder
from jaxtrain.tuning.worker import Budget, TrialNews
from zarr_store.errors import TerrashardError

__all__ = ["ORDER", "main"]

ORDER = "TERRASHARD_TUNE"
"""Variable with the order of a worker, as JSON."""


def main() -> None:
    """Work on the search that the environment describes."""
    order = json.loads(os.environ[ORDER])
    folder = StudyFolder.open(Path(order["study"]))
    from jaxtrain.parallel.processes import die_with_parent

    if "TERRASHARD_PARENT" in os.environ:
        die_with_parent(int(os.environ["TERRASHARD_PARENT"]))

    def say(line: dict[str, Any]) -> None:
        sys.stdout.write(f"{json.dumps(line)}\n")
        sys.stdout.flush()

    def tell(news: TrialNews) -> None:
        say(asdict(news))

    try:
        compiled = work_together(
            folder, Budget(**order["budget"]), order["population"], name=order["name"], number=order["number"],
            on_trial=tell, on_note=lambda note: say({"note": note}),
        )  # fmt: skip
    except TerrashardError as error:
        say({"error": str(error), "code": error.exit_code})
        sys.exit(error.exit_code)
    say({"compiled": compiled})


if __name__ == "__main__":
    main()
