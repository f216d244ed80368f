"""Postgres away: the log is the buffer, the lag is visible, the process stays alive."""

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from billing_tailer.embedded import EmbeddedPostgres
from billing_tailer.ledger import migrate
from tests.support.daemon import Daemon
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes
from tests.support.proxy import PostgresProxy


@pytest.fixture
def postgres(open_dir: Path) -> Iterator[EmbeddedPostgres]:
    """A server of the test's own, which it may stop."""
    with EmbeddedPostgres(open_dir / "postgres") as server:
        migrate(server.dsn)
        yield server


def _daemon(dsn: str, volume: Path) -> Daemon:
    variables = {"BILLING_TAILER_AUDIT_GLOBS": f"{volume}/audit*.jsonl*", "BILLING_TAILER_DATABASE_URL": dsn}
    return Daemon(variables, volume / "daemon.log")


def _lag(daemon: Daemon, log: Path) -> float:
    return daemon.metric("billing_tailer_lag_bytes", f'{{file="{log}"}}') or 0.0


@pytest.mark.timeout(180)
def test_ten_seconds_without_postgres_under_load(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    log.touch()
    stop = threading.Event()
    written = [0]

    def write() -> None:
        while not stop.is_set():
            with log.open("ab") as out:
                out.write(lines(written[0], 20))
            written[0] += 20
            time.sleep(0.05)

    with _daemon(postgres.dsn, tmp_path) as daemon:
        writer = threading.Thread(target=write)
        writer.start()
        daemon.wait_until(lambda: count(postgres.dsn, "usage_facts") > 100)
        postgres.stop()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            assert daemon.get("/livez").status_code == 200
            time.sleep(0.5)
        answer = daemon.get("/readyz")
        assert answer.status_code == 503
        assert "connecting" in answer.json()["reasons"]["ledger"][0]
        assert _lag(daemon, log) > 100_000
        assert daemon.metric("billing_tailer_commit_failures_total", '{reason="connection"}') or daemon.metric(
            "billing_tailer_commit_failures_total", '{reason="admin_shutdown"}'
        )
        postgres.start()
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        stop.set()
        writer.join()
        daemon.wait_until(lambda: _lag(daemon, log) == 0)
        daemon.wait_until(lambda: count(postgres.dsn, "usage_facts") == written[0])
        assert outcomes(postgres.dsn) == {"fact": written[0]}
        assert_sound(postgres.dsn, {1: log.read_bytes()})


def test_postgres_away_when_the_daemon_starts(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    log.write_bytes(lines(0, 100))
    dsn = postgres.dsn
    postgres.stop()
    with _daemon(dsn, tmp_path) as daemon:
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 503)
        daemon.wait_until(lambda: _lag(daemon, log) == log.stat().st_size, what="the lag shows the whole file")
        assert daemon.get("/livez").status_code == 200
        assert daemon.wait_for_event("ledger.waiting")["state"] == "connecting"
        assert daemon.metric("billing_tailer_oldest_uncommitted_timestamp_seconds") == pytest.approx(
            time.time(), abs=30
        )
        postgres.start()
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 100)
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        waits = [(one["state"], one["message"]) for one in daemon.events("ledger.waiting")]
        assert len(waits) == len(set(waits)), "the same reason is said once, however often it is tried"
        assert daemon.terminate() == 0


def test_a_connection_cut_after_commit_arrived(dsn: str, tmp_path: Path) -> None:
    """The answer to a COMMIT is lost, again and again: the database is asked what happened, nothing is sent twice."""
    log = tmp_path / "audit.jsonl"
    log.touch()
    with PostgresProxy(dsn) as proxy, _daemon(proxy.dsn, tmp_path) as daemon:
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        for number in range(10):
            proxy.mute()
            with log.open("ab") as out:
                out.write(line(2 * number) + line(2 * number + 1))
            time.sleep(0.1 * (number % 4))
            proxy.drop()
            proxy.forward()
            daemon.wait_until(partial(lambda expected: count(dsn, "usage_facts") == expected, 2 * number + 2))
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
    assert outcomes(dsn) == {"fact": 20}
    assert_sound(dsn, {1: log.read_bytes()})
