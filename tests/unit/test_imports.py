"""Imports run one way, and what only one module may do is done nowhere else, as the source shows."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "pgtask"

LAYERS = (
    {"__main__"},
    {"cli", "user.commands"},
    {"user.submit", "user.control", "user.listing"},
    {"user.ends", "user.search", "user.purge", "user.completion"},
    {"master.master", "user.agenda", "user.doctor", "user.import_cron", "user.script", "user.top.main", "user.why"},
    {"user.checks"},
    {"user.top.screen", "user.top.page"},
    {"user.top.summary"},
    {"user.top.views"},
    {"user.top.words"},
    {"user.top.look"},
    {"user.where", "user.shown", "master.keeper"},
    {"monitor.monitor"},
    {"monitor.gauges"},
    {"master.poller"},
    {"master.sleeper"},
    {"master.taker"},
    {"master.waiting", "master.holds", "master.reports", "master.history"},
    {"master.mender", "master.warm"},
    {"master.pool", "master.maintenance", "async_session", "master.outage"},
    {"master.handles"},
    {"worker.worker"},
    {"worker.shared"},
    {"worker.finish", "worker.remote", "worker.turn", "schema", "worker.progress"},
    {"worker.begin", "worker.following"},
    {"objects", "worker.ours"},
    {"worker.run", "worker.ways"},
    {"store"},
    {"worker.session", "output"},
    {"telling"},
    {"config", "resolve", "user.spoken"},
    {"coming", "metrics", "master.notify", "master.pidfile", "process", "settings", "master.backlog", "master.timers"},
    {"cron", "durations", "log"},
    {"sinks"},
    {"lines"},
    {"command"},
    {"errors", "events", "pace"},
)
"""From the top; a module imports from lower layers only, never from its own."""

ASIDE = {"user.reference": set(), "demo": {"embedded", "errors"}, "embedded": {"errors"}}
"""Modules that nobody imports but each other, and what they may import."""

DEPTH = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)

FORKING = {"fork", "forkpty", "wait", "wait3", "wait4", "waitid", "waitpid"}


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_place(module: str) -> None:
    assert module in DEPTH or module in ASIDE, f"put pgtask/{module}.py into its layer in {__file__}"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_below(module: str) -> None:
    for imported in own_imports(module):
        if module in ASIDE:
            assert imported in ASIDE[module], f"{module} stands aside, but imports {imported}"
        else:
            assert imported not in ASIDE, f"{imported} stands aside, but {module} imports it"
            assert DEPTH[module] < DEPTH[imported], f"{module} imports {imported}, which is not below it"


def test_package_itself_imports_no_module() -> None:
    assert list(own_imports("__init__")) == []


@pytest.mark.parametrize("module", [module for module in MODULES if module != "process"])
def test_only_process_forks_reaps_and_sets_titles(module: str) -> None:
    for node in ast.walk(tree(module)):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name):
                assert name not in FORKING, f"{module}:{node.lineno} uses os.{name}"
            case ast.ImportFrom(module="os", names=names):
                assert not FORKING & {one.name for one in names}, f"{module}:{node.lineno}"
    assert "setproctitle" not in imports(module), f"{module} imports setproctitle"


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("store", "schema")])
def test_only_store_and_schema_read_sql_files(module: str) -> None:
    assert not any(name.startswith("importlib.resources") for name in imports(module))
    for node in ast.walk(tree(module)):
        match node:
            case ast.Constant(value=str(text)) if text.endswith(".sql"):
                pytest.fail(f"{module}:{node.lineno} names {text}")


def own_imports(module: str) -> Iterator[str]:
    """The modules of the package that this one imports, anywhere in it."""
    for name in imports(module):
        match name.split("."):
            case ["pgtask", package, imported, *_] if f"{package}.{imported}" in MODULES:
                yield f"{package}.{imported}"
            case ["pgtask", imported, *_] if imported in MODULES or imported in DEPTH:
                yield imported


def imports(module: str) -> set[str]:
    """Every dotted name that is imported: for `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(tree(module)):
        match node:
            case ast.Import(names=names):
                found |= {one.name for one in names}
            case ast.ImportFrom(module=origin, names=names, level=level):
                base = ".".join(filter(None, ["pgtask" if level else None, origin]))
                found |= {base, *(f"{base}.{one.name}" for one in names)}
    return found


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8"))
