"""The benchmark itself: a quick run ends well and writes ratios; the report and the plots are made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from measure import flat, report
from measure.figure import Figure, quantile
from pgtask.objects import Names
from storm.stand import Broken
from tests.fixtures.server import binaries

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_quick_run_measures_both_sides_and_writes_ratios(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    command = [sys.executable, ROOT / "bench/bench.py", "throughput", "flat", "--quick", "--json", str(file)]
    command += ["--pg", str(binaries().version)]
    done = subprocess.run(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
    assert "\x1b" not in done.stdout, "colours in a pipe"
    told = json.loads(file.read_text())
    assert (told["quick"], told["trouble"], list(told["subjects"])) == (True, "", ["throughput", "flat"])
    figures = [figure for measured in told["subjects"].values() for figure in measured["figures"]]
    names = {figure["name"] for figure in figures}
    assert names >= {"one group, max 0", "one group, max 1"}
    assert names >= {f"1,000 all of these: {hot}, in the server" for hot in ("find", "take", "next")}
    [(nothing, _), (rows, cost)] = told["subjects"]["flat"]["curves"]["take"]["all of these"]
    assert (nothing, rows) == (0, 1000)
    assert cost > 0
    for figure in figures:
        assert figure["ours"] > 0
        assert figure["ratio"] == figure["ours"] / figure["reference"]
        assert figure["name"] in done.stdout


def test_a_ratio_is_the_median_of_the_runs_ratios_and_says_whether_the_mark_is_reached() -> None:
    figure = Figure(name="a", unit="ms", better="less", mark=1.3)
    for ours, reference in ((1.0, 1.0), (4.0, 2.0), (12.0, 10.0)):
        figure.add(ours, reference)
    assert (figure.ratio, figure.reached) == (1.2, True)
    bounded = Figure(name="b", unit="ms", better="less", limit=3.0, ours=[4.0])
    assert (bounded.ratio, bounded.reached) == (None, False)
    assert quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0


def test_a_statement_that_was_only_prepared_is_not_one_that_cost_nothing() -> None:
    text = Names(schema="public", table="task").store().text("take_one")
    records = [f"LOG:  duration: 0.400 ms  parse pgtask_7: {text}"]
    with pytest.raises(Broken, match=r"not in the server's log: find"):
        flat.durations(records, "task", "find")
    for kind, ms in (("bind", 0.1), ("execute", 0.3), ("execute", 0.5), ("execute", 0.2)):
        records.append(f"LOG:  duration: {ms} ms  {kind} pgtask_7: {text}")
    assert flat.durations(records, "task", "find") == {"find": pytest.approx(0.4)}


def test_a_subject_measured_again_leaves_the_others(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"server": "15", "subjects": {"inserts": {}, "flat": {"old": True}}}))
    assert report.merged(file, {"server": "18", "subjects": {"flat": {}}}) == {
        "server": "18",
        "subjects": {"flat": {}, "inserts": {}},
    }


def test_plots_are_text_without_background_and_the_same_each_time(tmp_path: Path) -> None:
    told = {
        "subjects": {
            "pickup": {"curves": {"latency": {"pgtask, a worker lingers": [1.0, 2.0, 3.0], "bare": [0.5, 0.6]}}},
            "plans": {"curves": {"lateness": {"pgtask": [0.1, 0.2]}}},
            "flat": {"curves": {"take": {"finished": [[0, 0.1], [10_000, 0.1]]}}},
        }
    }
    program = "import json, sys; from pathlib import Path; from measure import plot; "
    program += "[plot.draw(json.loads(sys.argv[1]), Path(place)) for place in sys.argv[2:]]"
    subprocess.run(
        [sys.executable, "-c", program, json.dumps(told), str(tmp_path / "one"), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "bench")},
        check=True,
    )
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["latency.svg", "lateness.svg", "take.svg"]
    for name in names:
        text = (tmp_path / "one" / name).read_text()
        assert text == (tmp_path / "two" / name).read_text()
        assert "#ffffff" not in text
    assert "a worker lingers" in (tmp_path / "one/latency.svg").read_text()
