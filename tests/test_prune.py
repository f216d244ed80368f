"""`prune`: what it removes, what it never touches, who may, and what happens beside a daemon."""

import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest

from billing_tailer.errors import LedgerUnavailable
from billing_tailer.ledger import pruning
from tests.support.follow import following
from tests.support.loglines import lines
from tests.support.proof import count, rows
from tests.support.spendlines import failure, payload, spool_line
from tests.support.verbs import Verb

OLD, NEW = 31, 29
REASON = ("--reason", "monthly", "--by", "ann")


def call(number: int) -> str:
    return f"call-{number:08d}"


@pytest.fixture
def fed(dsn: str, log: Path) -> str:
    """Calls 0 to 4 have lines. Of the others, 5 to 9 are old, 10 is new, and 11 is old and new. The DSN."""
    log.write_bytes(lines(0, 5))
    events = [payload(number) for number in range(12)] + [failure(5, 0.1, attempt=1), payload(11, attempt=1)]
    (log.parent / f"callbacks-{'0' * 32}-000000.jsonl").write_bytes(b"".join(map(spool_line, events)))
    with following(dsn, log.parent):
        pass
    age(dsn, OLD, "true")
    age(
        dsn,
        NEW - OLD,
        f"call_id = '{call(10)}' or record_id = (select max(record_id) from spend_records "
        f"where call_id = '{call(11)}')",
    )
    return dsn


def age(dsn: str, days: int, which: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("set search_path to billing")
        statement = f"update spend_records set received_at = now() - interval '{days} days' where {which}"
        owner.execute(statement.encode())


def records(dsn: str) -> list[str]:
    return [row["call_id"] for row in rows(dsn, "select call_id from spend_records order by call_id")]


LEFT = [*(call(number) for number in (0, 1, 2, 3, 4, 10)), call(11), call(11)]


@pytest.mark.parametrize("batch_rows", [1, 3, 5000])
def test_prune(verb: Verb, fed: str, monkeypatch: pytest.MonkeyPatch, batch_rows: int) -> None:
    monkeypatch.setattr(pruning, "BATCH_ROWS", batch_rows)
    verb.environment(MIGRATE_DATABASE_URL=fed)
    expected = {"calls": 5, "records": 6, "cost_usd": "0.101125"}
    before = rows(fed, "select * from charge_receipts order by source_reference")
    told = verb.json("prune", *REASON, "--dry-run")
    assert {**told, "received_before": None} == {
        "applied": False,
        "prune_id": None,
        "received_before": None,
        **expected,
    }
    assert (len(records(fed)), count(fed, "prunes")) == (14, 0)
    told = verb.json("prune", *REASON)
    assert {**told, "received_before": None} == {"applied": True, "prune_id": 1, "received_before": None, **expected}
    assert records(fed) == LEFT
    assert rows(fed, "select * from charge_receipts order by source_reference") == before
    (row,) = rows(fed, "select * from prunes")
    assert (row["calls"], row["records"], row["cost_usd"]) == (5, 6, Decimal("0.101125"))
    assert (row["reason"], row["pruned_by"], row["finished_at"] >= row["started_at"]) == ("monthly", "ann", True)
    assert "records          0" in verb("prune", *REASON)
    assert records(fed) == LEFT


def test_the_owner_may_and_the_daemon_may_not(verb: Verb, fed: str, daemon_dsn: str) -> None:
    verb("prune", *REASON, code=2)
    assert "MIGRATE_DATABASE_URL" in verb.stderr
    assert verb.json("prune", *REASON, "--dry-run")["records"] == 6
    assert (len(records(fed)), count(fed, "prunes")) == (14, 0)
    verb.environment(MIGRATE_DATABASE_URL=fed)
    assert verb.json("prune", *REASON)["records"] == 6
    with psycopg.connect(daemon_dsn) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("delete from billing.prunes")


def test_a_line_that_is_just_being_committed_keeps_its_records(fed: str) -> None:
    """The daemon has inserted the fact, and has not committed it yet."""
    insert = (
        "insert into billing.usage_facts select (jsonb_populate_record(f, jsonb_build_object('call_id', %s::text)))"
    )
    with psycopg.connect(fed) as daemon:
        daemon.execute(f"{insert}.* from billing.usage_facts f limit 1".encode(), (call(7),))
        with ThreadPoolExecutor(1) as pool:
            pruned = pool.submit(pruning.prune, fed, "billing", dsn_name="d", reason="r", person="ann", dry_run=False)
            waits = "select from pg_locks where not granted and relation = 'billing.usage_facts'::regclass"
            deadline = time.monotonic() + 10
            while not rows(fed, waits):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            daemon.commit()
    assert pruned.result().calls == 4
    assert records(fed) == sorted([*LEFT, call(7)])


def test_a_daemon_that_does_not_end_is_not_waited_for(fed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row says what is gone."""
    monkeypatch.setattr(pruning, "LOCK_SECONDS_MAX", 1)
    with psycopg.connect(fed) as daemon:
        daemon.execute("lock table billing.usage_facts in row exclusive mode")
        with pytest.raises(LedgerUnavailable, match="lock timeout"):
            pruning.prune(fed, "billing", dsn_name="d", reason="r", person="ann", dry_run=False)
    assert rows(fed, "select records, finished_at from prunes") == [{"records": 0, "finished_at": None}]
    assert len(records(fed)) == 14
