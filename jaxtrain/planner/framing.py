"""Count what a network carries besides the payload of exchanges: headers of messages and of packets.

Processes without accelerators exchange through Gloo over TCP. It cuts an array into segments, and each segment that
goes from one process to the next is a message: the sender announces it, the receiver says that it is ready, and the
segment follows. Each of the three has a preamble of Gloo and the headers of a packet, and a long segment takes several
packets.
(Gloo's `allreduce.cc`, `allgather.cc` and `transport/tcp/pair.cc`; RFC 791, RFC 9293 and RFC 7323 for IP, TCP and its
time stamps.)

Libraries of accelerators frame in other ways, which are not published; their profiles count no headers.
"""

from __future__ import annotations

import math

from jaxtrain.planner.collectives import Collective
from jaxtrain.planner.facts import Facts
from jaxtrain.planner.hlo import Array

__all__ = ["header_bytes", "message_count"]

PREAMBLE = 48
"""Bytes before each part of a message: six numbers of eight bytes."""
HEADERS = 20 + 32
"""Bytes of the headers of IPv4, and of TCP with time stamps, in each packet."""
PARTS = 3
"""Parts of a message: announced, awaited, sent."""
PACKET = 65536 - HEADERS
"""Payload of a packet on a loopback interface; a packet of Ethernet has 1448 bytes, and more headers for the same."""
SEGMENT = 1 << 20
"""Bytes of the longest segment of a sum."""


def header_bytes(facts: Facts, packet: int = PACKET) -> float:
    """Return the bytes of headers that all processes send in a step, each process with one device.

    Args:
        facts: what the programs of the strategy do.
        packet: Bytes of the payload of a packet.
    """
    total = 0.0
    for program in facts.programs:
        for one in program.collectives:
            total += program.runs * (message_count(one) * PARTS * (PREAMBLE + HEADERS) + _packets(one, packet))
    inside = math.prod(size for name, size in facts.mesh.items() if name != "pipe")
    for given in facts.handovers:
        if given.source != given.target:  # forward and back, for each microbatch
            each = PARTS * (PREAMBLE + HEADERS) + given.bytes // packet * HEADERS
            total += 2.0 * facts.microbatches * inside * each
    return total


def _packets(one: Collective, packet: int) -> float:
    """Return the bytes of the headers of those packets that a message needs besides its first one."""
    return one.total_bytes // packet * HEADERS


def message_count(one: Collective) -> int:
    """Return the messages that all devices send in one execution of a program for a collective."""
    if not one.wire_bytes or not one.axes:
        return 0
    n, count = one.group, 0
    groups = max(1, round(one.total_bytes / one.wire_bytes / n))
    for kind, shape in zip(one.types, one.shapes, strict=True):
        array = Array(kind, shape)
        if one.kind in ("all-reduce", "reduce-scatter"):
            width = max(1, array.bytes // max(1, array.size))
            segment = min(math.ceil(array.bytes / (2 * n)), SEGMENT)
            segments = math.ceil(array.bytes / (math.ceil(segment / width) * width))
            count += segments * (n - 1) * (2 if one.kind == "all-reduce" else 1) * groups
        elif one.kind == "all-gather":
            count += 2 * n * (n - 1) * groups
        elif one.kind == "all-to-all":
            count += n * (n - 1) * groups
        else:  # each pair of sender and receiver
            count += max(1, round(one.total_bytes / one.wire_bytes))
    return count * one.count
