"""The processes that measure placements compile before they meet."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from jaxtrain.learn.step import make_eval_step, make_train_step
from jaxtrain.planner import placement_measurer

from ..parallel.parity import make_program, mesh_of, model_of, put

COMPILED = "/jax/core/compile/backend_compile_duration"


def test_all_is_compiled_before_processes_wait_for_each_other_and_no_step_compiles_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The link between processes gives up after 30 s, and the first exchange is in the first step."""
    program = make_program(mesh_of("data=2"), model_of("cnn"))
    step, evaluate, batch = make_train_step(program), make_eval_step(program), put(program)
    state, key = program.init(jax.random.key(0)), jax.random.key(1)
    seen: list[str] = []

    def listen(event: str, _seconds: float, **_: Any) -> None:
        if event == COMPILED:
            seen.append("compiled")

    monkeypatch.setattr(placement_measurer, "wait_for_all", lambda _what: seen.append("waited"))
    listening: Any = jax.monitoring
    listening.register_event_duration_secs_listener(listen)
    try:
        placement_measurer._compile(step, evaluate, state, batch, key)
        assert seen == ["compiled", "compiled", "waited"]
        evaluate(state, batch)
        step(state, batch, key=key)
    finally:
        listening.unregister_event_duration_listener(listen)
    assert seen == ["compiled", "compiled", "waited"]
