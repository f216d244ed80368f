"""The daemon as a process: starting, waiting for Postgres, ending, standing by, one owner at a time."""

import os
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import psycopg
import pytest

from billing_tailer.embedded import EmbeddedPostgres
from billing_tailer.errors import ConfigError
from billing_tailer.ledger import Ledger, migrate
from billing_tailer.ledger.connection import lock_key
from tests.support.daemon import Daemon
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows
from tests.support.proxy import PostgresProxy
from tests.support.spendlines import payload
from tests.support.verbs import run_verb

SECRET = "hunter2-s3cret"


def variables(dsn: str, volume: Path, **changes: str) -> dict[str, str]:
    """The environment of a daemon that follows `volume`."""
    found = {"AUDIT_GLOBS": f"{volume}/audit*.jsonl*", "DATABASE_URL": dsn, "HTTP_PORT": "0", **changes}
    return {f"BILLING_TAILER_{name}": value for name, value in found.items()}


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A log volume with ten calls."""
    volume = tmp_path / "billing"
    volume.mkdir()
    (volume / "audit.jsonl").write_bytes(lines(0, 10))
    return volume


@pytest.fixture
def daemon_log(tmp_path: Path) -> Path:
    return tmp_path / "daemon.log"


def append(volume: Path, content: bytes) -> None:
    with (volume / "audit.jsonl").open("ab") as log:
        log.write(content)


def has_facts(dsn: str, number: int) -> bool:
    return count(dsn, "usage_facts") == number


def has_receipts(dsn: str, number: int) -> bool:
    return count(dsn, "charge_receipts") == number


def ready(daemon: Daemon) -> bool:
    return daemon.get("/readyz").status_code == 200


# --- refusing to start -----------------------------------------------------------------------------------------------


def refused(environment: dict[str, str], *words: str, script: str = "", timeout: float = 30) -> str:
    """`run` ends with code 2 and one message on standard error that holds these words."""
    found = run_verb(environment, "run", script=script, timeout=timeout)
    assert found.returncode == 2, found.stdout + found.stderr
    assert found.stderr.startswith("billing-tailer: ")
    assert "\n  -> " in found.stderr, "no next step"
    assert "Traceback" not in found.stdout + found.stderr
    assert SECRET not in found.stdout + found.stderr
    for word in words:
        assert word in found.stderr
    return found.stderr


def test_no_mount(dsn: str, tmp_path: Path) -> None:
    glob = f"{tmp_path}/missing/audit*.jsonl*"
    refused(variables(dsn, tmp_path / "missing"), f"BILLING_TAILER_AUDIT_GLOBS={glob}", "No such file", "mount")


def test_neither_dsn_nor_binaries(volume: Path, open_dir: Path) -> None:
    script = "from billing_tailer import cli, embedded; embedded._candidates = lambda: iter(()); cli.main()"
    environment = {**variables("", volume), "BILLING_TAILER_DATA_DIR": str(open_dir)}
    refused(environment, "BILLING_TAILER_DATABASE_URL", "billing-tailer[embedded]", script=script)


def test_binaries_named_but_not_there(volume: Path, open_dir: Path) -> None:
    environment = {**variables("", volume, DATA_DIR=str(open_dir), POSTGRES_BIN="/usr/no-such-bin")}
    refused(environment, "BILLING_TAILER_POSTGRES_BIN=/usr/no-such-bin", "initdb")


def test_every_bad_value_at_once(dsn: str, volume: Path) -> None:
    message = refused(
        variables(dsn, volume, HTTP_PORT="99999", POLL_INTERVAL_SECONDS="never", OFFSET_RESET="/a=end"),
        "BILLING_TAILER_HTTP_PORT = '99999': must be a whole number from 0 to 65535",
        "BILLING_TAILER_POLL_INTERVAL_SECONDS = 'never'",
        "BILLING_TAILER_OFFSET_RESET_ID is not set",
    )
    assert "3 settings are wrong" in message


def test_a_typo(dsn: str, volume: Path) -> None:
    refused(variables(dsn, volume, BATCH_LINE_MAX="5"), "BATCH_LINE_MAX", "did you mean BILLING_TAILER_BATCH_LINES_MAX")


def test_a_busy_port(dsn: str, volume: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(variables(dsn, volume, HTTP_PORT=str(port)), f"BILLING_TAILER_HTTP_PORT={port}", "in use", "free port")


@pytest.mark.parametrize("dsn", [f"mysql://u:{SECRET}@db/billing", f"host=db password={SECRET} nonsense=1"])
def test_a_dsn_that_is_none(dsn: str, volume: Path) -> None:
    refused(variables(dsn, volume), "BILLING_TAILER_DATABASE_URL")


@pytest.mark.parametrize("dsn", [f"host=db password={SECRET} sslmode=perhaps port=99999"])
def test_a_dsn_that_libpq_refuses(dsn: str, volume: Path) -> None:
    refused(variables(dsn, volume), "BILLING_TAILER_DATABASE_URL", timeout=2)


def test_only_the_owners_dsn(dsn: str, volume: Path) -> None:
    environment = variables("", volume, MIGRATE_DATABASE_URL=dsn)
    refused(environment, "BILLING_TAILER_MIGRATE_DATABASE_URL is set, but BILLING_TAILER_DATABASE_URL is not")


def test_no_schema(empty_dsn: str, volume: Path) -> None:
    refused(variables(empty_dsn, volume), "schema billing is at version 0", "billing-tailer migrate")


def test_a_newer_schema(dsn: str, volume: Path) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("insert into billing.schema_migrations (version, name, sha256) values (9999, 'new', 'x')")
    refused(variables(dsn, volume), "schema billing is at version 9999", "newer")
    refused(variables(dsn, volume, MIGRATE_DATABASE_URL=dsn), "schema billing is at version 9999", "newer")


def test_an_edited_migration(dsn: str, volume: Path) -> None:
    edit_migration(dsn)
    refused(
        variables(dsn, volume, MIGRATE_DATABASE_URL=dsn), "0001_positions_and_facts is not the one that was applied"
    )


def test_an_edited_migration_and_no_owner(dsn: str, volume: Path) -> None:
    edit_migration(dsn)
    refused(variables(dsn, volume), "0001_positions_and_facts is not the one that was applied", timeout=2)


def edit_migration(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("update billing.schema_migrations set sha256 = 'edited' where version = 1")


def test_the_start_migrates_where_the_owner_is_known(empty_dsn: str, volume: Path, daemon_log: Path) -> None:
    with Daemon(variables(empty_dsn, volume, MIGRATE_DATABASE_URL=empty_dsn), daemon_log) as daemon:
        daemon.wait_for_event("batch.committed")
        assert daemon.wait_for_event("migrated")["applied"][0] == "0001_positions_and_facts"
        assert daemon.terminate() == 0
    assert outcomes(empty_dsn) == {"fact": 10}
    assert_sound(empty_dsn)


def test_by_header_without_any_other_source(dsn: str, daemon_dsn: str, volume: Path, daemon_log: Path) -> None:
    """What that gets wrong is said at every start, as is a role that may change receipts. The second process finds the
    calls of the closed window captured."""
    append(volume, line(10, msec=f"{time.time() - 300:.3f}"))
    settings = {"COST_SOURCE": "header", "SETTLE_DEADLINE_SECONDS": "1"}
    for role, said in ((daemon_dsn, 0), (dsn, 1)):
        with Daemon(variables(role, volume, **settings), daemon_log) as daemon:
            daemon.wait_until(lambda: count(dsn, "charge_receipts") == 11)
            daemon.wait_for_event("owner")
            assert "streams" in daemon.wait_for_event("cost_source.header")["message"]
            assert len(list(daemon.events("receipts.not_append_only"))) == said
            assert list(daemon.events("cost_source.missing")) == []
            if role == dsn:
                daemon.wait_until(lambda: daemon.metric("billing_tailer_capture_ratio") == 1)
            assert daemon.terminate() == 0


def test_secrets_are_not_logged(dsn: str, volume: Path, daemon_log: Path) -> None:
    with Daemon(variables(f"{dsn} password={SECRET}", volume, API_TOKEN=SECRET * 2), daemon_log) as daemon:
        daemon.wait_for_event("owner")
    assert SECRET not in daemon.log()
    assert next(daemon.events("starting"))["settings"]["api_token"] == "***"


# --- Postgres is away at the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("migrating", [False, True])
def test_postgres_away_at_the_start(dsn: str, empty_dsn: str, volume: Path, daemon_log: Path, migrating: bool) -> None:
    target = empty_dsn if migrating else dsn
    with PostgresProxy(target) as proxy:
        proxy.cut()
        owner = {"MIGRATE_DATABASE_URL": proxy.dsn} if migrating else {}
        with Daemon(variables(proxy.dsn, volume, **owner), daemon_log) as daemon:
            daemon.wait_until(lambda: "refused" in str(daemon.get("/readyz").json()["reasons"].get("ledger")))
            assert daemon.get("/readyz").status_code == 503
            assert daemon.get("/livez").status_code == 200
            lag = f'{{file="{volume}/audit.jsonl"}}'
            size = (volume / "audit.jsonl").stat().st_size
            daemon.wait_until(lambda: daemon.metric("billing_tailer_lag_bytes", lag) == size)
            proxy.forward()
            daemon.wait_until(lambda: ready(daemon))
            daemon.wait_until(lambda: daemon.metric("billing_tailer_lag_bytes", lag) == 0)
            assert daemon.terminate() == 0
    assert outcomes(target) == {"fact": 10}
    assert_sound(target)


@pytest.mark.parametrize("migrating", [False, True])
def test_sigterm_while_postgres_is_away(dsn: str, volume: Path, daemon_log: Path, migrating: bool) -> None:
    with PostgresProxy(dsn) as proxy:
        proxy.cut()
        owner = {"MIGRATE_DATABASE_URL": proxy.dsn} if migrating else {}
        with Daemon(variables(proxy.dsn, volume, **owner), daemon_log) as daemon:
            daemon.wait_until(lambda: "refused" in daemon.get("/readyz").text)
            assert daemon.terminate(timeout=2) == 0


# --- ending ----------------------------------------------------------------------------------------------------------


def test_sigterm_while_idle(dsn: str, volume: Path, daemon_log: Path) -> None:
    with Daemon(variables(dsn, volume, POLL_INTERVAL_SECONDS="60"), daemon_log) as daemon:
        daemon.wait_for_event("batch.committed")
        started = time.monotonic()
        assert daemon.terminate(timeout=2) == 0
        assert time.monotonic() - started < 2
    assert [event["event"] for event in daemon.events()][-2:] == ["stopping", "stopped"]


def test_a_long_poll_interval_is_no_death(dsn: str, volume: Path, daemon_log: Path) -> None:
    with Daemon(variables(dsn, volume, POLL_INTERVAL_SECONDS="60"), daemon_log) as daemon:
        daemon.wait_for_event("batch.committed")
        time.sleep(4)
        assert daemon.get("/livez").json()["seconds_since_tick"] < 3


def test_sigint_ends_it_too(dsn: str, volume: Path, daemon_log: Path) -> None:
    with Daemon(variables(dsn, volume), daemon_log) as daemon:
        daemon.wait_for_event("owner")
        daemon.signal(signal.SIGINT)
        assert daemon.wait(5) == 0
    assert "Traceback" not in daemon.log()


def test_sigterm_while_committing(dsn: str, volume: Path, daemon_log: Path) -> None:
    append(volume, lines(10, 20_000))
    with Daemon(variables(dsn, volume, BATCH_LINES_MAX="200"), daemon_log) as daemon:
        daemon.wait_for_event("batch.committed")
        assert daemon.terminate(timeout=5) == 0
        done = sum(event["lines"] for event in daemon.events("batch.committed"))
        assert 0 < done < 20_010
        assert count(dsn, "usage_facts") == done
        assert_sound(dsn)
        daemon.start()
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 20_010)
    assert outcomes(dsn) == {"fact": 20_010}
    assert_sound(dsn)


SLOW_COMMIT = """
create function billing.doze() returns trigger language plpgsql as $$ begin perform pg_sleep(5); return null; end $$;
create constraint trigger doze after insert on billing.usage_facts deferrable initially deferred
for each row when (new.call_id = 'call-00000109') execute function billing.doze()
"""


def test_sigterm_while_postgres_hangs(dsn: str, empty_dsn: str, volume: Path, tmp_path: Path) -> None:
    """Three ways at once, since each takes its three seconds: the COMMIT takes long, and happens when nobody hears of
    it any more; nothing gets through to Postgres; it accepts a connection, and answers nothing."""
    migrate(empty_dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SLOW_COMMIT)
    with PostgresProxy(empty_dsn) as stalled, PostgresProxy(dsn) as silent:
        silent.stall()
        with (
            Daemon(variables(dsn, volume), tmp_path / "1.log") as first,
            Daemon(variables(stalled.dsn, volume), tmp_path / "2.log") as second,
            Daemon(variables(silent.dsn, volume, SOURCE_ID="third"), tmp_path / "3.log") as third,
        ):
            daemons = (first, second, third)
            first.wait_until(lambda: count(dsn, "usage_facts") == count(empty_dsn, "usage_facts") == 10)
            third.wait_until(lambda: silent.accepted > 0)
            stalled.stall()
            append(volume, lines(10, 100))
            time.sleep(0.5)
            assert third.get("/livez").status_code == 200
            started = time.monotonic()
            for daemon in daemons:
                daemon.signal(signal.SIGTERM)
            assert [daemon.wait(10) for daemon in daemons] == [0, 0, 0]
            assert time.monotonic() - started < 5
            assert count(dsn, "usage_facts") == 10, "this COMMIT was to outlive the process"
            stalled.forward()
            for daemon in (first, second):
                assert "Traceback" not in daemon.log()
                daemon.start()
                daemon.wait_for_event("owner")
            append(volume, line(110))
            first.wait_until(lambda: count(dsn, "usage_facts") == count(empty_dsn, "usage_facts") == 111)
            assert (first.terminate(), second.terminate()) == (0, 0)
    for found in (dsn, empty_dsn):
        assert outcomes(found) == {"fact": 111}
        assert_sound(found)


def test_the_second_signal_kills(dsn: str, volume: Path, daemon_log: Path) -> None:
    with PostgresProxy(dsn) as proxy, Daemon(variables(proxy.dsn, volume), daemon_log) as daemon:
        daemon.wait_until(lambda: ready(daemon))
        proxy.mute()
        append(volume, line(10))
        time.sleep(0.5)
        daemon.signal(signal.SIGTERM)
        time.sleep(0.5)
        assert daemon.alive()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(1) == -signal.SIGTERM


def test_sigterm_with_a_client_that_never_ends_its_request(dsn: str, volume: Path, daemon_log: Path) -> None:
    with Daemon(variables(dsn, volume), daemon_log) as daemon:
        port = int(daemon.url.rpartition(":")[2])
        daemon.wait_for_event("owner")
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
            time.sleep(0.2)
            started = time.monotonic()
            assert daemon.terminate(timeout=10) == 0
            assert time.monotonic() - started < 5


SLOW_ENDS = """
import time
from billing_tailer.cli import main
from billing_tailer.spool import Spool
from billing_tailer.web.server import HttpServer
def late(method):
    def waiting(self):
        time.sleep(2)
        method(self)
    return waiting
Spool.start, HttpServer.stop = late(Spool.start), late(HttpServer.stop)
main()
"""


def test_callbacks_are_taken_from_the_first_moment_to_the_last(
    dsn: str, volume: Path, tmp_path: Path, daemon_log: Path
) -> None:
    """As long as a client is heard at all: LiteLLM drops what it could not deliver."""
    environment = variables(dsn, volume, SPOOL_DIR=f"{tmp_path}/spool")
    with Daemon(environment, daemon_log, script=SLOW_ENDS) as daemon:
        with httpx.Client(base_url=daemon.url, trust_env=False) as client:

            def post(number: int) -> int:
                return client.post("/v1/callbacks/litellm", json=payload(number)).status_code

            assert post(0) == 200
            daemon.wait_for_event("owner")
            daemon.signal(signal.SIGTERM)
            daemon.wait_for_event("stopping")
            time.sleep(0.5)  # whatever ends before HTTP has ended now
            assert post(1) == 200
        assert daemon.wait(10) == 0
    with Daemon(environment, daemon_log) as daemon:
        daemon.wait_until(lambda: has_receipts(dsn, 2), what="both receipts")


def test_a_callback_wakes_the_loop(dsn: str, volume: Path, tmp_path: Path, daemon_log: Path) -> None:
    """Nothing else would, for two seconds: nobody watches the spool."""
    taken = []
    environment = variables(dsn, volume, SPOOL_DIR=f"{tmp_path}/spool", POLL_INTERVAL_SECONDS="60")
    with Daemon(environment, daemon_log) as daemon, httpx.Client(base_url=daemon.url, trust_env=False) as client:
        daemon.wait_until(lambda: has_facts(dsn, 10), what="the lines")
        for number in range(5):
            started = time.monotonic()
            assert client.post("/v1/callbacks/litellm", json=payload(number)).status_code == 200
            daemon.wait_until(partial(has_receipts, dsn, number + 1), what="the receipt")
            taken.append(time.monotonic() - started)
    assert sorted(taken)[2] < 1, taken


DYING_HTTP = """
import asyncio, uvicorn
from billing_tailer.cli import main
async def die(self, counter):
    await asyncio.sleep(1)
    raise MemoryError("as if")
uvicorn.Server.on_tick = die
main()
"""


def test_the_http_thread_dies(dsn: str, volume: Path) -> None:
    found = run_verb(variables(dsn, volume), "run", script=DYING_HTTP)
    assert found.returncode == 1
    assert "billing-tailer: the HTTP thread has died\n  -> " in found.stderr
    assert "side_task.died" in found.stdout
    assert outcomes(dsn) == {"fact": 10}


def test_the_embedded_postgres_dies(volume: Path, open_dir: Path, daemon_log: Path) -> None:
    """Nobody would start it again."""
    with Daemon(variables("", volume, DATA_DIR=str(open_dir / "data")), daemon_log) as daemon:
        dsn = str(daemon.wait_for_event("postgres.embedded")["dsn"])
        daemon.wait_until(lambda: ready(daemon) and outcomes(dsn) == {"fact": 10})
        second = run_verb(variables("", volume, DATA_DIR=str(open_dir / "data")), "run")
        assert second.returncode == 3
        assert str(daemon.pid) in second.stderr
        postmaster = int((open_dir / "data/pgdata/postmaster.pid").read_text().split()[0])
        os.kill(postmaster, signal.SIGKILL)
        assert daemon.wait(10) == 1
        assert "the embedded Postgres has died" in daemon.log()
        append(volume, lines(10, 10))
        daemon.start()
        daemon.wait_until(lambda: ready(daemon))
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 20)
        assert daemon.terminate(timeout=5) == 0
    with EmbeddedPostgres(open_dir / "data") as server:
        assert outcomes(server.dsn) == {"fact": 20}
        assert_sound(server.dsn)


NO_INOTIFY = """
import os, signal, threading
from watchdog.observers.inotify_c import InotifyFD
from billing_tailer import run_cli
from billing_tailer.cli import main
def refuse():
    raise OSError(24, "inotify instance limit reached")
InotifyFD._create_inotify_fd = staticmethod(refuse)
threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
main()
"""


def test_without_inotify_the_poll_does_the_work(dsn: str, volume: Path) -> None:
    found = run_verb(variables(dsn, volume), "run", script=NO_INOTIFY)
    assert (found.returncode, found.stderr) == (0, "")
    assert "inotify instance limit reached" in found.stdout
    assert outcomes(dsn) == {"fact": 10}


# --- one at a time ---------------------------------------------------------------------------------------------------


def standing_by(daemon: Daemon) -> bool:
    answer = daemon.get("/readyz")
    return answer.status_code == 503 and "standby: another tailer is active" in str(answer.json()["reasons"])


def test_a_standby_takes_over_within_three_seconds(dsn: str, volume: Path, tmp_path: Path) -> None:
    environment = variables(dsn, volume)
    with Daemon(environment, tmp_path / "1.log") as first, Daemon(environment, tmp_path / "2.log") as second:
        daemons = [first, second]
        for daemon in daemons:
            daemon.wait_until(lambda: any(ready(one) for one in daemons) and any(standing_by(one) for one in daemons))
        active, standby = daemons if ready(first) else daemons[::-1]
        active.wait_until(lambda: count(dsn, "usage_facts") == 10)
        assert standby.metric("billing_tailer_active") == 0
        assert standby.get("/livez").status_code == 200
        assert standby.wait_for_event("ledger.waiting")["state"] == "standby"
        for number in range(3):
            active.kill()
            append(volume, lines(10 + number * 10, 10))
            started = time.monotonic()
            standby.wait_until(partial(has_facts, dsn, 20 + number * 10))
            assert time.monotonic() - started < 3
            assert standby.metric("billing_tailer_active") == 1
            active, standby = standby, active.start()
            standby.wait_until(partial(standing_by, standby))
        assert standby.terminate(timeout=2) == 0
        assert active.terminate(timeout=2) == 0
    assert outcomes(dsn) == {"fact": 40}
    assert_sound(dsn, {1: (volume / "audit.jsonl").read_bytes()})


def test_the_same_source_on_another_volume_is_refused(dsn: str, volume: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "audit.jsonl").write_bytes(lines(500, 10))
    with Daemon(variables(dsn, volume), tmp_path / "1.log") as first:
        first.wait_until(lambda: count(dsn, "usage_facts") == 10)
        refused(variables(dsn, other), "SOURCE_ID default is in use for another volume", "BILLING_TAILER_SOURCE_ID")
        with Daemon(variables(dsn, other, SOURCE_ID="second"), tmp_path / "2.log") as second:
            second.wait_until(lambda: count(dsn, "usage_facts") == 20)
            append(volume, line(10))
            append(other, line(510))
            second.wait_until(lambda: count(dsn, "usage_facts") == 22)
            assert ready(first)
            assert ready(second)
    assert outcomes(dsn) == {"fact": 22}
    assert rows(dsn, "select source_id from tail_files order by 1") == [
        {"source_id": "default"},
        {"source_id": "second"},
    ]
    assert_sound(dsn)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "idle",
        "after a commit",
    ],
)
def test_a_frozen_owner_is_replaced(dsn: str, volume: Path, tmp_path: Path, moment: str) -> None:
    environment = variables(dsn, volume)
    with Daemon(environment, tmp_path / "1.log") as owner, Daemon(environment, tmp_path / "2.log") as standby:
        owner.wait_until(lambda: any(map(ready, (owner, standby))) and any(map(standing_by, (owner, standby))))
        frozen, other = (owner, standby) if ready(owner) else (standby, owner)
        frozen.wait_until(lambda: count(dsn, "usage_facts") == 10)
        time.sleep(2.5 if moment == "idle" else 0)
        frozen.signal(signal.SIGSTOP)
        try:
            append(volume, lines(10, 10))
            started = time.monotonic()
            other.wait_until(lambda: count(dsn, "usage_facts") == 20, timeout=18)
            assert time.monotonic() - started < 15
        finally:
            frozen.signal(signal.SIGCONT)
        append(volume, lines(20, 10))
        other.wait_until(lambda: count(dsn, "usage_facts") == 30)
        frozen.wait_until(lambda: standing_by(frozen))
        assert "Traceback" not in frozen.log()
        assert other.terminate() == 0
        append(volume, lines(30, 10))
        frozen.wait_until(lambda: count(dsn, "usage_facts") == 40, timeout=3)
    assert outcomes(dsn) == {"fact": 40}
    assert_sound(dsn, {1: (volume / "audit.jsonl").read_bytes()})


def test_the_lock_must_be_held_by_our_own_session(dsn: str, tmp_path: Path) -> None:
    """As behind a pool per transaction: the lock stays with a backend that serves somebody else by now."""
    stop = threading.Event()
    ledger = Ledger(dsn, schema="billing", source_id="default", stop=stop)
    assert ledger._try_open()
    ledger.ping()
    ledger._last_proof -= 10
    ledger.ping()
    key = lock_key("source", "billing", "default")
    ledger._session.execute("select pg_advisory_unlock(%s)", [key])
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute("select pg_advisory_lock(%s)", [key])
        with pytest.raises(ConfigError, match=r"the lock of SOURCE_ID default is held by \[\d+\], but this session is"):
            ledger._prove_lock()
        other.execute("select pg_advisory_unlock(%s)", [key])
    with pytest.raises(ConfigError, match="is held by None"):
        ledger._prove_lock()
    ledger.close()
