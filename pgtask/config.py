"""The configuration: TOML file, command line and environment become frozen values that know where they came from.

For each value the command line goes before the environment (PGTASK_NAME), that before the [[database]] entry, that
before [master] and [defaults], and the built-in value comes last. Everything that was written is checked, even what
another source overrides. What is wrong is one line: source, section, key, what is wrong, what would be right; never
with a piece of a password.

Nothing is connected to here, and a loaded configuration never changes: a reload makes a new one.
"""

import difflib
import functools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg import conninfo, pq

from pgtask.errors import ConfigError
from pgtask.lines import redact, shown
from pgtask.settings import Setting, Value, by_name, conninfo_problem, did_you_mean, sql_text, toml_text

SECTIONS = ("master", "defaults", "database", "json")
BUILT_IN = "built-in"
CONNINFO = Setting(name="conninfo", kind="conninfo", default=None, level="database", about="Where the table is.")
JSON_KEYS = {"data": "dbname", "user": "user"}
"""The words of pg_task's list form for what is part of a conninfo here."""

CLOSE = 0.85
"""How much a variable must look like one of ours (difflib's ratio) to be taken for a slip of the pen."""

JSON_SETTINGS = ("schema", "table", "sleep", "reset", "run")


@dataclass(frozen=True, kw_only=True)
class MasterConfig:
    """The settings of the whole program; `settings.py` says what each means."""

    workers: int
    spare: int
    linger: timedelta
    stop_timeout: timedelta
    log_level: str
    log: str
    log_format: str
    pidfile: Path | None
    listen: str | None


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """One task table: where it is, and the settings that hold for it."""

    conninfo: str
    schema: str
    table: str
    sleep: timedelta
    idle: int
    reset: timedelta
    run: int
    warm: int
    limit: int
    wake: bool
    batch_time: timedelta
    crashes: int
    remote_password: bool
    safety: timedelta
    log_failed: int
    slow_run: timedelta
    slow_take: timedelta
    keep: timedelta | str  # "forever"
    keep_failed: timedelta | str  # "forever", or "keep": as long as the others
    maintenance: str | None
    create: bool
    defaults: Mapping[str, str]  # the SQL text of every task setting
    told_apart: bool = False  # is there another table that is called the same on another server?

    @functools.cached_property
    def user(self) -> str:
        return self._parameters["user"]

    @functools.cached_property
    def dbname(self) -> str:
        return self._parameters.get("dbname") or self.user

    @functools.cached_property
    def open_conninfo(self) -> str:
        """The conninfo without its password, to be shown."""
        given = {name: str(value) for name, value in conninfo.conninfo_to_dict(self.conninfo).items()}
        given = {name: value for name, value in given.items() if name not in ("password", "sslpassword")}
        return conninfo.make_conninfo(**{"dbname": self.dbname, **given})

    @functools.cached_property
    def label(self) -> str:
        """What people know the table by, in the log and in metrics: unique in a configuration."""
        return f"{self.user}@{self.dbname} {self.schema}.{self.table}{self._server}"

    @functools.cached_property
    def title(self) -> str:
        """The same for ps: no name is longer than a line, or can be taken for something else."""
        return f"{shown(self.user)}@{shown(self.dbname)} {shown(self.schema)}.{shown(self.table)}{self._server}"

    @property
    def _server(self) -> str:
        """Where it is, if two tables would be called the same without it."""
        return f" on {':'.join(filter(None, self.target[:3]))}" if self.told_apart else ""

    @functools.cached_property
    def target(self) -> tuple[str, ...]:
        """The table's identity: two entries with the same one are the same table."""
        found = self._parameters
        where = (found.get("hostaddr") or found.get("host") or "", found.get("port", ""), found.get("service", ""))
        return (*where, self.dbname, self.user, self.schema, self.table)

    @functools.cached_property
    def _parameters(self) -> dict[str, str]:
        """The conninfo, completed by libpq's own defaults and the PG* variables."""
        options = {option.keyword.decode(): option.val for option in pq.Conninfo.get_defaults()}
        found = {name: value.decode(errors="replace") for name, value in options.items() if value}
        given = conninfo.conninfo_to_dict(self.conninfo)
        return {"user": "", **found, **{name: str(value) for name, value in given.items() if value}}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that was configured. `origins` says of every value where it came from."""

    master: MasterConfig
    tables: tuple[TableConfig, ...]
    file: Path | None
    origins: Mapping[str, str]  # "master.workers", "database[0].sleep", "database[0].defaults.timeout"
    doubts: tuple[str, ...] = ()  # what was probably meant otherwise, a line each


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A value that was read, and where."""

    value: Value
    origin: str


_Values = Mapping[str, _Found]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A table as one source names it."""

    where: str
    values: _Values


@dataclass(frozen=True, kw_only=True)
class _File:
    """What a configuration file says."""

    master: _Values
    defaults: _Values
    entries: tuple[_Entry, ...]


_NO_FILE = _File(master={}, defaults={}, entries=())


def load(
    file: Path | None, conninfos: Sequence[str], overrides: Mapping[str, object], environ: Mapping[str, str]
) -> Config:
    """The configuration from all its sources. Raises ConfigError."""
    said = _NO_FILE if file is None else _read_file(file)
    above = {**_read_environment(environ), **_read_overrides(overrides)}
    entries = [*said.entries, *_read_conninfos(conninfos)] or [_Entry(where=BUILT_IN, values={})]
    master = _merge(by_name("master"), said.master, above)
    tables = [_merge(_table_settings(), said.defaults, entry.values, above) for entry in entries]
    found = [*map(_table, tables)]
    _refuse_duplicates(found, [entry.where for entry in entries])
    return Config(
        master=MasterConfig(**{name: one.value for name, one in master.items()}),  # type: ignore[arg-type]
        tables=_told_apart(found),
        file=file,
        origins=_origins(master, tables),
        doubts=tuple(_misspelt(environ)),
    )


def print_lines(config: Config) -> list[str]:
    """The configuration as TOML without passwords, each value with a comment that says where it came from."""
    lines = ["[master]", *_printed("master", by_name("master"), config.master.__dict__, config.origins)]
    for number, table in enumerate(config.tables):
        values = {**table.__dict__, **table.defaults}
        lines += ["", "[[database]]", *_printed(f"database[{number}]", _table_settings(), values, config.origins)]
    return lines


def _table_settings() -> dict[str, Setting]:
    return {"conninfo": CONNINFO, **by_name("database"), **by_name("task")}


def _merge(settings: Mapping[str, Setting], *layers: _Values) -> dict[str, _Found]:
    """The last layer that has a value gives it."""
    merged = {name: _Found(value=setting.default, origin=BUILT_IN) for name, setting in settings.items()}
    for layer in layers:
        merged |= {name: found for name, found in layer.items() if name in settings}
    return merged


def _table(values: Mapping[str, _Found]) -> TableConfig:
    own: dict[str, Any] = {name: values[name].value for name in by_name("database")}
    defaults = {name: sql_text(values[name].value) for name in by_name("task")}
    return TableConfig(conninfo=str(values["conninfo"].value or ""), defaults=defaults, **own)


def _told_apart(tables: Sequence[TableConfig]) -> tuple[TableConfig, ...]:
    """With the server in the labels of those that would be called the same."""
    count = Counter(table.label for table in tables)
    return tuple(replace(table, told_apart=True) if count[table.label] > 1 else table for table in tables)


def _origins(master: Mapping[str, _Found], tables: Iterable[Mapping[str, _Found]]) -> dict[str, str]:
    origins = {f"master.{name}": found.origin for name, found in master.items()}
    for number, table in enumerate(tables):
        origins |= {_origin_key(f"database[{number}]", name): found.origin for name, found in table.items()}
    return origins


def _origin_key(section: str, name: str) -> str:
    return f"{section}.defaults.{name}" if name in by_name("task") else f"{section}.{name}"


def _refuse_duplicates(tables: Iterable[TableConfig], where: Iterable[str]) -> None:
    first: dict[tuple[str, ...], str] = {}
    for table, place in zip(tables, where, strict=True):
        if table.target in first:
            raise ConfigError(f"{place}: {table.label} is already served by {first[table.target]}")
        first[table.target] = place


def _misspelt(environ: Mapping[str, str]) -> Iterable[str]:
    """Variables that are nearly ours. Not an error: others too make variables that begin like ours do."""
    known = [setting.variable for level in ("master", "database", "task") for setting in by_name(level).values()]
    for name in environ:
        ours = name.startswith("PGTASK_") and not name.startswith("PGTASK_TEST_")
        if ours and name not in known and (meant := difflib.get_close_matches(name, known, 1, CLOSE)):
            yield f'environment {name}: unknown variable, did you mean "{meant[0]}"?'


def _read_environment(environ: Mapping[str, str]) -> _Values:
    """PGTASK_NAME for the master and the tables. An empty variable is one that is not set."""
    found = {}
    for name, setting in {**by_name("master"), **by_name("database")}.items():
        if text := environ.get(setting.variable):
            found[name] = _read_text(setting, text, f"environment {setting.variable}")
    return found


def _read_overrides(overrides: Mapping[str, object]) -> _Values:
    """The options of the command line: texts, except for switches."""
    settings = {**by_name("master"), **by_name("database")}
    given = {name: value for name, value in overrides.items() if value is not None}
    return {
        name: _read_text(settings[name], sql_text(value) if isinstance(value, bool) else str(value), origin)
        for name, value in given.items()
        for origin in [f"command line {settings[name].option}"]
    }


def _read_text(setting: Setting, text: str, origin: str) -> _Found:
    try:
        return _Found(value=setting.parse_text(text), origin=origin)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from error


def _read_conninfos(conninfos: Sequence[str]) -> Iterable[_Entry]:
    for number, text in enumerate(conninfos, 1):
        where = "command line CONNINFO" + f" {number}" * (len(conninfos) > 1)
        if problem := conninfo_problem(text):
            raise ConfigError(f"{where}: {problem}")
        yield _Entry(where=where, values={"conninfo": _Found(value=text or None, origin=where)})


def _read_file(file: Path) -> _File:
    data = _parse_file(file)
    for name in data:
        if name not in SECTIONS:
            raise ConfigError(f"{file}: {name}: unknown key or section{_hint(name, SECTIONS)}")
    master = dict(_typed(data.get("master", {}), dict, f"{file}: master: must be a section, written [master]"))
    defaults = _typed(data.get("defaults", {}), dict, f"{file}: defaults: must be a section, written [defaults]")
    wrong = f"{file}: database: must be a list of sections, each written [[database]]"
    entries = [_typed(entry, dict, wrong) for entry in _typed(data.get("database", []), list, wrong)]
    if "json" in data and "json" in master:
        raise ConfigError(f"{file}: [master] json: is given twice")
    listed = master.pop("json", data.get("json", "[]"))
    common = {**by_name("database"), **by_name("task")}
    return _File(
        master=_read_section(master, file, "[master]", by_name("master")),
        defaults=_read_section(defaults, file, "[defaults]", common),
        entries=(*_read_entries(entries, file), *_read_json(listed, file)),
    )


def _parse_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 at byte {error.start}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: {error}") from error


def _typed(value: Any, wanted: type, wrong: str) -> Any:
    if not isinstance(value, wanted):
        raise ConfigError(wrong)
    return value


def _read_entries(entries: Sequence[Mapping[str, object]], file: Path) -> Iterable[_Entry]:
    for number, entry in enumerate(entries, 1):
        section = "[[database]]" + f" {number}" * (len(entries) > 1)
        yield _Entry(where=f"{file}:{section}", values=_read_section(entry, file, section, _table_settings()))


def _read_section(data: Mapping[str, object], file: Path, section: str, settings: Mapping[str, Setting]) -> _Values:
    found = {}
    for name, value in data.items():
        if name not in settings:
            raise ConfigError(f"{file}: {section} {name}: unknown key{_place(name, settings)}")
        try:
            found[name] = _Found(value=settings[name].parse(value), origin=f"{file}:{section}")
        except ValueError as error:
            raise ConfigError(f"{file}: {section} {name}: {error}") from error
    return found


def _place(name: str, settings: Mapping[str, Setting]) -> str:
    """The end of a message about an unknown key: where it belongs, or which one was meant."""
    if name in by_name("master"):
        return ", it belongs in [master]"
    if name == "conninfo":
        return ", it belongs in [[database]]"
    if name in ("dbname", "host", "port", "user", "password"):
        return f', say it in conninfo = "{name}=..."'
    if name in _table_settings():
        return ", it belongs in [defaults] or [[database]]"
    return _hint(name, settings)


def _hint(name: str, known: Iterable[str]) -> str:
    return did_you_mean(name, known) or f"; known are {', '.join(known)}"


def _read_json(text: object, file: Path) -> Iterable[_Entry]:
    """pg_task's list form: the tables as one JSON text."""
    where = f"{file}: json"
    try:
        items = json.loads(_typed(text, str, f"{where}: must be a text that holds a JSON list of objects"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from error
    wrong = f"{where}: must be a list of objects"
    for number, item in enumerate(_typed(items, list, wrong)):
        yield _read_json_item(_typed(item, dict, wrong), f"{where}[{number}]", f"{file}:json[{number}]")


def _read_json_item(item: Mapping[str, Any], where: str, origin: str) -> _Entry:
    given = {name: value for name, value in item.items() if value is not None}
    known = (*JSON_KEYS, *JSON_SETTINGS)
    for name in given:
        if name not in known:
            raise ConfigError(f"{where} {name}: unknown key{_hint(name, known)}")
    values: dict[str, _Found] = {}
    try:
        for name in (name for name in JSON_SETTINGS if name in given):
            # As the extension does, numbers may be written as texts.
            setting, value = by_name("database")[name], given[name]
            parsed = setting.parse_text(value) if isinstance(value, str) else setting.parse(value)
            values[name] = _Found(value=parsed, origin=origin)
    except ValueError as error:
        raise ConfigError(f"{where} {name}: {error}") from error
    values["conninfo"] = _Found(value=_json_conninfo(given, where), origin=origin)
    return _Entry(where=origin, values=values)


def _json_conninfo(given: Mapping[str, Any], where: str) -> str:
    """A missing user is named like the database and the other way round; without both it is postgres."""
    names = {}
    for name, other in (("data", "user"), ("user", "data")):
        text = given.get(name, given.get(other, "postgres"))
        if not isinstance(text, str) or not text or "\0" in text or len(text.encode(errors="replace")) > 63:
            raise ConfigError(f"{where} {name if name in given else other}: must be a name of 1 to 63 bytes")
        names[JSON_KEYS[name]] = text
    return conninfo.make_conninfo("", **names)


def _printed(
    section: str, settings: Mapping[str, Setting], values: Mapping[str, Any], origins: Mapping[str, str]
) -> list[str]:
    pairs = [(f"{name} = {_toml_value(setting, values[name])}", name) for name, setting in settings.items()]
    width = min(60, max(len(text) for text, _ in pairs))
    return [f"{text:<{width}}  # {_one_line(origins[_origin_key(section, name)])}" for text, name in pairs]


def _toml_value(setting: Setting, value: Value) -> str:
    if setting.level == "task" and setting.kind in ("int", "bool"):
        return str(value)
    if setting.kind == "conninfo" and isinstance(value, str):
        return toml_text(_without_passwords(value))
    return toml_text(redact(value) if isinstance(value, str) else value)


def _without_passwords(text: str) -> str:
    """A conninfo as it was written; but where a password is written so oddly that it would be seen, as its parts."""
    shown = redact(text)
    try:
        parts = {name: str(value) for name, value in conninfo.conninfo_to_dict(shown).items()}
    except psycopg.ProgrammingError:
        return "***"
    secret = [name for name in parts if redact(f"{name}=x") != f"{name}=x"]
    if all(parts[name] == "***" for name in secret):
        return shown
    return conninfo.make_conninfo("", **{**parts, **dict.fromkeys(secret, "***")})


def _one_line(text: str) -> str:
    """A file may be named in any way; a comment of TOML ends with its line."""
    return re.sub(r"[\x00-\x1f\x7f]", "?", text)
