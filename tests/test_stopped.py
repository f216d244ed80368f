"""Calls that an exception stops: no sweep looks at them; a record, a question or other settings bring them on."""

import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from billing_tailer import settler
from billing_tailer.ledger.sqlfile import QUERIES
from billing_tailer.litellm import SpendLogs
from billing_tailer.poller import Poller
from billing_tailer.settle import Rules
from billing_tailer.spend import parse_row
from tests.support import database, spendlogs
from tests.support.follow import following
from tests.support.loglines import line, lines
from tests.support.proof import rows
from tests.support.spendlines import failure, payload
from tests.test_settler import billed, kinds, log, spool, sweep

MANY, WAIT = 30_000, 50


def asks(dsn: str) -> dict[str, float | None]:
    """Unsettled calls: when LiteLLM is to be asked for them by name, in minutes from now; None: time may decide."""
    found = rows(
        dsn,
        "select call_id, round(extract(epoch from ask_at - now()) / 60)::float8 as minutes from unsettled_facts "
        "order by call_id",
    )
    return {row["call_id"]: row["minutes"] for row in found}


def execute(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set search_path to billing")
        connection.execute(statement.encode())


def test_what_stops_a_call_takes_it_out_of_the_sweep(dsn: str, tmp_path: Path) -> None:
    log(tmp_path, lines(1, 2) + line(3, end_user="") + lines(4, 2))
    spool(tmp_path, payload(1, 0.0), payload(2), payload(3), failure(4))
    with following(dsn, tmp_path) as rig:
        assert asks(dsn) == {"call-00000001": 15, "call-00000003": 15, "call-00000004": None, "call-00000005": None}
        assert set(rig.ledger.waiting_calls(None, 100, 0).calls) == {"call-00000004", "call-00000005"}


def test_a_record_that_decides_nothing_yet_lets_time_decide_again(dsn: str, tmp_path: Path) -> None:
    """An overdue call of which a failed attempt becomes known waits for the next one, and is charged in the end."""
    log(tmp_path, line(1, request_completion=""))
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        sweep(rig)
    assert (kinds(dsn), asks(dsn)) == ({"call-00000001": "overdue"}, {"call-00000001": 15})
    with following(dsn, tmp_path) as rig:
        spool(tmp_path, failure(1, 0.0000081))
        rig.turn()
        assert (kinds(dsn), asks(dsn)) == ({}, {"call-00000001": None})
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        sweep(rig)
    assert billed(dsn) == {"call-00000001": (81, Decimal("0.0000081"))}


def test_a_sweep_goes_on_at_once_while_there_is_something_to_do(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a long outage: page after page, in one go."""
    monkeypatch.setattr(settler, "PAGE_CALLS", 3)
    log(tmp_path, lines(0, 20))
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        sweep(rig)
        assert len(kinds(dsn)) == 20
        assert rig.ledger.waiting_calls(None, 100, 0).calls == {}


def test_calls_that_cannot_be_decided_yet_do_not_hide_others(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages in which there is nothing to do come first."""
    monkeypatch.setattr(settler, "PAGE_CALLS", 3)
    log(tmp_path, lines(0, 20))
    with following(dsn, tmp_path) as rig:
        for table in ("usage_facts", "unsettled_facts"):
            execute(dsn, f"update {table} set committed_at = now() - interval '1 hour' where call_id = 'call-00000019'")
        rig.tailer._settler._swept_to, rig.tailer._settler._next_sweep = None, 0.0
        for _ in range(7):
            assert kinds(dsn) == {}
            rig.tailer._settler._next_sweep = 0.0
            rig.tailer._settler.turn()
        assert kinds(dsn) == {"call-00000019": "overdue"}


def test_other_settings_are_tried_page_by_page(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settler, "PAGE_CALLS", 2)
    log(tmp_path, lines(0, 9))
    spool(tmp_path, *(payload(number, 0.0) for number in range(5)))
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        sweep(rig)
    assert sorted(kinds(dsn).values()) == ["held_zero_cost"] * 5 + ["overdue"] * 4
    with following(dsn, tmp_path, rules=Rules(free_models=("up-*",))):
        pass
    assert (len(billed(dsn)), set(kinds(dsn).values())) == (5, {"overdue"})


def test_a_call_that_nothing_stops_any_more_waits_again(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon of before the migration, which went on beside it, closed exceptions and knew nothing of `ask_at`."""
    monkeypatch.setattr(settler, "PAGE_CALLS", 2)
    log(tmp_path, b"".join(line(number, request_completion="") for number in range(5)))
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        sweep(rig)
        spool(tmp_path, *(failure(number, 0.0000081) for number in range(4)))
    with following(dsn, tmp_path):
        pass
    execute(dsn, "update unsettled_facts set ask_at = now() + interval '1 hour'")
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        for _ in range(3):
            rig.tailer._settler._next_review = 0.0
            rig.tailer._settler.turn()
        sweep(rig)
    assert len(billed(dsn)) == 4
    assert (kinds(dsn), list(asks(dsn).values())) == ({"call-00000004": "overdue"}, [60])


# --- asking by name --------------------------------------------------------------------------------------------------


def test_a_call_that_was_given_up_is_asked_for_ever_more_seldom(dsn: str, tmp_path: Path) -> None:
    """Twice as old each time, a quarter of an hour at least, a week at most; soon again where there was no answer."""
    log(tmp_path, lines(0, 4))
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        sweep(rig)
        for number, hours in enumerate((0, 1, 100, 2000)):
            execute(
                dsn,
                f"update unsettled_facts set ask_at = now(), committed_at = now() - interval '{hours} hours' "
                f"where call_id = 'call-{number:08d}'",
            )
        window = rig.ledger.poll_window(None, None, 10)
        assert (window.span, window.late, len(window.given_up)) == (None, {}, 4)
        rig.ledger.asked(window, answered=True)
        assert list(asks(dsn).values()) == [15, 60, 6000, 7 * 24 * 60]
        assert rig.ledger.poll_window(None, None, 10).given_up == {}
        execute(dsn, "update unsettled_facts set ask_at = now() - interval '1 minute'")
        rig.ledger.asked(rig.ledger.poll_window(None, None, 10), answered=False)
        assert list(asks(dsn).values()) == [15, 15, 15, 15]


def test_asked_for_where_nothing_else_waits(dsn: str, tmp_path: Path) -> None:
    """And what LiteLLM says then is charged; the others come after it in turn, half of each question."""
    log(tmp_path, lines(0, 9))
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        sweep(rig)
        for number in range(9):
            execute(
                dsn,
                f"update unsettled_facts set ask_at = now() - interval '{number + 1} s' "
                f"where call_id = 'call-{number:08d}'",
            )
        window = rig.ledger.poll_window(None, None, 10)
        assert list(window.given_up) == [f"call-{number:08d}" for number in (8, 7, 6, 5, 4)]
        with spendlogs.spend_logs([spendlogs.row(payload(6))]) as url:
            logs = SpendLogs(url, "key", stop=threading.Event())
            poll = Poller(logs, partial(parse_row, cost_max=Decimal(1000)), lambda: None)._poll(window)
            logs.close()
        assert (poll.failure, poll.complete, len(poll.records)) == (None, True, 1)
        rig.tailer._settler._take(poll)
        assert set(billed(dsn)) == {"call-00000006"}
        assert list(rig.ledger.poll_window(None, None, 10).given_up) == [f"call-{n:08d}" for n in (3, 2, 1, 0)]


@pytest.mark.parametrize("changes", [{}, {"msec": "1795307912.000", "request_time": "0.000"}], ids=["apart", "at_once"])
def test_late_calls_are_asked_for_in_turn(dsn: str, tmp_path: Path, changes: dict[str, str]) -> None:
    """Also where they all began at one moment."""
    log(tmp_path, b"".join(line(number, **changes) for number in range(15)))
    with following(dsn, tmp_path) as rig:
        assert rig.ledger.poll_window(None, None, 10).late == {}
        execute(dsn, "update unsettled_facts set committed_at = now() - interval '31 seconds'")
        first = rig.ledger.poll_window(None, None, 10)
        assert first.span is not None
        assert list(first.late) == [f"call-{number:08d}" for number in range(10)]
        second = rig.ledger.poll_window(None, (list(first.late.values())[-1], list(first.late)[-1]), 10)
        assert list(second.late) == [f"call-{number:08d}" for number in range(10, 15)]


def test_one_call_that_cannot_be_asked_for_holds_no_deadline_up(dsn: str, tmp_path: Path) -> None:
    """Its span of time was read to the end: it is overdue like any other."""
    log(tmp_path, lines(0, 2))
    with following(dsn, tmp_path) as rig:
        execute(dsn, "update unsettled_facts set committed_at = now() - interval '31 seconds'")
        window = rig.ledger.poll_window(None, None, 10)
        assert list(window.late) == ["call-00000000", "call-00000001"]
        with spendlogs.spend_logs([spendlogs.row(payload(1))], refused=["call-00000000"]) as url:
            logs = SpendLogs(url, "key", stop=threading.Event())
            poll = Poller(logs, partial(parse_row, cost_max=Decimal(1000)), lambda: None)._poll(window)
            logs.close()
        assert (poll.covered, poll.complete) == (True, False)
        assert poll.failure is not None
        settler = rig.tailer._settler
        settler._take(poll)
        assert settler._polls == [(window.asked_at, window.span)]


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded(admin_dsn: str, template_database: str) -> Iterator[str]:
    """A database with many overdue calls and 50 that wait. The DSN."""
    with database.temporary(admin_dsn, template_database) as dsn:
        execute(
            dsn,
            f"""
            insert into tail_files (source_id, path, device, inode, generation, head, committed_offset, frontier_sha256,
                                    frontier_bytes, size_seen, state)
            values ('default', '/x', 1, 1, 1, '', 0, sha256(''), 0, 0, 'live');
            insert into usage_facts (call_id, id_echoed, status, request_completed, provenance, occurred_at, file_id,
                                     start_offset, end_offset)
            select md5(n::text), true, 200, true, 'response', now() - interval '1 ms' * ({MANY} - n), 1, n, n + 1
            from generate_series(1, {MANY}) n;
            insert into unsettled_facts (call_id, started_at, ask_at)
            select call_id, occurred_at, case when start_offset % {MANY // WAIT} > 0 then now() + interval '1 h' end
            from usage_facts;
            insert into call_exceptions (call_id, kind, seq, detail)
            select call_id, 'overdue', 1, '{{}}' from unsettled_facts where ask_at is not null;
            """,
        )
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("vacuum analyze")
        yield dsn


def looked_at(dsn: str, name: str, words: Mapping[str, Any]) -> float:
    """How many rows of tables a statement reads, whether it wants them or not."""
    with psycopg.connect(dsn) as connection:
        connection.execute("set search_path to billing")
        connection.execute(QUERIES["go_by_keys"])
        explain = f"explain (analyze, format json) {QUERIES[name]}"
        (plan,) = connection.execute(explain.encode(), words).fetchone() or ([],)

    def walk(node: Mapping[str, Any]) -> float:
        read = (
            node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
        )
        own = read * node["Actual Loops"] if "Relation Name" in node and node["Node Type"] != "ModifyTable" else 0
        return float(own) + sum(map(walk, node.get("Plans", ())))

    return walk(plan[0]["Plan"])


@pytest.mark.parametrize(
    "name",
    ["touched", "waiting_calls", "poll_window", "stragglers", "late_calls", "open_page", "stopped_page", "stop_calls"],
)
def test_overdue_calls_cost_nothing(crowded: str, name: str) -> None:
    """As many rows as for the fifty that wait, or for the page that is asked for."""
    words = {
        "source_id": "default",
        "deadline": 900,
        "limit": 10,
        "after_start": datetime(2000, 1, 1, tzinfo=UTC),
        "started_after": datetime(2000, 1, 1, tzinfo=UTC),
        "after_call": "",
        "after_kind": "",
        "call_ids": ["x"],
        "seconds": timedelta(minutes=15).total_seconds(),
    }
    assert looked_at(crowded, name, words) <= 5 * WAIT
