"""What the HTTP API asks Postgres: short reads on connections of their own, which cannot write.

Two threads, whoever asks and however many; a statement ends after STATEMENT_TIMEOUT_SECONDS, so that no snapshot is
held for longer. A connection that broke while it was idle costs nobody an answer; while Postgres is away, everybody is
told at once (tests/test_runs.py::test_postgres_away, ::test_a_restart_of_postgres_costs_no_answer).
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Any, TypeVar

import psycopg
from psycopg.errors import QueryCanceled
from psycopg.rows import dict_row

from billing_tailer.errors import LedgerUnavailable
from billing_tailer.ledger.connection import Connection, connect, query, wrapped

THREADS = 2
QUEUE_MAX = 4000
"""Reads that may wait for a thread."""
STATEMENT_TIMEOUT_SECONDS = 5
AWAY_SECONDS = 1.0
"""After a failed attempt to connect, so long nobody tries again."""
EXCEPTIONS_MAX = 100
FILES_MAX = 50
UNAUDITED_NAMED_MAX = 20
ROWS_MAX = 1000
"""Spend records or conflicts of one call that are shown."""

_RUN_STATUS = query("run_status").format(standings=query("call_standings"))
_RUN_CALLS = query("run_calls").format(standings=query("call_standings"))
WINDOW_COUNTS = query("reconcile_window").format(calls=query("reconcile_calls"))
"""How many calls that ended from `start` to before `end` stand where, and what they cost."""

T = TypeVar("T")
Read = Callable[[Connection], T]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at one moment. Credits and USD are receipts plus adjustments.

    settled: calls that have a receipt or are not charged. settled_named: which of the calls asked for by name are
    among them. exceptions: open ones (call_id, kind, opened_at), the oldest EXCEPTIONS_MAX. time: Postgres's clock;
    files: path and committed_offset of each file of the source, the FILES_MAX that moved last.
    """

    calls: int
    settled: int
    charged_credits: int
    provider_cost_usd: Decimal
    user_cost_usd: Decimal
    settled_named: frozenset[str]
    exceptions: list[dict[str, Any]]
    time: datetime
    files: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Unaudited:
    """Spend records without an audit line. with_line: those whose line was skipped, call_ids: some of them."""

    records: int
    with_line: int
    call_ids: list[str]


class Reads:
    """The API's way to Postgres. Every method may be called from any thread and returns at once."""

    def __init__(self, schema: str, source_id: str, *, threads: int = THREADS, waiting_max: int = QUEUE_MAX) -> None:
        """threads, waiting_max: who reads what takes long has threads of his own, and does not let many wait."""
        self._schema = schema
        self._source_id = source_id
        self._threads = threads
        self._waiting_max = waiting_max
        self._dsn: str | None = None
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Read[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._away: tuple[float, LedgerUnavailable] | None = None

    @contextmanager
    def of(self, dsn: str) -> Iterator[None]:
        """Answer from this database; before and afterwards, every read fails with LedgerUnavailable."""
        threads = [threading.Thread(target=self._work, name=f"reads-{n}", daemon=True) for n in range(self._threads)]
        self._dsn = dsn
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._dsn = None
            for _ in threads:
                self._jobs.put(None)

    def run_status(self, run_id: str, named: Collection[str]) -> Future[RunStatus]:
        """The calls of a run; those `named` that are settled are told apart."""
        return self.submit(partial(_run_status, source_id=self._source_id, run_id=run_id, named=list(named)))

    def run_calls(self, run_id: str, after: str, limit: int) -> Future[list[dict[str, Any]]]:
        """A page of a run's calls in the order of their ids."""
        return self.submit(partial(_run_calls, run_id=run_id, after=after, limit=limit))

    def closed_window(self, closed_seconds: int) -> Future[dict[str, Any]]:
        """Where the calls stand that ended in the 15 minutes up to so many seconds ago (a whole minute)."""
        return self.submit(partial(_closed_window, closed_seconds=closed_seconds))

    def unaudited(self, after: datetime, to: datetime) -> Future[Unaudited]:
        """Spend records without a line that were received after `after`, up to `to`."""
        return self.submit(partial(_unaudited, after=after, to=to))

    def call(self, call_id: str) -> Future[dict[str, Any]]:
        """Everything that is known of one call, at one moment, and the files that its parts stand in."""
        return self.submit(partial(_call, call_id=call_id))

    # --- threads

    def submit(self, read: Read[T]) -> Future[T]:
        """Have one of the threads read: `read` is called with a connection that cannot write. A connection that broke
        while it was idle means that it is called twice."""
        future: Future[T] = Future()
        with self._lock:  # nothing is put behind the threads' last job
            if self._dsn is None:
                future.set_exception(LedgerUnavailable("the database is not open", "try again in a second"))
            elif self._jobs.qsize() >= self._waiting_max:
                waiting = f"{self._waiting_max} reads wait already"
                future.set_exception(LedgerUnavailable(waiting, "try again in a second"))
            else:
                self._jobs.put((future, read))
        return future

    def _work(self) -> None:
        connection: Connection | None = None
        while (job := self._jobs.get()) is not None:
            future, read = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                connection, answer = self._answer(connection, read)
            except Exception as error:  # noqa: BLE001  # it is the asker's: the thread goes on
                _close(connection)
                connection = None
                future.set_exception(error)
            else:
                future.set_result(answer)
        _close(connection)

    def _answer(self, connection: Connection | None, read: Read[T]) -> tuple[Connection, T]:
        if connection is not None and not connection.closed:
            try:
                with wrapped():
                    return connection, read(connection)
            except LedgerUnavailable as error:
                if isinstance(error.__cause__, QueryCanceled):
                    raise
                _close(connection)  # it broke while idle, perhaps: only a fresh one tells
        connection = self._connect()
        try:
            with wrapped():
                connection.execute(query("read_only_session"), {"timeout": f"{STATEMENT_TIMEOUT_SECONDS}s"})
                return connection, read(connection)
        except BaseException:
            _close(connection)
            raise

    def _connect(self) -> Connection:
        dsn, away = self._dsn, self._away
        if dsn is None:
            raise LedgerUnavailable("the database is not open", "try again in a second")
        if away is not None and time.monotonic() < away[0]:
            raise LedgerUnavailable(away[1].message, away[1].hint)
        try:
            connection = connect(dsn, self._schema, application_name="billing_tailer reads")
        except LedgerUnavailable as error:
            self._away = (time.monotonic() + AWAY_SECONDS, error)
            raise
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        self._away = None
        return connection


def _close(connection: Connection | None) -> None:
    if connection is not None:
        with contextlib.suppress(psycopg.Error):
            connection.close()


def _rows(connection: Connection, statement: Any, **parameters: Any) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement, parameters).fetchall()


def _run_status(connection: Connection, *, source_id: str, run_id: str, named: Sequence[str]) -> RunStatus:
    limits = {"exceptions_max": EXCEPTIONS_MAX, "files_max": FILES_MAX}
    [row] = _rows(connection, _RUN_STATUS, source_id=source_id, run_id=run_id, named=named, **limits)
    return RunStatus(**{**row, "settled_named": frozenset(row["settled_named"])})


def _run_calls(connection: Connection, *, run_id: str, after: str, limit: int) -> list[dict[str, Any]]:
    return _rows(connection, _RUN_CALLS, run_id=run_id, after=after, limit=limit)


def _closed_window(connection: Connection, *, closed_seconds: int) -> dict[str, Any]:
    [window] = _rows(connection, query("closed_window"), closed=closed_seconds)
    [row] = _rows(connection, WINDOW_COUNTS, **window)
    return row


def _unaudited(connection: Connection, *, after: datetime, to: datetime) -> Unaudited:
    [row] = _rows(connection, query("unaudited"), after=after, to=to, named_max=UNAUDITED_NAMED_MAX)
    return Unaudited(**row)


def _call(connection: Connection, *, call_id: str) -> dict[str, Any]:
    with connection.transaction():
        facts = _rows(connection, query("call_fact"), call_id=call_id)
        records = _rows(connection, query("call_records"), call_id=call_id, limit=ROWS_MAX)
        conflicts = _rows(connection, query("call_conflicts"), call_id=call_id, limit=ROWS_MAX)
        receipts, adjustments, exceptions = (
            [
                {column: value for column, value in row.items() if column != "key"}
                for row in _rows(connection, query(f"settle_{name}"), call_ids=[call_id])
            ]
            for name in ("receipts", "adjustments", "exceptions")
        )
        details = _rows(connection, query("call_details"), call_id=call_id)
        named = {row["file_id"] for row in (*facts, *records, *conflicts)} - {None}
        files = _rows(connection, query("call_files"), file_ids=sorted(named))
    return {
        "fact": facts[0] if facts else None,
        "records": records,
        "receipt": receipts[0] if receipts else None,
        "details": details[0] if details else None,
        "adjustments": adjustments,
        "exceptions": exceptions,
        "conflicts": conflicts,
        "files": {row["file_id"]: row for row in files},
    }
