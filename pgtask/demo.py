"""The demonstration behind `bin/demo`: a billing company's background work, on a real server, in half a minute.

It starts a PostgreSQL server of its own in a throw-away directory and a real `pgtask-master` on two databases of it,
lets payments come in, and shows what the tasks that their triggers queue do. Everything shown is read from the
tables and from the system; at the end what came out is compared with what must, and the exit status says so.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psycopg
from psycopg.rows import dict_row
from rich import box
from rich.console import Console
from rich.table import Table

from pgtask.embedded import Server

STORY = 11.0
"""Seconds that the story takes; a repeated task goes on for ever, so the story has an end of its own."""

WATCH = 'read -r line && exit; kill -INT "$1"'
"""A line on its input means that the master was ended; the end of the input, that the demonstration died."""

CONFIG = """
[master]
workers = 12
stop_timeout = "5 s"

[defaults]
delete = false            # the demo wants to show every row; by default one that said nothing is removed

[[database]]
conninfo = "{billing}"

[[database]]
conninfo = "{crm}"
schema = "crm"
"""

BILLING = """
CREATE TABLE account (
    id int PRIMARY KEY, owner text NOT NULL, balance numeric NOT NULL DEFAULT 0, service text NOT NULL DEFAULT 'off');
CREATE TABLE payment (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, account int NOT NULL REFERENCES account, amount numeric NOT NULL);
CREATE TABLE mail (at timestamptz DEFAULT clock_timestamp(), recipient text, subject text);
INSERT INTO account (id, owner) VALUES (1, 'ann'), (2, 'bob'), (3, 'eve');

CREATE FUNCTION recalculate(account_id int) RETURNS numeric LANGUAGE sql AS $$
    UPDATE account SET balance = (SELECT sum(amount) FROM payment WHERE account = account_id)
    WHERE id = account_id RETURNING balance
$$;
CREATE FUNCTION switch_on(account_id int) RETURNS text LANGUAGE sql AS $$
    UPDATE account SET service = 'on' WHERE id = account_id AND balance > 0
    RETURNING 'service of ' || owner || ' is ' || service
$$;
CREATE FUNCTION send_mail(account_id int, subject text) RETURNS text LANGUAGE sql AS $$
    SELECT pg_sleep(0.4);
    INSERT INTO mail (recipient, subject) SELECT owner, subject FROM account WHERE id = account_id
    RETURNING 'mail to ' || recipient
$$;

-- A gateway that does not answer at first: the task's own row knows how often it was asked.
CREATE FUNCTION charge() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT attempt FROM task WHERE id = current_setting('pg_task.id')::bigint) < 3 THEN
        RAISE 'the gateway does not answer';
    END IF;
    RETURN 'charged';
END $$;
"""

FOLLOWS = """
-- What follows a payment happens in the background, after the gateway has its answer.
CREATE TRIGGER payment_1_recalculate AFTER INSERT ON payment FOR EACH ROW
EXECUTE FUNCTION task_async('SELECT recalculate(account) FROM new', 'group = account {account}');
CREATE TRIGGER payment_2_switch_on AFTER INSERT ON payment FOR EACH ROW
EXECUTE FUNCTION task_async('SELECT switch_on(account) FROM new', 'group = account {account}');
CREATE TRIGGER payment_3_mail AFTER INSERT ON payment FOR EACH ROW
EXECUTE FUNCTION task_async($$SELECT send_mail(account, 'thanks for ' || amount) FROM new$$, 'group = mail', 'max = 1');
"""

CRM = """
CREATE TABLE contact (at timestamptz DEFAULT clock_timestamp(), text text);
"""

OTHERS = """
INSERT INTO task ("group", plan, input) VALUES
    ('statement', now() + interval '2.5 s', 'SELECT owner, balance, service FROM account ORDER BY id');
INSERT INTO task ("group", repeat, input) VALUES
    ('heartbeat', '1 s', $$SELECT count(*) || ' payments so far' FROM payment$$);
SELECT task_schedule('report', '*/3 * * * * *', $$SELECT sum(amount) || ' paid' FROM payment$$, "group" => 'report');
WITH charge AS (
    INSERT INTO task ("group", retry, backoff, input) VALUES ('gateway', 5, '400 ms', 'SELECT charge()') RETURNING id
)
SELECT task_run($$SELECT 'the gateway has answered'$$, "group" => 'after', depend => ARRAY[id]) FROM charge;
INSERT INTO task ("group", input) VALUES
    ('mistake', 'SELECT 100 / 0 AS discount');
SELECT task_run('SELECT pg_sleep(60)', "group" => 'export');
INSERT INTO task ("group", timeout, input) VALUES
    ('slow', '700 ms', 'SELECT pg_sleep(60)');
INSERT INTO task ("group", remote, input) VALUES
    ('crm', {remote}, $$INSERT INTO contact (text) VALUES ('first payment of ann') RETURNING text$$);
"""

SUMMARY = """
SELECT "group", state::text, count(*) AS tasks,
    round(avg(extract(epoch FROM start - plan) * 1000), 1) AS waited,
    round(max(extract(epoch FROM start - plan) * 1000), 1) AS longest,
    round(avg(extract(epoch FROM stop - start) * 1000), 1) AS ran, count(DISTINCT pid) AS sessions
FROM {table} GROUP BY 1, 2 ORDER BY min(id)
"""

BEATS = """
SELECT bool_and(next - plan = make_interval(secs => 1 + floor(extract(epoch FROM stop - plan))::int)) AS kept,
    round(extract(epoch FROM max(plan) FILTER (WHERE state = 'DONE') - min(plan)))::int + 1 AS seconds
FROM (SELECT plan, stop, state, lead(plan) OVER (ORDER BY plan) AS next FROM task WHERE "group" = 'heartbeat') AS beat
"""
"""A machine that stands still for longer than a second leaves out what it has missed, and no more."""

ENDED = """
SELECT id, "group", state::text, regexp_replace(input, '^WITH new AS .*[)][[:space:]]+(?=SELECT )', 'new: ') AS input,
    coalesce(output, split_part(error, chr(10), 1)) AS said,
    round(extract(epoch FROM start - plan) * 1000, 1) AS waited
FROM task WHERE stop IS NOT NULL AND id <> ALL (%s) ORDER BY stop
"""


@dataclass(kw_only=True)
class Stage:
    """What the story is played on."""

    console: Console
    server: Server
    master: subprocess.Popen[bytes]
    billing: psycopg.Connection[dict[str, Any]]
    crm: psycopg.Connection[dict[str, Any]]
    began: float = field(default_factory=time.monotonic)
    shown: list[int] = field(default_factory=list)
    tree: list[str] = field(default_factory=list)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--keep", is_flag=True, help="Stay up afterwards, and say how to connect with psql.")
def main(keep: bool) -> None:
    """Play a billing company's background work on a server of its own."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with _stage(console) as stage:
            _play(stage)
            wrong = _sum_up(stage)
            if keep:
                _stay(stage)
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left running")
        sys.exit(130)
    for line in wrong:
        console.print(f"[red]wrong:[/red] {line}")
    sys.exit(1 if wrong else 0)


@contextmanager
def _stage(console: Console) -> Iterator[Stage]:
    with Server.start(auth_host="scram-sha-256") as server:
        console.print(f"PostgreSQL {server.binaries.version} runs in {server.directory}")
        for user in ("billing", "crm"):
            with psycopg.connect(server.conninfo(), autocommit=True) as admin:
                admin.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'secret-{user}'".encode())
                admin.execute(f"CREATE DATABASE {user} OWNER {user}".encode())
        with _connect(server, "billing") as billing, _connect(server, "crm") as crm:
            billing.execute(BILLING.encode())
            crm.execute(CRM.encode())
            with _master(console, server) as master:
                yield Stage(console=console, server=server, master=master, billing=billing, crm=crm)


def _connect(server: Server, name: str) -> psycopg.Connection[dict[str, Any]]:
    return psycopg.connect(_conninfo(server, name), autocommit=True, row_factory=dict_row)


def _conninfo(server: Server, name: str) -> str:
    return server.conninfo(dbname=name, user=name, password=f"secret-{name}")


@contextmanager
def _master(console: Console, server: Server) -> Iterator[subprocess.Popen[bytes]]:
    config = server.directory / "pgtask.toml"  # goes with the server, whatever ends the demonstration
    config.write_text(CONFIG.format(billing=_conninfo(server, "billing"), crm=_conninfo(server, "crm")))
    config.chmod(0o600)
    log = server.directory / "pgtask.log"
    with open(log, "wb") as stream:
        command = [sys.executable, "-m", "pgtask", "--config", str(config)]
        master = subprocess.Popen(command, stderr=stream, start_new_session=True)
    # The end of this pipe, which closes with us whatever kills us, ends the master too.
    watch = subprocess.Popen(["sh", "-c", WATCH, "sh", str(master.pid)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 15
        while log.read_text().count(" leading ") < 2:
            if master.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException(f"pgtask-master does not start:\n{log.read_text()}")
            time.sleep(0.05)
        console.print(f"pgtask-master {master.pid} serves public.task of billing and crm.task of crm\n")
        yield master
    finally:
        master.send_signal(signal.SIGINT)
        try:
            master.wait(10)
        except subprocess.TimeoutExpired:
            master.kill()
            master.wait()
        watch.communicate(b"ended\n")


def _play(stage: Stage) -> None:
    """The story: payments come in for some seconds, and what ends is shown as it ends."""
    # Over TCP the server asks for the password, as it must for a remote task; the row carries it.
    remote = stage.server.tcp(dbname="crm", user="crm", password="secret-crm")
    stage.console.print("[bold]seconds  state  group       began after  what and what it said  (after its plan)[/bold]")
    stage.billing.execute(FOLLOWS.encode())
    with stage.billing.transaction():
        text = OTHERS.replace("{remote}", psycopg.sql.Literal(remote).as_string(None))
        stage.billing.execute(text.encode())
    stage.crm.execute(
        """INSERT INTO crm.task ("group", input) VALUES ('import', 'SELECT pg_sleep(0.8), 42 AS contacts')"""
    )
    payments = [(1, 20), (2, 35), (1, 5), (3, 50), (2, 12), (3, 8)]
    moments = [0.5, 1.0, 1.0, 1.2, 1.4, 4.0]
    cancelled = False
    while (now := time.monotonic() - stage.began) < STORY:
        while moments and now >= moments[0]:
            account, amount = payments[len(payments) - len(moments)]
            moments.pop(0)
            stage.billing.execute("INSERT INTO payment (account, amount) VALUES (%s, %s)", (account, amount))
            _say(stage, "paid", "", "", f"{amount} by account {account}")
        if not cancelled and now > 2:
            stage.billing.execute("SELECT task_cancel(id) FROM task WHERE \"group\" = 'export'")
            cancelled = True
        if not stage.tree and now > 1.6:
            stage.tree = _tree(stage.master.pid)
        _show_ended(stage)
        time.sleep(0.05)


def _show_ended(stage: Stage) -> None:
    for row in stage.billing.execute(ENDED.encode(), (stage.shown,)).fetchall():
        stage.shown.append(row["id"])
        said = " / ".join((row["said"] or "").replace("\t", " | ").splitlines())
        _say(stage, row["state"], row["group"], f"{row['waited']} ms", f"{_cut(row['input'], 60)} -> {said}")


def _say(stage: Stage, state: str, group: str, waited: str, text: str) -> None:
    seconds = time.monotonic() - stage.began
    line = f"{seconds:7.2f}  {state:5}  {group:11}  {waited:>9}  {text}"
    if stage.console.is_terminal:
        line = _cut(line, stage.console.width)
    stage.console.print(line, markup=False, soft_wrap=True)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _sum_up(stage: Stage) -> list[str]:
    """Print what ran where, and the processes; return what is not as it must be."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    title = "What ran where; mean milliseconds, and the longest wait"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("database", "group", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("tasks", "waited", "longest", "ran", "sessions"):
        table.add_column(name, no_wrap=True, justify="right")
    for name, conn, relation in (("billing", stage.billing, "task"), ("crm", stage.crm, "crm.task")):
        for row in conn.execute(SUMMARY.format(table=relation).encode()).fetchall():
            rows[name, row["group"], row["state"]] = row
            table.add_row(name, *(str(value if value is not None else "") for value in row.values()))
    stage.console.print()
    stage.console.print(table)
    stage.console.print("\n[bold]Processes, while it was busy[/bold]")
    for line in stage.tree:
        stage.console.print(line, markup=False, soft_wrap=True)
    balances = {row["owner"]: row["balance"] for row in stage.billing.execute("SELECT * FROM account").fetchall()}
    stage.console.print(f"\nbalances: {', '.join(f'{owner} {balance}' for owner, balance in balances.items())}")
    return _wrong(stage, rows, balances)


def _wrong(stage: Stage, rows: dict[tuple[str, str, str], dict[str, Any]], balances: dict[str, Any]) -> list[str]:
    def count(database: str, group: str, state: str) -> int:
        return int(rows.get((database, group, state), {"tasks": 0})["tasks"])

    contact = stage.crm.execute("SELECT count(*) AS n FROM contact").fetchone()
    [beats] = stage.billing.execute(BEATS.encode()).fetchall()
    expected = {
        "balances are the sums of the payments": balances == {"ann": 25, "bob": 47, "eve": 58},
        "six mails were sent": count("billing", "mail", "DONE") == 6,
        "the statement ran at its time": count("billing", "statement", "DONE") == 1,
        "the heartbeat ran every second": beats["kept"] and beats["seconds"] in (int(STORY), int(STORY) + 1),
        "the report came every three seconds": count("billing", "report", "DONE") in (3, 4),
        "the gateway answered at the third try": count("billing", "gateway", "DONE") == 1,
        "what depends on it ran": count("billing", "after", "DONE") == 1,
        "the export was cancelled": count("billing", "export", "STOP") == 1,
        "the mistake failed": count("billing", "mistake", "FAIL") == 1,
        "the slow one timed out": count("billing", "slow", "FAIL") == 1,
        "the remote one ran on the other database": contact is not None and contact["n"] == 1,
        "the other database's own task ran": count("crm", "import", "DONE") == 1,
        "ps shows the workers": any("pgtask: worker" in line for line in stage.tree),
    }
    return [f"not true: {what}" for what, ok in expected.items() if not ok]


def _tree(master: int) -> list[str]:
    """The lines of ps for the master and its workers; straight from the system where ps is not installed."""
    children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    pids = [str(master), *children]
    if shutil.which("ps"):
        command = ["ps", "-ww", "-o", "pid,ppid,args", "-p", ",".join(pids)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [f"{pid:>7} {Path(f'/proc/{pid}/cmdline').read_text().replace(chr(0), ' ')}" for pid in pids]


def _stay(stage: Stage) -> None:
    host = stage.server.conninfo(dbname="billing", user="billing")
    psql = "psql" if shutil.which("psql") else stage.server.program / "psql"
    stage.console.print(f"\nstill running; connect with:\n{psql} {host!r}", soft_wrap=True)
    stage.console.print("for example:\nINSERT INTO task (input) VALUES ('SELECT recalculate(1)');", soft_wrap=True)
    stage.console.print("Ctrl-C ends everything")
    with suppress(KeyboardInterrupt):
        while stage.master.poll() is None:
            _show_ended(stage)
            time.sleep(0.2)
        raise click.ClickException(f"pgtask-master ended with status {stage.master.returncode}")
    stage.console.print("stopped; nothing is left running")


if __name__ == "__main__":
    os.environ.pop("PGOPTIONS", None)
    main()
