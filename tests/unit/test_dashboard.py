"""The dashboard for Grafana: it asks for metrics that there are, in words that Prometheus understands."""

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pgtask.metrics import METRICS

FILE = Path(__file__).resolve().parents[2] / "etc/grafana/pgtask.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"$table": ".*", "$__rate_interval": "5m"}

UNSEEN = {
    *("pgtask_build_info", "pgtask_up", "pgtask_standby", "pgtask_master_up", "pgtask_last_take_timestamp_seconds"),
    *("pgtask_master_start_time_seconds", "pgtask_scrape_errors_total", "pgtask_scrape_seconds"),
    *("pgtask_tasks_taken_total", "pgtask_tasks_retried_total", "pgtask_runs_interrupted_total"),
    "pgtask_notifications_total",
}
"""What alerts speak of, or only who looks for something; and of the process all but its processor and memory."""


def expressions() -> list[str]:
    found = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return found + [one["expr"] for one in DASHBOARD["annotations"]["list"]]


def test_it_shows_each_metric_that_there_is_but_for_a_few() -> None:
    asked = {name.removesuffix("_bucket") for text in expressions() for name in re.findall(r"\bpgtask_\w+", text)}
    metrics = {metric.name for metric in METRICS}
    assert asked <= metrics
    assert {name for name in metrics - asked if not name.startswith("pgtask_master_process_")} == UNSEEN


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_says_what_it_shows_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    assert all(
        ("by (" in target["expr"]) <= (bool(target["legendFormat"]) or panel["type"] == "stat")
        for target in panel["targets"]
    )


def test_panels_stand_beside_each_other() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_prometheus_understands_every_question(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool: Debian has it in the package prometheus")
    rules = []
    for number, text in enumerate(expressions()):
        for variable, value in VARIABLES.items():
            text = text.replace(variable, value)
        assert "$" not in text
        rules.append({"record": f"one:{number}", "expr": text})
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
