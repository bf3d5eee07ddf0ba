"""pgtask runs SQL kept in a PostgreSQL table: a task is a row, and `pgtask-master` runs it when it is due.

Nothing is imported here: the modules import one way, from `cli` down to `errors`, and the package itself is
below them all.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pgtask")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
