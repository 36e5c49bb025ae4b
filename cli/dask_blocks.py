"""`DaskBlocks` runs the jobs of `jaxtrain.tasks` on the workers of a Dask cluster; results keep their order."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from zarr_store.errors import AccessError, InvalidInput

__all__ = ["DaskBlocks", "dask_blocks"]

T = TypeVar("T")
_IN_FLIGHT = 3
"""Blocks for each thread of the cluster that are under way, so that no thread waits for the client."""


class DaskBlocks:
    """Workers of a cluster; a block goes to the same worker in each pass, which keeps what it has read.

    Args:
        client: Connected to the cluster.
        workers: Addresses of the workers.
        threads: Threads of the whole cluster.
    """

    def __init__(self, client: Any, workers: Sequence[str], threads: int) -> None:
        self.client, self.workers, self.threads = client, list(workers), threads

    def map(self, job: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
        under_way: deque[Any] = deque()
        # the job holds centres and no pixels; sent once, it is not sent with every block
        held = self.client.scatter([job], broadcast=True, hash=False)[0]
        try:
            for number in numbers:
                home = self.workers[number % len(self.workers)]
                under_way.append(
                    self.client.submit(_run, held, number, workers=[home], allow_other_workers=True, pure=False)
                )
                if len(under_way) >= _IN_FLIGHT * self.threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            if under_way:
                self.client.cancel(list(under_way))

    def share(self, value: T) -> T:
        return value


def _run(job: Callable[[int], T], number: int) -> T:
    return job(number)


def _keep(nbytes: int) -> None:
    from jaxtrain.tasks.work import keep_blocks

    keep_blocks(nbytes)


@contextmanager
def dask_blocks(address: str, kept: int) -> Iterator[DaskBlocks]:
    """Open the workers of the cluster at `address`.

    Args:
        address: Address of the scheduler, such as tcp://10.0.0.1:8786.
        kept: Bytes of blocks that each worker keeps between passes.

    Raises:
        InvalidInput: The address has no scheme.
        AccessError: The cluster does not answer, or has no worker.
    """
    if not re.match(r"[a-z]+://.", address):
        raise InvalidInput(
            f"--dask {address}: expected the address of a scheduler with its scheme, such as tcp://10.0.0.1:8786"
        )
    from ingest.request.config import IngestConfig
    from ingest.run.cluster import open_cluster

    with open_cluster(IngestConfig(scheduler=address)) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            raise AccessError(f"the cluster at {address} has no workers; start some, or leave --dask out")
        client.run(_keep, kept)
        threads = sum(int(about["nthreads"]) for about in workers.values())
        yield DaskBlocks(client, sorted(workers), threads)
