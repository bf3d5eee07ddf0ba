"""What is published: both kinds of archive, built as anybody would build them, and the wheel installed."""

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.fixtures.master import ROOT

MADE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "node_modules")


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def files(*tops: str) -> set[str]:
    """The project's own files under these directories, from its top."""
    found = {path.relative_to(ROOT) for top in tops for path in (ROOT / top).rglob("*") if path.is_file()}
    return {str(path) for path in found if not MADE(str(path.parent), path.parts)}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with both, the wheel made from the source archive."""
    top = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, top / "checkout", ignore=MADE)
    said = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", top / "dist", cwd=top / "checkout")
    assert re.findall("(?i)^.*(?:warning|deprecat|invalid).*", said, re.MULTILINE) == []
    return top / "dist"


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    [found] = archives.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and what it depends on from the one of the tests."""
    place = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", place / "bin/python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=place)
    packages = place / f"lib/python3.{sys.version_info.minor}/site-packages"
    (packages / "depends.pth").write_text("\n".join(site.getsitepackages()), "utf-8")
    return place


def test_source_archive_has_everything(archives: Path) -> None:
    [found] = archives.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = files("pgtask", "etc", "bin", "tests", "docs", "bench") | {"README.md", "LICENSE", "CHANGELOG.md"}
    assert not wanted - names


def test_wheel_has_every_file_of_the_package_and_nothing_beside_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.startswith("pgtask/")} == files("pgtask")
    assert "pgtask/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"pgtask"}
    assert any(name.endswith("/LICENSE") for name in names)


def test_wheel_brings_the_files_of_the_system(installed: Path) -> None:
    """They lie there as in etc: whoever adds one names it in setup.cfg as well."""
    share = installed / "share/pgtask"
    assert {str(path.relative_to(share)) for path in share.rglob("*") if path.is_file()} == {
        name.removeprefix("etc/") for name in files("etc")
    }
    assert all((share / name.removeprefix("etc/")).read_bytes() == (ROOT / name).read_bytes() for name in files("etc"))
    assert os.access(share / "init.d/pgtask", os.X_OK)


def test_commands_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    version = run(
        installed / "bin/python", "-c", "import pgtask; print(pgtask.__version__, pgtask.__file__)", cwd=tmp_path
    )
    number, _, file = version.strip().partition(" ")
    assert Path(file).is_relative_to(installed)
    assert run(installed / "bin/pgtask-master", "--version", cwd=tmp_path) == f"pgtask-master {number}\n"
    assert run(installed / "bin/pgtask", "--version", cwd=tmp_path) == f"pgtask {number}\n"
    assert "CREATE TABLE" in run(installed / "bin/pgtask", "sql", cwd=tmp_path).upper()
