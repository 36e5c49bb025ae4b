"""Make the same step give the same bits, on GPUs too, and do not compile it twice.

Left alone, XLA may sum on a GPU in an order that changes from run to run, and it times several kernels for each
convolution and takes the one that was fastest that day. A run that is continued would then differ from one that nothing
befell. So a training leaves out kernels whose order changes (`repeat_exactly`), and keeps its compiled programs in the
user's cache (`programs_kept`): who continues it there uses the same ones, and does not wait for them to be compiled.
On processors nothing is timed, and equal programs are equal: there all runs share what they compile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, MutableMapping

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxtrain.runs.programs import program_folder, shared_folder

__all__ = ["programs_kept", "repeat_exactly"]

_WORTH_S = 0.1
"""Seconds of compiling from which on a program is kept; JAX's own bound of 1 s leaves many small ones out."""
_FLAGS = ("--xla_gpu_exclude_nondeterministic_ops", "--xla_gpu_deterministic_ops")


def repeat_exactly(environment: MutableMapping[str, str] | None = None) -> bool:
    """Ask XLA for kernels that sum in a fixed order, and return whether it will use them.

    Call it before anything touches a device. A user whose XLA_FLAGS name such a flag, as true or false, is left alone:
    with --xla_gpu_deterministic_ops=true, runs that are started again are equal, too: then no kernels are timed.
    """
    env = os.environ if environment is None else environment
    flags = env.get("XLA_FLAGS", "")
    if any(flag in flags for flag in _FLAGS):
        return False
    env["XLA_FLAGS"] = f"{flags} {_FLAGS[0]}=true".strip()
    return True


@contextlib.contextmanager
def programs_kept(key: str) -> Iterator[None]:
    """Keep programs that are compiled inside, and reuse those that were compiled before.

    A user who has named a folder for all that JAX compiles (JAX_COMPILATION_CACHE_DIR) is left alone.

    Args:
        key: Identity of the run, so that runs do not share programs of a GPU.
    """
    own = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # of jax
    backend = jax.default_backend()
    folder = None
    if not own and backend in ("cpu", "gpu"):
        folder = program_folder(key) if backend == "gpu" else shared_folder()
    if folder is None:
        yield
        return
    least = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]  # of jax
    jax.config.update("jax_compilation_cache_dir", str(folder))  # type: ignore[no-untyped-call]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min(least, _WORTH_S))  # type: ignore[no-untyped-call]
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)  # type: ignore[no-untyped-call]
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)  # type: ignore[no-untyped-call]
        compilation_cache.reset_cache()
