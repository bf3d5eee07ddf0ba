"""Host names are resolved by a child: the master stays single-threaded and tells what cannot be resolved."""

import asyncio
import faulthandler
import signal
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgtask.process import Children, threads
from pgtask.resolve import resolved
from tests.fixtures.database import Database
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually


def resolve(text: str, environ: dict[str, str] | None = None) -> dict[str, object]:
    async def run() -> dict[str, object]:
        children = Children()
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, children.reap)
        return dict(conninfo_to_dict(await resolved(text, children, environ or {})))

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def alone() -> None:
    """pytest's own watchdog is a thread, and with one nobody forks; the kernel sees a thread end after Python does."""
    faulthandler.cancel_dump_traceback_later()
    eventually(lambda: threads() == 1)


def test_master_reaches_a_named_host_and_has_one_thread(database: Database, master: Callable[..., Master]) -> None:
    one = master(make_conninfo(database.tcp, host="localhost"))
    assert database.wait(database.insert("SELECT 1", delete=False))["state"] == "DONE"
    assert len(list(Path(f"/proc/{one.pid}/task").iterdir())) == 1
    eventually(lambda: [pid for pid in one.children() if pid not in one.workers()] == [])
    assert threads() == 1


def test_unknown_host_is_one_clear_line_and_tried_again(database: Database, master: Callable[..., Master]) -> None:
    one = master("host=no.such.host.invalid dbname=billing user=app", wait=False)
    [line] = one.wait_log("table_down")
    assert 'could not translate host name \\"no.such.host.invalid\\" to address: ' in line
    assert one.process.poll() is None


def test_name_gets_an_address() -> None:
    found = resolve("host=localhost dbname=a")
    assert set(str(found["host"]).split(",")) == {"localhost"}
    assert "127.0.0.1" in str(found["hostaddr"]).split(",")


def test_ports_go_with_their_hosts() -> None:
    found = resolve("host=localhost,127.0.0.2 port=1,2")
    hosts, addresses, ports = (str(found[key]).split(",") for key in ("host", "hostaddr", "port"))
    assert (hosts[-1], addresses[-1], ports[-1]) == ("127.0.0.2", "127.0.0.2", "2")
    assert set(zip(hosts[:-1], ports[:-1], strict=True)) == {("localhost", "1")}


@pytest.mark.parametrize(
    "text",
    ["dbname=a", "host=/tmp dbname=a", "host=127.0.0.1", "host=::1", "host=localhost hostaddr=127.0.0.1", "host=@a"],
)
def test_conninfo_without_a_name_to_resolve_stays_as_it_is(text: str) -> None:
    assert resolve(text) == conninfo_to_dict(text)


def test_host_of_the_environment_is_resolved_too() -> None:
    assert "127.0.0.1" in str(resolve("dbname=a", {"PGHOST": "localhost"})["hostaddr"])


def test_host_that_is_unknown_does_not_hide_the_others() -> None:
    found = resolve("host=no.such.host.invalid,localhost port=5432")
    assert set(str(found["host"]).split(",")) == {"localhost"}


def test_ports_that_do_not_fit_are_left_for_the_library_to_refuse() -> None:
    text = "host=localhost,localhost port=1,2,3"
    assert resolve(text) == conninfo_to_dict(text)


def test_unknown_host_raises_the_resolvers_words() -> None:
    with pytest.raises(psycopg.OperationalError, match=r'host name "no\.such\.host\.invalid" to address: \[Errno'):
        resolve("host=no.such.host.invalid")
