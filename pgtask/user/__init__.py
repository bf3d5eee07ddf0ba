"""The command `pgtask`: a module for each of its commands, or for a few that belong together.

Each is a client of the database like any other: what it does, a session with the same rights could do in SQL.
"""
