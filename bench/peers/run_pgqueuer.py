"""pgqueuer: its quick start's driver (asyncpg), a hundred jobs fetched and finished at a time, a pool for their SQL."""

from collections.abc import Iterable

import asyncpg
import job
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

BATCH = 100
SESSIONS = 4


class Pgqueuer(job.Peer):
    async def install(self) -> None:
        session = await asyncpg.connect()
        await session.execute(job.RESULT)
        await Queries(AsyncpgDriver(session)).install()
        await session.close()

    async def open(self) -> None:
        self.queries = Queries(AsyncpgDriver(await asyncpg.connect()))

    async def fill(self, jobs: Iterable[int]) -> None:
        payloads = [str(number).encode() for number in jobs]
        await self.queries.enqueue(["run"] * len(payloads), payloads, [0] * len(payloads))

    async def put(self, job: int) -> None:
        await self.queries.enqueue("run", str(job).encode())

    async def work(self) -> None:
        pool = await asyncpg.create_pool(min_size=SESSIONS, max_size=SESSIONS)
        queuer = PgQueuer(AsyncpgDriver(await asyncpg.connect()))

        @queuer.entrypoint("run")
        async def statement(one: Job) -> None:
            await pool.execute(job.STATEMENT.format("$1::bigint"), int(one.payload or b"0"))

        await queuer.run(batch_size=BATCH)


if __name__ == "__main__":
    job.run(Pgqueuer())
