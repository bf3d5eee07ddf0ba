"""The one hierarchy of errors, and the exit statuses, which are a protocol.

An error of the user's is one line and status 2; a bug is any other exception and shows its traceback. A task that
fails is neither: it is a value, and no exception leaves `run.py` for it.
"""

OK = 0
LOST = 1  # a worker's session was lost or could not be opened
USER = 2

PASSING = ("40", "53", "55", "57", "58")
"""Classes of SQLSTATEs that pass by themselves: conflicts, resources, locks, cancels and shutdown, the system's."""


class PgtaskError(Exception):
    """What this program raises on purpose."""


class UserError(PgtaskError):
    """What the user got wrong; the text is one line that says where, what, and what would be right."""


class ConfigError(UserError):
    """The configuration cannot be used."""
