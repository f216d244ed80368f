"""Postgres fails, hangs, goes away, comes back older: the log is the buffer, and every line is there once."""

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from billing_tailer.ledger import connection
from tests.scenarios.outcome import assert_exactly, states
from tests.support import database
from tests.support.daemon import Daemon
from tests.support.follow import Rig, following
from tests.support.logfiles import append
from tests.support.loglines import lines
from tests.support.proof import count, rows
from tests.support.proxy import PostgresProxy

FAILURES = {
    "serialization failure": "40001",
    "deadlock": "40P01",
    "too many connections": "53300",
    "disk full": "53100",
    "out of memory": "53200",
    "I/O error": "58030",
    "internal error": "XX000",
}
FAIL = """
create sequence billing.attempts;
create function billing.fail() returns trigger language plpgsql as $$
begin
    if nextval('billing.attempts') <= 3 then
        raise exception 'as if' using errcode = '%s';
    end if;
    return null;
end $$;
create constraint trigger fail after insert or update on billing.%s deferrable initially %s
for each row execute function billing.fail()
"""
"""A sequence does not go back with the transaction: the first three attempts fail."""


def execute(dsn: str, statement: str, *, database_of: str | None = None) -> None:
    """As the owner."""
    with psycopg.connect(database_of or dsn, autocommit=True) as owner:
        owner.execute(statement.encode())


def turn_through(rig: Rig) -> None:
    """Turn the loop, with its reconnecting, until nothing is left to do."""
    idle = 0
    while idle < 2:
        rig.follower.scan_soon()
        idle = 0 if rig.tailer._turn() else idle + 1


@pytest.mark.parametrize("moment", ["immediate", "deferred"], ids=["at a statement", "at COMMIT"])
@pytest.mark.parametrize("code", FAILURES.values(), ids=FAILURES)
def test_serialization_failure_disk_full_and_their_like(dsn: str, log: Path, code: str, moment: str) -> None:
    """Three times, then not any more: tried again from what Postgres has, until it works."""
    log.write_bytes(lines(0, 50))
    with following(dsn, log.parent) as rig:
        execute(dsn, FAIL % (code, "usage_facts", moment))
        append(log, lines(50, 50))
        turn_through(rig)
        assert not rig.health.reasons()
    assert rows(dsn, "select last_value > 3 as n from billing.attempts") == [{"n": True}]
    assert_exactly(dsn, range(100), contents={1: lines(0, 100)})


@pytest.mark.parametrize("moment", ["immediate", "deferred"], ids=["at a statement", "at COMMIT"])
@pytest.mark.parametrize("table", ["tail_files", "tail_batches", "log_gaps"])
def test_disk_full_in_the_middle_of_a_transaction(dsn: str, log: Path, table: str, moment: str) -> None:
    """At other statements: registering a file, moving an offset, declaring a gap."""
    log.write_bytes(lines(0, 5))
    with following(dsn, log.parent) as rig:
        execute(dsn, FAIL % (FAILURES["disk full"], table, moment))
        append(log, lines(5, 5))
        log.with_name("audit-new.jsonl").write_bytes(lines(100, 5))
        turn_through(rig)
        log.write_bytes(b"")  # a gap
        turn_through(rig)
        append(log, lines(20, 5))
        turn_through(rig)
        assert not rig.health.reasons()
    assert rows(dsn, "select last_value > 3 as n from billing.attempts") == [{"n": True}]
    # the numbers that a failed transaction drew are not used again
    new, again = (row["file_id"] for row in rows(dsn, "select file_id from tail_files where file_id > 1 order by 1"))
    assert_exactly(
        dsn,
        [*range(10), *range(20, 25), *range(100, 105)],
        contents={1: lines(0, 10), new: lines(100, 5), again: lines(20, 5)},
        gaps=[(1, len(lines(0, 10)), None, "truncated")],
    )


@contextmanager
def locked(dsn: str, table: str) -> Iterator[psycopg.Connection]:
    """Another session has a table for itself."""
    with psycopg.connect(dsn) as other:
        other.execute(f"lock table billing.{table} in exclusive mode".encode())
        yield other


@pytest.mark.parametrize("table", ["usage_facts", "tail_files", "tail_batches"])
def test_statement_timeout(dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    monkeypatch.setattr(connection, "STATEMENT_TIMEOUT_SECONDS", 0.2)
    log.write_bytes(lines(0, 50))
    with following(dsn, log.parent) as rig:
        append(log, lines(50, 50))
        with locked(dsn, table):
            for _ in range(2):
                assert rig.tailer._turn()
            assert rig.ledger.trouble is not None
            assert "statement timeout" in rig.ledger.trouble
            assert count(dsn, "usage_facts") == 50
        turn_through(rig)
        assert not rig.health.reasons()
    assert_exactly(dsn, range(100), contents={1: lines(0, 100)})


# --- an earlier state ------------------------------------------------------------------------------------------------


class Snapshot:
    """A copy of a database, which can take its place."""

    def __init__(self, admin_dsn: str, dsn: str) -> None:
        self._admin_dsn = admin_dsn
        self._name = str(conninfo_to_dict(dsn)["dbname"])
        self._end_sessions()
        self._copy = database.create(admin_dsn, self._name)

    def restore(self) -> None:
        """Everybody is thrown out, and finds the older state behind the same name."""
        self._end_sessions()
        execute(self._admin_dsn, f"drop database {self._name} with (force)")
        execute(self._admin_dsn, f"alter database {self._copy} rename to {self._name}")

    def _end_sessions(self) -> None:
        execute(
            self._admin_dsn,
            f"select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = '{self._name}'",
        )


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_database_restored_to_an_earlier_state(admin_dsn: str, dsn: str, log: Path, stopped: bool) -> None:
    """Everything since is read again, from the files where it stands by now: one that grew, one that was rotated, one
    that was not known yet."""
    log.write_bytes(lines(0, 10))
    other = log.with_name("audit-other.jsonl")
    other.write_bytes(lines(100, 10))
    with following(dsn, log.parent):
        pass
    snapshot = Snapshot(admin_dsn, dsn)
    with following(dsn, log.parent) as rig:
        append(log, lines(10, 10))
        append(other, lines(110, 10))
        rig.turn()
        log.rename(f"{log}.1")
        log.write_bytes(lines(20, 10))
        rig.turn()
        assert count(dsn, "usage_facts") == 50
        snapshot.restore()
        if not stopped:
            rig.tailer._next_check = 0  # as two seconds later: an idle loop asks Postgres something
            turn_through(rig)
            assert not rig.health.reasons()
            assert count(dsn, "usage_facts") == 50
    append(log, lines(30, 5))
    append(other, lines(120, 5))
    with following(dsn, log.parent) as rig:
        assert not rig.health.reasons()
    assert sorted(states(dsn)) == [
        ("audit-other.jsonl", "live", None),
        ("audit.jsonl", "live", None),
        ("audit.jsonl.1", "rotated", None),
    ]
    by_path = {Path(row["path"]).name: row["file_id"] for row in rows(dsn, "select path, file_id from tail_files")}
    assert_exactly(
        dsn,
        [*range(35), *range(100, 125)],
        contents={
            by_path["audit.jsonl.1"]: lines(0, 20),
            by_path["audit-other.jsonl"]: lines(100, 25),
            by_path["audit.jsonl"]: lines(20, 15),
        },
    )


# --- away ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_postgres_away_during_20_rotations(dsn: str, tmp_path: Path) -> None:
    """Renamed every time, every fifth compressed; a real daemon, which was stopped and started again meanwhile."""
    volume = tmp_path / "billing"
    volume.mkdir()
    log = volume / "audit.jsonl"
    log.write_bytes(lines(0, 10))
    with PostgresProxy(dsn) as proxy:
        variables = {
            "BILLING_TAILER_AUDIT_GLOBS": f"{volume}/audit*.jsonl*",
            "BILLING_TAILER_DATABASE_URL": proxy.dsn,
        }
        with Daemon(variables, tmp_path / "daemon.log") as daemon:
            daemon.wait_until(lambda: count(dsn, "usage_facts") == 10)
            proxy.cut()
            for number in range(1, 21):
                append(log, lines(number * 100, 5))
                rotated = log.rename(f"{log}.{number:02d}")
                log.write_bytes(lines(number * 100 + 50, 5))
                if number % 5 == 0:
                    Path(f"{rotated}.gz").write_bytes(gzip.compress(rotated.read_bytes()))
                    rotated.unlink()
                if number == 10:
                    daemon.kill()
                    daemon.start()
            daemon.wait_until(lambda: "connecting" in daemon.get("/readyz").text)
            proxy.forward()
            daemon.wait_until(lambda: count(dsn, "usage_facts") == 210)
            daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
            assert daemon.terminate() == 0
    contents = {}
    for row in rows(dsn, "select path, file_id from tail_files"):
        content = Path(row["path"]).read_bytes()
        contents[row["file_id"]] = gzip.decompress(content) if row["path"].endswith(".gz") else content
    assert len(contents) == 21
    numbers = [*range(10), *(n * 100 + extra for n in range(1, 21) for extra in (*range(5), *range(50, 55)))]
    assert_exactly(dsn, numbers, contents=contents)


# --- what cannot be --------------------------------------------------------------------------------------------------


DAMAGES = {
    "an offset behind the end": "committed_offset = committed_offset + 5000, size_seen = size_seen + 5000",
    "an offset far behind the end": "committed_offset = 9223372036854775807, size_seen = 9223372036854775807",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_position_rows(dsn: str, log: Path, damage: str) -> None:
    """Blocked, over restarts, whatever is appended; the file beside it is read; once the row is right again, it goes
    on. (What contradicts itself in one row is refused by the schema: tests/test_ledger.py.)"""
    log.write_bytes(lines(0, 10))
    beside = log.with_name("audit-beside.jsonl")
    with following(dsn, log.parent):
        pass
    (sound,) = rows(dsn, "select committed_offset, size_seen from tail_files")
    execute(dsn, f"update billing.tail_files set {damage}")
    append(log, lines(10, 2))
    beside.write_bytes(lines(100, 5))
    for _ in range(2):
        with following(dsn, log.parent) as rig:
            assert "blocked, offset_past_end" in str(rig.health.reasons())
            append(log, lines(12, 2))
            rig.turn()
            os.truncate(log, len(lines(0, 12)))
    assert states(dsn) == [("audit.jsonl", "blocked", "offset_past_end"), ("audit-beside.jsonl", "live", None)]
    assert count(dsn, "usage_facts") == 15
    values = f"committed_offset = {sound['committed_offset']}, size_seen = {sound['size_seen']}"
    execute(dsn, f"update billing.tail_files set {values} where file_id = 1")
    with following(dsn, log.parent) as rig:
        assert not rig.health.reasons()
    assert_exactly(dsn, [*range(12), *range(100, 105)], contents={1: lines(0, 12), 2: lines(100, 5)})


@pytest.mark.parametrize("damage", ["frontier_sha256 = sha256('x')", "head = overlay(head placing 'x' from 1)"])
def test_a_position_row_with_another_identity(dsn: str, log: Path, damage: str) -> None:
    """As if the file had been rewritten: a generation of its own, whose calls are replays; nothing is billed twice."""
    log.write_bytes(lines(0, 10))
    with following(dsn, log.parent):
        pass
    (sound,) = rows(dsn, "select head, frontier_sha256 from tail_files")
    execute(dsn, f"update billing.tail_files set {damage}")
    append(log, lines(10, 5))
    with following(dsn, log.parent):
        pass
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(
            "update billing.tail_files set head = %(head)s, frontier_sha256 = %(frontier_sha256)s where file_id = 1",
            sound,
        )
    assert_exactly(
        dsn,
        range(15),
        contents={1: lines(0, 10), 2: lines(0, 15)},
        gaps=[(1, len(lines(0, 10)), None, "regrown")],
        replayed=10,
    )
