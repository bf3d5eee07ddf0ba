"""Makes the pictures of `pgtask top` beside it anew: `.venv/bin/python docs/images/top.py`.

They are of a real run: a server of its own, a real master on two databases, and half a minute of a shop's background
work. Only the name of the machine is changed, in the table that tells who leads.
"""

import asyncio
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from pgtask import config
from pgtask.embedded import Server
from pgtask.user.top.screen import Top

HERE = Path(__file__).resolve().parent
SIZE = (120, 24)
SECONDS = 25.0
HOST = "db1"

SHOP = """
CREATE TABLE orders (id int PRIMARY KEY, state text);
CREATE FUNCTION send_mail(id int) RETURNS text LANGUAGE sql AS
    'SELECT pg_sleep(0.15 + random() * 0.3); SELECT ''sent''';
CREATE FUNCTION charge(id int) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_sleep(0.2);
    IF id % 9 = 0 THEN
        RAISE 'card % was refused by the bank', 4000 + id USING ERRCODE = 'P0402';
    END IF;
    RETURN 'charged';
END $$;
CREATE FUNCTION recalculate(account int) RETURNS bigint LANGUAGE sql AS
    'SELECT count(*) FROM generate_series(1, 300000) AS n WHERE n % (account + 1) = 0';
CREATE PROCEDURE load_orders() LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. 100 LOOP
        PERFORM task_progress(i, 'orders');
        PERFORM pg_sleep(0.6);
    END LOOP;
END $$;
"""

WORK = """
INSERT INTO task ("group", input) VALUES ('import', 'CALL load_orders()');
INSERT INTO task ("group", input) VALUES ('archive', 'LOCK TABLE orders; DELETE FROM orders WHERE state = ''old''');
INSERT INTO task ("group", plan, input)
SELECT 'nightly', now() + i * interval '1 day', 'CALL close_day()' FROM generate_series(1, 30) AS i;
INSERT INTO task ("group", max, input)
SELECT 'export', 1, 'SELECT export(' || i || ')' FROM generate_series(1, 40) AS i;
"""

MORE = """
INSERT INTO task ("group", max, input)
SELECT 'mail', 3, format('SELECT send_mail(%%s)', 1000 + %(n)s * 10 + i) FROM generate_series(1, %(mails)s) AS i;
INSERT INTO task ("group", max, input)
SELECT 'gateway', 1, format('SELECT charge(%%s)', %(n)s * 2 + i) FROM generate_series(1, 2) AS i;
INSERT INTO task ("group", input)
SELECT 'account ' || a, format('SELECT recalculate(%%s)', a) FROM generate_series(1, 6) AS a WHERE random() < 0.4;
"""


def main() -> None:
    with Server.start() as server:
        for name in ("shop", "crm"):
            with psycopg.connect(server.conninfo(), autocommit=True) as admin:
                admin.execute(f"CREATE ROLE {name} LOGIN".encode())
                admin.execute(f"CREATE DATABASE {name} OWNER {name}".encode())
        places = [server.conninfo(dbname=name, user=name) for name in ("shop", "crm")]
        with psycopg.connect(places[0], autocommit=True) as shop:
            shop.execute(SHOP.encode())
            with master(places), lock(places[0]), work(shop, places):
                asyncio.run(photograph(places))


@contextmanager
def master(places: list[str]) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "pgtask", *places], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    led = 0
    while led < len(places):
        line = process.stderr.readline()
        assert line, "the master has ended"
        led += " leading " in f"{line} "
    drain = threading.Thread(target=process.stderr.read, daemon=True)
    drain.start()
    try:
        yield
    finally:
        process.terminate()
        process.wait()
        drain.join()


@contextmanager
def lock(place: str) -> Iterator[None]:
    """Somebody whom one of the tasks has to wait for."""
    with psycopg.connect(place) as other:
        other.execute("INSERT INTO orders VALUES (1, 'new')")
        yield


@contextmanager
def work(shop: psycopg.Connection[tuple[object, ...]], places: list[str]) -> Iterator[None]:
    over = threading.Event()

    def insert() -> None:
        number = 0
        while not over.wait(0.4):
            number += 1
            psycopg.ClientCursor(shop).execute(MORE.encode(), {"n": number, "mails": random.randint(3, 8)})

    for place in places:
        with psycopg.connect(place) as other:
            other.execute(b"UPDATE task_master SET host = %s, pid = 2417", [HOST])
    shop.execute("SELECT task_hold('export')")
    shop.execute(WORK.encode())
    with psycopg.connect(places[1]) as crm:
        crm.execute("""INSERT INTO task ("group", input) VALUES ('sync', 'SELECT pg_sleep(600)')""")
    inserter = threading.Thread(target=insert)
    inserter.start()
    try:
        yield
    finally:
        over.set()
        inserter.join()


async def photograph(places: list[str]) -> None:
    app = Top(config.load(None, places, {}, {}).tables, 1.0)
    async with app.run_test(size=SIZE) as pilot:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            await pilot.pause(0.2)
        for key, name in (("1", "top"), ("2", "top-groups")):
            await pilot.press(key)
            await pilot.pause(1.5)
            (HERE / f"{name}.svg").write_text(plain(app.export_screenshot(title="pgtask top")), "utf-8")
        await pilot.press("q")


def plain(svg: str) -> str:
    """Without fonts from elsewhere: any with letters of one width will do."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "DejaVu Sans Mono, ui-monospace, Menlo, Consolas")
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
