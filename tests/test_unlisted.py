"""Facts of large batches come onto the work list later, and none is forgotten on the way, whatever happens."""

import threading
import time
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from billing_tailer import settler as settler_module
from billing_tailer.ledger import Ledger, activity_reads
from billing_tailer.ledger.connection import lock_key
from billing_tailer.ledger.writer import PIPELINE_FACTS_MAX
from billing_tailer.litellm import SpendLogs
from billing_tailer.poller import Poll, Poller
from billing_tailer.settler import LIST_SECONDS_MAX, Settler
from billing_tailer.spend import parse_row
from tests.support.follow import following
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, rows
from tests.support.spendlines import failure, payload
from tests.support.verbs import Verb
from tests.test_settler import billed, kinds, log, spool, sweep

MANY = PIPELINE_FACTS_MAX + 10


def listed(dsn: str) -> list[str]:
    return [row["call_id"] for row in rows(dsn, "select call_id from unsettled_facts order by call_id")]


def calls(numbers: range) -> list[str]:
    return [f"call-{number:08d}" for number in numbers]


def counted_at_commits(monkeypatch: pytest.MonkeyPatch, dsn: str, table: str) -> list[int]:
    """How many rows a table has before each commit from now on."""
    seen: list[int] = []
    commit = Ledger.commit

    def note(self: Ledger, *args: Any) -> Any:
        seen.append(count(dsn, table))
        return commit(self, *args)

    monkeypatch.setattr(Ledger, "commit", note)
    return seen


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop has always something better to do."""
    monkeypatch.setattr(Settler, "_list", lambda *_, **__: False)


def test_a_large_batch_is_one_entry_until_there_is_time(dsn: str, tmp_path: Path) -> None:
    log(tmp_path, lines(0, MANY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settler, "_list", lambda *_, **__: False)
        with following(dsn, tmp_path):
            assert listed(dsn) == []
            (entry,) = rows(dsn, "select * from unlisted_facts")
    size = (tmp_path / "audit.jsonl").stat().st_size
    assert (entry["start_offset"], entry["end_offset"], entry["facts"]) == (0, size, MANY)
    assert entry["ended_from"] == datetime.fromtimestamp(1795307912, UTC)
    assert_sound(dsn)
    with following(dsn, tmp_path):
        assert (listed(dsn), count(dsn, "unlisted_facts")) == (calls(range(MANY)), 0)
    (times,) = rows(
        dsn,
        "select bool_and(u.committed_at = f.committed_at) as committed, "
        "bool_and(u.started_at = f.occurred_at - make_interval(secs => f.request_seconds::float8)) as started "
        "from unsettled_facts u join usage_facts f using (call_id)",
    )
    assert times == {"committed": True, "started": True}


def test_few_facts_are_listed_at_once(dsn: str, tmp_path: Path, no_time: None) -> None:
    log(tmp_path, lines(0, 2) + line(2, request_time="-"))
    with following(dsn, tmp_path):
        pass
    assert (listed(dsn), count(dsn, "unlisted_facts")) == (calls(range(3)), 0)
    starts = rows(
        dsn,
        "select bool_and(u.started_at = f.occurred_at - make_interval(secs => coalesce(f.request_seconds, 0)::float8)) "
        "as same from unsettled_facts u join usage_facts f using (call_id)",
    )
    assert starts == [{"same": True}]


def test_what_is_decided_meanwhile_is_never_listed(dsn: str, tmp_path: Path) -> None:
    """Settled, not charged, closed by a person: only what waits. What is held is listed, and leaves the sweep's way."""
    log(tmp_path, lines(0, MANY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settler, "_list", lambda *_, **__: False)
        with following(dsn, tmp_path, quiet_seconds=0) as rig:
            spool(tmp_path, *map(payload, range(20)), failure(20), payload(21, 0.0))
            rig.turn()
            sweep(rig)
            assert (len(billed(dsn)), count(dsn, "unlisted_facts")) == (20, 1)
            assert kinds(dsn) == {"call-00000020": "not_charged", "call-00000021": "held_zero_cost"}
    with following(dsn, tmp_path) as rig:
        sweep(rig)
        assert listed(dsn) == calls(range(21, MANY))
        assert rows(dsn, "select call_id from unsettled_facts where ask_at is not null") == [
            {"call_id": "call-00000021"}
        ]
    assert len(billed(dsn)) == 20
    assert_sound(dsn)


def test_they_wait_while_there_is_more_to_read_but_not_for_long(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(tmp_path, lines(0, 4 * MANY))
    seen = counted_at_commits(monkeypatch, dsn, "unsettled_facts")
    with following(dsn, tmp_path, batch_lines_max=MANY):
        assert len(listed(dsn)) == 4 * MANY
    assert seen == [0, 0, 0, 0], "listed between two batches"

    monkeypatch.setattr(settler_module, "LIST_SECONDS_MAX", 0.0)
    del seen[:]
    (tmp_path / "audit-2.jsonl").write_bytes(lines(1000, 4 * MANY))
    with following(dsn, tmp_path, batch_lines_max=MANY):
        assert len(listed(dsn)) == 8 * MANY
    assert [number - seen[0] for number in seen] == [0, MANY, 2 * MANY, 3 * MANY]
    assert 0 < LIST_SECONDS_MAX <= 60


def test_several_files_do_not_bring_them_faster_than_they_are_listed(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch leaves a range for each file: with one range a round, calls of a busy source would never be listed."""
    for file in range(4):
        (tmp_path / f"audit-{file}.jsonl").write_bytes(lines(10_000 * file, 2000))
    seen = counted_at_commits(monkeypatch, dsn, "unlisted_facts")
    monkeypatch.setattr(settler_module, "LIST_SECONDS_MAX", 0.0)
    with following(dsn, tmp_path):
        assert count(dsn, "unsettled_facts") == 8000
    assert len(seen) > 4
    assert max(seen) == 0, "left behind while there is more to read"


def test_a_poll_before_they_are_listed_has_not_covered_them(dsn: str, tmp_path: Path) -> None:
    """It asked for what began up to the end of the calls that were listed: a later attempt of another one may have
    begun after that."""
    with following(dsn, tmp_path, deadline_seconds=0) as rig, pytest.MonkeyPatch.context() as patch:
        settler = rig.tailer._settler
        settler._poller = Poller(
            SpendLogs("http://127.0.0.1:9", "key", stop=threading.Event()),
            partial(parse_row, cost_max=Decimal(1)),
            lambda: None,
        )
        settler._poller.busy = True
        patch.setattr(Settler, "_list", lambda *_, **__: False)
        log(tmp_path, line(0) + line(1, msec="1795308912.000"))
        rig.turn()
        log(tmp_path, line(2, msec="1795310000.000", request_time="1500.000") + lines(1000, MANY))
        rig.turn()
        settler._take(Poll(rig.ledger.poll_window(None, None, 10), (), 0, covered=True))
        patch.undo()
        sweep(rig)
        assert kinds(dsn).get("call-00000001") == "overdue"
        assert kinds(dsn).get("call-00000002") is None
        settler._take(Poll(rig.ledger.poll_window(None, None, 10), (), 0, covered=True))
        sweep(rig)
        assert kinds(dsn)["call-00000002"] == "overdue"


def test_an_idle_daemon_waits_for_nobody(dsn: str, tmp_path: Path) -> None:
    """Where nothing is to be listed, whoever decides elsewhere, and however long, does not keep it from reading."""
    log(tmp_path, lines(0, 1))
    with following(dsn, tmp_path) as rig, psycopg.connect(dsn) as other:
        rig.ledger._session.execute("set lock_timeout = '500ms'")
        other.execute("select pg_advisory_xact_lock(%s)", (lock_key("decide", "billing"),))
        sweep(rig)


def test_ranges_of_another_process_are_found(dsn: str, tmp_path: Path) -> None:
    """A backfill leaves them to whoever follows."""
    with following(dsn, tmp_path) as rig:
        log(tmp_path, lines(0, MANY))
        rig.turn()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rig.tailer._settler, "_next_sweep", time.monotonic() + 60)
            rows(dsn, "delete from unsettled_facts returning 1")
            rows(
                dsn,
                "insert into unlisted_facts (file_id, start_offset, end_offset, facts, ended_from) "
                "select file_id, 0, committed_offset, 1, now() from tail_files returning 1",
            )
            rig.turn()
            assert listed(dsn) == []
        sweep(rig)
        assert listed(dsn) == calls(range(MANY))


def test_a_range_that_begins_where_another_one_does(dsn: str, tmp_path: Path, no_time: None) -> None:
    """After a reset, say: the batch goes the way of those whose calls may be known, and lists them one by one."""
    with following(dsn, tmp_path) as rig:
        log(tmp_path, lines(0, 1))
        rig.turn()
        (file,) = rows(dsn, "select file_id, committed_offset from tail_files")
        rows(
            dsn,
            "insert into unlisted_facts (file_id, start_offset, end_offset, facts, ended_from) "
            "values (%s, %s, %s, 1, now()) returning 1",
            *(file["file_id"], file["committed_offset"], file["committed_offset"] + 1),
        )
        log(tmp_path, lines(1, MANY))
        rig.turn()
    assert (listed(dsn), count(dsn, "unlisted_facts")) == (calls(range(MANY + 1)), 1)
    assert_sound(dsn)


def test_everybody_knows_that_they_wait(verb: Verb, dsn: str, log: Path, no_time: None) -> None:
    """status, the gauges, the reconciliation, the page and the proof."""
    log.write_bytes(lines(0, MANY))
    with following(dsn, log.parent) as rig:
        counts = rig.ledger.settle_counts()
        assert (counts["pending"], time.time() - counts["oldest_pending"] < 60) == (MANY, True)
    assert verb.json("status")["pending_calls"] == MANY
    assert verb.json("reconcile", "--from", "2026-11-22", "--to", "2026-11-22T02:00:00")["total"]["pending"] == MANY
    with activity_reads(dsn, "billing") as reads:
        standing = reads.standing()
    assert standing["unsettled_since"] == standing["waiting_since"] == datetime.fromtimestamp(1795307912, UTC)
    assert verb.json("verify", "--settlement")["differences"] == []
    rows(dsn, "delete from unlisted_facts returning 1")
    assert len(verb.json("verify", "--settlement", code=1)["differences"]) == MANY
