"""`python -m jaxtrain.train CONFIG.toml --out RUN`: this module holds only that command.

The function is `jaxtrain.train`, from `jaxtrain/loop.py`. A module of the same name would hide it as soon as anything
imported the module, so this file can be run but not imported.
"""

from __future__ import annotations

if __name__ != "__main__":
    raise ImportError(
        "jaxtrain.train is a function, and the module of that name is only a command: "
        "write `from jaxtrain import train`"
    )

import sys

from jaxtrain.script import main

sys.exit(main())
