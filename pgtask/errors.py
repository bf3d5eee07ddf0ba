"""The one hierarchy of errors, and the exit statuses, which are a protocol.

An error of the user's is one line and status 2; a bug is any other exception and shows its traceback. A task that
fails is neither: it is a value, and no exception leaves `run.py` for it.
"""

OK = 0
LOST = 1  # a worker's session was lost or could not be opened
NO = 1
USER = 2
OVER = 124
INTERRUPTED = 130

STATUSES = {
    OK: "yes, or done",
    NO: "the answer is no, or not all could be done; or the output could not be written",
    USER: "what was asked is wrong, or the database refuses it or cannot be reached; a line on standard error says why",
    OVER: "the time that was given is over, as `timeout` of the coreutils says it",
    INTERRUPTED: "interrupted by SIGINT, as a shell says it",
}
"""What the exit statuses of the command `pgtask` mean."""

PASSING = ("40", "53", "55", "57", "58")
"""Classes of SQLSTATEs that pass by themselves: conflicts, resources, locks, cancels and shutdown, the system's."""


class PgtaskError(Exception):
    """What this program raises on purpose."""


class UserError(PgtaskError):
    """What the user got wrong; the text is one line that says where, what, and what would be right."""


class ConfigError(UserError):
    """The configuration cannot be used."""
