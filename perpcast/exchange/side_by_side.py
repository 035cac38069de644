"""Many questions at once, and no more of them than help."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

# Enough in flight to reach the exchange's rate limit at 0.2 s an answer.
QUESTIONS = 24

Job = TypeVar("Job")


async def side_by_side(jobs: Iterable[Job], work: Callable[[Job], Awaitable[None]]) -> None:
    """Does `work` on every job, QUESTIONS of them at a time, begun in order; the first error ends them all."""
    waiting = iter(jobs)

    async def worker() -> None:
        for job in waiting:  # shared: each job goes to the worker that is free
            await work(job)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(QUESTIONS):
                group.create_task(worker())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others are the same trouble, or follow from it
