"""The text of a program as the compiler prints it: instructions, loops, groups of devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.planner.collectives import Dialect, find_collectives, replica_groups, result_bytes, wire_bytes
from jaxtrain.planner.hlo import Array, read_module
from zarr_store.errors import InvalidInput

TEXT = """HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %v = f32[8]{0} get-tuple-element(%p), index=1
  %moved = f32[8]{0} collective-permute(%v), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  ROOT %t = (s32[], f32[8]{0}) tuple(%n, %moved)
}

%test (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%outer (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], /*index=1*/f32[8]{0:T(8)}) while(%q), condition=%test, body=%inner, BACKEND5
}

ENTRY %main (a: f32[8], b: bf16[2,3]) -> f32[8] {
  %a = f32[8]{0} parameter(0), metadata={op_name="state.params['kernel']"}
  %b = bf16[2,3]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%test, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %v.1 = f32[8]{0} get-tuple-element(%loop), index=1
  %all = (f32[8]{0}, bf16[2,3]{1,0}) all-reduce(%v.1, %b), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %out = f32[8]{0} get-tuple-element(%all), index=0
}
""".replace("BACKEND5", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_arrays_have_the_bytes_of_their_types():
    sizes = {"f32": 4, "bf16": 2, "pred": 1, "u8": 1, "s64": 8, "f8e4m3fn": 1, "c64": 8}
    for kind, size in sizes.items():
        assert Array(kind, (3, 5)).bytes == 15 * size, kind
    assert Array("s4", (3,)).bytes == 2  # two numbers in a byte


def test_what_a_loop_does_counts_each_turn_of_it_and_of_the_loops_around_it():
    module = read_module(TEXT)
    assert module.entry == "main"
    counts = {one.name: count for _, one, count in module.walk()}
    assert counts["moved"] == 15
    assert counts["all"] == 1
    assert module.unknown_loops == ()
    assert read_module(TEXT.replace("known_trip_count", "dynamic")).unknown_loops == ("loop", "w")
    mesh = {"data": 2, "model": 2}
    assert wire_bytes(find_collectives(TEXT, mesh)) == {
        "model": {"collective-permute": 15 * 32, "all-reduce": 32 + 12}  # 2 (n - 1) / n of the result is all of it
    }
    assert result_bytes(TEXT) == {"collective-permute": 15 * 32, "all-reduce": 32 + 12}


def test_the_devices_of_a_group_in_all_notations():
    for text, groups in (
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ):
        assert sorted(map(sorted, replica_groups(text, 4))) == groups, text


def test_text_without_a_program_is_refused():
    with pytest.raises(InvalidInput, match="entry computation"):
        read_module("HloModule nothing")


def test_bfloat16_that_a_processor_reduces_as_float32_is_counted_as_what_it_is():
    text = TEXT.replace("%add (", "%add_promoted (").replace("to_apply=%add", "to_apply=%add_promoted")
    plain, half = (
        sum(one.wire_bytes for one in find_collectives(text, {"data": 4}, dialect) if one.kind == "all-reduce")
        for dialect in (Dialect(), Dialect(half=True))
    )
    assert half == plain / 2
    (one,) = [one for one in find_collectives(text, {"data": 4}, Dialect(half=True)) if one.corrected]
    assert "bfloat16" in one.corrected


def test_a_scan_is_counted_by_its_turns(device_mesh):
    mesh, split, whole = device_mesh

    def program(x):
        def body(total, _):
            total = total + jax.lax.with_sharding_constraint(x * total, split).sum()
            return total, None

        return jax.lax.scan(body, jnp.float32(1), None, length=7)[0]

    compiled = jax.jit(program, in_shardings=split, out_shardings=whole).lower(jnp.ones((8, 4))).compile()
    (one,) = [c for c in find_collectives(compiled, dict(mesh.shape)) if c.kind == "all-reduce"]
    assert (one.count, one.result_bytes, one.wire_bytes) == (7, 4, 7 * 4 * 2 * 7 / 8)
