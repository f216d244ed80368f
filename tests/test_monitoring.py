"""deploy/prometheus, deploy/grafana and deploy/runbook.md against the program: nothing in them names what is not there.

That each alert fires and clears is promtool's to show, on made-up series (deploy/prometheus/tests), and a real
Prometheus' on real trouble (tests/e2e/test_alerts.py). The dashboard is looked at as data only.
"""

import json
import re
import shlex
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import pytest
import typer.main
import yaml

from billing_tailer.cli import cli
from billing_tailer.events import Events
from tests.docs_tables import metric_rows
from tests.e2e.nginx import program
from tests.support.daemon import ROOT
from tests.test_docs import code_of

PROMETHEUS: Final = ROOT / "deploy/prometheus"
GRAFANA: Final = ROOT / "deploy/grafana"
RUNBOOK: Final = ROOT / "deploy/runbook.md"
ROWS: Final = ["Is it current", "Throughput by outcome", "Money", "Trouble", "Capture rate", "Process"]
OF_PROMETHEUS: Final = {"up": set[str](), "ALERTS": {"alertname", "alertstate"}}
EVERYWHERE: Final = {"job", "instance", "source_id"}
WORDS: Final = frozenset(
    re.findall(
        r"\w+",
        "absent and bool by changes group group_left histogram_quantile ignoring increase label_values last_over_time "
        "max min min_over_time offset on or query rate sum time unless without",
    )
)
UNITS: Final = {"short", "s", "bytes", "percentunit", "currencyUSD"}


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / f"rules/{name}.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules("alerts") if "alert" in rule]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GRAFANA / "dashboards/billing_tailer.json").read_text("utf-8"))["panels"]
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Where, and every expression of rules and dashboard."""
    for rule in (*rules("recording"), *alerts()):
        yield rule.get("alert") or rule["record"], rule["expr"]
    dashboard = json.loads((GRAFANA / "dashboards/billing_tailer.json").read_text("utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        yield variable["name"], variable["query"]["query"]
    for annotation in dashboard["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


# --- metrics and labels --------------------------------------------------------------------------------------------


@cache
def known() -> dict[str, set[str]]:
    """Metric -> its labels: the program's, the recorded ones with those they are summed by, and Prometheus' own."""
    found: dict[str, set[str]] = {}
    for name, kind, labels, _ in metric_rows():
        found[name] = set(labels)
        if kind == "histogram":
            found |= {f"{name}_bucket": {*labels, "le"}, f"{name}_sum": set(labels), f"{name}_count": set(labels)}
    for family in Events().registry.collect():
        if family.name.startswith("process_"):
            found |= {sample.name: set(sample.labels) for sample in family.samples}
    for rule in rules("recording"):
        by = re.match(r"(?:sum|max) by \(([^)]*)\)", rule["expr"])
        found[rule["record"]] = set(re.findall(r"\w+", by[1])) if by else set()
    return found | OF_PROMETHEUS


def wrong_names(expression: str) -> list[str]:
    """Metrics, labels and words of an expression that nobody knows."""
    wrong = []
    labels_named: set[str] = set()

    def clause(match: re.Match[str]) -> str:
        labels_named.update(re.findall(r"\w+", match[1]))
        return " "

    text = re.sub(r"\b(?:by|without|on|ignoring|group_left)\s*\(([^)]*)\)", clause, expression)
    text = re.sub(r"\[[^\]]*\]|\$\w+", " ", text)
    text = re.sub(r"(label_values\([^,]+), \w+\)", r"\1)", text)
    for name, matchers in re.findall(r"\b([a-zA-Z_][\w:]*)\s*(\{[^}]*\})?", _without_matched_values(text)):
        if name in WORDS:
            continue
        if name not in known():
            wrong.append(name)
            continue
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        wrong += [f"{name}{{{label}}}" for label in labels - known()[name] - EVERYWHERE]
    every_label = set().union(*known().values()) | EVERYWHERE
    return wrong + sorted(labels_named - every_label)


def _without_matched_values(text: str) -> str:
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)


def test_every_metric_and_label_exists() -> None:
    found = [(where, wrong) for where, expression in expressions() if (wrong := wrong_names(expression))]
    assert found == []


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("billing_tailer_activ == 1", ["billing_tailer_activ"]),
        ('billing_tailer_files{sate="live"} > 0', ["billing_tailer_files{sate}"]),
        ("sum by (acount) (rate(billing_tailer_lines_total[5m]))", ["acount"]),
        ("smu(up)", ["smu"]),
        ('max by (job) (time() - process_start_time_seconds{job="$job"}) > 2 * 60', []),
    ],
)
def test_wrong_names_are_noticed(expression: str, wrong: list[str]) -> None:
    assert wrong_names(expression) == wrong


def test_values_of_closed_labels_exist() -> None:
    """`{kind="held"}` would never fire, and nobody would know."""
    events = Events()
    events.expect_callbacks()
    values = defaultdict(set)
    for family in events.registry.collect():
        for sample in family.samples:
            for label, value in sample.labels.items():
                values[sample.name, label].add(value)
    values["billing_tailer_gaps_recorded", "reason"] = values["billing_tailer_gaps_total", "reason"]
    values["billing_tailer_unready_reasons", "topic"] = {"files", "reading"}  # tests/test_docs.py knows them all
    for record, metric in (("gaps_recorded:max", "gaps_recorded"), ("total:increase30m", "spend_records_total")):
        for name in [name for name in known() if name.endswith(record)]:
            values |= {
                (name, label): found for (of, label), found in values.items() if of == f"billing_tailer_{metric}"
            }
    wrong = [
        (where, name, label, pattern)
        for where, expression in expressions()
        for name, matchers in re.findall(r"([\w:]+)\{([^}]*)\}", expression)
        for label, pattern in re.findall(r'(\w+)=~?"([^"$]*)"', matchers)
        if label != "job" and name not in OF_PROMETHEUS
        if any(not any(re.fullmatch(part, value) for value in values[name, label]) for part in pattern.split("|"))
    ]
    assert wrong == []


# --- alerts --------------------------------------------------------------------------------------------------------


def test_alerts_have_their_shape() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(set(names)) == len(names)
    for alert in alerts():
        name, annotations = alert["alert"], alert["annotations"]
        assert name.startswith("BillingTailer")
        assert set(alert["labels"]) == {"severity"}
        assert alert["labels"]["severity"] in {"page", "ticket", "info"}
        assert set(annotations) == {"summary", "description", "runbook"}
        assert annotations["runbook"] == f"deploy/runbook.md#{name.lower()}"
        assert "$value" in annotations["description"] or name in {
            "BillingTailerAbsent",
            "BillingTailerDown",
            "BillingTailerNobodyCommits",
            "BillingTailerSpoolRefuses",
        }


def test_every_alert_is_tested_for_firing_and_for_silence() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for path in (PROMETHEUS / "tests").glob("*.yml"):
        for test in yaml.safe_load(path.read_text("utf-8"))["tests"]:
            for check in test["alert_rule_test"]:
                (fires if check["exp_alerts"] else silent).add(check["alertname"])
    assert fires == silent == {alert["alert"] for alert in alerts()}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", str(PROMETHEUS / "prometheus.yml")],
        ["check", "rules", *map(str, sorted(PROMETHEUS.glob("rules/*.yml")))],
        ["test", "rules", *map(str, sorted(PROMETHEUS.glob("tests/*.yml")))],
    ],
    ids=["config", "rules", "tests"],
)
def test_promtool_agrees(arguments: list[str]) -> None:
    found = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, f"{found.stdout}\n{found.stderr}"
    assert "SUCCESS" in found.stdout


# --- the runbook ---------------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    """Heading -> text, in order."""
    parts = re.split(r"^## (.+)\n", RUNBOOK.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_alert_has_its_heading() -> None:
    assert sorted(sections()) == sorted(alert["alert"] for alert in alerts())
    for alert in alerts():
        text = sections()[alert["alert"]]
        assert text.strip().startswith(f"**{alert['labels']['severity']}** · "), alert["alert"]
        assert re.search(r"\bClears\b|\. Clears|clears", text), f"{alert['alert']}: when does it clear?"
    anchors = re.findall(r"\]\(#([^)]+)\)", RUNBOOK.read_text("utf-8"))
    assert set(anchors) <= {name.lower() for name in sections()}


def test_the_rules_of_inhibition_name_alerts_and_labels_that_there_are() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", RUNBOOK.read_text("utf-8"), re.DOTALL)
    names = {alert["alert"]: alert for alert in alerts()}
    pages = {name for name, alert in names.items() if alert["labels"]["severity"] == "page"}
    for rule in yaml.safe_load(text)["inhibit_rules"]:
        (source,), (target,) = rule["source_matchers"], rule["target_matchers"]
        cause, pattern = source.removeprefix("alertname = "), re.sub(r"alertname =~? ", "", target)
        hidden = {name for name in names if re.fullmatch(pattern, name)}
        assert cause in pages
        assert len(hidden) == pattern.count("|") + 1, pattern
        assert cause not in hidden
        assert hidden & pages <= {"BillingTailerStalled"}, "one page may hide another only where it is the cause"


def test_every_command_of_the_runbook_parses() -> None:
    """By the program's own parser, with its arguments and options."""
    commands = re.findall(r"^    billing-tailer (.+)$", RUNBOOK.read_text("utf-8"), re.MULTILINE)
    assert len(commands) > 30
    for command in commands:
        context = typer.main.get_command(cli)
        words = shlex.split(command)
        while hasattr(context, "get_command"):
            context = context.get_command(None, words.pop(0))
        context.make_context(command, words)
    named = {code for code in code_of(RUNBOOK.read_text("utf-8")) if code.startswith("billing-tailer ")}
    assert named == {f"billing-tailer {command}" for command in commands}


# --- the dashboard -------------------------------------------------------------------------------------------------


def test_the_dashboard_has_its_rows() -> None:
    assert [panel["title"] for panel in panels() if panel["type"] == "row"] == ROWS
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)


def test_every_panel_says_what_it_shows() -> None:
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text("utf-8"))["datasources"][0]
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["type"] in {"stat", "timeseries"}
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        assert panel["targets"]
        assert all(target["legendFormat"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_metric_of_ours_is_watched() -> None:
    """On the dashboard or in an alert, but for what both say in another way."""
    text = " ".join(expression for _, expression in expressions())
    unwatched = {name for name, *_ in metric_rows() if not re.search(rf"\b{name}(?:_bucket)?\b", text)}
    assert unwatched == {
        "billing_tailer_committed_offset_bytes",  # the lag is what is left
        "billing_tailer_file_size_bytes",
        "billing_tailer_gaps_total",  # gaps_recorded
    }
