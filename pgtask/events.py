"""Every event of the log, once: its name, levels and fields, what it means, and what is to be done about it.

docs/reference/events.md is made from this list, and a test compares it with every call of the log.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Event:
    """`levels` has more than one where it depends; the `meaning` says on what. Fields without a value are left out."""

    name: str
    levels: tuple[str, ...]
    fields: tuple[str, ...]
    meaning: str
    action: str  # "" where there is nothing to do


def _event(name: str, levels: str, fields: str, meaning: str, action: str = "") -> Event:
    return Event(name=name, levels=tuple(levels.split()), fields=tuple(fields.split()), meaning=meaning, action=action)


FIELDS = {
    "attempt": "how many runs of the task had begun, this one included",
    "backend": "the pid of a server process",
    "before": "more runs that were missed earlier, and are not noted one by one",
    "change": "what was created or altered",
    "code": "the SQLSTATE",
    "count": "how many",
    "error": "what went wrong, in one line; of a task's error the first line",
    "failed": "whether the task is FAIL now",
    "failures": "tries until it went well",
    "group": "the task's group",
    "held": "how many groups are held now",
    "hint": "what to do about it",
    "how": "the exit status or signal of a process; the signal by which the master was stopped",
    "id": "the task",
    "ids": "the tasks",
    "leader": "the host of the master that serves the table",
    "leader_pid": "that master's pid",
    "listen": "the address and port that the monitor answers at",
    "logger": "which library says it",
    "losses": "how many times in a row the session was lost",
    "lost": "how many lines",
    "monitor": "the monitor's pid",
    "ms": "how long it took, in milliseconds",
    "name": "the application_name of a session",
    "noted": "runs that were missed and have rows of their own, which are GONE",
    "of": "the event whose lines were left out",
    "ok": "whether the run went well",
    "on": "whether workers report from now on",
    "owner": "the role that owns the table",
    "pause": "seconds until the next try",
    "retried": "whether the task is to run again",
    "signal": "the signal that came",
    "step": "the statement of ours that failed",
    "table": "the task table, as role@database schema.table; in a worker's lines it is the last field",
    "tables": "how many tables the configuration has",
    "tasks": "how many tasks were taken",
    "term": "the number of the time in which one master serves the table",
    "text": "what a library says",
    "times": "how many runs of the task were lost",
    "together": "how many tasks shared the transaction",
    "tries": "tries until it went well",
    "user": "a role",
    "what": "the role or the database",
    "why": "the reason",
    "worker": "the pid of a worker",
    "workers": "how many workers there may be",
}
"""What the fields mean."""

SECTIONS = {
    "The master": (
        _event("master_started", "info", "tables workers", "The master begins."),
        _event("stopping", "info", "signal", "A signal to stop came; a second, harsher one is told again."),
        _event("master_stopped", "info", "how", "The master has ended in order."),
        _event("reloaded", "info", "tables", "HUP: the configuration was read again and holds."),
        _event(
            "reload_refused",
            "error",
            "error",
            "HUP: the new configuration is wrong; the old one goes on.",
            "Mend what the error names and send HUP again.",
        ),
        _event(
            "notify_failed",
            "warning",
            "error",
            "What systemd is told (ready, status, sign of life) does not reach it; said once.",
            "See why NOTIFY_SOCKET cannot be written; without the sign of life systemd starts the service anew.",
        ),
        _event("table_added", "info", "table", "A reload brought this table."),
        _event("table_changed", "info", "table", "A reload changed settings of this table."),
        _event("table_removed", "info", "table", "A reload took this table away; its runs end first."),
        _event(
            "running_as_root",
            "warning",
            "hint",
            "The master runs as root.",
            "Run it as a system user of its own.",
        ),
        _event(
            "poller_crashed",
            "error",
            "table",
            "A bug in the master, with a traceback; it stops, so that whoever started it starts it anew.",
            "Report it.",
        ),
        _event("warm_crashed", "error", "table", "A bug in what keeps sessions ready, with a traceback.", "Report it."),
    ),
    "Tables": (
        _event(
            "leading",
            "info debug",
            "table term backend",
            "This master serves the table from now on. At debug while the table is unstable.",
        ),
        _event(
            "standing_by",
            "info",
            "table leader leader_pid",
            "Another master serves the table; this one takes over when that one is gone.",
        ),
        _event(
            "lock_held_by_another",
            "warning",
            "table backend user name hint",
            "A session that is no master holds the lock that the table's master needs.",
            "End that session, as the hint says; find out who did it.",
        ),
        _event(
            "table_down",
            "warning error",
            "table error",
            "The table cannot be served: no connection, or it was lost. It is tried again and again; said once for "
            "each reason. At error where waiting does not help: it is not what it should be, or rights are missing.",
            "At error: mend what it says. At warning: look at the server, if no `table_up` follows.",
        ),
        _event("table_up", "info", "table failures", "The table is served again after `table_down`."),
        _event(
            "table_unstable",
            "warning",
            "table error",
            "The session was lost soon after it was opened, more than once. Nothing more is said until `table_stable`.",
            "Look at the server's log: who ends our sessions?",
        ),
        _event("table_stable", "info", "table losses", "No session was lost for a while."),
        _event(
            "schema_changed",
            "info debug",
            "table change",
            "An object of the table was created or altered. At debug for comments.",
        ),
        _event(
            "table_of_another",
            "warning",
            "table owner hint",
            "The table belongs to another role, which may have any SQL run as the master's.",
            "Make sure that it is the table that you meant.",
        ),
        _event(
            "connected_as_superuser",
            "warning",
            "table user hint",
            "Tasks run as a superuser.",
            "Connect as a role with no more rights than tasks need.",
        ),
        _event("created", "info", "table what", "The role or database was missing and was made (`maintenance`)."),
        _event("created_by_another", "debug", "what", "Somebody else made it at the same moment."),
        _event(
            "maintenance_failed",
            "warning",
            "table error",
            "The role or database is missing and could not be made.",
            "Make it by hand, or mend the conninfo `maintenance`.",
        ),
        _event("holds_changed", "info", "table held", "Somebody has held or released groups."),
        _event("history_removed", "info", "table count", "Finished rows were kept long enough, and are gone (`keep`)."),
        _event(
            "history_refused",
            "warning",
            "table id error hint",
            "A finished row could not be removed; said once in a pass.",
            "Look for a foreign key, a trigger or a lock of yours.",
        ),
        _event(
            "take_slow",
            "warning",
            "table ms tasks",
            "A look for due tasks took longer than `slow_take`. Told once a minute at most.",
            "Look for old transactions (dead entries of indexes stay), bloat, locks, a server without processor time.",
        ),
    ),
    "Workers": (
        _event(
            "worker_forked", "debug", "worker table backend", "A worker begins, maybe with a session that was ready."
        ),
        _event(
            "worker_ended",
            "debug warning error",
            "worker table how why",
            "A worker has ended. At warning: its session was lost. At error: it crashed or was killed.",
            "At warning: `why` is the server's word. At error: look for who killed it (out of memory?), or report it.",
        ),
        _event(
            "workers_cannot_open",
            "warning",
            "table why",
            "Workers get no session or no process; they are tried one at a time with growing pauses. Said once.",
            "Raise max_connections, or lower `workers` or `run`; look at the limits of the system.",
        ),
        _event("workers_open_again", "info", "table", "Workers get their sessions again."),
        _event(
            "worker_killed",
            "error",
            "worker table",
            "A worker did not end when the master stopped, did not say what it had begun, or did nothing of what it was"
            " told for 20 s, and was killed. Its task is put back.",
            "Look at what the task does: it ignored cancel requests; at your triggers: one waits for something; or at"
            " the machine: it swaps, or somebody has stopped the worker.",
        ),
        _event(
            "worker_unheard",
            "warning",
            "table backend id",
            "The server has answered a worker that still waits: something in between swallows what passes.",
            "Look at the network, proxies and firewalls.",
        ),
        _event(
            "workers_report", "debug", "table on", "Workers say which tasks have ended, since others wait for them."
        ),
        _event(
            "warm_session_refused", "debug", "table error", "A session that was to be kept ready could not be opened."
        ),
        _event(
            "session_outdated", "debug", "table backend", "Settings of the role have changed: a new session is opened."
        ),
        _event(
            "cleanup_failed",
            "warning",
            "table step code error",
            "What a task left in its session could not be dropped at once; it is tried again.",
        ),
        _event("child_crashed", "error", "table", "A bug in a worker, with a traceback.", "Report it."),
    ),
    "Tasks": (
        _event(
            "task_failed",
            "warning info",
            "table id group code attempt ms retried error",
            "A run failed. At warning: that is the task's end, FAIL. At info: it is to run again (`retry`). At most "
            "`log_failed` lines a minute and table.",
            "Read the row: `SELECT error, input FROM task WHERE id = ...`; mend, then set its state back to PLAN.",
        ),
        _event(
            "task_slow",
            "warning",
            "table id group attempt ms ok",
            "A run took longer than `slow_run`, from its begin to its commit. At most 100 lines a minute and table.",
        ),
        _event(
            "lines_left_out",
            "warning",
            "table of count",
            "So many more lines of the event `of` were not written in the last minute.",
            "The rows are complete: ask the table.",
        ),
        _event("run_begun", "debug", "table id attempt group", "A run begins."),
        _event("run_ended", "debug", "table id ok code ms together", "A run has ended, and that is committed."),
        _event(
            "tasks_gone", "info", "table count", "Tasks were too late (`active`), or what they depend on failed: GONE."
        ),
        _event("run_skipped", "info", "table id", "A run of a calendar was missed, and is not made up for (`missed`)."),
        _event("runs_missed", "info", "table id noted before", "Runs of a calendar were missed before this one."),
        _event(
            "run_lost",
            "warning",
            "table id times failed",
            "A worker, its session or the server died in the middle of a run. It runs again, unless that happened more "
            "than `crashes` times.",
            "Look for the death: `worker_ended` in this log, or the server's own.",
        ),
        _event(
            "run_put_back",
            "info",
            "table id",
            "A task that nobody had begun, or a stop has interrupted, is PLAN again.",
        ),
        _event(
            "run_disowned",
            "info",
            "table id",
            "The row was stopped, deleted or taken away while it ran; its work was undone.",
        ),
        _event(
            "run_undone",
            "warning",
            "table id code error",
            "The end of the run could not be written with its work, which was undone; the task fails.",
            "Look at triggers and constraints of yours on the task table.",
        ),
        _event(
            "run_ignores_cancel",
            "warning",
            "table id backend",
            "Cancel requests have no effect; the server is asked to end that session.",
            "Look at what the task calls.",
        ),
        _event(
            "remote_ignores_cancel",
            "warning",
            "table id backend",
            "The same on the task's remote server.",
            "Look at what the task calls there.",
        ),
        _event(
            "remote_not_terminated",
            "warning",
            "table id backend error",
            "And that session could not be ended: its statement may go on.",
            "End it on the remote server.",
        ),
        _event(
            "repeat_refused",
            "warning error",
            "table id code error",
            "The next row of a repeated task could not be made: the series ends. At error after a run that was lost.",
            "Mend what the error names, and insert the task anew.",
        ),
        _event(
            "retry_refused",
            "warning",
            "table id code error",
            "A failed task could not be planned again: it is FAIL, whatever `retry` has left.",
            "Mend what the error names: a constraint, a trigger, a partition that is missing.",
        ),
        _event(
            "begin_failed",
            "warning",
            "table id code error",
            "A run could not be begun; it is tried again. Said once for each reason.",
            "Look for locks on the table, and triggers of yours.",
        ),
        _event(
            "look_failed",
            "debug",
            "table code error",
            "An idle worker could not begin what was due: the master took it.",
        ),
        _event("begin_recovered", "info", "table id", "A run was begun after `begin_failed`."),
        _event(
            "finish_failed",
            "warning error",
            "table id step code error",
            "The end of a run could not be written; it is tried again. At error the fifth time: it keeps its slot.",
            "At error: look for locks on the table, triggers of yours, a full disk.",
        ),
        _event("finish_recovered", "info", "table id tries", "It was written after `finish_failed`."),
        _event("batch_undone", "debug", "table ids why", "Tasks that shared a transaction run one by one instead."),
        _event(
            "waiting_row_refused",
            "warning",
            "table id error",
            "A task that waits for others cannot be written.",
            "Look at triggers of yours on the task table.",
        ),
    ),
    "The monitor": (
        _event("monitor_started", "info", "monitor listen", "A process for metrics and health was started."),
        _event("monitor_listening", "info", "listen", "It answers from now on."),
        _event(
            "monitor_cannot_listen",
            "warning",
            "listen error",
            "It cannot have the address, and tries again until it can.",
            "See who has the port, or set `listen` to another one.",
        ),
        _event(
            "monitor_cannot_read",
            "warning",
            "table error",
            "It cannot read the table for its page, which then has `pgtask_up` 0; said once until it can.",
            "If the master serves the table meanwhile: see whether the role may open one more session.",
        ),
        _event("monitor_reads_again", "info", "table", "It can again."),
        _event(
            "monitor_ended",
            "warning",
            "why pause",
            "It died, or could not be started, and is started again after a pause. Tasks do not need it.",
            "Report it if it ends by itself.",
        ),
        _event(
            "metrics_off",
            "warning debug",
            "error",
            "A process cannot count: there is no room for its file. At debug if the file has gone with its master.",
            "Make room where the files are; see monitoring.",
        ),
    ),
    "The log itself": (
        _event(
            "log_writable_again",
            "warning",
            "lost",
            "Lines of this process were lost: the disk was full, or the log daemon was away or did not read.",
            "Make room, or see why it was away.",
        ),
        _event("library_message", "warning error", "logger text", "A library has something to say."),
    ),
}

EVENTS = {event.name: event for section in SECTIONS.values() for event in section}


def markdown() -> str:
    """The reference page."""
    lines = [
        "# Events of the log",
        "",
        "A line is an event, whose name never changes, and its fields. How to choose where the log goes, and how to",
        "read it, is in [logging](../how-to/logging.md). INFO is the life cycle; WARNING what mended itself, or went",
        "wrong for one task; ERROR what a person must act on; DEBUG every task. A field without a value is left out.",
        "",
        "This page is made by `bin/generate` from `pgtask/events.py`, which a test compares with the program.",
    ]
    for title, section in SECTIONS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| event | level | fields | meaning | what to do |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += map(_row, section)
    lines += ["", "## Fields", "", "| field | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in FIELDS.items()]
    return "\n".join(lines) + "\n"


def _row(event: Event) -> str:
    levels, fields = ", ".join(event.levels), _code(event.fields)
    return f"| `{event.name}` | {levels} | {fields} | {event.meaning} | {event.action} |"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
