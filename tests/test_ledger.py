"""The writing session: one transaction per plan, compare-and-set, overlap, the lock, the border for errors."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest

from billing_tailer import audit, fastlane, plan
from billing_tailer.errors import ConfigError, LedgerUnavailable, PositionMoved, RowRejected
from billing_tailer.files import Chunk, LogFiles
from billing_tailer.ledger import (
    Changes,
    Ledger,
    LedgerState,
    NewFile,
    migrate,
    migrations,
    reason_of,
    reports,
    settlement,
)
from billing_tailer.ledger.connection import Connection, connect, wrapped
from billing_tailer.ledger.writer import PIPELINE_FACTS_MAX, SEND_BYTES, _socket_of
from billing_tailer.model import FileStep, Gap, GapReason, PlacedRecord, Plan, Position, SpendRecord
from billing_tailer.plan import FileWork, OpenRow
from billing_tailer.settings import LLM_ROUTES
from billing_tailer.settle import Decision, Standing
from billing_tailer.spend import parse_spool_line
from tests.support.follow import following
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows
from tests.support.spendlines import payload, spool_line

parse = fastlane.AuditLines(audit.routes(LLM_ROUTES))


@pytest.fixture
def ledger(dsn: str) -> Iterator[Ledger]:
    own = Ledger(dsn, schema="billing", source_id="default", stop=threading.Event())
    assert own.open(tick=lambda: None, may_stand_by=lambda _: True)
    yield own
    own.close()


@pytest.fixture
def start(ledger: Ledger, tmp_path: Path) -> Position:
    """A registered file at byte 0."""
    log = tmp_path / "audit.jsonl"
    log.touch()
    files = LogFiles((str(log),), 8)
    (seen,) = files.scan().files
    ledger.apply(Changes(new=(NewFile(seen, None, 1, files.place_at(seen, 0)),)))
    files.close()
    (position,) = ledger.positions()
    return position


def work_of(position: Position, data: bytes, before: bytes = b"", row: OpenRow | None = None) -> FileWork:
    size = position.committed_offset + len(data)
    chunk = Chunk(before[-4096:], data, size)
    work = plan.take_lines(
        position, chunk, row, parse, lines_max=100_000, line_bytes_max=1 << 20, held_bytes_max=1 << 30
    )
    assert work is not None
    return work


def plan_of(position: Position, data: bytes) -> Plan:
    return plan.build([work_of(position, data)])


@pytest.mark.parametrize("number", [1, PIPELINE_FACTS_MAX, PIPELINE_FACTS_MAX + 1, 500])
def test_a_plan_is_one_transaction(ledger: Ledger, start: Position, dsn: str, number: int) -> None:
    data = lines(0, number)
    committed = ledger.commit(plan_of(start, data))
    assert ledger.positions()[0].committed_offset == len(data) == committed.positions[0].committed_offset
    assert replace(ledger.positions()[0], last_commit_at=None) == replace(committed.positions[0], last_commit_at=None)
    assert count(dsn, "usage_facts") == number
    assert_sound(dsn, {start.file_id: data})


@pytest.mark.parametrize("again", [b"", line(0)], ids=["direct", "staged"])
def test_rows_are_on_their_way_before_anything_else_is_done(
    ledger: Ledger, start: Position, dsn: str, again: bytes
) -> None:
    """The caller's own work, which would take its turn from the first statements."""
    times = []

    def meanwhile() -> None:
        times.append(time.monotonic())
        arrived = "select 1 from pg_stat_progress_copy where bytes_processed > 0 and datname = current_database()"
        while not rows(dsn, arrived):
            assert time.monotonic() < times[-1] + 10, "Postgres has no row"

    ledger.commit(plan_of(start, lines(0, 1200) + again), meanwhile)
    assert len(times) == 3


@pytest.mark.parametrize(("number", "records"), [(1, 0), (PIPELINE_FACTS_MAX, 0), (1200, 1)])
def test_few_rows_and_records_leave_time_from_the_beginning(
    ledger: Ledger, start: Position, dsn: str, number: int, records: int
) -> None:
    states = []

    def meanwhile() -> None:
        session = "select state from pg_stat_activity where application_name = 'billing_tailer default'"
        states.append(rows(dsn, f"{session} and datname = current_database()"))

    spent = [parse_spool_line(spool_line(payload(1))[:-1], Decimal(1)) for _ in range(records)]
    placed = tuple(PlacedRecord(record) for record in spent if isinstance(record, SpendRecord))
    ledger.commit(replace(plan_of(start, lines(0, number)), records=placed), meanwhile)
    assert states[0] == [{"state": "idle"}]
    assert count(dsn, "spend_records") == records


def test_a_unix_socket_has_room_for_a_batch(ledger: Ledger) -> None:
    with _socket_of(ledger._session) as twin:
        room = twin.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert twin.family == socket.AF_UNIX
    allowed = int(Path("/proc/sys/net/core/wmem_max").read_text("ascii"))
    assert room == 2 * min(SEND_BYTES, allowed)  # the kernel doubles it, for its own bookkeeping


@pytest.mark.timeout(30)
def test_a_slow_network_takes_everything_in_the_end(ledger: Ledger, start: Position) -> None:
    """psycopg's `Pipeline.sync` sends once, and then waits for answers to what the socket had no room for."""
    with _socket_of(ledger._session) as twin:
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
    bad = 60_000 * b"x" + b"\n"
    ledger.commit(plan_of(start, 100 * bad))
    assert [position.committed_offset for position in ledger.positions()] == [100 * len(bad)]


@pytest.mark.parametrize("number", [1, 500])
def test_a_failed_compare_and_set_leaves_nothing(ledger: Ledger, start: Position, dsn: str, number: int) -> None:
    ledger.commit(plan_of(start, line(0)))
    with pytest.raises(PositionMoved, match=r"tail_batches|0 of 1"):
        ledger.commit(plan_of(start, lines(1, number) + b"poison\n"))
    assert (count(dsn, "usage_facts"), count(dsn, "dead_letters"), count(dsn, "tail_batches")) == (1, 0, 1)
    assert ledger.positions()[0].committed_offset == len(line(0))


def test_a_batch_row_that_another_moved_is_noticed(ledger: Ledger, start: Position, dsn: str) -> None:
    first = work_of(start, line(0))
    (position,) = ledger.commit(plan.build([first])).positions
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute("update billing.tail_batches set end_offset = end_offset + 1")
    with pytest.raises(PositionMoved, match="grow_batch"):
        ledger.commit(plan.build([work_of(position, line(1), line(0), first.row)]))
    assert count(dsn, "usage_facts") == 1


def test_a_scan_that_knows_another_position_changes_nothing(ledger: Ledger, start: Position, dsn: str) -> None:
    elsewhere = replace(start, committed_offset=5)
    gap = Gap(start.file_id, 100, 120, GapReason.ACCEPTED)
    with pytest.raises(PositionMoved, match="update_file: 1 of 2 files"):
        ledger.apply(Changes(updated=(start, elsewhere), gaps=(gap,)))
    assert count(dsn, "log_gaps") == 0
    ledger.apply(Changes(updated=(start,), gaps=(gap,)))
    assert count(dsn, "log_gaps") == 1


def test_one_batch_row_grows_in_place(ledger: Ledger, start: Position, dsn: str) -> None:
    position, row, content = start, None, b""
    for number in range(20):
        work = work_of(position, line(number), content, row)
        (position,) = ledger.commit(plan.build([work])).positions
        content, row = content + line(number), work.row
    assert count(dsn, "tail_batches") == 1
    assert_sound(dsn, {start.file_id: content})


def test_replays_and_conflicts(ledger: Ledger, start: Position, dsn: str) -> None:
    """The same request again is a replay; another request under its call id is a conflict; both stand in the ranges."""
    data = lines(0, 100)
    (position,) = ledger.commit(plan_of(start, data)).positions
    again = lines(50, 100) + line(7, nginx_request_id="f" * 32, end_user="someone else")
    ledger.commit(plan.build([work_of(position, again, data)]))
    assert outcomes(dsn) == {"fact": 150, "replayed": 50, "conflict": 1}
    (conflict,) = rows(dsn, "select * from call_conflicts")
    assert (conflict["call_id"], conflict["billing_account_id"]) == ("call-00000007", "someone else")
    assert conflict["start_offset"] == len(data) + len(lines(50, 100))
    (fact,) = rows(dsn, "select billing_account_id from usage_facts where call_id = 'call-00000007'")
    assert fact["billing_account_id"] == "account-1"
    assert_sound(dsn, {start.file_id: data + again})


def test_a_conflict_that_is_read_again_is_a_replay(ledger: Ledger, start: Position, dsn: str) -> None:
    data = line(0) + line(0, nginx_request_id="f" * 32) + line(0, nginx_request_id="f" * 32)
    (position,) = ledger.commit(plan_of(start, data)).positions
    ledger.commit(plan.build([work_of(position, data, data)]))
    assert outcomes(dsn) == {"fact": 1, "conflict": 1, "replayed": 4}
    assert count(dsn, "call_conflicts") == 1


def test_without_a_request_id_the_line_itself_decides(ledger: Ledger, start: Position, dsn: str) -> None:
    older = b'{"ts":"2026-11-22T00:00:00+00:00","run_id":"r","end_user":"a","status":200,"litellm_call_id":"c"%s}\n'
    ledger.commit(plan_of(start, older % b"" + older % b"" + older % b',"litellm_model_id":"m"'))
    assert outcomes(dsn) == {"fact": 1, "replayed": 1, "conflict": 1}


def test_what_postgres_refuses_is_found(ledger: Ledger, start: Position, dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute("alter table billing.usage_facts add check (run_id <> 'run-7')")
    wanted = plan_of(start, lines(0, 60))
    with pytest.raises(RowRejected, match="usage_facts"):
        ledger.commit(wanted)
    assert list(ledger.find_refused(wanted)) == [7]
    assert count(dsn, "usage_facts") == 0


def test_damaged_positions_are_refused_by_the_schema(ledger: Ledger, start: Position, dsn: str) -> None:
    ledger.commit(plan_of(start, lines(0, 10)))
    damages = ("committed_offset = 5", "head = ''", "frontier_bytes = 1", "frontier_sha256 = ''", "state = 'lively'")
    with psycopg.connect(dsn, autocommit=True) as other:
        for damage in damages:
            with pytest.raises(psycopg.errors.CheckViolation):
                other.execute(f"update billing.tail_files set {damage}")


def test_the_lock_keeps_a_second_tailer_out_until_the_first_is_gone(ledger: Ledger, dsn: str) -> None:
    second = Ledger(dsn, schema="billing", source_id="default", stop=threading.Event())
    assert second._try_open() is False
    other_source = Ledger(dsn, schema="billing", source_id="other", stop=threading.Event())
    assert other_source._try_open() is True
    ledger.close()
    assert second._try_open() is True
    second.close()
    other_source.close()


def test_another_volume_is_refused(ledger: Ledger, dsn: str) -> None:
    second = Ledger(dsn, schema="billing", source_id="default", stop=threading.Event())
    with pytest.raises(ConfigError, match="SOURCE_ID default is in use for another volume"):
        second.open(tick=lambda: None, may_stand_by=lambda _: False)
    second.close()


def test_a_lost_session_cannot_write_any_more(ledger: Ledger, start: Position, dsn: str) -> None:
    """After a lost connection the old backend is ended before the position is read again."""
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity "
            "where application_name = 'billing_tailer default'"
        )
    with pytest.raises(LedgerUnavailable) as caught:
        ledger.commit(plan_of(start, line(0)))
    assert reason_of(caught.value) in ("admin_shutdown", "connection")
    ledger.lost(caught.value)
    assert ledger.open(tick=lambda: None, may_stand_by=lambda _: True)
    assert ledger.positions()[0].committed_offset == 0


def test_reopening_ends_the_old_backend(ledger: Ledger, dsn: str) -> None:
    """The old session still lives on the server (its client only looks dead to us): it must lose the lock."""
    old = ledger._connection
    assert old is not None
    backend = old.info.backend_pid
    ledger._connection = None  # as after a cut network: nobody told the server
    assert ledger.open(tick=lambda: None, may_stand_by=lambda _: True)
    alive = rows(dsn, "select 1 from pg_stat_activity where pid = %s", backend)
    assert alive == []
    old.close()


def test_a_lock_that_is_not_ours_is_noticed(ledger: Ledger) -> None:
    """What a pool in transaction mode does: the lock stays with another server session than the one we talk to."""
    ledger._session.execute("select pg_advisory_unlock_all()")
    with pytest.raises(ConfigError, match="pool in session mode"):
        ledger._prove_lock()


def test_statement_timeout_is_a_passing_fault(ledger: Ledger, start: Position, dsn: str) -> None:
    with psycopg.connect(dsn) as other:
        other.execute("lock table billing.usage_facts")
        ledger._session.execute("set statement_timeout = '200ms'")
        with pytest.raises(LedgerUnavailable) as caught:
            ledger.commit(plan_of(start, lines(0, 100)))
        assert reason_of(caught.value) == "query_canceled"
    assert ledger.positions()[0].committed_offset == 0


def test_migrations_apply_once_and_together(empty_dsn: str) -> None:
    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.append(migrate(empty_dsn))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [migration.name for migration in migrations()]
    assert sorted(results, key=len) == [[], [], [], names]


def test_another_schema_name(empty_dsn: str) -> None:
    migrate(empty_dsn, "money")
    with reports(empty_dsn, "money", "default") as found:
        assert found.totals()["facts"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("update billing.schema_migrations set version = version + 100", "newer than this program"),
        ("update billing.schema_migrations set sha256 = 'other'", "is not the one that was applied"),
    ],
)
def test_a_schema_of_another_program_is_refused(dsn: str, change: str, message: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute(change)
    with pytest.raises(ConfigError, match=message):
        migrate(dsn)


def test_a_missing_schema_is_a_configuration_error(empty_dsn: str) -> None:
    own = Ledger(empty_dsn, schema="billing", source_id="default", stop=threading.Event())
    with pytest.raises(ConfigError, match="is at version 0"):
        own.open(tick=lambda: None, may_stand_by=lambda _: True)


def test_nonsense_dsn(dsn: str) -> None:
    with pytest.raises(ConfigError, match="BILLING_TAILER_DATABASE_URL"):
        connect("postgresql://host:not-a-port/x?nonsense=1", "billing")
    with pytest.raises(LedgerUnavailable):
        connect("host=/nonexistent dbname=x", "billing")


def test_the_hot_statements_use_their_keys(ledger: Ledger, start: Position, dsn: str) -> None:
    """The compare-and-set and the growing row must find theirs by key, whatever the tables grow to."""
    ledger.commit(plan_of(start, lines(0, 10)))
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute("set search_path to billing")
        other.execute("set enable_seqscan = off")
        for statement, index in (
            ("update tail_files set state = 'live' where file_id = 1 and committed_offset = 0", "tail_files_pkey"),
            ("update tail_batches set end_offset = 1 where file_id = 1 and start_offset = 0", "tail_batches_pkey"),
            ("select 1 from usage_facts where call_id = 'x'", "usage_facts_pkey"),
            ("select 1 from usage_facts where run_id = 'x'", "usage_facts_run"),
        ):
            found = other.execute(f"explain {statement}").fetchall()
            assert index in str(found)


def test_a_deadlock_is_taken_through_staging(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sessions that insert the same calls in another order, as the daemon and a backfill do."""
    log = tmp_path / "audit.jsonl"
    log.write_bytes(lines(0, 60))
    real, tries = Ledger._commit_new, []

    def wait(other: psycopg.Connection, row: str) -> None:
        other.execute(row.encode(), ("a",))
        other.close()

    def waiting_for_each_other(self: Ledger, _plan: Plan, _meanwhile: Callable[[], None]) -> tuple[FileStep, ...]:
        """The other session has the last call and waits for the first."""
        tries.append(1)
        other = psycopg.connect(dsn, autocommit=False)
        other.execute("set search_path to billing; set deadlock_timeout to '10s'")
        row = "insert into skipped_calls (call_id, file_id, start_offset) values (%s, 1, 0)"
        other.execute(row, ("b",))
        self._session.execute("set deadlock_timeout to '20ms'")
        with wrapped(), self._session.transaction():
            self._session.execute(row, ("a",))
            threading.Thread(target=wait, args=(other, row)).start()
            time.sleep(0.2)
            try:
                self._session.execute(row, ("b",))
            finally:
                monkeypatch.setattr(Ledger, "_commit_new", real)
        raise AssertionError("no deadlock")

    monkeypatch.setattr(Ledger, "_commit_new", waiting_for_each_other)
    with following(dsn, tmp_path) as rig:
        assert rig.ledger.state is LedgerState.ACTIVE
    assert tries == [1]
    assert outcomes(dsn) == {"fact": 60}
    assert_sound(dsn)


@pytest.mark.parametrize("moment", ["while it decides", "before COMMIT"])
def test_who_freezes_while_deciding_holds_nobody_up(ledger: Ledger, start: Position, dsn: str, moment: str) -> None:
    """Postgres ends a session that says nothing from the last statement of loading calls on."""
    ledger.commit(plan_of(start, line(1)))
    decided = threading.Event()

    def freeze(frozen: Connection, other: Connection) -> None:
        with settlement.deciding(frozen, "billing"):
            calls = settlement.load(
                frozen, ["call-00000001"], deadline_seconds=900, quiet_seconds=10, is_over=lambda _: True
            )
            assert len(calls) == 1
            if moment == "before COMMIT":
                settlement.write(frozen, {"call-00000001": Decision(Standing.OVERDUE)})
            with settlement.deciding(other, "billing"):
                decided.set()

    with connect(dsn, "billing") as frozen, connect(dsn, "billing") as other:
        frozen.execute("set idle_in_transaction_session_timeout = '1s'")
        with pytest.raises(LedgerUnavailable, match=r"closed the connection|idle-in-transaction"):
            freeze(frozen, other)
    assert decided.is_set()


def test_calls_with_records(ledger: Ledger) -> None:
    """Whatever the ids are made of."""
    odd = ['quo"te', "back\\slash", "com,ma", "{brace}", "NULL", "ümlaut", "\\", "'"]
    records = [parse_spool_line(spool_line(payload(1, litellm_call_id=call_id))[:-1], Decimal(1)) for call_id in odd]
    ledger.add_records([record for record in records if isinstance(record, SpendRecord)])
    assert sorted(ledger.with_records({*odd, "unknown", "{}"})) == sorted(odd)
    assert ledger.with_records(set()) == []
