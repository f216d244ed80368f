"""The demonstration feeder of `make run`: lines of the recorded shape, each a call of its own."""

import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from types import ModuleType

import pytest

from billing_tailer import audit
from billing_tailer.model import UsageFact
from billing_tailer.settings import LLM_ROUTES

ROOT = Path(__file__).resolve().parents[1]
FEED = ROOT / "deploy/demo/feed.py"
RECORDED = ROOT / "tests/data/audit.jsonl"
LINES = RECORDED.read_text("utf-8").removesuffix("\n").split("\n")
FRESH = ("msec", "time", "nginx_request_id", "call_id", "litellm_call_id")
NOW = 1800000000.25


@pytest.fixture(scope="module")
def feed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_feed", FEED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("line", LINES, ids=[f"line-{number}" for number in range(1, len(LINES) + 1)])
def test_only_ids_and_times_change(feed: ModuleType, line: str) -> None:
    made = feed.fresh(line, NOW)
    before, after = json.loads(line), json.loads(made)
    assert list(after) == list(before)
    assert {k: v for k, v in after.items() if k not in FRESH} == {k: v for k, v in before.items() if k not in FRESH}
    assert after["msec"] == "1800000000.250"
    assert datetime.fromisoformat(after["time"]).timestamp() == int(NOW)
    assert len(after["time"]) == len(before["time"])
    assert after["nginx_request_id"] != before["nginx_request_id"]
    assert len(after["nginx_request_id"]) == len(before["nginx_request_id"])
    old, new = before["litellm_call_id"], after["litellm_call_id"]
    assert bool(new) == bool(old)
    assert not old or new != old
    assert (new == after["nginx_request_id"]) == (old == before["nginx_request_id"])
    # the bytes of everything else are nginx's own
    for name in FRESH:
        if name in before:
            line = line.replace(json.dumps(before[name]), json.dumps(after[name]), 1)
    assert made == line


def test_an_id_of_the_proxy_stays_consistent(feed: ModuleType) -> None:
    line = json.dumps({"nginx_request_id": "ab", "call_id": "ab", "litellm_call_id": "ab"}, separators=(",", ":"))
    made = json.loads(feed.fresh(line, NOW))
    assert made["call_id"] == made["litellm_call_id"] == made["nginx_request_id"] != "ab"


def test_two_passes_have_no_call_twice(feed: ModuleType) -> None:
    llm_path = audit.routes(LLM_ROUTES)
    outcomes = [audit.parse(feed.fresh(line, NOW).encode(), llm_path) for line in LINES + LINES]
    recorded = [audit.parse(line.encode(), llm_path) for line in LINES + LINES]
    assert [type(outcome) for outcome in outcomes] == [type(outcome) for outcome in recorded]
    calls = Counter(outcome.call_id for outcome in outcomes if isinstance(outcome, UsageFact))
    assert calls
    assert set(calls.values()) == {1}


def test_rotation_by_rename_with_a_late_line(feed: ModuleType, tmp_path: Path) -> None:
    log = feed.RotatingLog(tmp_path, rotate_lines=3, keep_files=2)
    for number in range(12):
        log.append(str(number))
        time.sleep(0.002)  # names carry milliseconds
    log.close()
    rotated = sorted(tmp_path.glob("audit.jsonl-*"))
    # each with one line more, as nginx writes on until it has handled USR1; 0 to 3 was rotated first, and is gone
    assert [path.read_text() for path in rotated] == ["4\n5\n6\n7\n", "8\n9\n10\n11\n"]
    assert (tmp_path / "audit.jsonl").read_text() == ""


def test_a_torn_last_line_is_closed(feed: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_text("whole\nto")
    log = feed.RotatingLog(tmp_path)
    log.append("next")
    log.close()
    assert (tmp_path / "audit.jsonl").read_text() == "whole\nto\nnext\n"


def test_one_feeder_at_a_time(tmp_path: Path) -> None:
    command = [sys.executable, str(FEED), str(RECORDED), str(tmp_path), "--lines-per-second", "0.001"]
    log = tmp_path / "audit.jsonl"
    first = subprocess.Popen(command)
    try:
        _wait_for_lines(log, 10)
        second = subprocess.Popen(command)
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(0.5)
            assert log.read_bytes().count(b"\n") == 10
            first.terminate()
            _wait_for_lines(log, 20)
        finally:
            second.kill()
            second.wait()
    finally:
        first.kill()
        first.wait()


def _wait_for_lines(log: Path, count: int) -> None:
    deadline = time.monotonic() + 10
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
