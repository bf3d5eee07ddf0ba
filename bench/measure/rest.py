"""What a master costs that has nothing to do.

CPU is what the kernel counted of the master and of its session's backend. Statements are counted twice: by the
server's log with log_statement = all, and by the transactions in pg_stat_database, of which the look at it is one.
"""

import time

from measure import bare
from measure.figure import Course, Outcome, subject
from measure.ground import Ground, Usage

TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
BACKEND = "SELECT backend FROM task_master"
LISTENER = "SELECT pid FROM pg_stat_activity WHERE query = 'LISTEN nothing'"


@subject
def idle(course: Course) -> Outcome:
    """Processor time, statements and wake-ups of a master, its backend and the server over a minute without a task."""
    outcome = Outcome()
    seconds = course.size(60, 2)
    against = "a process that LISTENs in select()"
    master = outcome.figure("master: CPU", "%", against=against, better="less", limit=0.05, headline=True)
    backend = outcome.figure("its backend: CPU", "%", against="that process's backend", better="less", limit=0.05)
    sleeps = outcome.figure("master: wake-ups a minute", "", better="less")
    logged = outcome.figure("statements a minute (server log)", "", better="less", limit=0, headline=True)
    look = outcome.figure("statements of a safety look (one a minute)", "", better="less")
    counted = outcome.figure("transactions a minute (pg_stat_database)", "", better="less")
    with course.site.ground("idle") as ground:
        ground.install()
        for _ in course.rounds():
            with (
                ground.logged("log_statement", "all") as records,
                ground.master("--safety", "1h") as process,
                bare.running("idle", ground.conninfo) as listener,
            ):
                ground.own("INSERT INTO task (input) VALUES ('SELECT 1')")  # it has worked before it rests
                ground.drained()
                time.sleep(min(seconds, 5))  # the worker has gone
                ground.settle()
                pids = [process.pid, ground.value(BACKEND), listener.pid, ground.value(LISTENER)]
                local = course.site.server is not None
                before = [Usage.of(pid) for pid in pids] if local else []
                statements = len(_statements(records()))
                transactions = ground.value(TRANSACTIONS)
                time.sleep(seconds)
                after = [Usage.of(pid) for pid in pids] if local else []
                said = _statements(records())[statements:]
                counted.add((ground.value(TRANSACTIONS) - transactions) * 60 / seconds)
                if local:
                    spent = [now.since(then) for now, then in zip(after, before, strict=True)]
                    shares = [one.cpu / seconds * 100 for one in spent]
                    master.add(shares[0], shares[2])
                    backend.add(shares[1], shares[3])
                    sleeps.add(spent[0].sleeps * 60 / seconds)
                    # One is ours: the look at pg_stat_database.
                    logged.add(sum("pg_stat_database" not in one for one in said) * 60 / seconds)
                bare.go(listener)
            if course.site.server is not None:
                look.add(_looks(ground))
    outcome.note("Measured between two safety looks (`safety` = 1 hour); what one look costs is a line of its own.")
    outcome.note("Of the transactions in pg_stat_database one or two are the benchmark's own looks.")
    return outcome


def _looks(ground: Ground) -> float:
    """Statements of one look, with one a second."""
    with ground.logged("log_statement", "all") as records, ground.master("--safety", "1s"):
        time.sleep(1.5)
        before = len(_statements(records()))
        time.sleep(3)
        return (len(_statements(records())) - before) / 3


def _statements(records: list[str]) -> list[str]:
    return [one for one in records if one.startswith(("LOG:  statement:", "LOG:  execute"))]
