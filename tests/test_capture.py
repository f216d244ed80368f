"""The capture ratio and unaudited spend records, on a real Postgres."""

import math
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from billing_tailer.capture import Capture
from billing_tailer.errors import TailerError
from billing_tailer.events import Events
from billing_tailer.ledger import Reads, operator, writer
from billing_tailer.ledger.connection import query
from billing_tailer.ledger.runs import WINDOW_COUNTS
from tests.support.follow import Rig, following
from tests.support.loglines import line
from tests.support.proof import count, rows
from tests.support.spendlines import failure, payload, spool_line

DEADLINE_SECONDS = 900


def call(number: int) -> str:
    return f"call-{number:08d}"


def refused(number: int, **changes: str) -> bytes:
    """The line of a call that LiteLLM's door refused: without its id, with the one that the proxy gave it."""
    return line(number, status="401", litellm_call_id="", call_id=call(number), upstream_status="401", **changes)


def feed(volume: Path, audit: bytes, *events: dict[str, Any]) -> None:
    with (volume / "audit.jsonl").open("ab") as out:
        out.write(audit)
    with (volume / f"callbacks-{'0' * 32}-000000.jsonl").open("ab") as out:
        out.write(b"".join(map(spool_line, events)))


def execute(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"set search_path to billing; {statement}".encode())


def an_hour_passes(dsn: str) -> None:
    """Since all records came, and since it was last looked at them."""
    execute(
        dsn,
        "update spend_records set received_at = now() - interval '1 hour'; "
        "update unaudited_progress set counted_to = counted_to - interval '1 hour'",
    )


@contextmanager
def reading(dsn: str) -> Iterator[Reads]:
    reads = Reads("billing", "default")
    with reads.of(dsn):
        yield reads


def turned(rig: Rig, reads: Reads, capture: Capture | None = None) -> Events:
    """One turn, and all its answers taken."""
    capture = capture or Capture(rig.ledger, reads, Events(), DEADLINE_SECONDS)
    taken: list[threading.Event] = []
    when_done = Capture._when_done

    def noted(answer: Future[Any], take: Callable[[Any], None], fail: Callable[[TailerError], None]) -> None:
        over = threading.Event()
        taken.append(over)

        def then(tell: Callable[[Any], None]) -> Callable[[Any], None]:
            def told(what: object) -> None:
                tell(what)
                over.set()

            return told

        when_done(answer, then(take), then(fail))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "_when_done", noted)
        capture.turn()
    assert all(event.wait(10) for event in taken)
    while capture._asking:
        reads.call("none").result(10)
    return capture._events


def value(events: Events, name: str) -> float:
    found = re.search(rf"^billing_tailer_{name} (\S+)$", events.exposition().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def unaudited(events: Events) -> tuple[float, float]:
    """Spend records without a line, and those whose line was skipped."""
    return value(events, "unaudited_spend_records_total"), value(events, "unaudited_with_line_total")


# --- unaudited spend records ---------------------------------------------------------------------------------------


def test_unaudited_records_are_counted_once(dsn: str, tmp_path: Path) -> None:
    """When their time of grace is over, by one process alone, also after a restart."""
    with following(dsn, tmp_path) as rig, reading(dsn) as reads:
        capture = Capture(rig.ledger, reads, Events(), DEADLINE_SECONDS)
        feed(tmp_path, line(1), payload(1), payload(2), failure(2, attempt=1), payload(3))
        rig.turn()
        assert unaudited(turned(rig, reads, capture)) == (0, 0)
        an_hour_passes(dsn)
        feed(tmp_path, line(3))
        rig.turn()
        assert unaudited(turned(rig, reads, capture)) == (2, 0)
        assert unaudited(turned(rig, reads, capture)) == (2, 0)
        assert unaudited(turned(rig, reads)) == (0, 0)
        feed(tmp_path, b"", payload(4))
        rig.turn()
        execute(
            dsn, f"update spend_records set received_at = now() - interval '1000 seconds' where call_id = '{call(4)}'"
        )
        execute(dsn, "update unaudited_progress set counted_to = counted_to - interval '200 seconds'")
        assert unaudited(turned(rig, reads)) == (1, 0)


@pytest.mark.parametrize("first", ["line", "record"])
def test_a_record_of_a_skipped_line_alarms(
    dsn: str, tmp_path: Path, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    halves: list[tuple[bytes, list[dict[str, Any]]]] = [(refused(1) + refused(2), []), (b"", [payload(1), payload(7)])]
    with following(dsn, tmp_path) as rig, reading(dsn) as reads:
        for audit, events in halves if first == "line" else reversed(halves):
            feed(tmp_path, audit, *events)
            rig.turn()
        an_hour_passes(dsn)
        assert unaudited(turned(rig, reads)) == (2, 1)
    printed = capsys.readouterr().out
    assert '"event": "unaudited_with_line"' in printed
    assert f'"call_ids": ["{call(1)}"]' in printed
    assert count(dsn, "charge_receipts") == 0
    (skipped,) = rows(dsn, "select call_id, file_id, start_offset from skipped_calls where call_id = %s", call(2))
    assert skipped == {
        "call_id": call(2),
        "file_id": rows(dsn, AUDIT_FILE)[0]["file_id"],
        "start_offset": len(refused(1)),
    }


AUDIT_FILE = "select file_id from tail_files where path like '%%/audit.jsonl'"


def test_only_so_many_skipped_calls_are_kept(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SKIPPED_CALLS_MAX", 3)
    with following(dsn, tmp_path, batch_lines_max=2) as rig:
        feed(tmp_path, b"".join(refused(number) for number in range(10)) + line(10, method="GET"))
        rig.turn()
    kept = [row["call_id"] for row in rows(dsn, "select call_id from skipped_calls order by seq")]
    assert kept == [call(7), call(8), call(9)]


def test_a_skipped_line_that_comes_again_changes_nothing(dsn: str, tmp_path: Path) -> None:
    with following(dsn, tmp_path) as rig:
        for _ in range(2):
            feed(tmp_path, refused(1) + refused(1))
            rig.turn()
    assert count(dsn, "skipped_calls") == 1


def test_what_could_not_be_counted_is_counted_later(dsn: str, tmp_path: Path) -> None:
    reads = Reads("billing", "default")
    with following(dsn, tmp_path) as rig:
        capture = Capture(rig.ledger, reads, Events(), DEADLINE_SECONDS)
        feed(tmp_path, b"", *(payload(number) for number in range(5)))
        rig.turn()
        an_hour_passes(dsn)
        for _ in range(2):  # the reads are not open
            capture.turn()
        assert math.isnan(value(capture._events, "capture_ratio"))
        with reads.of(dsn):
            assert unaudited(turned(rig, reads, capture)) == (5, 0)


# --- the capture ratio -----------------------------------------------------------------------------------------------


def test_the_capture_ratio_is_what_reconcile_says(dsn: str, tmp_path: Path) -> None:
    """Of the 15 minutes up to one deadline and a minute ago: two of five calls have a receipt, one is not charged."""
    now = rows(dsn, "select extract(epoch from now())::float8 as now")[0]["now"]
    inside = f"{now - DEADLINE_SECONDS - 300:.3f}"
    audit = b"".join(line(number, msec=inside) for number in range(1, 5)) + line(5, msec=inside, end_user="")
    outside = line(6, msec=f"{now - 60:.3f}") + line(7, msec=f"{now - 2 * DEADLINE_SECONDS - 300:.3f}")
    events = [payload(1), payload(2), payload(3, 0.0), failure(4), payload(5)]
    feed(tmp_path, audit + outside, *events)
    with following(dsn, tmp_path, quiet_seconds=0) as rig, reading(dsn) as reads:
        assert value(Events(), "capture_ratio") != value(Events(), "capture_ratio")  # NaN: not known yet
        assert value(turned(rig, reads), "capture_ratio") == 0.6
    with operator(dsn, "billing", quiet_seconds=10, deadline_seconds=DEADLINE_SECONDS) as ledger:
        start, end = (datetime.fromtimestamp(now - age, UTC) for age in (DEADLINE_SECONDS + 600, DEADLINE_SECONDS))
        counts = ledger.window_counts(start, end)
    assert {name: counts[name] for name in ("billable", "settled", "not_charged", "held", "unattributed")} == {
        "billable": 5,
        "settled": 2,
        "not_charged": 1,
        "held": 1,
        "unattributed": 1,
    }


def test_no_calls_no_ratio(dsn: str, tmp_path: Path) -> None:
    with following(dsn, tmp_path) as rig, reading(dsn) as reads:
        assert math.isnan(value(turned(rig, reads), "capture_ratio"))


# --- speed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "words", "indexes"),
    [
        (
            WINDOW_COUNTS,
            {"start": "2026-11-22", "end": "2026-11-23"},
            {"usage_facts_time"},
        ),
        (
            query("receipts"),
            {"run_id": None, "account": None, "since": "2026-11-22", "limit": 10},
            {"charge_receipts_time"},
        ),
        (
            query("receipts"),
            {"run_id": "run-1", "account": None, "since": None, "limit": 10},
            {"usage_facts_run", "charge_receipts_pkey"},
        ),
        (
            query("unaudited"),
            {"after": "2026-11-22", "to": "2026-11-23", "named_max": 20},
            {"spend_records_time"},
        ),
    ],
)
def test_a_range_of_time_is_no_look_at_everything(
    dsn: str, statement: str, words: dict[str, Any], indexes: set[str]
) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("set search_path to billing; set enable_seqscan = off; set enable_indexonlyscan = off")
        plan = connection.execute(f"explain {statement}".encode(), words).fetchall()
    assert indexes <= set(re.findall(r"\w+_(?:time|run|pkey)\b", "\n".join(row[0] for row in plan)))
