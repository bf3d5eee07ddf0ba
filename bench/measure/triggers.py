"""What an asynchronous trigger costs the statement that fires it, for each of its rows.

The reference is a plain AFTER trigger that inserts the row's columns into a log table with a primary key. Tasks are due
a day later, so that nothing else runs than what fires; the master is there, and asleep.
"""

from measure import bare
from measure.figure import Course, Outcome, subject
from measure.ground import Ground

TABLE = (
    "CREATE TABLE {} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, account int, amount numeric(10,2), note text)"
)
BY_ROW = ("logged", "fired", "grouped", "queued")
BY_STATEMENT = ("logged_all", "fired_all", "parted")
"""Tables with a trigger each; the first is the reference of the others."""

FILL = "INSERT INTO {} (account, amount, note) SELECT n % 100, n, 'payment ' || n FROM generate_series(1, {}) AS n"
LOG = """CREATE FUNCTION log_row() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO log (account, amount, note) VALUES (NEW.account, NEW.amount, NEW.note); RETURN NULL; END $$"""
LOG_ALL = """CREATE FUNCTION log_all() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO log (account, amount, note) SELECT account, amount, note FROM new; RETURN NULL; END $$"""
QUEUE = """CREATE FUNCTION queue() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO task (plan, input) VALUES (now() + interval '1 day', format('SELECT f(%s)', NEW.account));
    RETURN NULL; END $$"""
ROW = "CREATE TRIGGER t AFTER INSERT ON {} FOR EACH ROW EXECUTE FUNCTION {}"
ALL = "CREATE TRIGGER t AFTER INSERT ON {} REFERENCING NEW TABLE AS new FOR EACH STATEMENT EXECUTE FUNCTION {}"
ASYNC = "task_async('SELECT f(account) FROM new', 'delay = 1 day')"
GROUPED = "task_async('SELECT f(account) FROM new', 'delay = 1 day', 'group = account {account}')"


@subject
def triggers(course: Course) -> Outcome:
    """A row inserted under an asynchronous trigger, by row and by statement, against a trigger that fills a log."""
    outcome = Outcome()
    rows, many = course.size(10_000, 200), course.size(100_000, 1000)
    log = "AFTER trigger that inserts into a log table"
    cases = {
        "fired": ("FOR EACH ROW: time of a row", log, True),
        "grouped": ("FOR EACH ROW, group = account {account}: time of a row", log, False),
        "queued": ("plain trigger that inserts a task by hand: time of a row", log, False),
        "fired_all": (f"FOR EACH STATEMENT of {many:,} rows: time of a row", log + ", by statement", True),
        "parted": ("the same, 100 tasks by group = account {account}: time of a row", log + ", by statement", False),
    }
    figures = {
        name: outcome.figure(what, "µs", against=against, better="less", headline=headline)
        for name, (what, against, headline) in cases.items()
    }
    with course.site.ground("triggers") as ground:
        ground.install()
        prepare(ground)
        for _ in course.rounds():
            with ground.master():
                for (reference, *others), count in ((BY_ROW, rows), (BY_STATEMENT, many)):
                    for name in others:
                        course.say(figures[name].name)
                        figures[name].add(spent(ground, name, count), spent(ground, reference, count))
                        ground.own(f"TRUNCATE task, log, {name}, {reference}")
                        ground.ask("CHECKPOINT")
    return outcome


def prepare(ground: Ground) -> None:
    ground.own(*(TABLE.format(name) for name in (*BY_ROW, *BY_STATEMENT, "log")), LOG, LOG_ALL, QUEUE)
    ground.own(
        ROW.format("logged", "log_row()"),
        ROW.format("queued", "queue()"),
        ROW.format("fired", ASYNC),
        ROW.format("grouped", GROUPED),
        ALL.format("logged_all", "log_all()"),
        ALL.format("fired_all", ASYNC),
        ALL.format("parted", GROUPED),
    )


def spent(ground: Ground, table: str, count: int) -> float:
    """Microseconds a row, of a statement of so many."""
    begin, end = bare.together("insert", 1, ground.conninfo, FILL.format(table, count), 1)[0]
    return (end - begin) / count * 1e6
