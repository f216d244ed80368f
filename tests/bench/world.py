"""Where everything is measured: one Postgres with fsync on, databases, directories, daemons."""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psycopg

from billing_tailer.embedded import EmbeddedPostgres
from billing_tailer.ledger import migrate
from tests.bench import fill, logs
from tests.bench.amounts import Amounts
from tests.support import database
from tests.support.daemon import Daemon

TOKEN: Final = "callback-token-0123456789"
POLL_SECONDS: Final = 0.1
"""How often Postgres is asked whether it has everything: it has other work to do."""
PATIENCE_SECONDS: Final = 600.0


class World:
    """One Postgres for all figures of a run; entering starts it, leaving removes everything."""

    def __init__(self, amounts: Amounts) -> None:
        self.amounts = amounts
        self.directory = Path(tempfile.mkdtemp(prefix="billing-tailer-bench-"))
        self.directory.chmod(0o755)  # root runs Postgres as nobody
        self._server = self._server_with(())
        self._template = ""
        self._between_checkpoints = False
        self._filled: dict[int, str] = {}
        self._logs: dict[tuple[int, int, bool], Path] = {}

    def __enter__(self) -> Self:
        self._server.start()
        self._template = database.create(self.admin_dsn, prefix="template")
        migrate(database.dsn_of(self.admin_dsn, self._template))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _server_with(self, settings: Sequence[str]) -> EmbeddedPostgres:
        options = [word for setting in ("track_commit_timestamp=on", *settings) for word in ("-c", setting)]
        return EmbeddedPostgres(self.directory / "postgres", None, options)

    @contextmanager
    def restarted(self, settings: Sequence[str]) -> Iterator[None]:
        """The same Postgres on the same data, with these settings for a while, and without a checkpoint before each
        measurement: after one, the first change of each page goes whole into the log, and what such a Postgres pays for
        that twice an hour would fall into each half minute."""
        self._server.stop()
        usual, self._server = self._server, self._server_with(settings)
        self._server.start()
        self._between_checkpoints = True
        try:
            yield
        finally:
            self._between_checkpoints = False
            self._server.stop()
            self._server = usual
            self._server.start()

    @property
    def admin_dsn(self) -> str:
        """A superuser's."""
        return self._server.dsn

    @property
    def postmaster(self) -> int:
        """The process id of the server."""
        assert self._server.pid is not None
        return self._server.pid

    @contextmanager
    def database(self) -> Iterator[str]:
        """A fresh one with the schema, dropped at the end; what earlier ones left to write is on disk."""
        with database.temporary(self.admin_dsn, self._template) as dsn:
            self._write_out(self.admin_dsn)
            yield dsn

    def filled(self, receipts: int) -> str:
        """One with so many settled calls of the last 30 days: made once, and it grows by what is measured in it."""
        if receipts not in self._filled:
            dsn = database.dsn_of(self.admin_dsn, database.create(self.admin_dsn, self._template))
            fill.settled_calls(dsn, receipts)
            self._filled[receipts] = dsn
        dsn = self._filled[receipts]
        execute(dsn, "truncate billing.tail_files cascade")  # the volumes of those who were here before are gone
        self._write_out(dsn)
        return dsn

    def _write_out(self, dsn: str) -> None:
        """Databases that were dropped and logs that were written keep the disk busy for long, and an fsync waits."""
        if not self._between_checkpoints:
            execute(dsn, "checkpoint")
        os.sync()

    @contextmanager
    def volume(self) -> Iterator[Path]:
        """An empty directory."""
        path = self.directory / f"volume-{uuid.uuid4().hex}"
        path.mkdir(mode=0o755)
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def log(self, count: int, seed: int = 0) -> Path:
        """A log of so many calls: written once, to be linked into volumes, never to be appended to."""
        return self._made(count, seed, logs.write_log, spool=False)

    def spool(self, count: int, seed: int = 0) -> Path:
        """The spool file of the same calls."""
        return self._made(count, seed, logs.write_spool, spool=True)

    def _made(self, count: int, seed: int, write: Callable[[Path, int, int], None], *, spool: bool) -> Path:
        key = (count, seed, spool)
        if key not in self._logs:
            path = self.directory / f"{'spool' if spool else 'log'}-{count}-{seed}.jsonl"
            write(path, count, seed)
            self._logs[key] = path
        return self._logs[key]

    def forget(self, count: int, seed: int) -> None:
        """Remove the log and the spool file of these calls."""
        for spool in (False, True):
            path = self._logs.pop((count, seed, spool), None)
            if path is not None:
                path.unlink()


def daemon(dsn: str, volume: Path, more: Mapping[str, str] | None = None) -> Daemon:
    """One on a volume, as it comes but for what is named here; to be entered."""
    variables = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{volume}/audit*.jsonl*",
        "BILLING_TAILER_DATABASE_URL": dsn,
        "BILLING_TAILER_SPOOL_DIR": f"{volume}/spool",
        "BILLING_TAILER_CALLBACK_TOKEN": TOKEN,
        **(more or {}),
    }
    # its log beside the volume: within, each line of it would wake the daemon's threads
    return Daemon(variables, volume.with_name(f"{volume.name}.log"))


def wait_until_ready(running: Daemon) -> None:
    """It follows and commits."""
    running.wait_until(lambda: running.get("/readyz").status_code == 200, what="it is ready")


FACTS: Final = "select coalesce(sum((counts->>'fact')::bigint), 0) from billing.tail_batches"
"""How many calls are committed: a row per MiB, so it costs nothing to ask."""
RECEIPTS: Final = "select count(*) from billing.charge_receipts"


def wait_for_count(running: Daemon, dsn: str, statement: str, wanted: int, poll_seconds: float = POLL_SECONDS) -> None:
    """Until a statement's number is at least `wanted`."""
    with psycopg.connect(dsn, autocommit=True) as connection:

        def there() -> bool:
            row = connection.execute(statement.encode()).fetchone()
            if row is not None and row[0] is not None and row[0] >= wanted:
                return True
            time.sleep(poll_seconds)
            return False

        running.wait_until(there, PATIENCE_SECONDS, what=f"{wanted} by {statement}")


def last_commit(dsn: str, table: str) -> float:
    """When the last row of a table was committed, by Postgres (epoch seconds, the clock of this machine)."""
    return float(value(dsn, f"select max(extract(epoch from pg_xact_commit_timestamp(xmin)))::float8 from {table}"))


def value(dsn: str, statement: str) -> Any:
    """Of the first row and column."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


def execute(dsn: str, statement: str) -> None:
    """Outside of a transaction."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement.encode())
