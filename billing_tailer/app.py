"""Composition root of the daemon: puts the rooms together, runs the loop, ends in time."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from billing_tailer import __version__, audit
from billing_tailer.embedded import EmbeddedPostgres, attach, default_data_dir
from billing_tailer.errors import ConfigError, TailerError
from billing_tailer.events import Events, configure_logging
from billing_tailer.files import LogFiles, escape_path
from billing_tailer.follower import Follower
from billing_tailer.health import Health
from billing_tailer.ledger import Ledger, migrate
from billing_tailer.resets import newest_at, plan_reset
from billing_tailer.settings import OffsetReset, Settings, effective
from billing_tailer.tailer import Limits, Tailer
from billing_tailer.wake import Wake
from billing_tailer.web import HttpServer

ABORT_SECONDS = 3.5
"""After SIGTERM a hanging transaction is cut after this time, so that the process ends within five seconds."""


def run(settings: Settings) -> int:
    """The daemon, until SIGTERM or SIGINT. Returns the exit code; raises TailerError."""
    configure_logging(settings.log_level, settings.log_format)
    events, health, stop, wake = Events(), Health(), threading.Event(), Wake()
    events.info("starting", version=__version__, settings=effective(settings))
    files = LogFiles(settings.audit_globs, settings.open_files_max)
    files.require_mounts()
    http = HttpServer(settings.http_host, settings.http_port, events, health)
    http.start()
    with _database(settings, events.info) as dsn:
        ledger = Ledger(dsn, schema=settings.db_schema, source_id=settings.source_id, stop=stop)
        with _signals(stop, wake, ledger.abort, events):
            watchdog = _watch_side_task(http, stop, wake)
            try:
                _follow(settings, files, ledger, events, health, stop, wake)
            finally:
                wake.stop()
                ledger.close()
                files.close()
    died = watchdog.is_set()
    http.stop()
    if died:
        raise TailerError("the HTTP thread has died", "see the log above; a supervisor should start the process again")
    events.info("stopped")
    return 0


def _follow(
    settings: Settings,
    files: LogFiles,
    ledger: Ledger,
    events: Events,
    health: Health,
    stop: threading.Event,
    wake: Wake,
) -> None:
    follower = Follower(files, ledger, events, health, start_at_end=settings.start_at == "end")
    tailer = Tailer(
        files=files,
        ledger=ledger,
        follower=follower,
        parse=partial(audit.parse, is_llm_route=audit.routes(settings.llm_routes)),
        wake=wake,
        events=events,
        health=health,
        stop=stop,
        limits=Limits(
            settings.poll_interval_seconds,
            settings.batch_lines_max,
            settings.batch_bytes_max,
            settings.line_bytes_max,
        ),
        apply_reset=partial(_apply_reset, settings, ledger, files, events, health),
    )
    wake.start()
    if wake.trouble:
        events.warning("inotify.unavailable", trouble=wake.trouble, message="the poll interval does the work")
    tailer.run()


def _apply_reset(settings: Settings, ledger: Ledger, files: LogFiles, events: Events, health: Health) -> None:
    """OFFSET_RESET, once per OFFSET_RESET_ID."""
    wanted, reset_id = settings.offset_reset, settings.offset_reset_id
    if wanted is None or reset_id is None:
        return
    request = OffsetReset(escape_path(os.fsencode(wanted.path)), wanted.target)
    if ledger.reset_applied(reset_id, str(request)):
        events.info("offset.reset_known", reset_id=reset_id, requested=str(request), message="applied before: no-op")
        return
    position = newest_at(ledger.positions(), request.path)
    if position is None:
        health.say("reset", [f"OFFSET_RESET {request}: nothing is known of {request.path} yet; the id is not used up"])
        events.warning("offset.reset_pending", reset_id=reset_id, requested=str(request))
        return
    reset = plan_reset(
        request,
        position,
        files,
        ledger.range_start,
        reset_id=reset_id,
        source="env",
        reason="BILLING_TAILER_OFFSET_RESET",
    )
    ledger.reset(reset)
    events.reset(
        "env",
        reset_id=reset_id,
        path=position.path,
        file_id=position.file_id,
        old_offset=position.committed_offset,
        new_offset=reset.place.offset,
    )


@contextmanager
def _database(settings: Settings, report: Callable[..., None]) -> Iterator[str]:
    """The DSN to write to; starts the embedded Postgres where none is given, and migrates where that is ours to do."""
    if not settings.uses_embedded_postgres:
        if settings.database_url is None:
            raise ConfigError(
                "BILLING_TAILER_MIGRATE_DATABASE_URL is set, but BILLING_TAILER_DATABASE_URL is not",
                "set both: the first with the owner's role, the second with the daemon's",
            )
        if settings.migrate_database_url is not None:
            applied = migrate(settings.migrate_database_url.get_secret_value(), settings.db_schema)
            report("migrated", applied=applied)
        yield settings.database_url.get_secret_value()
        return
    data_dir = settings.data_dir or default_data_dir(os.environ)
    with EmbeddedPostgres(data_dir, settings.postgres_bin) as postgres:
        dsn = postgres.dsn
        report("postgres.embedded", data_dir=str(data_dir), dsn=dsn)
        migrate(dsn, settings.db_schema)
        yield dsn


@contextmanager
def database_for_verbs(settings: Settings) -> Iterator[str]:
    """The DSN for a verb: the one given, else that of a running daemon's embedded Postgres, else a started one."""
    if settings.uses_embedded_postgres:
        running = attach(settings.data_dir or default_data_dir(os.environ))
        if running is not None:
            yield running
            return
    elif settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    with _database(settings, lambda *_, **__: None) as dsn:
        yield dsn


@contextmanager
def _signals(stop: threading.Event, wake: Wake, abort: Callable[[], None], events: Events) -> Iterator[None]:
    """First SIGTERM or SIGINT: finish or roll back the batch and end. Second: die at once."""
    timer = threading.Timer(ABORT_SECONDS, abort)
    timer.daemon = True

    def on_signal(number: int, _: FrameType | None) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()
        wake.set()
        timer.start()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.is_set():
        events.info("stopping")


def _watch_side_task(http: HttpServer, stop: threading.Event, wake: Wake) -> threading.Event:
    """Stops the loop when the HTTP thread dies; returns the event that tells that it did."""
    died = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            if not http.alive():
                died.set()
                stop.set()
                wake.set()

    threading.Thread(target=watch, name="side-task-watch", daemon=True).start()
    return died
