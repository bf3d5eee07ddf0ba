"""The list of events and the calls of the log agree, as the source shows."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from pgtask import log
from pgtask.events import EVENTS, FIELDS, SECTIONS, markdown
from tests.unit.test_imports import MODULES, tree

ROOT = Path(__file__).resolve().parent.parent.parent
MADE_BELOW = {"log_writable_again": ("sinks", "warning"), "library_message": ("lines", "warning error")}
"""Events that no call of the log makes, and where they are made."""


@dataclass(frozen=True)
class Call:
    place: str
    name: str
    levels: frozenset[str]
    fields: frozenset[str]


@cache
def calls() -> list[Call]:
    return [call for module in MODULES if module != "log" for call in calls_in(module)]


def calls_in(module: str) -> Iterator[Call]:
    bound = module.startswith("worker.") or module == "process"  # the table, to every line that a worker writes
    for node in ast.walk(tree(module)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=function), args=arguments, keywords=given):
                if function in (*log.LEVELS, "event", "exception"):
                    yield call(f"{module}:{node.lineno}", function, arguments, given, bound=bound)


def call(place: str, function: str, arguments: list[ast.expr], given: list[ast.keyword], *, bound: bool) -> Call:
    level, arguments = (arguments[0], arguments[1:]) if function == "event" else (ast.Constant(function), arguments)
    match arguments:
        case [ast.Constant(value=str(name))]:
            pass
        case _:
            pytest.fail(f"{place}: the event's name must be written there, and nothing else but fields by name")
    fields = [keyword.arg for keyword in given]
    assert all(fields), f"{place}: fields must be written one by one"
    if bound:
        assert "table" not in fields, f"{place}: every line of a worker has the table"
        fields.append("table")
    return Call(place=place, name=name, levels=levels_in(level), fields=frozenset(filter(None, fields)))


def levels_in(level: ast.expr) -> frozenset[str]:
    """The levels that an expression comes to: a literal, or one of those of a condition."""
    if isinstance(level, ast.IfExp):
        return levels_in(level.body) | levels_in(level.orelse)
    assert isinstance(level, ast.Constant), ast.dump(level)
    return frozenset({str(level.value).replace("exception", "error")})


def test_source_has_calls_to_compare() -> None:
    assert len(calls()) > 60


@pytest.mark.parametrize("call", calls(), ids=lambda call: f"{call.place} {call.name}")
def test_every_call_is_as_the_list_says(call: Call) -> None:
    assert call.name in EVENTS, f"{call.place}: put {call.name} into pgtask/events.py"
    event = EVENTS[call.name]
    assert call.levels <= set(event.levels)
    assert call.fields <= set(event.fields)


@pytest.mark.parametrize("name", sorted(set(EVENTS) - set(MADE_BELOW)))
def test_everything_in_the_list_is_used(name: str) -> None:
    found = [call for call in calls() if call.name == name]
    assert found, "no call makes it"
    assert set(EVENTS[name].levels) == set().union(*(call.levels for call in found))
    assert set(EVENTS[name].fields) == set().union(*(call.fields for call in found))


@pytest.mark.parametrize("name", MADE_BELOW)
def test_what_the_log_makes_by_itself_is_in_the_list(name: str) -> None:
    module, levels = MADE_BELOW[name]
    assert any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(tree(module)))
    assert EVENTS[name].levels == tuple(levels.split())


def test_names_are_unique_and_of_one_kind() -> None:
    names = [event.name for section in SECTIONS.values() for event in section]
    assert len(names) == len(set(names))
    assert all(name.islower() and name.replace("_", "").isalpha() for name in names)
    assert all(set(event.levels) <= set(log.LEVELS) for event in EVENTS.values())


def test_every_field_is_explained_and_none_is_taken() -> None:
    used = {field for event in EVENTS.values() for field in event.fields}
    assert list(FIELDS) == sorted(used)
    assert not used & {"time", "level", "pid", "event", "traceback"}, "a line of JSON has them already"


def test_every_error_says_what_to_do() -> None:
    assert all(
        event.action for event in EVENTS.values() if set(event.levels) & {"error"} and "library" not in event.name
    )


def test_page_in_docs_is_up_to_date() -> None:
    assert (ROOT / "docs/reference/events.md").read_text("utf-8") == markdown()
