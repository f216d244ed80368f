"""`make bench` in small: every figure is measured, or says why not, and every one has its place in the document."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from billing_tailer import audit
from billing_tailer.model import UsageFact
from billing_tailer.settings import LLM_ROUTES
from tests.bench import docs, logs
from tests.bench.__main__ import main
from tests.bench.figures import FIGURES
from tests.bench.peers import PEERS
from tests.bench.readings import Goal, Reading, median
from tests.bench.stops import Stops, together, watch
from tests.bench.table import cells, number

GOALS = {
    "backlog": {"ratio"},
    "receipts": set(),
    "peers": {"rsyslog_times", "rsyslog_batches_times", "fluent_bit_times"},
    "latency": {"line_200_p50_ms", "line_200_p99_ms"},
    "settling": {"settled_200_max_ms"},
    "memory": {"backlog_peak_mb", "outage_peak_mb", "long_line_peak_mb"},
    "idle": {"cpu_percent", "resident_mb"},
    "growth-receipts": {"ratio_1000", "roomy_ratio_1000"},
    "growth-files": set(),
    "start": {"more_s"},
    "callbacks": set(),
    "waiters": set(),
    "page": set(),
}
"""The readings that stand against a goal."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_everything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert main(["--quick", "--json", str(path)]) == 0, capsys.readouterr().out[-6000:]
    found = json.loads(path.read_text("utf-8"))
    assert found["machine"]["postgres_settings"]["fsync"] == "on"
    assert found["machine"]["postgres_settings"]["track_commit_timestamp"] == "on"
    assert list(found["figures"]) == list(FIGURES)
    for name, figure in found["figures"].items():
        assert figure["error"] is None
        assert {reading["key"] for reading in figure["readings"] if reading["goal"]} == GOALS[name]
        keys = [reading["key"] for reading in figure["readings"]]
        assert len(set(keys)) == len(keys)
        for reading in figure["readings"]:
            assert (reading["value"] is None) == reading["note"].startswith("SKIPPED"), reading
    peers = {reading["key"]: reading for reading in found["figures"]["peers"]["readings"]}
    assert (peers["fluent_bit_lines_per_s"]["value"] is None) == (shutil.which("fluent-bit") is None)
    assert peers["script_lines_per_s"]["value"] > 0
    assert {f"{peer.key}_times" for peer in PEERS} < peers.keys()


def test_stops_of_the_machine_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three naps the second lasts until the machine goes on."""
    clock = iter([10.0, 10.002, 11.0, 11.052, 12.0, 12.003])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    stops = Stops(list(watch([False, False, False, True])))
    (span,) = stops.spans
    assert span == pytest.approx((11.002, 11.052))
    assert stops.longest() == pytest.approx(0.05)
    assert stops.within(11.03, 20) == pytest.approx(0.022)
    assert stops.within(11.01, 11.02) == pytest.approx(0.01)
    assert stops.within(0, 11) == stops.within(12, 13) == 0


def test_the_machine_stands_still_where_all_its_processors_do() -> None:
    one, other = [(1.0, 2.0), (3.0, 4.0), (6.0, 7.0)], [(1.5, 3.5), (5.0, 6.0)]
    assert together([one, other]) == together([other, one]) == [(1.5, 2.0), (3.0, 3.5)]
    assert together([one]) == one
    assert together([one, []]) == []


def test_a_bystander_ends_with_what_it_watches() -> None:
    with Stops() as stops:
        assert len(stops.processes) == len(os.sched_getaffinity(0))
    assert {process.returncode for process in stops.processes} == {0}
    assert all(start < end for start, end in stops.spans)


def test_every_figure_has_its_place_in_the_document() -> None:
    text = docs.DOCUMENT.read_text("utf-8")
    assert sorted(docs.MARKER.findall(text)) == sorted(2 * docs.names())


def test_the_document_has_the_numbers_of_the_run() -> None:
    figure: dict[str, Any] = {
        "title": "x",
        "measured_at": "2026-11-22T12:00:00+00:00",
        "revision": "abc1234",
        "beside": {"load": [0.5, 0.1, 0.1], "busy": {"python": 0.5}},
        "error": None,
        "readings": [
            median("ratio", "of raw COPY", "", [0.5, 0.9, 0.7], goal=Goal(at_least=0.8)).as_json(),
            Reading("peer", "a | b", None, "1/s", note="SKIPPED: not here").as_json(),
        ],
    }
    text = "a\n<!-- bench-backlog -->\nold\n<!-- /bench-backlog -->\n<!-- bench-idle -->\nkept\n<!-- /bench-idle -->\n"
    written = docs.rendered(text, {"machine": {}, "figures": {"backlog": figure}})
    assert "| of raw COPY | 0.700 | 0.500 to 0.900 | ≥ 0.8: NOT met |  |" in written
    assert "| a \\| b | - |  |  | SKIPPED: not here |" in written
    assert "Measured 2026-11-22 12:00 UTC at abc1234, load before 0.5, beside python 50% of a core." in written
    assert "old" not in written
    assert "<!-- bench-idle -->\nkept\n<!-- /bench-idle -->" in written


def test_a_figure_that_breaks_off_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.json"

    def broken(_: object) -> list[Reading]:
        raise ValueError("no such thing")

    def fine(_: object) -> list[Reading]:
        return [Reading("one", "one", 1.0, "s", goal=Goal(at_most=2))]

    monkeypatch.setitem(FIGURES, "idle", FIGURES["idle"].__class__("Broken", broken))
    monkeypatch.setitem(FIGURES, "backlog", FIGURES["backlog"].__class__("Fine", fine))
    assert main(["--quick", "--only", "backlog,idle", "--json", str(path)]) == 1
    figures = json.loads(path.read_text("utf-8"))["figures"]
    assert "no such thing" in figures["idle"]["error"]
    assert figures["backlog"]["readings"][0]["met"] is True
    # a later run of one figure keeps the other where it is told to
    assert main(["--quick", "--only", "backlog", "--keep", "--json", str(path)]) == 0
    assert list(json.loads(path.read_text("utf-8"))["figures"]) == ["idle", "backlog"]
    # and none of this gets into the document
    before = docs.DOCUMENT.read_bytes()
    assert main(["--write-docs", "--json", str(path)]) == 1
    assert docs.DOCUMENT.read_bytes() == before


def test_the_log_has_every_kind_of_call(tmp_path: Path) -> None:
    count = 2_000
    logs.write_log(tmp_path / "log", count, seed=7)
    lines = (tmp_path / "log").read_bytes().splitlines()
    facts = [audit.parse(line, audit.routes(LLM_ROUTES)) for line in lines]
    calls = [fact for fact in facts if isinstance(fact, UsageFact)]
    assert len(calls) == count
    assert [call.call_id for call in calls] == [call_id.decode() for call_id in logs.call_ids(count, seed=7)]
    assert len({call.call_id for call in calls}) == count
    assert len({call.run_id for call in calls}) == logs.RUNS
    assert len({call.billing_account_id for call in calls}) == logs.ACCOUNTS
    assert {call.requested_model for call in calls} == set(logs.MODELS)
    assert sum(call.provenance == "stream" for call in calls) == count // 2
    assert all((call.header_cost_usd is None) == (call.provenance == "stream") for call in calls)
    logs.write_spool(tmp_path / "spool", count, seed=7)
    events = [json.loads(line)["payload"] for line in (tmp_path / "spool").read_bytes().splitlines()]
    assert [(event["litellm_call_id"], event["model_group"]) for event in events] == [
        (call.call_id, call.requested_model) for call in calls
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.03684, "0.0368"),
        (0.7, "0.700"),
        (4.476, "4.48"),
        (42.04, "42.0"),
        (117_312.0, "117,000"),
        (96.0, "96.0"),
    ],
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown


def test_a_goal_at_its_edge() -> None:
    assert Goal(at_least=0.8).met(0.8)
    assert not Goal(at_least=0.8).met(0.79)
    assert Goal(at_most=96).met(96)
    assert not Goal(at_most=96).met(96.1)
    assert cells(Reading("k", "w", None, "MB", note="SKIPPED: x", goal=Goal(at_most=96)).as_json())[3].endswith(
        "not measured"
    )
