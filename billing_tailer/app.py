"""Composition root of the daemon: puts the rooms together, runs the loop, ends in time.

However the loop hangs, the process ends within five seconds of SIGTERM, and never goes on without its side tasks
(tests/test_app.py::test_sigterm_while_postgres_hangs, ::test_the_http_thread_dies,
::test_the_embedded_postgres_dies).
"""

import ctypes
import gc
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Self

from starlette.routing import BaseRoute

from billing_tailer import __version__, audit, fastlane
from billing_tailer.capture import Capture
from billing_tailer.configured import given_dsn, rules, spool_directory
from billing_tailer.embedded import EmbeddedPostgres, default_data_dir
from billing_tailer.errors import LedgerUnavailable, TailerError
from billing_tailer.events import Events, configure_logging
from billing_tailer.files import LogFiles, escape_path
from billing_tailer.follower import Follower
from billing_tailer.health import Health
from billing_tailer.ledger import Ledger, LedgerState, Reads, listening, migrate
from billing_tailer.litellm import SpendLogs
from billing_tailer.poller import Poller
from billing_tailer.reader import Limits, Reader
from billing_tailer.resets import OrderedReset
from billing_tailer.settings import HEADER_LIMITS, Settings, effective
from billing_tailer.settler import Settler, Timing
from billing_tailer.spend import parse_row, parse_spool_line, slim
from billing_tailer.spool import Committer, Spool
from billing_tailer.tailer import Tailer
from billing_tailer.wake import Wake
from billing_tailer.web import HttpServer
from billing_tailer.web.callbacks import callback_routes
from billing_tailer.web.pages import THREADS, WAITING_MAX, Deciding, page_routes
from billing_tailer.web.runs import run_routes
from billing_tailer.web.waiters import Waiters

ABORT_SECONDS = 3.0
"""So long after SIGTERM a hanging transaction is cut."""
M_ARENA_MAX = -8
"""Of malloc.h."""
EXIT_SECONDS = 4.5
"""So long after SIGTERM the process ends whatever hangs: what is not committed is read again."""
WATCH_SECONDS = 1.0
MIGRATE_RETRY_SECONDS = 1.0
SPEND_LOGS_PAGE_ROWS = 250
"""A row has 10 KB: larger pages need more memory than the daemon is to have."""
SPOOL_RETENTION_SECONDS = 7 * 24 * 3600
"""So long a finished spool file stays after its last byte was written, unless room is needed, and at least until it is
committed."""

GARBAGE_OBJECTS = 20_000
"""So many new objects are looked through for cycles at a time. Lines make thousands of them and no cycles: with
Python's 700, and everything there is looked through now and then, that was a tenth of a backlog's time."""
SWITCH_SECONDS = 0.0002
"""So long may one thread keep the others from running: while the next batch is parsed, the one that feeds COPY has
little to do, and much to wait for. With Python's 5 ms a backlog took half as long again."""

_COMMITTER: dict[LedgerState, Committer] = {LedgerState.ACTIVE: "us", LedgerState.STANDBY: "another"}


class Ending:
    """How the process ends: by a signal, or because a side task has died. One thread waits for both.

    A signal handler runs in the middle of whatever the main thread does: setting an Event there would wait for ever
    for a lock that the main thread holds. `SimpleQueue.put` is made for that; the thread does the rest.
    """

    def __init__(self, wake: Callable[[], None], events: Events) -> None:
        """wake: makes the loop look at `stop`."""
        self.stop = threading.Event()
        self.abort: Callable[[], None] = lambda: None
        """Cuts a hanging transaction. Called from another thread."""
        self.died: str | None = None
        self._wake = wake
        self._events = events
        self._requests: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._signalled = False
        self._over = threading.Event()
        self._watched: dict[str, Callable[[], bool]] = {}
        self._thread = threading.Thread(target=self._wait, name="ending", daemon=True)

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is None and self.died is not None:
            raise TailerError(f"{self.died} has died", "see the log above; a supervisor should start the process again")

    @contextmanager
    def watching(self, name: str, alive: Callable[[], bool]) -> Iterator[None]:
        """End the process if a side task dies in here."""
        self._watched[name] = alive
        try:
            yield
        finally:
            self._watched.pop(name)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """First SIGTERM or SIGINT: finish or roll back the batch and end. Second: die at once."""
        if self._signalled:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signalled = True
        self._requests.put(number)

    def _wait(self) -> None:
        while not self._over.is_set() and self.died is None:
            try:
                number = self._requests.get(timeout=WATCH_SECONDS)
                self._events.info("stopping", signal=signal.Signals(number).name)
                break
            except queue.Empty:
                dead = (name for name, alive in list(self._watched.items()) if not alive())
                self.died = next(dead, None)
                if self.died is not None:
                    self._events.error("side_task.died", name=self.died)
        self.stop.set()
        self._wake()
        if self._over.wait(ABORT_SECONDS):
            return
        self._events.warning("stopping.abort", message="the transaction does not end: its connection is cut")
        self.abort()
        if self._over.wait(EXIT_SECONDS - ABORT_SECONDS):
            return
        self._events.error("stopping.forced", message="the process hangs: what is not committed will be read again")
        os._exit(0 if self.died is None else 1)


def _share_one_heap() -> None:
    """Before threads are made: glibc would give each of them a heap of its own, which it fills and hardly gives back.
    With pages and exports in use that was 92 MB resident instead of 86. Another libc has no such thing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def run(settings: Settings) -> int:
    """The daemon, until SIGTERM or SIGINT. Returns the exit code; raises TailerError."""
    configure_logging(settings.log_level, settings.log_format)
    _share_one_heap()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()  # what was imported stays
    gc.set_threshold(GARBAGE_OBJECTS)
    # log files that are held open and clients that wait share the limit, of which the soft part is often 1024
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard := resource.getrlimit(resource.RLIMIT_NOFILE)[1], hard))
    events, health = Events(), Health()
    events.of_source(settings.source_id)
    events.info("starting", version=__version__, settings=effective(settings))
    LogFiles(settings.audit_globs, settings.open_files_max).require_mounts()
    spool = _spool(settings, events)
    files = _log_files(settings, spool)
    wake = Wake(files.concerns, told=() if spool is None else (str(spool.directory),))
    reads = Reads(settings.db_schema, settings.source_id)
    page_reads = Reads(settings.db_schema, settings.source_id, threads=THREADS, waiting_max=WAITING_MAX)
    waiters = Waiters(reads.run_status)
    routes = [
        *_callback_routes(settings, spool, events),
        *run_routes(_api_token(settings), reads, waiters),
        *_page_routes(settings, page_reads, health, events),
    ]
    http = HttpServer(settings.http_host, settings.http_port, events, health, routes)
    # the spool before HTTP and after it: who reaches us is never told that the spool is closed
    with Ending(wake.set, events) as ending, _spooling(spool, ending):
        http.start()
        try:
            with (
                ending.watching("the HTTP thread", http.alive),
                _database(settings, ending, events) as dsn,
                reads.of(dsn),
                page_reads.of(dsn),
                listening(dsn, settings.db_schema, waiters.notify) as hears,
                ending.watching("the thread that hears of operators", hears),
                closing(waiters),
            ):
                _follow(settings, dsn, files, spool, events, health, ending, wake, reads, waiters.notify)
        finally:
            http.stop()
            wake.stop()
            files.close()
    events.info("stopped")
    return 0


def _page_routes(settings: Settings, reads: Reads, health: Health, events: Events) -> list[BaseRoute]:
    how = Deciding(rules(settings), settings.failure_quiet_seconds, settings.settle_deadline_seconds)
    return page_routes(_api_token(settings), reads, settings.db_schema, settings.source_id, how, health, events)


def _spool(settings: Settings, events: Events) -> Spool | None:
    """The spool of callbacks; None where nobody may send any."""
    if settings.cost_source == "header":
        events.warning("cost_source.header", message=HEADER_LIMITS)
    directory = spool_directory(settings)
    if directory is None:
        if settings.litellm_url is None and settings.cost_source == "litellm":
            events.warning(
                "cost_source.missing",
                message="calls are recorded but not charged: set CALLBACK_TOKEN, or LITELLM_URL and LITELLM_API_KEY",
            )
        return None
    return Spool(directory, settings.spool_bytes_max, events.spool)


def _log_files(settings: Settings, spool: Spool | None) -> LogFiles:
    if spool is None:
        return LogFiles(settings.audit_globs, settings.open_files_max)
    inside = os.fsencode(spool.directory) + b"/"
    return LogFiles(
        (*settings.audit_globs, spool.glob),
        settings.open_files_max,
        lambda path: spool.readable_bytes(path) if path.startswith(inside) else sys.maxsize,
    )


def _api_token(settings: Settings) -> str | None:
    return None if settings.api_token is None else settings.api_token.get_secret_value()


def _callback_routes(settings: Settings, spool: Spool | None, events: Events) -> list[BaseRoute]:
    if spool is None:
        return []
    events.expect_callbacks()
    token = None if settings.callback_token is None else settings.callback_token.get_secret_value()
    return [*callback_routes(token, spool, slim, settings.callback_bytes_max, events.callback)]


@contextmanager
def _spooling(spool: Spool | None, ending: "Ending") -> Iterator[None]:
    if spool is None:
        yield
        return
    spool.start()
    try:
        with ending.watching("the spool's thread", spool.alive):
            yield
    finally:
        spool.stop()


def _follow(
    settings: Settings,
    dsn: str,
    files: LogFiles,
    spool: Spool | None,
    events: Events,
    health: Health,
    ending: Ending,
    wake: Wake,
    reads: Reads,
    notify: Callable[[Collection[str]], None],
) -> None:
    ledger = Ledger(dsn, schema=settings.db_schema, source_id=settings.source_id, stop=ending.stop)
    ending.abort = ledger.abort
    if spool is not None:
        spool.synced = wake.set
        spool.committer = lambda: _COMMITTER.get(ledger.state)
    in_spool = None if spool is None else escape_path(os.fsencode(spool.directory)) + "/"

    def is_spool(path: str) -> bool:
        return in_spool is not None and path.startswith(in_spool)

    at_end = settings.start_at == "end"
    follower = Follower(files, ledger, events, health, start_at_end=at_end, is_spool=is_spool)

    def spool_is_behind() -> bool:
        return follower.spool_is_behind() or (spool is not None and spool.has_more)

    capture = Capture(ledger, reads, events, settings.settle_deadline_seconds)

    def tidy() -> None:
        capture.turn()
        if spool is not None:
            follower.removed(spool.janitor(follower.is_committed, SPOOL_RETENTION_SECONDS, time.time()))

    with _polling(settings, ending, wake) as poller:
        tailer = Tailer(
            files=files,
            ledger=ledger,
            follower=follower,
            reader=_reader(settings, files, is_spool),
            wake=wake,
            events=events,
            health=health,
            stop=ending.stop,
            poll_interval_seconds=settings.poll_interval_seconds,
            reset=OrderedReset(settings.offset_reset, settings.offset_reset_id, ledger, files, events, health),
            settler=Settler(
                ledger,
                rules(settings),
                Timing(settings.settle_deadline_seconds, settings.failure_quiet_seconds),
                events,
                health,
                poller=poller,
                spool_is_behind=spool_is_behind,
                notify=notify,
            ),
            tidy=tidy,
        )
        _migrate(settings, dsn, follower, events, health, ending)
        wake.start()
        if wake.trouble:
            events.warning("inotify.unavailable", trouble=wake.trouble, message="the poll interval does the work")
        try:
            tailer.run()
        finally:
            ledger.close()


def _reader(settings: Settings, files: LogFiles, is_spool: Callable[[str], bool]) -> Reader:
    audit_line = fastlane.AuditLines(audit.routes(settings.llm_routes))
    spool_line = partial(parse_spool_line, cost_max=settings.cost_max_usd)
    limits = Limits(settings.batch_lines_max, settings.batch_bytes_max, settings.line_bytes_max)
    return Reader(files, lambda path: spool_line if is_spool(path) else audit_line, limits)


@contextmanager
def _polling(settings: Settings, ending: Ending, wake: Wake) -> Iterator[Poller | None]:
    """The side task that asks LiteLLM's spend logs, where its address is known."""
    if settings.litellm_url is None or settings.litellm_api_key is None or settings.cost_source == "header":
        yield None
        return
    key = settings.litellm_api_key.get_secret_value()
    logs = SpendLogs(settings.litellm_url, key, stop=ending.stop, page_size=SPEND_LOGS_PAGE_ROWS)
    poller = Poller(logs, partial(parse_row, cost_max=settings.cost_max_usd), wake.set)
    poller.start()
    try:
        with ending.watching("the poller of spend logs", lambda: poller.alive() or ending.stop.is_set()):
            yield poller
    finally:
        logs.close()
        poller.stop()


def _migrate(settings: Settings, dsn: str, follower: Follower, events: Events, health: Health, ending: Ending) -> None:
    """Apply the migrations where that is ours to do, however long Postgres is away."""
    if settings.uses_embedded_postgres:
        owner = dsn
    elif settings.migrate_database_url is not None:
        owner = settings.migrate_database_url.get_secret_value()
    else:
        return
    while not ending.stop.is_set():
        health.tick()
        try:
            applied = migrate(owner, settings.db_schema)
        except LedgerUnavailable as error:
            health.say("ledger", [f"migrating: {error.message}"])
            events.warning("migrate.waiting", message=error.message)
            follower.show(time.time(), waiting=True)
            ending.stop.wait(MIGRATE_RETRY_SECONDS)
        else:
            events.info("migrated", applied=applied)
            return


@contextmanager
def _database(settings: Settings, ending: Ending, events: Events) -> Iterator[str]:
    """The DSN to write to; starts the embedded Postgres where none is given."""
    if not settings.uses_embedded_postgres:
        yield given_dsn(settings)
        return
    data_dir = settings.data_dir or default_data_dir(os.environ)
    with (
        EmbeddedPostgres(data_dir, settings.postgres_bin) as postgres,
        ending.watching("the embedded Postgres", postgres.alive),
    ):
        events.info("postgres.embedded", data_dir=str(data_dir), dsn=postgres.dsn)
        yield postgres.dsn
