"""Headers that carry an exchange, beside the protocol's own rules and what an interface was seen to carry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxtrain.planner.facts import HandOver
from jaxtrain.planner.framing import HEADERS, PACKET, header_bytes, message_count

from .test_cost import exchange, facts, program

MESSAGE = 3 * (48 + 52)


@pytest.mark.parametrize(
    ("kind", "shape", "group", "messages"),
    [
        ("all-reduce", (1000,), 2, 8),  # four segments, to the other process and back
        ("all-reduce", (), 2, 2),  # a scalar is one segment
        ("all-reduce", (3,), 2, 6),
        ("all-reduce", (1000,), 4, 8 * 3 * 2),
        ("all-reduce", (3 << 20,), 2, 12 * 2),  # no segment is longer than a mebibyte
        ("all-gather", (1000,), 2, 4),
        ("all-gather", (1000,), 4, 8 * 3),
        ("reduce-scatter", (1000,), 2, 4),
        ("all-to-all", (1000,), 3, 6),
    ],
)
def test_messages_are_the_segments_that_go_from_process_to_process(kind, shape, group, messages):
    one = replace(exchange(("data",), 4e3, group, kind), shapes=(shape,))
    assert message_count(one) == messages
    assert message_count(replace(one, count=3, wire_bytes=3 * one.wire_bytes, total_bytes=3 * one.total_bytes)) == (
        3 * messages
    )
    two_groups = replace(one, total_bytes=2 * one.total_bytes)
    assert message_count(two_groups) == 2 * messages
    assert message_count(replace(one, axes=(), wire_bytes=0.0)) == 0


def test_each_pair_of_a_permutation_is_a_message():
    one = replace(exchange(("space",), 512.0, 2, "collective-permute"), total_bytes=512.0)
    assert message_count(one) == 1
    assert message_count(replace(one, total_bytes=3 * 512.0)) == 3


def test_headers_are_those_of_messages_and_of_further_packets():
    long = replace(exchange(("data",), 4.0 * 50_000, 2), shapes=((50_000,),))
    known = facts({"data": 2}, program(runs=2, collectives=(long,)))
    assert header_bytes(known) == 2 * (8 * MESSAGE + 400_000 // PACKET * HEADERS)
    assert header_bytes(known, packet=1448) == 2 * (8 * MESSAGE + 400_000 // 1448 * HEADERS)
    piped = facts({"pipe": 2}, program(), handovers=(HandOver(0, 1, 100), HandOver(0, 0, 7)), microbatches=4)
    assert header_bytes(piped) == 2 * 4 * MESSAGE
