"""A GPU is asked for kernels that sum in a fixed order, and its compiled programs stay with the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxtrain.runs.repeat import programs_kept, repeat_exactly

ASKED = "--xla_gpu_exclude_nondeterministic_ops=true"
READ_AFTER_JAX_IS_IMPORTED = """
import os, jax
from jaxtrain.runs.repeat import repeat_exactly
repeat_exactly()
os.environ["XLA_FLAGS"] += " --xla_no_such_flag=1"
jax.devices()
"""


def test_the_flag_joins_what_the_user_has_and_never_contradicts() -> None:
    env = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    assert repeat_exactly(env)
    assert env["XLA_FLAGS"] == f"--xla_cpu_enable_fast_math=false {ASKED}"
    assert not repeat_exactly(env)
    empty: dict[str, str] = {}
    assert repeat_exactly(empty)
    assert empty["XLA_FLAGS"] == ASKED
    for own in ("--xla_gpu_deterministic_ops=true", "--xla_gpu_exclude_nondeterministic_ops=false"):
        theirs = {"XLA_FLAGS": own}
        assert not repeat_exactly(theirs)
        assert theirs["XLA_FLAGS"] == own


def test_the_compiler_knows_the_flag_and_reads_it_after_jax_is_imported() -> None:
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    told = subprocess.run(
        [sys.executable, "-c", READ_AFTER_JAX_IS_IMPORTED], capture_output=True, text=True, timeout=120, env=env
    )
    assert told.returncode != 0
    assert "xla_no_such_flag" in told.stderr
    assert "exclude_nondeterministic" not in told.stderr.split("in XLA_FLAGS")[-1]


@pytest.fixture
def no_cache():
    """JAX keeps nothing, and whatever a test does to that ends with it; other tests share what they compile."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("no_cache")
def test_programs_for_a_gpu_are_kept_in_the_run_and_taken_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    hits: list[str] = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
    )
    for turn in range(2):
        with programs_kept(tmp_path / "compiled"):
            assert float(jax.jit(lambda x: x * 3 + 1)(jnp.float32(2))) == 7
        jax.clear_caches()
        assert len(hits) >= turn
        assert bool(hits) == bool(turn)
    assert any(path.name.startswith("jit_") for path in (tmp_path / "compiled").iterdir())
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("why", ["processor", "own folder"])
def test_nothing_is_kept_on_a_processor_or_beside_a_folder_of_the_user(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = None
    if why == "own folder":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        own = str(tmp_path / "own")
        jax.config.update("jax_compilation_cache_dir", own)
    with programs_kept(tmp_path / "compiled"):
        assert jax.config.jax_compilation_cache_dir == own
    assert not (tmp_path / "compiled").exists()
