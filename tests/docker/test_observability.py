"""The files for Prometheus and Grafana, as far as they can be looked at without an engine; docs/metrics.md too."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raftkv.daemons.metrics_table import HISTOGRAM, METRICS, PROCESS_METRICS, as_markdown
from tests.docker.stack import COMPOSE, ENVIRONMENT, ROOT

FILES = ROOT / "compose"
FROM_PROMETHEUS = {"up"}
BY_NAME = {metric.name: metric for metric in (*METRICS, *PROCESS_METRICS)}
TARGET_LABELS = {"job", "instance", "role", "gid"}


def need_promtool() -> None:
    """Skip where it isn't installed; with RAFTKV_PROMTOOL=required, fail."""
    if shutil.which("promtool") is None:
        reason = "promtool isn't installed: on Debian and Ubuntu it is in the package prometheus"
        (pytest.fail if os.environ.get("RAFTKV_PROMTOOL") == "required" else pytest.skip)(reason)


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FILES / "grafana" / "raftkv.json").read_text(encoding="utf-8"))
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of the dashboard and the alerts."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
        assert found is not None
        yield f"variable {variable['name']}", f"count by ({found[2]}) ({found[1]})"
    alerts = (FILES / "alerts.yml").read_text(encoding="utf-8")
    for text in re.findall(r"expr: (?:>-\n)?((?:.|\n)*?)\n +for:", alerts):
        yield "alert", " ".join(text.split())


def metrics_in(expression: str) -> set[str]:
    """The names of its metrics: histograms without the suffix."""
    names = set(re.findall(r"\b(raftkv_\w+|process_\w+|up)\b", expression))
    return {re.sub(r"_(bucket|sum|count)$", "", name) if name not in BY_NAME else name for name in names}


def test_every_expression_names_metrics_and_labels_that_exist() -> None:
    found = list(expressions())
    assert len(found) > 40
    for where, expression in found:
        names = metrics_in(expression)
        assert names, f"{where}: {expression}"
        assert names <= set(BY_NAME) | FROM_PROMETHEUS, f"{where}: {expression}"
        for name, suffix in re.findall(r"\b(raftkv_\w+?)(_bucket|_sum|_count)\b", expression):
            assert name in BY_NAME and BY_NAME[name].kind == HISTOGRAM, f"{where}: {name}{suffix}"
        labels = {label for name in names & set(BY_NAME) for label in BY_NAME[name].labels} | {"le"} | TARGET_LABELS
        used = {label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(", ")}
        used |= {part for group in re.findall(r"\{([^}]*)\}", expression) for part in re.findall(r"(\w+)=", group)}
        used |= {part for group in re.findall(r"\{([^}]*)\}", expression) for part in re.findall(r"(\w+)!=", group)}
        assert used <= labels, f"{where}: {used - labels}"


def test_the_dashboard_is_one_that_grafana_can_load() -> None:
    board = dashboard()
    assert board["title"] == "RaftKV" and board["uid"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    source = re.search(r"uid: (\S+)", (FILES / "grafana" / "datasource.yml").read_text(encoding="utf-8"))
    assert source is not None
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == source[1]
            for target in panel["targets"]:
                for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                    aggregated = re.search(r"\bby \(", target["expr"])
                    assert not aggregated or re.search(rf"\bby \([^)]*\b{label}\b", target["expr"]), panel["title"]


def test_the_page_about_metrics_has_the_table() -> None:
    """If this fails, put what `metrics_table.as_markdown()` gives into docs/metrics.md."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert as_markdown() in page
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(BY_NAME)


def test_every_daemon_is_scraped_where_it_listens() -> None:
    listening = set(re.findall(r"^  ([\w-]+): \*daemon$", (FILES / "observability.yaml").read_text(), re.MULTILINE))
    daemons = set(re.findall(r"^    container_name: ([\w-]+-\d)$", (FILES / "compose.yaml").read_text(), re.MULTILINE))
    third = set(re.findall(r"^    container_name: ([\w-]+)$", (FILES / "scale.yaml").read_text(), re.MULTILINE))
    asked = (FILES / "prometheus.yml").read_text()
    assert listening == daemons and len(daemons) == 12
    assert set(re.findall(r'"([\w-]+):9000"', asked)) == daemons
    assert set(re.findall(r"shardkv3-\d", asked)) == third
    for line in re.findall(r"targets: .*\n +labels: .*", asked):
        role, gid = re.findall(r'role: (\w+), gid: "(\d)"', line)[0]
        names = set(re.findall(r'"(\w+)-\d:9000"', line))
        assert names == {f"shardkv{gid}" if role == "shardkv" else role}


@pytest.mark.parametrize("more", [[], ["scale.yaml"]])
def test_compose_takes_the_files_together(more: list[str]) -> None:
    if shutil.which(COMPOSE[0]) is None:
        pytest.skip(f"{COMPOSE[0]} isn't installed")
    files = ["compose.yaml", *more, "observability.yaml"]
    words = [word for name in files for word in ("-f", f"compose/{name}")]
    done = subprocess.run(
        [*COMPOSE, *words, "config"], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    if "unknown command" in done.stderr or "is not a docker command" in done.stderr:
        pytest.skip("there is no compose")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RAFTKV_METRICS_LISTEN: 0.0.0.0:9000") == 12 + 3 * len(more)
    assert "prom/prometheus:v" in done.stdout and "grafana/grafana:" in done.stdout
    for source in re.findall(r"(\S+/compose/\S+):/etc", done.stdout):
        assert (ROOT / "compose" / source.split("/compose/")[1]).is_file()


@pytest.mark.parametrize(
    "words",
    [
        ["check", "config", "compose/prometheus.yml"],
        ["check", "rules", "compose/alerts.yml"],
        ["test", "rules", "tests/docker/alerts_test.yml"],
    ],
)
def test_prometheus_takes_its_files_and_the_alerts_fire(words: list[str]) -> None:
    need_promtool()
    done = subprocess.run(["promtool", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_expression_is_promql(tmp_path: Path) -> None:
    """As rules: so Prometheus itself parses them."""
    need_promtool()
    rules = []
    for number, (_, expression) in enumerate(expressions()):
        text = expression.replace("$__rate_interval", "1m").replace("$role", ".*").replace("$gid", ".*")
        rules.append({"record": f"r{number}", "expr": text})
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "g", "rules": rules}]}))
    words = ["promtool", "check", "rules", str(tmp_path / "rules.yml")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
