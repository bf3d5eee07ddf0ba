"""Every setting, once: its name, kind, default, bounds and meaning.

The command line, the sample file, the reference in docs/ and the SQL defaults of the task table are made
from this list, so they cannot differ. A setting reads its own values (`parse` what TOML gives, `parse_text`
what a command line or an environment gives) and says in one line what it wants instead. Where values come
from is `config.py`'s business.
"""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import psycopg
from psycopg import conninfo, pq

from pgtask.durations import duration_text, interval_seconds
from pgtask.lines import redact
from pgtask.sinks import Target

Level = Literal["master", "database", "task"]
Kind = Literal["int", "bool", "duration", "interval", "text", "char", "choice", "path", "address", "log", "conninfo"]
Value = int | bool | str | timedelta | Path | None

LOGS = ("stderr", "syslog", "journal")
"""Where to log, if it is not a file."""

INT32 = 2**31 - 1
MS = timedelta(milliseconds=1)
LONGEST = timedelta(days=1000)
AGES = timedelta(days=100000)
LONGEST_NAME = 63

CONNINFO_NUMBERS = (
    *("connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
    "tcp_user_timeout",
)
CONNINFO_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "sslcertmode": ("disable", "allow", "require"),
    "gssencmode": ("disable", "prefer", "require"),
    "channel_binding": ("disable", "prefer", "require"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "load_balance_hosts": ("disable", "random"),
}
"""Parameters of a conninfo with few right values, as libpq's manual has them."""

_BOOLS = {
    "true": True,
    "on": True,
    "yes": True,
    "1": True,
    "false": False,
    "off": False,
    "no": False,
    "0": False,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting. `min` and `max` bound a number, a duration, an interval's seconds, a text's bytes.

    `choices` are what a choice can be, and the words that a duration can be instead.
    """

    name: str
    kind: Kind
    default: Value
    level: Level
    about: str  # the doc without the sentence on the default
    unit: str = ""  # what a bare number means: "ms" or "s"
    min: float | timedelta | None = None
    max: float | timedelta | None = None
    choices: tuple[str, ...] = ()

    @property
    def doc(self) -> str:
        return f"{self.about} Defaults to {_spoken(self.default)}."

    @property
    def option(self) -> str:
        """Its option on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its variable in the environment."""
        return f"PGTASK_{self.name.upper()}"

    @property
    def sql_default(self) -> str:
        """The default as SQL takes it, without quotes."""
        return sql_text(self.default)

    @property
    def expects(self) -> str:
        """What a right value is, in words."""
        match self.kind:
            case "int":
                return f"a whole number from {self.min} to {self.max}"
            case "bool":
                return "true or false"
            case "duration":
                words = "".join(f', or "{word}"' for word in self.choices)
                return f'a duration such as "30 s" (a bare number is in {self.unit}), {self._range()}{words}'
            case "interval":
                return f'an interval such as "1 hour", {"more than 0" if self.min else "0 or more"}'
            case "char":
                return "one byte, or nothing"
            case "choice":
                return f"one of {', '.join(self.choices)}"
            case "path":
                return "a path"
            case "address":
                return 'an address such as "127.0.0.1:9187", "[::1]:9187" or ":9187"'
            case "log":
                return "stderr, syslog, journal, or a path"
            case "conninfo":
                return "a conninfo string or URI"
            case "text":
                return (
                    f"a text of {self.min} to {self.max} bytes"
                    if self.max
                    else "a text" + ", not empty" * bool(self.min)
                )

    def parse(self, value: object) -> Value:
        """A value as TOML has it. Raises ValueError with one line that says what is wrong."""
        if isinstance(value, str):
            self._check_text(value)
        match self.kind:
            case "int":
                right = isinstance(value, int) and not isinstance(value, bool) and self._within(value)
                parsed: Value = value if right else None  # type: ignore[assignment]
            case "bool":
                parsed = value if isinstance(value, bool) else None
            case "duration":
                parsed = self._duration(value)
            case "interval":
                parsed = self._interval(value)
            case "conninfo":
                return self._conninfo(value)
            case "path":
                if value == "":
                    return None
                parsed = Path(value) if isinstance(value, str) else None
            case "address":
                if value == "":
                    return None
                parsed = value if isinstance(value, str) and _is_address(value) else None
            case "log":
                parsed = self._log(value)
            case _:
                parsed = value if isinstance(value, str) and self._fits(value) else None
        if parsed is None:
            raise ValueError(self._wrong(value))
        return parsed

    def parse_text(self, text: str) -> Value:
        """A value as a command line or an environment has it."""
        value: object = text
        word = text.strip()
        if self.kind == "int" and re.fullmatch(r"[+-]?[0-9]{1,20}", word):
            value = int(word)
        elif self.kind == "bool":
            value = _BOOLS.get(word.lower(), text)
        return self.parse(value)

    def _check_text(self, text: str) -> None:
        if "\0" in text:
            raise ValueError("must not contain a NUL byte")
        if not _encodable(text):
            raise ValueError("must be valid UTF-8")

    def _within(self, value: float | timedelta) -> bool:
        # The bounds of a setting have the type of its values.
        low = self.min is None or value >= self.min  # type: ignore[operator]
        return low and (self.max is None or value <= self.max)  # type: ignore[operator]

    def _fits(self, text: str) -> bool:
        size = len(text.encode())
        if self.kind == "choice":
            return text in self.choices
        return size <= 1 if self.kind == "char" else self._within(size)

    def _duration(self, value: object) -> timedelta | str | None:
        if isinstance(value, str) and (word := value.strip().lower()) in self.choices:
            return word
        seconds: float | None = None
        if isinstance(value, str) and not re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*", value):
            seconds = interval_seconds(value)
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            seconds = float(value) * {"ms": 0.001, "s": 1.0}[self.unit]
        if seconds is None or not math.isfinite(seconds) or abs(seconds) > AGES.total_seconds():
            return None
        duration = timedelta(seconds=seconds)
        return duration if self._within(duration) else None

    def _interval(self, value: object) -> str | None:
        """Kept as text: only the server knows how long a month is. Read to refuse what it would refuse."""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        text = str(value).strip()
        seconds = interval_seconds(text)
        return text if seconds is not None and self._within(seconds) else None

    def _log(self, value: object) -> str | None:
        if not isinstance(value, str) or not value:
            return None
        Target.parse(value)
        near = difflib.get_close_matches(value, LOGS, 1) if re.fullmatch(r"\w+", value) else None
        if near and near[0] != value:
            raise ValueError(f'did you mean "{near[0]}"? A file of this name is "./{value}"')
        return value

    def _conninfo(self, value: object) -> str | None:
        if not isinstance(value, str):
            raise ValueError(f"must be {self.expects}")
        if problem := conninfo_problem(value):
            raise ValueError(problem)
        return value or None

    def _wrong(self, value: object) -> str:
        line = f"must be {self.expects}, not {_shown(value)}"
        if self.kind == "choice" and isinstance(value, str):
            line += did_you_mean(value.lower(), self.choices)
        return line

    def _range(self) -> str:
        bounds = [(self.min, "at least"), (self.max, "at most")]
        return ", ".join(f"{word} {duration_text(b)}" for b, word in bounds if isinstance(b, timedelta) and b)


def _int(level: Level, name: str, default: int, low: int, high: int, about: str) -> Setting:
    return Setting(name=name, kind="int", default=default, level=level, about=about, min=low, max=high)


def _bool(level: Level, name: str, default: bool, about: str) -> Setting:
    return Setting(name=name, kind="bool", default=default, level=level, about=about)


def _duration(level: Level, name: str, default: timedelta, low: timedelta, unit: str, about: str) -> Setting:
    return Setting(
        name=name, kind="duration", default=default, level=level, about=about, unit=unit, min=low, max=LONGEST
    )


def _keep(name: str, default: str, words: tuple[str, ...], about: str) -> Setting:
    return Setting(
        name=name,
        kind="duration",
        default=default,
        level="database",
        about=about,
        unit="s",
        min=timedelta(0),
        max=AGES,
        choices=words,
    )


def _interval(name: str, default: str, low: float, about: str) -> Setting:
    return Setting(name=name, kind="interval", default=default, level="task", about=about, min=low)


def _choice(level: Level, name: str, default: str, choices: tuple[str, ...], about: str) -> Setting:
    return Setting(name=name, kind="choice", default=default, level=level, about=about, choices=choices)


def _name(level: Level, name: str, default: str, about: str) -> Setting:
    return Setting(name=name, kind="text", default=default, level=level, about=about, min=1, max=LONGEST_NAME)


def _char(name: str, default: str, about: str) -> Setting:
    return Setting(name=name, kind="char", default=default, level="task", about=about)


SETTINGS: tuple[Setting, ...] = (
    _int(
        "master", "workers", 16, 1, 10000, "Worker processes at most, of all tables together; each holds one session."
    ),
    _int("master", "spare", 0, 0, 10000, "Idle workers kept forked ahead, so that the first task starts sooner."),
    _duration(
        "master",
        "linger",
        timedelta(seconds=1),
        timedelta(0),
        "s",
        "How long a worker without a task is kept before it is ended.",
    ),
    _duration(
        "master",
        "stop_timeout",
        timedelta(seconds=30),
        timedelta(0),
        "s",
        "How long a stop by TERM lets runs end before it cancels them and puts them back.",
    ),
    _choice("master", "log_level", "info", ("debug", "info", "warning", "error"), "The least that is logged."),
    Setting(
        name="log",
        kind="log",
        default="stderr",
        level="master",
        about='Where to log: "stderr"; the path of a file, opened anew after it was rotated or on USR1; "syslog", or '
        '"syslog:local3" for another facility than daemon; or "journal", which is systemd\'s.',
    ),
    _choice("master", "log_format", "text", ("text", "json"), "How a line of the log is written."),
    Setting(
        name="pidfile",
        kind="path",
        default=None,
        level="master",
        about="A file that holds the master's pid while it runs; a second master with the same one is refused.",
    ),
    Setting(
        name="listen",
        kind="address",
        default=None,
        level="master",
        about="Where the monitor answers HTTP requests for metrics and health. Without it there is no monitor.",
    ),
    _name("database", "schema", "public", "The schema of the task table."),
    _name("database", "table", "task", "The name of the task table."),
    _duration(
        "database",
        "sleep",
        timedelta(seconds=1),
        MS,
        "ms",
        "The pause between polls while the poller is not woken; a bare number is in milliseconds.",
    ),
    _int("database", "idle", 1, 1, INT32, "Empty polls before the poller goes to sleep until it is notified."),
    _duration(
        "database",
        "reset",
        timedelta(hours=1),
        MS,
        "s",
        "How often to look for runs that lost their owner; a worker's death is noticed at once anyway.",
    ),
    _int("database", "run", INT32, 1, INT32, "Concurrent runs of this table at most."),
    _int(
        "database",
        "warm",
        1,
        0,
        100,
        "Sessions kept open for workers that are yet to be forked, so that the first task starts sooner.",
    ),
    _int("database", "limit", 1000, 1, INT32, "Tasks taken by one poll at most."),
    _bool(
        "database",
        "wake",
        True,
        "Whether inserts wake the poller by NOTIFY. False only polls, for users of PREPARE TRANSACTION.",
    ),
    _duration(
        "database",
        "batch_time",
        timedelta(milliseconds=10),
        MS,
        "ms",
        "How long tasks that share a commit may wait for it; a bare number is in milliseconds.",
    ),
    _int("database", "crashes", 3, 0, INT32, "How many times a run may be lost in a crash before its task fails."),
    _bool("database", "remote_password", True, "Whether a task's remote conninfo must carry its own password."),
    _duration(
        "database",
        "safety",
        timedelta(seconds=60),
        MS,
        "s",
        "A sleeping poller looks at the table at least so often, in case a wake-up never came.",
    ),
    _int(
        "database",
        "log_failed",
        100,
        0,
        INT32,
        "Failed runs of this table that are logged in a minute at most; the others are counted. 0 logs none.",
    ),
    _duration(
        "database",
        "slow_run",
        timedelta(0),
        timedelta(0),
        "ms",
        "Runs that take longer are logged; 0 is never. A bare number is in milliseconds.",
    ),
    _duration(
        "database",
        "slow_take",
        timedelta(seconds=1),
        timedelta(0),
        "ms",
        "Looks for due tasks that take longer are logged; 0 is never. A bare number is in milliseconds.",
    ),
    _keep(
        "keep",
        "forever",
        ("forever",),
        "How long the rows of tasks that are DONE, GONE or STOP are kept before they are removed.",
    ),
    _keep(
        "keep_failed",
        "keep",
        ("forever", "keep"),
        'The same for those that FAILed; "keep" is as long as the others.',
    ),
    Setting(
        name="maintenance",
        kind="conninfo",
        default=None,
        level="database",
        about="A conninfo with the right to create the role and the database when they are missing.",
    ),
    _bool(
        "database",
        "create",
        True,
        "Whether to create or alter what is missing. False only checks; what `pgtask sql` prints, a DBA runs.",
    ),
    _interval("active", "1 hour", 1e-6, "How long after plan a task may still start; later it is GONE."),
    _interval("live", "0", 0, "A worker older than this takes no further task like this one; 0 is no limit."),
    _interval("repeat", "0", 0, "A new row is planned this much later after the run; 0 is never."),
    _interval("timeout", "0", 0, "Time allowed for the run, to the millisecond; 0 is no limit."),
    _int("task", "count", 0, 0, INT32, "A worker that ran so many takes no further task like this one; 0 is no limit."),
    _int(
        "task",
        "max",
        0,
        -INT32 - 1,
        INT32,
        "How many others of the group may run beside it, and its priority. Negative: one at a "
        "time, so many milliseconds apart.",
    ),
    _bool("task", "delete", True, "Whether to remove the row when both output and error are null."),
    _bool("task", "drift", False, "Whether repetition counts from the end of the run instead of from plan."),
    _bool("task", "header", True, "Whether results of more than one column begin with a line of column names."),
    _bool("task", "save", False, "Whether to leave the session as it is for the worker's next task."),
    _bool("task", "string", True, "Whether to quote only strings."),
    _char("delimiter", "\t", "What stands between columns."),
    _char("escape", "", "What stands before each quote and escape character inside a quoted value."),
    _char("quote", "", "What stands around values."),
    Setting(
        name="group",
        kind="text",
        default="group",
        level="task",
        about="Tasks with the same group and remote share slots.",
    ),
    Setting(name="null", kind="text", default="\\N", level="task", about="How a null is written."),
    _bool("task", "atomic", True, "Whether to run and finish in one transaction wherever the input allows it."),
    _int("task", "retry", 0, 0, INT32, "How many further runs a task gets after failed ones."),
    _interval("backoff", "1 second", 0, "The pause before the first of them; it doubles each time, up to an hour."),
    Setting(
        name="retry_on",
        kind="text",
        default="* !0A !42",
        level="task",
        about="After which errors: SQLSTATEs and classes of them, * for all, with ! before those that are not meant. "
        "What passes by itself (a lost connection, a conflict, a lock timeout, a server that stops) always is.",
    ),
    _choice(
        "task",
        "missed",
        "once",
        ("once", "skip", "all"),
        "What becomes of the runs of a calendar that were missed: one late run, none, or all of them.",
    ),
    _int("task", "batch", 1, 1, 50, "How many short tasks of the group may share one transaction and its commit."),
)


def by_name(level: Level) -> dict[str, Setting]:
    """The settings of a level, in their order."""
    return {setting.name: setting for setting in SETTINGS if setting.level == level}


def sql_text(value: Value) -> str:
    """A value as SQL takes it, without quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def toml_text(value: Value) -> str:
    """A value as TOML has it. None is the empty text, which every setting without a value takes for it."""
    if isinstance(value, bool | int):
        return sql_text(value)
    text = duration_text(value) if isinstance(value, timedelta) else "" if value is None else str(value)
    return '"' + "".join(_toml_character(character) for character in text) + '"'


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f', did you mean "{near[0]}"?' if near else ""


def conninfo_problem(text: str) -> str | None:
    """What libpq finds wrong in a conninfo, in one line that never holds a piece of a password."""
    if "\0" in text:
        return "must not contain a NUL byte"
    if not _encodable(text):
        return "must be valid UTF-8"
    # A password that was not quoted right may stand in any other part.
    secret = bool(re.search("pass|secret|//|@|postgres", text, re.I))
    try:
        params = conninfo.conninfo_to_dict(text)
    except psycopg.Error as error:
        line = _without_secrets(" ".join(str(error).split()), secret=secret)
        return line + (f', did you mean "dbname={text}"?' if not secret and re.fullmatch(r"\w[\w-]*", text) else "")
    for name, value in params.items():
        if (problem := _value_problem(name, str(value))) is not None:
            return problem + ("" if secret else f', not "{value}"')
    return None


def _value_problem(name: str, value: str) -> str | None:
    """What libpq would find wrong in a parameter when it connects, which nothing that comes later can mend."""
    if name == "port":
        ports = filter(None, value.split(","))
        right = all(re.fullmatch(r"\s*[0-9]{1,5}\s*", port) and 0 < int(port) < 65536 for port in ports)
        return None if right else "port must be from 1 to 65535"
    if name in CONNINFO_NUMBERS and value and not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", value):
        return f"{name} must be a whole number"
    if name in CONNINFO_CHOICES and value and value not in CONNINFO_CHOICES[name]:
        return f"{name} must be one of {', '.join(CONNINFO_CHOICES[name])}"
    return None


def _without_secrets(line: str, *, secret: bool) -> str:
    """A password that was not quoted or escaped right is in libpq's message, in pieces."""
    unknown = re.fullmatch(r'invalid (?:connection option|URI query parameter:) "([^"]*)"', line)
    keywords = [option.keyword.decode() for option in pq.Conninfo.get_defaults()]
    if unknown and ((hint := did_you_mean(unknown[1], keywords)) or not secret):
        return f'unknown connection option "{unknown[1]}"{hint}'
    line = line.replace('"="', "=")
    return re.sub('".*"', '"***"', line) if secret else line


def toml_sample() -> str:
    """The sample file: every key with what it means and its built-in value, commented out."""
    lines = _prose(
        "The configuration of pgtask-master. Every key stands here with its built-in value, commented out. "
        "The command line (--workers 4) goes before the environment (PGTASK_WORKERS=4), and both before this "
        "file. HUP reads the file again."
    )
    database = by_name("database")
    own = ("schema", "table", "maintenance")
    lines += ["", "[master]"]
    lines += _sample_keys(by_name("master").values())
    lines += ["", "[defaults]"]
    lines += _prose("What a task row has when its INSERT does not say.")
    lines += _sample_keys(by_name("task").values())
    lines += [""]
    lines += _prose("What every table has when its [[database]] entry does not say.")
    lines += _sample_keys(setting for name, setting in database.items() if name not in own)
    lines += [""]
    lines += _prose("One entry for each task table. Any key of [defaults] may stand here again, for this table only.")
    lines += ["[[database]]", ""]
    lines += _prose(
        'Where the table is: a conninfo string ("host=db1 dbname=billing user=app") or a URI '
        '("postgresql://app@db1/billing"). Defaults to what libpq itself and the PG* variables say.'
    )
    lines += ['#conninfo = ""']
    lines += _sample_keys(database[name] for name in own)
    return "\n".join(lines) + "\n"


def markdown_table(level: Level) -> str:
    """The settings of a level as a Markdown table."""
    lines = ["| setting | value | meaning |", "| --- | --- | --- |"]
    for setting in by_name(level).values():
        cells = (f"`{setting.name}`", setting.expects, setting.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _sample_keys(settings: Iterable[Setting]) -> list[str]:
    lines = []
    for setting in settings:
        lines += ["", *_prose(setting.doc), f"#{setting.name} = {toml_text(setting.default)}"]
    return lines


def _prose(text: str, width: int = 100) -> list[str]:
    lines = ["#"]
    for word in text.split():
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append("#")
        lines[-1] += f" {word}"
    return lines


def _spoken(value: Value) -> str:
    """A default in a sentence."""
    if value is None or value == "":
        return "none"
    if isinstance(value, timedelta):
        return duration_text(value)
    if isinstance(value, str):
        return "a tab" if value == "\t" else f'"{value}"'
    return sql_text(value)


def _shown(value: object) -> str:
    """A wrong value in a message: in TOML's words, short, without a password."""
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if not isinstance(value, str):
        return "a list" if isinstance(value, list) else "a table" if isinstance(value, dict) else f"{value}"
    text = redact(value)
    return toml_text(text if len(text) <= 60 else text[:60] + "...")


def _is_address(text: str) -> bool:
    """HOST:PORT, [IPv6]:PORT, or :PORT for every address of this machine."""
    found = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+(?:%\w+)?\]|[\w.-]*):([0-9]{1,5})", text, re.ASCII)
    return found is not None and 0 < int(found[1]) < 65536


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _toml_character(character: str) -> str:
    short = {"\t": "\\t", "\n": "\\n", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
    if character in short:
        return short[character]
    return f"\\u{ord(character):04x}" if ord(character) < 32 or ord(character) == 127 else character
