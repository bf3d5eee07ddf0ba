"""What README.md, CONTRIBUTING.md and docs/ show is what happens: every block is run, every link leads somewhere."""

import configparser
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import yaml

from pgtask import config, embedded, errors
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.docs import APPLICATION, ROOT, Block, Page, page, pages
from tests.fixtures.master import end, launch
from tests.fixtures.server import start_server
from tests.fixtures.wait import eventually

BLOCKS = [block for page in pages() for block in page.blocks]
NOT_RUN = [block for block in BLOCKS if block.kind == "not run"]
RUN = [block for block in BLOCKS if block.kind != "not run"]

LONGEST = 60
"""Seconds that a command may take, on a machine that does much else."""

PROCESSES = ("master", "worker", "monitor")
"""Folders of the program that hold what runs in one process."""

PENDING: set[str] = set()
"""Pages that are linked and not written yet."""

UNFINISHED = """
    SELECT count(*) FROM task WHERE state::text IN ('TAKE', 'WORK') OR state = 'PLAN' AND repeat = '0' AND cron IS NULL
        AND plan < now() + interval '3 s' AND "group" NOT IN (SELECT "group" FROM task_held)"""
"""What a reader sees end while he reads on: what is due, or soon."""

MISTAKEN = "SELECT id, input, error FROM task WHERE state = 'FAIL' AND code LIKE '42%'"
"""Tasks of a page that could never work: there is no such function, or that is no SQL."""


class Stage:
    """Where the blocks of one page run: a database, a directory, and the daemons that the page has started."""

    def __init__(self, server: embedded.Server, page: Page, database: str, directory: Path) -> None:
        self.server = server
        self.page = page
        self.database = database
        self.directory = directory
        self.output = ""
        self._waiting = list(page.blocks)
        self._daemons: list[tuple[subprocess.Popen[str], Path]] = []

    def run(self, block: Block) -> None:
        """This block, after all those before it that did not run yet."""
        while self._waiting and self._waiting[0].line <= block.line:
            one = self._waiting.pop(0)
            if one.kind != "not run":
                getattr(self, f"_{one.language}")(one)

    def begin(self) -> None:
        """Start what the page has in the background, as its reader has before he tries the rest."""
        for block in [one for one in self._waiting if one.word == "in the background"]:
            self._waiting.remove(block)
            self._begin(block)

    def close(self) -> None:
        daemons, self._daemons = self._daemons, []
        for daemon, log in daemons:
            daemon.send_signal(signal.SIGTERM)
            try:
                assert daemon.wait(LONGEST) == errors.OK, log.read_text("utf-8")
            finally:
                daemon.kill()

    def _sql(self, block: Block) -> None:
        if block.word == "in an empty database":
            self.database = "empty"
            self._make_empty()
        user = {"as a superuser": "postgres", "as an administrator": "administrator"}.get(block.word, "app")
        self._call(["psql", "-XU", user, "-v", "ON_ERROR_STOP=1", "-f", "-"], block.text)
        if not block.word:
            self._settle()

    def _sh(self, block: Block) -> None:
        if block.word == "in the background":
            self._begin(block)
        else:
            self._call(["sh", "-eu"], block.text, self._place(block))

    def _console(self, block: Block) -> None:
        for command in re.findall(r"^\$ (.+)", block.text, re.MULTILINE):
            self._call(["sh", "-eu"], command, self._place(block))

    def _python(self, block: Block) -> None:
        self._call([sys.executable, "-"], block.text)

    def _toml(self, block: Block) -> None:
        """It is also the page's pgtask.toml from here on."""
        file = self.directory / "pgtask.toml"
        file.write_text(block.text, "utf-8")
        assert config.load(file, [], {}, {}).doubts == ()

    def _yaml(self, block: Block) -> None:
        assert yaml.safe_load(block.text)

    def _ini(self, block: Block) -> None:
        parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
        parser.read_string(block.text)
        assert parser.sections()

    def _json(self, block: Block) -> None:
        assert json.loads(block.text)

    def _text(self, block: Block) -> None:
        if block.kind == "output":
            for told, said in paired(block.text, self.output):
                pattern = r".*".join(re.escape(part) for part in told.split("..."))
                assert re.fullmatch(pattern, said), f"told {told!r}, said {said!r}, all of it:\n{self.output}"

    def _call(self, command: list[str], text: str, place: Path | None = None) -> None:
        done = subprocess.run(
            command,
            input=text,
            cwd=place or self.directory,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST,
        )
        self.output = done.stdout
        assert done.returncode == errors.OK, f"{text}\n{done.stdout}"

    def _begin(self, block: Block) -> None:
        """A master is up when it leads all its tables."""
        log = self.directory / f"{block.line}.log"
        with log.open("w", encoding="utf-8") as file:
            daemon = subprocess.Popen(
                ["sh", "-euc", f"exec {block.text}"],
                cwd=self._place(block),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                text=True,
            )
        self._daemons.append((daemon, log))
        tables = max(1, block.text.count("dbname="))
        eventually(
            lambda: daemon.poll() is not None or len(re.findall(r"\bleading\b", log.read_text("utf-8"))) >= tables,
            LONGEST,
        )
        assert daemon.poll() is None, log.read_text("utf-8")

    def _place(self, block: Block) -> Path:
        """Programs of the checkout are called from its top."""
        return ROOT if re.search(r"^(\$ )?bin/", block.text, re.MULTILINE) else self.directory

    def _environment(self) -> dict[str, str]:
        programs = (Path(sys.executable).parent, self.server.binaries.directory, os.environ["PATH"])
        return os.environ | {
            "PATH": ":".join(map(str, programs)),
            "HOME": str(self.directory),
            "LC_ALL": "C.UTF-8",
            "PGHOST": str(psycopg.conninfo.conninfo_to_dict(self.server.conninfo())["host"]),
            "PGPORT": str(self.server.port),
            "PGUSER": "app",
            "PGDATABASE": self.database,
        }

    def _make_empty(self) -> None:
        with psycopg.connect(self.server.conninfo(), autocommit=True) as session:
            session.execute("DROP DATABASE IF EXISTS empty WITH (FORCE)")
            session.execute("CREATE DATABASE empty OWNER app")

    def _settle(self) -> None:
        """Let what is due come to its end, as somebody who reads on does; nothing may be a mistake."""
        with psycopg.connect(self.server.conninfo(self.database, "app"), autocommit=True) as session:
            if session.execute("SELECT to_regclass('task')").fetchone() == (None,):
                return
            eventually(lambda: session.execute(UNFINISHED).fetchone() == (0,), LONGEST)
            assert session.execute(MISTAKEN).fetchall() == []


def paired(told: str, said: str) -> list[tuple[str, str]]:
    """Line by line, without blank ones at the end of either."""
    left, right = ([line.rstrip() for line in text.strip("\n").split("\n")] for text in (told, said))
    assert len(left) == len(right), f"told {len(left)} lines, said {len(right)}:\n{said}"
    return list(zip(left, right, strict=True))


@pytest.fixture(scope="module")
def docs_server() -> Iterator[embedded.Server]:
    """A server of the pages' own, so that they may call databases and roles what they like."""
    with start_server() as server:
        with psycopg.connect(server.conninfo(), autocommit=True) as session:
            session.execute("CREATE ROLE app LOGIN CREATEDB")
            session.execute("CREATE ROLE administrator LOGIN CREATEDB CREATEROLE")
        yield server


@pytest.fixture(scope="module")
def databases(docs_server: embedded.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A database for each page that needs one and names none, all served by one master."""
    served = {
        page.name: re.sub(r"\W+", "_", page.name.removesuffix(".md").lower())
        for page in pages()
        if any(block.language in ("sql", "sh", "console", "python") for block in page.blocks) and not names_app(page)
    }
    for name in served.values():
        create(docs_server, name)
    tables = tuple(docs_server.conninfo(name, "app") for name in served.values())
    master = launch(tables, {}, tmp_path_factory.mktemp("docs") / "master.log")
    master.wait_log(r"\bleading\b.*\btable=", len(tables), LONGEST)
    yield served
    problems = end(master)
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module")
def stages() -> Iterator[dict[str, Stage]]:
    made: dict[str, Stage] = {}
    yield made
    for stage in made.values():
        stage.close()


@pytest.fixture
def stage(
    block: Block,
    docs_server: embedded.Server,
    databases: dict[str, str],
    stages: dict[str, Stage],
    tmp_path_factory: pytest.TempPathFactory,
) -> Stage:
    """The stage of the block's page; the one before is closed when another page begins."""
    if block.page not in stages:
        for other in stages.values():
            other.close()
        one = page(ROOT / block.page)
        made = stages[block.page] = Stage(
            docs_server, one, databases.get(block.page, "app"), tmp_path_factory.mktemp("page")
        )
        if names_app(one):
            begins_with_nothing = any("createdb app" in block.text for block in one.blocks)
            for name in ("app", "billing"):
                create(docs_server, name, empty=begins_with_nothing)
            if not begins_with_nothing:
                made.begin()
    return stages[block.page]


def names_app(page: Page) -> bool:
    """Do its commands name the database that they are meant for?"""
    return any(re.search(r"\b(dbname=|createdb )app\b", block.text) for block in page.blocks if block.language == "sh")


def create(server: embedded.Server, name: str, *, empty: bool = False) -> None:
    """A new database with the objects of the application; or none, for a page that makes it."""
    with psycopg.connect(server.conninfo(), autocommit=True) as session:
        session.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())
        if empty:
            return
        session.execute(f"CREATE DATABASE {name} OWNER app".encode())
        session.execute(f"GRANT CREATE ON DATABASE {name} TO administrator".encode())
    with psycopg.connect(server.conninfo(name, "app"), autocommit=True) as session:
        session.execute(APPLICATION.read_bytes())


@pytest.mark.parametrize("block", RUN, ids=str)
def test_block_does_what_its_page_says(block: Block, stage: Stage) -> None:
    stage.run(block)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_has_a_language_that_can_be_run_and_a_mark_that_is_known(block: Block) -> None:
    assert hasattr(Stage, f"_{block.language}"), f"{block}: no rule for blocks of this language"
    known = {
        "": {""},
        "output": {""},
        "run": {
            "in the background",
            "in an empty database",
            "in the same database",
            "and read on at once",
            "as a superuser",
            "as an administrator",
        },
    }
    assert block.word if block.kind == "not run" else block.word in known[block.kind], f"{block}: {block.word!r}"


def test_few_blocks_are_not_run() -> None:
    root = [block for block in RUN if block.language == "console" and re.search(r"^# ", block.text, re.MULTILINE)]
    told = "\n".join(f"{block}: {block.word or 'commands of root'}" for block in [*NOT_RUN, *root])
    assert len(NOT_RUN) + len(root) <= 32, told


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page) -> None:
    targets = {one.name: one for one in pages()}
    for link in page.links():
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = os.path.normpath(Path(page.name).parent / path) if path else page.name
        if target in PENDING and not (ROOT / target).exists():
            continue
        assert (ROOT / target).exists(), f"{page.name}: {link}"
        assert not anchor or anchor in targets[target].anchors(), f"{page.name}: {link}"


def test_every_page_is_in_the_index() -> None:
    index = page(ROOT / "docs" / "README.md")
    linked = {os.path.normpath(Path("docs") / link.partition("#")[0]) for link in index.links()}
    assert {page.name for page in pages() if page.name.startswith("docs/")} - {index.name} <= linked


def test_map_of_the_modules_has_them_all() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    package = ROOT / "pgtask"
    files = [file for folder in (package, *map(package.joinpath, PROCESSES)) for file in folder.glob("*.py")]
    modules = {file.stem for file in files if not file.stem.startswith("__")}
    assert modules <= set(re.findall(r"`(\w+)`", text)), "CONTRIBUTING.md says which process runs which module"


def test_table_of_columns_has_those_that_are_made(database: Database) -> None:
    install(database)
    text = (ROOT / "docs/reference/columns.md").read_text("utf-8")
    [table] = re.findall(r"<!-- columns -->\n(.*?)<!-- /columns -->", text, re.DOTALL)
    told = re.findall(r"^\| (\w+) \|", table, re.MULTILINE)[1:]
    with psycopg.connect(database.conninfo) as session:
        made = [column.name for column in session.execute("SELECT * FROM task").description or ()]
    assert told == made


def test_functions_of_the_reference_have_these_arguments_and_results(database: Database) -> None:
    install(database)
    made = database.execute("""
        SELECT p.proname,
            coalesce((
                SELECT string_agg(quote_ident(name), ', ' ORDER BY n)
                FROM unnest(p.proargnames) WITH ORDINALITY AS a (name, n)
                WHERE n <= p.pronargs AND coalesce(p.proargmodes[n], 'i') IN ('i', 'b')), ''),
            CASE WHEN p.prokind = 'p' THEN '' WHEN p.proretset THEN 'rows' ELSE p.prorettype::regtype::text END
        FROM pg_proc AS p WHERE p.pronamespace = 'public'::regnamespace""")
    text = (ROOT / "docs/reference/functions.md").read_text("utf-8")
    told = re.findall(r"^\| `(?:CALL )?(task_\w+)\((.*?)\)` \| (\w*) *\|", text, re.MULTILINE)
    assert len(told) >= 17
    # What a procedure answers with stands after what it is given.
    called = [
        (name, arguments.removesuffix(", state, output, error, code, notice"), type) for name, arguments, type in made
    ]
    assert set(told) <= set(called)


def test_functions_and_queries_that_are_named_are_there(database: Database) -> None:
    install(database)
    text = "\n".join(page.text for page in pages())
    made = database.execute("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace")
    named = set(re.findall(r"`(?:CALL )?(task_\w+)\(", text))
    assert len(named) >= 12
    assert named <= {name for (name,) in made}
    queries = [one for one in re.findall(r"`(SELECT [^`]* FROM task\b[^`]*)`", text) if "..." not in one]
    assert len(queries) >= 3
    for query in queries:
        database.execute(query)


def test_asynchronous_triggers_make_the_tasks_that_are_told(database: Database) -> None:
    install(database)
    database.execute(APPLICATION.read_text("utf-8"))
    [block] = [block for block in page(ROOT / "docs/how-to/triggers.md").blocks if "CREATE TRIGGER" in block.text]
    database.execute(block.text)
    database.execute("INSERT INTO payment VALUES (7)")
    [recalculation, settlement] = database.tasks("\"group\" = 'account 7'")
    called = (
        "WITH new AS (SELECT '7'::integer AS account, NULL::numeric AS amount)\nSELECT recalculate(account) FROM new"
    )
    assert recalculation["input"] == called
    assert settlement["retry"] == 3
