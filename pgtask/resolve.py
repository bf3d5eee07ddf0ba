"""Host names without a thread and without stopping the loop: a short-lived child asks the system's resolver.

psycopg resolves in a thread, and a process with threads must not fork; resolving on the loop's own thread would stop
every table while one name server is silent. So the name is looked up in a child, by the same getaddrinfo that libpq
uses (files, DNS, whatever nsswitch says), and the addresses travel as libpq's `hostaddr`.
"""

import asyncio
import ipaddress
import json
import os
import signal
import socket

from psycopg import OperationalError, conninfo

from pgtask.lines import shown
from pgtask.process import Children, Ended, set_title

PATIENCE = 30.0
"""Seconds that the resolver may take."""


async def resolved(text: str, children: Children, environ: dict[str, str]) -> str:
    """The conninfo with a `hostaddr` for each host name in it.

    Of several names, those that cannot be resolved are left out. Raises psycopg.OperationalError when none can.
    """
    params = {name: str(value) for name, value in conninfo.conninfo_to_dict(text).items()}
    hosts = params.get("host", environ.get("PGHOST", ""))
    if params.get("hostaddr") or environ.get("PGHOSTADDR") or not hosts or "service" in params:
        return text
    names = hosts.split(",")
    if all(_is_address(name) for name in names):
        return text
    ports = (params.get("port") or environ.get("PGPORT", "")).split(",")
    if len(ports) == 1:
        ports *= len(names)
    if len(ports) != len(names):
        return text  # libpq says what is wrong with it
    found = await _lookup(names, children)
    rows = [(n, a, p) for n, p in zip(names, ports, strict=True) for a in found.get(n, ())]
    params["host"], params["hostaddr"], params["port"] = (",".join(column) for column in zip(*rows, strict=True))
    return conninfo.make_conninfo(**params)


def _is_address(name: str) -> bool:
    """Nothing to resolve: a socket directory, an abstract socket, or an address already."""
    if not name or name.startswith(("/", "@")):
        return True
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


async def _lookup(names: list[str], children: Children) -> dict[str, list[str]]:
    reader, writer = os.pipe()
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_end(_: Ended) -> None:
        if not done.done():
            done.set_result(None)

    with os.fdopen(reader, "rb") as stream:
        try:
            pid = children.fork(lambda: _child(names, writer), keep=[writer], on_end=on_end)
        finally:
            os.close(writer)
        try:
            await asyncio.wait_for(asyncio.shield(done), PATIENCE)
        except TimeoutError:
            raise OperationalError(f"could not resolve {', '.join(names)}: no answer in {PATIENCE:.0f} s") from None
        finally:
            if not done.done():
                os.kill(pid, signal.SIGKILL)
        return _addresses(names, json.loads(stream.read() or b"{}"))


def _addresses(names: list[str], answer: dict[str, list[str] | str]) -> dict[str, list[str]]:
    found = {name: known for name in names if isinstance(known := answer.get(name), list)}
    if not found:
        why = answer.get(names[0], "the resolver failed")
        raise OperationalError(f'could not translate host name "{names[0]}" to address: {why}')
    return found


def _child(names: list[str], writer: int) -> int:
    set_title(f"resolver {' '.join(map(shown, names))}")
    answer: dict[str, list[str] | str] = {}
    for name in names:
        try:
            if _is_address(name):
                answer[name] = [name if not name.startswith(("/", "@")) else ""]
            else:
                infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                answer[name] = list(dict.fromkeys(str(info[4][0]) for info in infos))
        except OSError as error:
            answer[name] = str(error)
    os.write(writer, json.dumps(answer).encode())
    return 0
