"""The rules for Prometheus: they speak of metrics that there are, and each alert fires when it should."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pgtask.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
RULES = (ROOT / "etc/prometheus/pgtask.rules.yml").read_text("utf-8")
ALERTS = RULES.split("- alert: ")[1:]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda text: text.split()[0])
def test_alert_speaks_of_metrics_that_there_are(alert: str) -> None:
    metrics = {metric.name for metric in METRICS}
    for name in re.findall(r"\bpgtask_\w+", alert):
        assert name.removesuffix("_bucket") in metrics
    for part in ("expr: ", "severity: ", "summary: ", "description: "):
        assert part in alert


@pytest.mark.parametrize(
    "command", [("check", "etc/prometheus/pgtask.rules.yml"), ("test", "tests/fixtures/alerts.yml")]
)
def test_promtool_finds_nothing_wrong(command: tuple[str, str]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool: Debian has it in the package prometheus")
    done = subprocess.run(
        ["promtool", command[0], "rules", command[1]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
