// graphile-worker with the settings that its page on performance measures with: 24 jobs at once, 500 fetched
// at a time, finishes batched. PROGRAM install | fill COUNT | trickle COUNT GAP | work
import { makeWorkerUtils, run } from "graphile-worker";
import pg from "pg";

const RESULT = "CREATE TABLE result (job bigint PRIMARY KEY, output text, at timestamptz NOT NULL)";
const STATEMENT = {
  name: "statement",
  text: "INSERT INTO result (job, output, at) SELECT $1::bigint, (SELECT 1)::text, clock_timestamp()",
};
const pause = (ms) => new Promise((done) => setTimeout(done, Math.max(0, ms)));

const modes = {
  async install(pool) {
    await pool.query(RESULT);
    const utils = await makeWorkerUtils({ pgPool: pool });
    await utils.migrate();
    await utils.release();
  },
  async fill(pool, count) {
    const utils = await makeWorkerUtils({ pgPool: pool });
    const jobs = Array.from({ length: Number(count) }, (_, n) => ({ identifier: "run", payload: { number: n + 1 } }));
    await utils.addJobs(jobs);
    await utils.release();
  },
  async trickle(pool, count, gap) {
    const utils = await makeWorkerUtils({ pgPool: pool });
    const moments = {};
    const begun = performance.now();
    for (let job = 1; job <= Number(count); job++) {
      await pause(begun + job * Number(gap) * 1000 - performance.now());
      await utils.addJob("run", { number: job });
      moments[job] = (performance.timeOrigin + performance.now()) / 1000;
    }
    console.log(JSON.stringify(moments));
    await utils.release();
  },
  async work(pool) {
    const runner = await run({
      preset: {
        worker: {
          pgPool: pool,
          concurrentJobs: 24,
          maxPoolSize: 25,
          localQueue: { size: 500 },
          completeJobBatchDelay: 0,
          failJobBatchDelay: 0,
        },
      },
      taskList: { run: ({ number }, helpers) => helpers.withPgClient((client) => client.query({ ...STATEMENT, values: [number] })) },
    });
    await runner.promise;
  },
};

const [mode, ...values] = process.argv.slice(2);
const pool = new pg.Pool({ max: 25 });
await modes[mode](pool, ...values);
await pool.end();
