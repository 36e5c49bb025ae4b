"""The exchange of a step between processes of this machine, and the same bytes over plain loopback TCP and memcpy.

Every process contributes a vector of 2 MB or 100 MB and gets the sum of all. The peers in the same run:

- `tcp`: the same processes send each other as many bytes by plain sockets, without adding: 2 (n - 1) / n × R each way.
- `memcpy`: as many bytes copied within one process, by all processes at the same time.

All processes share the cores, so with more processes than cores the limit is what the cores can copy.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
from harness import Row, arguments, publish

from jaxtrain.hetero.coordinator import Coordinator
from jaxtrain.hetero.member import Member
from jaxtrain.hetero.membership import Contribution, Identity, Total
from jaxtrain.hetero.wire import new_secret

IDENTITY = Identity("benchmark", "benchmark", "benchmark")
SIDES = ("exchange", "tcp", "memcpy")
SIZES = {"2 MB": 500_000, "100 MB": 25_000_000}


def exchange(pipe: Connection, address: str, secret: str, name: str, members: int, size: int, repeats: int) -> None:
    """Seconds of each exchange, between two barriers of the group."""
    vector = np.random.default_rng(int(name)).standard_normal(size, dtype=np.float32)
    with Member.join(address, secret, name, IDENTITY, chunks=members, state_step=0) as member:
        member.needs_state()
        seconds = []
        for step in range(repeats + 2):
            work = member.start(step)
            began = time.perf_counter()
            total = member.exchange(Contribution(step, work.chunks, vector, 1.0))
            assert isinstance(total, Total)
            seconds.append(time.perf_counter() - began)
        pipe.send(seconds[2:])
        member.leave(finished=True)


def plain_tcp(pipe: Connection, number: int, members: int, size: int, repeats: int) -> None:
    """Seconds to send to and receive from each other process 2 R / n bytes by plain sockets."""
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    ports = pipe.recv()
    share = 2 * size * 4 // members
    outgoing = [socket.create_connection(("127.0.0.1", port)) for n, port in enumerate(ports) if n != number]
    incoming = [listener.accept()[0] for _ in outgoing]
    data, into = np.ones(share, np.uint8), [np.empty(share, np.uint8) for _ in incoming]

    def receive(sock: socket.socket, target: np.ndarray) -> None:
        view, done = target.data, 0
        while done < share:
            done += sock.recv_into(view[done : done + (1 << 19)], 0, socket.MSG_WAITALL)

    seconds = []
    for _ in range(repeats + 2):
        pipe.send("ready")
        pipe.recv()
        began = time.perf_counter()
        threads = [threading.Thread(target=receive, args=pair) for pair in zip(incoming, into, strict=True)]
        threads += [threading.Thread(target=sock.sendall, args=(data,)) for sock in outgoing]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds.append(time.perf_counter() - began)
    pipe.send(seconds[2:])


def memcpy(pipe: Connection, number: int, members: int, size: int, repeats: int) -> None:
    """Seconds to copy as many bytes as one member receives."""
    pipe.send(number)
    pipe.recv()
    source = np.ones(2 * (members - 1) * size // members, np.float32)
    target = np.empty_like(source)
    seconds = []
    for _ in range(repeats + 2):
        pipe.send("ready")
        pipe.recv()
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    pipe.send(seconds[2:])


def together(target: object, members: int, size: int, repeats: int) -> float:
    """Median over the repeats of the slowest process, each repeat begun by all at the same time."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(members):
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there, number, members, size, repeats))  # type: ignore[arg-type]
        process.start()
        pipes.append(here)
        processes.append(process)
    first = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(first)
    for _ in range(repeats + 2):
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send("go")
    return finish(pipes, processes)


def finish(pipes: list[Connection], processes: Sequence[multiprocessing.process.BaseProcess]) -> float:
    found = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return float(statistics.median(max(turn) for turn in zip(*found, strict=True)))


def members_exchange(members: int, size: int, repeats: int) -> float:
    context = multiprocessing.get_context("spawn")
    secret = new_secret()
    pipes, processes = [], []
    with Coordinator("127.0.0.1:0", secret, expected=members) as server:
        for number in range(members):
            here, there = context.Pipe()
            args = (there, server.address, secret, str(number), members, size, repeats)
            process = context.Process(target=exchange, args=args)
            process.start()
            pipes.append(here)
            processes.append(process)
        return finish(pipes, processes)


def main() -> int:
    options = arguments(__doc__ or "")
    rows = []
    for members in (2, 4):
        for label, size in SIZES.items():
            repeats = options.repeats * (10 if size < 1_000_000 else 2)
            ours = members_exchange(members, size, repeats)
            tcp = together(plain_tcp, members, size, repeats)
            copy = together(memcpy, members, size, repeats)
            moved = 2 * (members - 1) / members * size * 4
            what = f"{members} processes, {label}"
            times = ", ".join(
                f"{name} {1000 * value:.1f} ms" for name, value in zip(SIDES, (ours, tcp, copy), strict=True)
            )
            print(f"  {what}: {times}", flush=True)
            note = f"{moved / ours / 1e9:.2f} GB/s each way"
            limit = 1.5 if size > 1_000_000 else None  # small vectors cost the round trips to the coordinator
            rows.append(Row(f"{what}: time ÷ plain TCP", ours / tcp, limit, at_most=True, note=note))
            rows.append(Row(f"{what}: time ÷ memcpy", ours / copy))
    return 0 if publish("hetero_exchange", rows, full=options.full) else 1


if __name__ == "__main__":
    sys.exit(main())
