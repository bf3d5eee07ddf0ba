"""chancy: its executor for jobs that wait (asyncio), a hundred at once so it fetches many, polled as slots get free."""

import asyncio
import logging
from collections.abc import Iterable

import job
import psycopg
from chancy import Chancy, Job, Queue, Worker
from psycopg_pool import AsyncConnectionPool

CONCURRENCY = 100
SESSIONS = 4
pool: AsyncConnectionPool | None = None


async def statement(number: int) -> None:
    assert pool is not None
    async with pool.connection() as session:
        await session.execute(job.STATEMENT.format("%s::bigint"), [number])


class Ours(job.Peer):
    """Jobs are found by the name of their module, so this is not run as __main__."""

    def __init__(self) -> None:
        logging.getLogger("chancy").addHandler(logging.NullHandler())
        self.chancy = Chancy("")

    async def install(self) -> None:
        with psycopg.connect("") as session:
            session.execute(job.RESULT)
        async with self.chancy as chancy:
            await chancy.migrate()
            await chancy.declare(
                Queue("default", concurrency=CONCURRENCY, executor=Chancy.Executor.Async, eager_polling=True)
            )

    async def open(self) -> None:
        await self.chancy.__aenter__()

    async def fill(self, jobs: Iterable[int]) -> None:
        async for _ in self.chancy.push_many([Job.from_func(statement, kwargs={"number": number}) for number in jobs]):
            pass

    async def put(self, job: int) -> None:
        await self.chancy.push(Job.from_func(statement, kwargs={"number": job}))

    async def work(self) -> None:
        global pool
        pool = AsyncConnectionPool(
            "", min_size=SESSIONS, kwargs={"autocommit": True, "prepare_threshold": 0}, open=False
        )
        async with pool, self.chancy as chancy, Worker(chancy) as worker:
            await worker.wait_for_shutdown()
            await asyncio.sleep(0)


if __name__ == "__main__":
    import run_chancy

    job.run(run_chancy.Ours())
