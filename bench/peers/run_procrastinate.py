"""procrastinate: one worker process, as many jobs at once as there are workers, a pool of its own for the jobs' SQL."""

from collections.abc import Iterable

import job
import procrastinate
import psycopg
from psycopg_pool import AsyncConnectionPool

CONCURRENCY = 4

app = procrastinate.App(connector=procrastinate.PsycopgConnector())
pool = AsyncConnectionPool("", min_size=CONCURRENCY, kwargs={"autocommit": True, "prepare_threshold": 0}, open=False)


@app.task(name="run")
async def statement(number: int) -> None:
    async with pool.connection() as session:
        await session.execute(job.STATEMENT.format("%s::bigint"), [number])


class Procrastinate(job.Peer):
    async def install(self) -> None:
        with psycopg.connect("") as session:
            session.execute(job.RESULT)
        async with app.open_async():
            await app.schema_manager.apply_schema_async()

    async def open(self) -> None:
        await app.open_async()

    async def fill(self, jobs: Iterable[int]) -> None:
        await statement.batch_defer_async(*({"number": number} for number in jobs))

    async def put(self, job: int) -> None:
        await statement.defer_async(number=job)

    async def work(self) -> None:
        async with pool, app.open_async():
            await app.run_worker_async(concurrency=CONCURRENCY)


if __name__ == "__main__":
    job.run(Procrastinate())
