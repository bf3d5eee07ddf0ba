"""Filling a table with tasks, of ours or bare, having them done, and the rate that the table itself tells."""

from dataclasses import dataclass

from measure import bare
from measure.ground import Ground
from storm.stand import Broken

RATE = """SELECT count(*) / extract(epoch FROM max(stop) - min(start))::float8, count(*),
    count(*) FILTER (WHERE state::text = 'DONE' AND output = %s AND attempt = 1)
FROM {} WHERE input = %s AND id > %s"""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Equal tasks: as many, what each runs, what it must have said; `columns` are more columns of ours."""

    count: int
    input: str = "SELECT 1"
    output: str = "1"
    columns: str = ""
    values: str = ""  # of n

    def insert(self, table: str, columns: str = "", values: str = "") -> str:
        columns, values = (f", {columns}", f", {values}") if columns else ("", "")
        return (
            f"INSERT INTO {table} (input{columns}) SELECT '{self.input}'{values} "
            f"FROM generate_series(1, {self.count}) AS n"
        )


def ours(ground: Ground, work: Work, table: str = "task", empty: bool = True) -> float:
    """Tasks a second, by a master that is already there and asleep."""
    ground.settle()
    _begin(ground, table, empty)
    ground.own(work.insert(table, work.columns, work.values))
    ground.drained(table)
    return rate(ground, table, work)


def loops(ground: Ground, work: Work, processes: int, table: str = "bare") -> float:
    """Tasks a second, by as many bare loops."""
    _begin(ground, table, empty=True)
    ground.own(work.insert(table))
    done = bare.together("loop", processes, ground.conninfo, table)
    if sum(done) != work.count:
        raise Broken(f"the bare loops did {sum(done)} of {work.count} tasks")
    return rate(ground, table, work)


def rate(ground: Ground, table: str, work: Work, after: int = 0) -> float:
    """From the first start to the last stop; every task must have been done, once, and said what it should."""
    found, count, right = ground.ask(RATE.format(table), [work.output, work.input.replace("''", "'"), after])[0]
    if (count, right) != (work.count, work.count):
        raise Broken(
            f"{table}: {right} of {work.count} tasks are done once with output {work.output!r}, {count} are there"
        )
    return float(found)


def _begin(ground: Ground, table: str, empty: bool) -> None:
    if empty:
        ground.own(f"TRUNCATE {table}")
    # Every run begins with what it will write already allowed for, and none with another's dirty pages.
    ground.ask("CHECKPOINT")
