"""What README.md shows is what the server takes."""

import re
from pathlib import Path

import psycopg

from tests.fixtures.catalog import install
from tests.fixtures.database import Database

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def test_every_statement_of_the_readme_runs(database: Database) -> None:
    install(database)
    database.execute("CREATE TABLE payment (account int)")
    blocks = re.findall(r"^```sql\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    for block in blocks:
        database.execute(block)
    assert len(database.tasks()) >= 9
    database.execute("INSERT INTO payment VALUES (7)")
    assert database.tasks("\"group\" = 'account 7' AND input = 'SELECT recalculate(7)'")


def test_readme_is_for_the_version_of_the_columns_that_are_made(database: Database) -> None:
    install(database)
    [table] = re.findall(r"<!-- columns -->\n(.*?)<!-- /columns -->", README.read_text("utf-8"), re.DOTALL)
    told = re.findall(r"^\| (\w+) \|", table, re.MULTILINE)[1:]
    with psycopg.connect(database.conninfo) as session:
        made = [column.name for column in session.execute("SELECT * FROM task").description or ()]
    assert told == made
