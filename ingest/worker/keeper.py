"""`RateKeeper` lets the scheduler of a cluster keep the rate limits of all its workers."""

from __future__ import annotations

from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

from ingest.worker.rates import TURN, RateLimiter

__all__ = ["RateKeeper"]


class RateKeeper(SchedulerPlugin):
    """A plugin that lets the scheduler keep the rate limits of all workers."""

    name = "terrashard-rates"
    idempotent = True

    async def start(self, scheduler: Any) -> None:
        """Add a handler to the scheduler that tells workers when they may send requests."""
        limiter = RateLimiter()

        async def take(name: str, rate: float, count: int) -> float:
            return limiter.take(name, rate, count)

        scheduler.handlers[TURN] = take
