"""The session that writes: one connection, one advisory lock, one transaction per plan.

Holds POSITION_AND_ROWS_COMMIT_TOGETHER (tests/test_ledger.py::test_a_failed_compare_and_set_leaves_nothing,
tests/test_crash.py) and one owner per source: the lock is held by the very session that writes, so that whoever lost
the lock cannot write any more, and after a lost connection the old backend is ended before the position is read again.
"""

import contextlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import islice
from operator import itemgetter
from typing import Any, TypeAlias

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg.types.string import StrDumperUnknown
from tenacity import RetryError, Retrying, retry_if_exception_type, wait_exponential_jitter

from billing_tailer.errors import ConfigError, LedgerUnavailable, Overlap, PositionMoved, TailerError
from billing_tailer.ledger import settlement
from billing_tailer.ledger.connection import (
    Connection,
    connect,
    lock_key,
    may_change_money,
    query,
    reason_of,
    require_schema,
    wrapped,
)
from billing_tailer.ledger.records import insert_records, known_lines, record_key
from billing_tailer.ledger.resets import Reset, already_applied, apply_reset, range_start
from billing_tailer.model import (
    BatchRow,
    BlockReason,
    FileState,
    FileStep,
    Gap,
    GapReason,
    Outcome,
    Place,
    PlacedRecord,
    PlacedSkip,
    Plan,
    Position,
    SeenFile,
    SpendRecord,
)
from billing_tailer.plan import moved_counts
from billing_tailer.rows import COLUMNS as FACT_COLUMNS
from billing_tailer.rows import PLACE_COLUMNS, identity, values_of
from billing_tailer.settle import CallState, Decision

PING_SECONDS = 2.0
"""How often an idle session proves that it is alive; a frozen one is ended by the server after IDLE_SECONDS."""
IDLE_SECONDS = 12
STANDBY_POLL_SECONDS = 0.5
OTHER_VOLUME_SECONDS = 3.0
"""So long the volume may show none of the recorded files before it is taken for another one."""
WAIT_SECONDS_MAX = 1.0
LETTERS_COUNTED_MAX = 10_000
GAPS_COUNTED_MAX = 10_000
DEADLOCK_ATTEMPTS = 5
COPY_ROWS = 500
"""So many rows are handed to COPY at a time: a quarter of a megabyte."""
SEND_BYTES = 2 << 20
"""The rows of a whole batch, as far as `net.core.wmem_max` allows it: the thread that hands them to the kernel then
seldom waits for its turn beside the one that reads ahead."""
PIPELINE_FACTS_MAX = 20
"""Up to so many facts one pipelined round trip, work list included, is no slower than COPY, which takes a round trip of
its own and leaves the list for later."""
SKIPPED_CALLS_MAX = 200_000
"""Of the calls whose lines were skipped, so many are remembered: 30 MB, however many strangers knock."""

COLUMNS = (*FACT_COLUMNS, *PLACE_COLUMNS)
_COPY_FACTS = query("copy_facts").format(columns=", ".join(COLUMNS))
_COPY_STAGED = query("copy_staged").format(columns=", ".join(COLUMNS))
_INSERT_FACT = query("insert_fact").format(columns=", ".join(COLUMNS), values=", ".join(["%s"] * len(COLUMNS)))
_INSERT_STAGED = query("insert_staged").format(columns=", ".join(COLUMNS))
_Move: TypeAlias = Callable[[str, Sequence[Mapping[str, Any]]], None]
"""Runs a statement for each of the rows, all of which it must find."""
_STARTS = itemgetter(*map(COLUMNS.index, ("call_id", "occurred_at", "request_seconds")))


class LedgerState(StrEnum):
    """What the writing session is doing, for /readyz."""

    CONNECTING = "connecting"
    STANDBY = "standby"
    ACTIVE = "active"


@dataclass(frozen=True, slots=True)
class NewFile:
    """A generation to register, at a place behind 0 only for START_AT, which leaves a gap."""

    seen: SeenFile
    previous_file_id: int | None
    generation: int
    place: Place


@dataclass(frozen=True, slots=True)
class Changes:
    """What a scan changes about generations, in one transaction. updated: positions with their new place and state."""

    new: tuple[NewFile, ...] = ()
    updated: tuple[Position, ...] = ()
    gaps: tuple[Gap, ...] = ()


@dataclass(frozen=True, slots=True)
class Committed:
    """What became of a plan: its steps with the counts as they were stored, and the positions afterwards. unlisted: its
    facts may still have to be put on the work list."""

    steps: tuple[FileStep, ...]
    positions: tuple[Position, ...]
    seconds: float
    unlisted: bool


class Ledger:
    """The only writer of a source. Used by one thread, but for `abort` and the plain attributes."""

    def __init__(self, dsn: str, *, schema: str, source_id: str, stop: threading.Event) -> None:
        self._dsn = dsn
        self._schema = schema
        self.source_id = source_id
        self._stop = stop
        self._connection: Connection | None = None
        self._backend: tuple[int, datetime] | None = None
        self._lock_key = lock_key("source", schema, source_id)
        unsigned = self._lock_key & (2**64 - 1)
        self._lock_words = {"high": unsigned >> 32, "low": unsigned & (2**32 - 1)}  # as pg_locks shows the key
        self._last_proof = 0.0
        self.state = LedgerState.CONNECTING
        self.trouble: str | None = None

    # --- becoming and staying the owner

    def open(self, *, tick: Callable[[], None], may_stand_by: Callable[[Sequence[Position]], bool]) -> bool:
        """Connect and take the lock, however long Postgres is away or another tailer is active.

        tick is called at least once a second while waiting. may_stand_by is asked with the recorded positions before
        waiting for another owner: False means that the source id is in use for another volume (ConfigError).
        Returns False if told to stop.
        """

        def wait(seconds: float) -> None:
            tick()
            self._stop.wait(seconds)

        retrying = Retrying(
            retry=retry_if_exception_type(LedgerUnavailable),
            wait=wait_exponential_jitter(multiplier=0.05, max=WAIT_SECONDS_MAX, jitter=0.05),
            stop=lambda _: self._stop.is_set(),
            sleep=wait,
        )
        doubtful_since: float | None = None
        asked = False
        while not self._stop.is_set():
            tick()
            try:
                if retrying(self._try_open):
                    return True
            except RetryError:
                return False
            if not asked:
                with wrapped():
                    positions = self.positions()
                asked = may_stand_by(positions)
                # the log may have been rewritten while its owner is dying: it is asked again
                doubtful_since = None if asked else (doubtful_since or time.monotonic())
                if doubtful_since is not None and time.monotonic() - doubtful_since >= OTHER_VOLUME_SECONDS:
                    raise ConfigError(
                        f"SOURCE_ID {self.source_id} is in use for another volume",
                        "give every proxy's volume its own BILLING_TAILER_SOURCE_ID, or mount the same volume",
                    )
            self.close()
            wait(STANDBY_POLL_SECONDS)
        return False

    def _try_open(self) -> bool:
        """One attempt. True: owner. False: another session holds the lock; the connection is left open."""
        self.close()
        self.state = LedgerState.CONNECTING
        try:
            connection = connect(self._dsn, self._schema, application_name=f"billing_tailer {self.source_id}")
            self._connection = connection
            with contextlib.suppress(psycopg.Error, OSError), _socket_of(connection) as twin:
                if twin.family == socket.AF_UNIX:  # of other kinds the kernel finds the size itself
                    twin.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            with wrapped():
                if self._backend is not None:
                    # a COMMIT of ours may still be under way there: only its end makes the position readable
                    connection.execute(
                        "select pg_terminate_backend(pid, 5000) from pg_stat_activity "
                        "where pid = %s and backend_start = %s",
                        self._backend,
                    )
                connection.execute(
                    "select set_config('idle_session_timeout', %(idle)s, false), "
                    "set_config('idle_in_transaction_session_timeout', %(idle)s, false), "
                    "set_config('tcp_keepalives_idle', '5', false), set_config('tcp_keepalives_interval', '2', false), "
                    "set_config('tcp_keepalives_count', '3', false)",
                    {"idle": f"{IDLE_SECONDS}s"},
                )
            require_schema(connection, self._schema)
            with wrapped():
                row = connection.execute("select pg_try_advisory_lock(%s)", (self._lock_key,)).fetchone()
                if row != (True,):
                    connection.execute(query("end_frozen_owner"), {**self._lock_words, "seconds": IDLE_SECONDS})
                    self.state, self.trouble = LedgerState.STANDBY, "another tailer is active for this source"
                    return False
                row = connection.execute(
                    "select pid, backend_start from pg_stat_activity where pid = pg_backend_pid()"
                ).fetchone()
                assert row is not None
                self._backend = (row[0], row[1])
            self._prove_lock()
        except TailerError as error:
            self.trouble = error.message
            self.close()
            raise
        self.state, self.trouble = LedgerState.ACTIVE, None
        return True

    def _prove_lock(self) -> None:
        """The session that holds the lock must be the one we talk to: a DSN that pools per transaction breaks that."""
        with wrapped():
            row = self._session.execute(
                "select pg_backend_pid(), array_agg(pid) from pg_locks where locktype = 'advisory' and granted "
                "and database = (select oid from pg_database where datname = current_database()) "
                "and classid::bigint = %s and objid::bigint = %s and objsubid = 1",
                (self._lock_words["high"], self._lock_words["low"]),
            ).fetchone()
        assert row is not None
        assert self._backend is not None
        if row[1] != [row[0]] or row[0] != self._backend[0]:
            raise ConfigError(
                f"the lock of SOURCE_ID {self.source_id} is held by {row[1]}, but this session is {row[0]}",
                "point BILLING_TAILER_DATABASE_URL at Postgres itself, or at a pool in session mode",
            )
        self._last_proof = time.monotonic()

    def ping(self) -> None:
        """Prove the lock again if PING_SECONDS have passed. Raises LedgerUnavailable."""
        if time.monotonic() - self._last_proof >= PING_SECONDS:
            self._prove_lock()

    @property
    def _session(self) -> Connection:
        if self._connection is None:
            raise LedgerUnavailable("not connected")
        return self._connection

    def lost(self, error: LedgerUnavailable) -> None:
        """Forget the session after an error: positions are to be read again from Postgres."""
        self.state, self.trouble = LedgerState.CONNECTING, error.message
        self.close()

    def close(self) -> None:
        """End the session, and with it the lock."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(psycopg.Error):
                connection.close()

    def abort(self) -> None:
        """Cut the connection from another thread: a hanging statement fails and its transaction is rolled back."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(psycopg.Error, OSError), _socket_of(connection) as twin:
                twin.shutdown(socket.SHUT_RDWR)

    def may_change_money(self) -> bool:
        """Whether receipts are not append-only for our role."""
        return may_change_money(self._session, self._schema)

    # --- positions

    def positions(self, after_file_id: int = 0) -> list[Position]:
        """Every generation of the source, or those younger than one, oldest first."""
        values = {"source_id": self.source_id, "after_file_id": after_file_id}
        with wrapped(), self._session.cursor(row_factory=dict_row) as cursor:
            # row by row, and heads as bytes: thousands of generations would be in memory three times over
            return [position_of(row) for row in cursor.stream(query("positions"), values, binary=True)]

    def positions_of_daemons(self) -> list[Position]:
        """Every generation of every source, but for what was read by `backfill`, oldest first."""
        with wrapped(), self._session.cursor(row_factory=dict_row) as cursor:
            return [position_of(row) for row in cursor.execute(query("files_elsewhere")).fetchall()]

    def note_backfill(self, position: Position, reason: str, by: str) -> None:
        """Leave a row about a run of `backfill` that reads a file from a position on."""
        words = {"file_id": position.file_id, "path": position.path, "from_offset": position.committed_offset}
        with wrapped():
            self._session.execute(query("insert_backfill"), {**words, "reason": reason, "by": by})

    def apply(self, changes: Changes) -> None:
        """Commit what a scan found. Raises PositionMoved if a position is not where we believe it to be."""
        unfinished = [p for p in changes.updated if p.state is not FileState.FINAL]
        with wrapped(), self._session.transaction():
            with self._moving() as move:
                if unfinished:
                    self._session.cursor().executemany(query("delete_gaps_of_revived"), [_place(p) for p in unfinished])
                if changes.gaps:
                    self._session.cursor().executemany(query("insert_gap"), [_gap(gap) for gap in changes.gaps])
                move("update_file", [_place(position) for position in changes.updated])
            for file in changes.new:
                self._insert_file(file)

    def _insert_file(self, file: NewFile) -> None:
        seen, place = file.seen, file.place
        values = {
            "source_id": self.source_id,
            "path": seen.path,
            "device": seen.device,
            "inode": seen.inode,
            "generation": file.generation,
            "previous_file_id": file.previous_file_id,
            "head": place.head,
            "committed_offset": place.offset,
            "frontier_sha256": place.frontier_sha256,
            "frontier_bytes": place.frontier_bytes,
            "size_seen": max(seen.size, place.offset),
            "state": str(FileState.LIVE),
        }
        row = self._session.execute(query("insert_file"), values).fetchone()
        assert row is not None
        if place.offset:
            self._session.execute(query("insert_gap"), _gap(Gap(row[0], 0, place.offset, GapReason.START_AT)))

    def open_dead_letters(self) -> int:
        """How many dead letters of the source nobody has decided yet, counted up to LETTERS_COUNTED_MAX."""
        values = {"source_id": self.source_id, "count_max": LETTERS_COUNTED_MAX}
        with wrapped():
            row = self._session.execute(query("open_dead_letters"), values).fetchone()
        assert row is not None
        return int(row[0])

    def gap_counts(self) -> dict[GapReason, tuple[int, int]]:
        """Gaps of the source by reason: how many, and their bytes where these are known. Up to GAPS_COUNTED_MAX."""
        values = {"source_id": self.source_id, "count_max": GAPS_COUNTED_MAX}
        with wrapped():
            found = self._session.execute(query("gap_counts"), values).fetchall()
        return {GapReason(reason): (count, size) for reason, count, size in found}

    def reset(self, reset: Reset) -> None:
        """Apply an operator's reset. Raises PositionMoved."""
        apply_reset(self._session, self.source_id, reset)

    def reset_applied(self, reset_id: str, requested: str) -> bool:
        """True if this id was applied before with this request. Raises ConfigError if with another."""
        return already_applied(self._session, self.source_id, reset_id, requested)

    def range_start(self, position: Position, offset: int) -> int:
        """Where the committed range that contains `offset` begins."""
        return range_start(self._session, position, offset)

    def newest_reset(self) -> tuple[int, datetime | None]:
        """How often offsets were reset by operators, and when last: their commits may come in another order than their
        times."""
        with wrapped():
            row = self._session.execute(query("newest_reset"), {"source_id": self.source_id}).fetchone()
        assert row is not None
        return row[0], row[1]

    # --- plans

    def commit(self, plan: Plan, meanwhile: Callable[[], None] = lambda: None) -> Committed:
        """One plan, one transaction. Raises PositionMoved, RowRejected or LedgerUnavailable, with nothing written.

        meanwhile: called, maybe more than once, when there is time for other work: as soon as COPY has its first rows,
        and before the first statement where rows are few or spend records come first.
        """
        started = time.monotonic()
        if plan.records or len(plan.facts) <= PIPELINE_FACTS_MAX:
            meanwhile()
        steps = self._commit_once(plan, meanwhile, staged=plan.overlapping, attempts=DEADLOCK_ATTEMPTS)
        self._last_proof = time.monotonic()
        seconds = self._last_proof - started
        return Committed(steps, tuple(step.after() for step in steps), seconds, len(plan.facts) > PIPELINE_FACTS_MAX)

    def _commit_once(
        self, plan: Plan, meanwhile: Callable[[], None], *, staged: bool, attempts: int
    ) -> tuple[FileStep, ...]:
        """Direct first; through staging where calls are known, or where another session (a backfill of the same calls)
        and we waited for each other, which staging, in the order of call ids, does not do with its like."""
        try:
            return self._commit_staged(plan, meanwhile) if staged else self._commit_new(plan, meanwhile)
        except Overlap:
            if staged:
                raise
        except LedgerUnavailable as error:
            if reason_of(error) != "deadlock_detected" or not attempts:
                raise
        return self._commit_once(plan, meanwhile, staged=True, attempts=attempts - 1)

    def _commit_new(self, plan: Plan, meanwhile: Callable[[], None]) -> tuple[FileStep, ...]:
        """The common case: no call is known yet. A unique violation rolls everything back."""
        session = self._session
        if len(plan.facts) > PIPELINE_FACTS_MAX:
            with wrapped(), session.transaction():
                steps = self._insert_records(plan)
                copy_text(session, _COPY_FACTS, (fact.text for fact in plan.facts), meanwhile)
                with self._moving() as move:
                    session.cursor().executemany(query("insert_unlisted"), _unlisted(plan))
                    self._write_positions(plan, steps, move)
            return steps
        with wrapped(), self._moving_at_once() as move:
            steps = self._insert_records(plan)
            if plan.facts:
                values = [values_of(fact.text) for fact in plan.facts]
                _texts(session).executemany(_INSERT_FACT, values)
                _texts(session).executemany(query("insert_unsettled"), [_STARTS(row) for row in values])
            self._write_positions(plan, steps, move)
        return steps

    def _commit_staged(self, plan: Plan, meanwhile: Callable[[], None]) -> tuple[FileStep, ...]:
        """Calls that may be known: stage all, insert what is new, and sort the others into replays and conflicts."""
        session = self._session
        with wrapped(), session.transaction():
            steps = self._insert_records(plan)
            session.execute(query("create_staging"))
            texts = (f"{fact.text}\t{number}" for number, fact in enumerate(plan.facts))
            copy_text(session, _COPY_STAGED, texts, meanwhile)
            first: dict[str, int] = {}
            for number, fact in enumerate(plan.facts):
                first.setdefault(fact.call_id, number)
            inserted = [first[row[0]] for row in session.execute(_INSERT_STAGED).fetchall()]
            session.execute(query("unsettle_staged"), {"inserted": inserted})
            steps, conflicts = _sort_out(plan, steps, set(inserted), known_lines(session, first))
            if conflicts:
                session.execute(query("insert_conflicts"), {"conflicts": conflicts})
                # the call may be settled: after a crash right now nobody else would look at it again
                ids = [plan.facts[number].call_id for number in conflicts]
                session.execute(query("touch_calls"), {"call_ids": ids})
            with self._moving() as move:
                self._write_positions(plan, steps, move)
        return steps

    def add_records(self, records: Sequence[SpendRecord]) -> int:
        """Spend records that LiteLLM was asked for; returns how many of them are new."""
        if not records:
            return 0
        with wrapped(), self._session.transaction():
            return len(insert_records(self._session, [PlacedRecord(record) for record in records]))

    def _insert_records(self, plan: Plan) -> tuple[FileStep, ...]:
        """Insert the plan's spend records; returns the steps, with those that are known counted as replays."""
        if not plan.records:
            return plan.steps
        new = insert_records(self._session, plan.records)
        seen: set[tuple[str, str, str]] = set()
        replays: Counter[int] = Counter()
        for placed in plan.records:
            key = record_key(placed.record)
            if key not in new or key in seen:
                replays[placed.file_id or 0] += 1
            seen.add(key)
        return tuple(
            moved_counts(step, {str(Outcome.SPEND_RECORD): -replayed, str(Outcome.REPLAYED): replayed})
            if (replayed := replays[step.position.file_id])
            else step
            for step in plan.steps
        )

    @contextlib.contextmanager
    def _moving(self) -> Iterator[_Move]:
        """A pipeline. Raises PositionMoved at its end unless all that was to be moved is where this process left it.
        Not before: `Pipeline.sync` sends but once, and then waits for answers to what the socket had no room for."""
        moved: list[tuple[str, psycopg.Cursor[Any], int]] = []

        def move(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
            if rows:
                cursor = self._session.cursor()
                cursor.executemany(query(name), rows)
                moved.append((name, cursor, len(rows)))

        with self._session.pipeline():
            yield move
        for name, cursor, count in moved:
            if cursor.rowcount != count:
                raise PositionMoved(f"{name}: {cursor.rowcount} of {count} files are where this process left them")

    @contextlib.contextmanager
    def _moving_at_once(self) -> Iterator[_Move]:
        """`_moving` in a transaction of its own, whose BEGIN goes with the first statement: psycopg's waits for an
        answer, and so does its pipeline within one. COMMIT comes after the pipeline: Postgres does not start
        idle_session_timeout after one, and a process that freezes right then would keep its lock. Of one that freezes
        before COMMIT the lock is taken by whoever stands by (`end_frozen_owner`), as during COPY."""
        try:
            with self._moving() as move:
                self._session.execute("begin", prepare=False)  # rollback forgets no plan of what did not begin
                yield move
        except BaseException:
            with contextlib.suppress(psycopg.Error):  # what went wrong first is what counts
                self._session.rollback()
            raise
        self._session.commit()

    def _write_positions(self, plan: Plan, steps: Sequence[FileStep], move: _Move) -> None:
        """The compare-and-set of every file, its batch row and its dead letters."""
        batches = [_batch(step.position.file_id, step.batch) for step in steps if step.batch is not None]
        move("move_position", [_move(step) for step in steps])
        move("insert_batch", [row for row in batches if row["grows_from"] is None])
        move("grow_batch", [row for row in batches if row["grows_from"] is not None])
        move("insert_hole", [_gap(step.gap) for step in steps if step.gap is not None])
        if plan.skips:
            self._session.execute(query("insert_skipped"), _columns(plan.skips))
            self._session.execute(query("forget_skipped"), {"kept": SKIPPED_CALLS_MAX})
        if plan.dead_letters:
            self._session.cursor().executemany(
                query("insert_dead_letter"), [_letter(letter) for letter in plan.dead_letters]
            )

    # --- settlement

    def touched_calls(self, limit: int) -> list[str]:
        """Calls about which records have come that were not looked at yet."""
        return settlement.touched(self._session, limit)

    def list_facts(self) -> bool:
        """Put the calls of the oldest batch that is not listed yet on the work list; False where there is none."""
        if not settlement.any_unlisted(self._session):  # an idle daemon waits for nobody's turn to decide
            return False
        with self.deciding():
            settlement.list_facts(self._session)
        return True

    def waiting_calls(
        self, after: tuple[datetime, str] | None, limit: int, deadline_seconds: int
    ) -> settlement.WaitingPage:
        """The next calls that time may decide."""
        return settlement.waiting(self._session, after, limit, deadline_seconds)

    def due_calls(
        self,
        calls: Mapping[str, settlement.Waiting],
        *,
        by_header: bool,
        is_over: Callable[[settlement.Waiting], bool],
    ) -> list[str]:
        """Those of this source's waiting calls that can be decided. by_header: also those that their header settles."""
        return settlement.due(self._session, self.source_id, calls, by_header=by_header, is_over=is_over)

    def with_records(self, call_ids: Collection[str]) -> list[str]:
        """Those of the calls about which there is a spend record."""
        return settlement.with_records(self._session, call_ids)

    def open_exceptions(self, after: tuple[str, str] | None, limit: int) -> settlement.ExceptionPage:
        """The next calls with an exception that other settings may decide."""
        return settlement.open_exceptions(self._session, after, limit)

    def doubtful_calls(self, page: settlement.ExceptionPage, *, by_header: bool) -> list[str]:
        """Those of a page that the settings of now may decide."""
        return settlement.doubtful(self._session, self.source_id, page, by_header=by_header)

    def resume_calls(self, after_call: str, limit: int) -> str | None:
        """Let time decide again those of the next stopped calls that nothing stops; returns the last of all these."""
        with self.deciding():
            return settlement.resume(self._session, after_call, limit)

    def deciding(self) -> contextlib.AbstractContextManager[None]:
        """The transaction in which calls are loaded, decided and written."""
        return settlement.deciding(self._session, self._schema)

    def load_calls(
        self,
        call_ids: Collection[str],
        *,
        deadline_seconds: int,
        quiet_seconds: int,
        is_over: Callable[[settlement.Waiting], bool],
    ) -> list[CallState]:
        """Everything that is committed about these calls."""
        return settlement.load(
            self._session, call_ids, deadline_seconds=deadline_seconds, quiet_seconds=quiet_seconds, is_over=is_over
        )

    def take_calls(self, call_ids: Collection[str]) -> None:
        """Take calls off the list of touched ones, before they are loaded."""
        settlement.take(self._session, call_ids)

    def write_decisions(self, decisions: Mapping[str, Decision]) -> None:
        """Write what was decided."""
        settlement.write(self._session, decisions)
        self._last_proof = time.monotonic()

    def poll_window(
        self, started_after: datetime | None, late_after: tuple[datetime, str] | None, limit: int
    ) -> settlement.Window:
        """What to ask LiteLLM's spend logs for next."""
        return settlement.window(
            self._session, self.source_id, started_after=started_after, late_after=late_after, limit=limit
        )

    def asked(self, window: settlement.Window, *, answered: bool) -> None:
        """Note when calls that were given up are to be asked for again."""
        settlement.asked(self._session, window, answered=answered)

    def settle_counts(self) -> dict[str, Any]:
        """Pending calls, the oldest of them, open exceptions by kind."""
        return settlement.counts(self._session)

    def claim_unaudited(self, grace_seconds: int) -> tuple[datetime, datetime] | None:
        """A span of `received_at` (after, to) in which nobody else looks for spend records without a line, up to
        grace_seconds ago; None where there is none yet."""
        with wrapped():
            row = self._session.execute(query("unaudited_span"), {"grace": grace_seconds}).fetchone()
            if row is None or row[0] >= row[1]:
                return None
            span: tuple[datetime, datetime] = (row[0], row[1])
            claimed = self._session.execute(query("claim_unaudited"), {"after": span[0], "to": span[1]})
        return span if claimed.rowcount == 1 else None

    def find_refused(self, plan: Plan) -> dict[int, str]:
        """Which facts Postgres refuses, by index, with its words; nothing is written. Slow: one savepoint per fact."""
        refused: dict[int, str] = {}
        with wrapped(), self._session.transaction(force_rollback=True):
            for index, fact in enumerate(plan.facts):
                try:
                    with self._session.transaction():
                        _texts(self._session).execute(_INSERT_FACT, values_of(fact.text))
                except psycopg.errors.UniqueViolation:
                    continue
                except (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded) as error:
                    refused[index] = str(error).splitlines()[0]
        return refused


def _socket_of(connection: Connection) -> socket.socket:
    """A second descriptor of a connection's socket, to be closed."""
    return socket.socket(fileno=os.dup(connection.fileno()))


def copy_text(
    session: Connection, statement: str, texts: Iterable[str], meanwhile: Callable[[], None] = lambda: None
) -> None:
    """COPY rows that are text already. Postgres has the first ones before the last are looked at; meanwhile: called
    from then on."""
    rest = iter(texts)
    with session.cursor() as cursor, cursor.copy(sql.SQL(statement)) as copy:
        while rows := list(islice(rest, COPY_ROWS)):
            copy.write("\n".join(rows) + "\n")
            session.pgconn.flush()  # libpq keeps the end of a message for the next one, and Postgres waits for it
            meanwhile()


def _texts(session: Connection) -> psycopg.Cursor[Any]:
    """A cursor that leaves it to Postgres what type a text is."""
    cursor = session.cursor()
    cursor.adapters.register_dumper(str, StrDumperUnknown)
    return cursor


def _unlisted(plan: Plan) -> list[dict[str, int]]:
    """The ranges of a plan whose facts are to be put on the work list later."""
    return [
        {
            "file_id": step.position.file_id,
            "start_offset": step.position.committed_offset,
            "end_offset": step.end_offset,
            "facts": step.counts[Outcome.FACT],
            "second": plan.earliest[step.position.file_id],
        }
        for step in plan.steps
        if step.position.file_id in plan.earliest
    ]


def _sort_out(
    plan: Plan, before: Sequence[FileStep], inserted: set[int], known: set[tuple[str, str | None, bytes | None]]
) -> tuple[tuple[FileStep, ...], list[int]]:
    """Lines that made no fact -> steps with the counts put right, and the numbers of the conflicting lines. inserted:
    the numbers of those that made one; known: the requests that are known, theirs too."""
    change: dict[int, dict[str, int]] = {}
    conflicts: list[int] = []
    known = set(known)
    for number, placed in enumerate(plan.facts):
        if number in inserted:
            continue
        outcome = Outcome.REPLAYED if identity(placed) in known else Outcome.CONFLICT
        if outcome is Outcome.CONFLICT:
            conflicts.append(number)
            known.add(identity(placed))
        counts = change.setdefault(
            placed.file_id, {str(Outcome.FACT): 0, str(Outcome.REPLAYED): 0, str(Outcome.CONFLICT): 0}
        )
        counts[Outcome.FACT] -= 1
        counts[outcome] += 1
    steps = tuple(
        moved_counts(step, change[step.position.file_id]) if step.position.file_id in change else step
        for step in before
    )
    return steps, conflicts


def _move(step: FileStep) -> dict[str, Any]:
    return {
        "file_id": step.position.file_id,
        "old_offset": step.position.committed_offset,
        "end_offset": step.end_offset,
        "head": step.head,
        "frontier_sha256": step.frontier_sha256,
        "frontier_bytes": step.frontier_bytes,
        "size_seen": step.size_seen,
        "dead_letter_bytes": step.dead_letter_bytes,
    }


def _batch(file_id: int, batch: BatchRow) -> dict[str, Any]:
    return {
        "file_id": file_id,
        "start_offset": batch.start_offset,
        "end_offset": batch.end_offset,
        "grows_from": batch.grows_from,
        "sha256": batch.sha256,
        "counts": Jsonb(dict(batch.counts)),
    }


def _columns(skips: Sequence[PlacedSkip]) -> dict[str, list[Any]]:
    return {name: [getattr(skip, name) for skip in skips] for name in PlacedSkip._fields}


def _letter(letter: Any) -> dict[str, Any]:
    return {
        "file_id": letter.file_id,
        "start_offset": letter.start_offset,
        "end_offset": letter.end_offset,
        "reason": str(letter.reason),
        "detail": letter.detail.replace("\0", "\\0"),
        "raw": letter.raw,
        "sha256": letter.sha256,
    }


def _gap(gap: Gap) -> dict[str, Any]:
    return {
        "file_id": gap.file_id,
        "start_offset": gap.start_offset,
        "end_offset": gap.end_offset,
        "reason": str(gap.reason),
    }


def _place(position: Position) -> dict[str, Any]:
    return {
        "file_id": position.file_id,
        "committed_offset": position.committed_offset,
        "path": position.path,
        "device": position.device,
        "inode": position.inode,
        "size_seen": position.size_seen,
        "state": str(position.state),
        "blocked_reason": None if position.blocked_reason is None else str(position.blocked_reason),
    }


def position_of(row: Mapping[str, Any]) -> Position:
    """A row of the query `positions`."""
    return Position(
        **{
            **row,
            "device": int(row["device"]),
            "inode": int(row["inode"]),
            "state": FileState(row["state"]),
            "blocked_reason": None if row["blocked_reason"] is None else BlockReason(row["blocked_reason"]),
        }
    )
