"""Callbacks all the way, POST, spool, `spend_records`: each that got its 200 is there once, whatever dies between."""

import asyncio
import contextlib
import resource
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from billing_tailer.embedded import EmbeddedPostgres
from billing_tailer.ledger import migrate
from billing_tailer.spool import TORN
from tests.support.callbacks import CANARY, dumps, event, post
from tests.support.daemon import Daemon
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows
from tests.support.spendlines import payload
from tests.support.verbs import answer_of, run_verb

TOKEN = "callback-token-0123456789"
POSTS = 200
ANSWERED_BEFORE_THE_KILL = 70


@pytest.fixture
def postgres(open_dir: Path) -> Iterator[EmbeddedPostgres]:
    """A server of the test's own, whose files it may search."""
    with EmbeddedPostgres(open_dir / "postgres") as server:
        migrate(server.dsn)
        yield server


def _daemon(dsn: str, directory: Path, log: str = "daemon.log", **more: str) -> Daemon:
    for name in ("volume", "tmp"):
        (directory / name).mkdir(exist_ok=True)
    variables = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{directory}/volume/audit*.jsonl*",
        "BILLING_TAILER_DATABASE_URL": dsn,
        "BILLING_TAILER_SPOOL_DIR": f"{directory}/spool",
        "BILLING_TAILER_DATA_DIR": f"{directory}/data",
        "BILLING_TAILER_CALLBACK_TOKEN": TOKEN,
        "BILLING_TAILER_LOG_LEVEL": "debug",
        "TMPDIR": f"{directory}/tmp",
        **more,
    }
    return Daemon(variables, directory / log)


def _call_ids(number: int) -> list[str]:
    """The calls of one POST."""
    return [f"call-of-{number:03d}-{index:02d}" for index in range(1 + number % 20)]


def _body(number: int) -> bytes:
    return dumps([event(call_id, f"{CANARY}-{call_id}") for call_id in _call_ids(number)])


async def _post_all_and_kill(daemon: Daemon) -> list[int]:
    """All at once; the daemon dies among them. Returns those that got a 200."""
    port = int(daemon.url.rpartition(":")[2])
    answered: list[int] = []

    async def one(number: int) -> None:
        if await post(port, TOKEN, _body(number)) == 200:
            answered.append(number)
            if len(answered) == ANSWERED_BEFORE_THE_KILL:
                daemon.kill()

    await asyncio.gather(*map(one, range(POSTS)))
    return answered


def _everything_is_committed(dsn: str, spool: Path) -> bool:
    committed = {row["path"]: row["committed_offset"] for row in rows(dsn, "select * from tail_files")}
    return all(committed.get(str(path), 0) == path.stat().st_size for path in spool.glob("callbacks-*.jsonl"))


def _files_with(text: str, *directories: Path) -> list[Path]:
    files = [path for directory in directories for path in directory.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


@pytest.mark.e2e
@pytest.mark.parametrize("outage", [True, False], ids=["Postgres down", "Postgres up"])
def test_kill_9_in_the_middle_of_200_posts(postgres: EmbeddedPostgres, tmp_path: Path, outage: bool) -> None:
    """What got its 200 is in `spend_records` exactly once, what did not at most once, and no prompt is anywhere."""
    dsn, spool = postgres.dsn, tmp_path / "spool"
    with _daemon(dsn, tmp_path) as daemon:
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        if outage:
            postgres.stop()
            daemon.wait_until(lambda: daemon.get("/readyz").status_code == 503)
        answered = asyncio.run(_post_all_and_kill(daemon))
        assert ANSWERED_BEFORE_THE_KILL <= len(answered) < POSTS
        daemon.start()
        if outage:
            postgres.start()
        daemon.wait_until(lambda: _everything_is_committed(dsn, spool))
        found = rows(dsn, "select call_id, count(*) as n from spend_records group by call_id")
        times = {row["call_id"]: row["n"] for row in found}
        safe = [call_id for number in answered for call_id in _call_ids(number)]
        assert {call_id: times.get(call_id) for call_id in safe if times.get(call_id) != 1} == {}
        assert set(times) <= {call_id for number in range(POSTS) for call_id in _call_ids(number)}
        assert set(times.values()) == {1}
        assert set(outcomes(dsn)) <= {"spend_record", "torn"}
        assert_sound(dsn)
        assert daemon.terminate() == 0
    postgres.stop()  # with a checkpoint: whatever it had in memory is in its files
    everywhere = (tmp_path, postgres.data_dir)
    assert _files_with(safe[-1], postgres.data_dir / "pgdata/pg_wal"), "the search finds what is there"
    assert _files_with(safe[-1], spool)
    assert _files_with(CANARY, *everywhere) == []


def _posted(daemon: Daemon, events: Sequence[dict[str, Any]]) -> int | None:
    return asyncio.run(post(int(daemon.url.rpartition(":")[2]), TOKEN, dumps(events)))


@pytest.mark.e2e
def test_a_write_torn_by_a_kill_leaves_nothing_to_do(dsn: str, tmp_path: Path) -> None:
    """Half a line in the spool, and its writer dead: the line is counted, nothing waits for it, nobody is bothered."""
    spool = tmp_path / "spool"
    with _daemon(dsn, tmp_path, BILLING_TAILER_SETTLE_DEADLINE_SECONDS="1") as daemon:
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        assert _posted(daemon, [event(f"whole-{number}") for number in range(100)]) == 200
        (path,) = spool.iterdir()
        limit = path.stat().st_size + 1000
        _let_files_grow(daemon, limit)
        assert _posted(daemon, [event(f"torn-{number}") for number in range(100)]) == 503
        assert path.stat().st_size == limit
        daemon.kill()
        (tmp_path / "volume/audit.jsonl").write_bytes(line(1))
        daemon.start()
        daemon.wait_until(lambda: _everything_is_committed(dsn, spool))
        overdue = "select 1 from call_exceptions where kind = 'overdue'"
        daemon.wait_until(lambda: rows(dsn, overdue), what="no deadline waits for it")
        assert path.read_bytes().endswith(TORN + b"\n")
        assert outcomes(dsn)["torn"] == 1
        found = {row["call_id"] for row in rows(dsn, "select call_id from spend_records")}
        assert {f"whole-{number}" for number in range(100)} <= found
        status = answer_of(run_verb(daemon.variables, "status", "--json"), code=1)
        assert (status["dead_letters_open"], status["lag_bytes"]) == (0, 0)
        assert [one["reason"] for one in status["unhealthy"]] == ["1 call is overdue"]
        assert_sound(dsn, {_file_id(dsn, path): path.read_bytes()})


def _file_id(dsn: str, path: Path) -> int:
    (row,) = rows(dsn, "select file_id from tail_files where path = %s", str(path))
    return int(row["file_id"])


def _stands_by(daemon: Daemon) -> bool:
    return "standby: another tailer is active" in daemon.get("/readyz").text


@pytest.mark.e2e
def test_a_standby_takes_callbacks_for_the_one_that_commits(dsn: str, tmp_path: Path) -> None:
    """What a standby took is settled within seconds, also when it is killed; it takes over its own callbacks, too."""
    spool = tmp_path / "spool"
    with _daemon(dsn, tmp_path, "1.log") as active, contextlib.ExitStack() as stack:
        (tmp_path / "volume/audit.jsonl").write_bytes(lines(0, 30))
        active.wait_until(lambda: count(dsn, "usage_facts") == 30)
        standby = stack.enter_context(_daemon(dsn, tmp_path, "2.log"))
        standby.wait_until(lambda: _stands_by(standby))
        for number in range(2):
            started = time.monotonic()
            assert _posted(standby, [payload(number)]) == 200
            active.wait_until(partial(lambda expected: count(dsn, "charge_receipts") == expected, number + 1))
            assert time.monotonic() - started < 5
        assert _posted(active, [payload(2)]) == 200
        assert _posted(standby, [payload(number) for number in range(3, 10)]) == 200
        standby.kill()
        active.wait_until(lambda: count(dsn, "charge_receipts") == 10)
        standby.start()
        standby.wait_until(lambda: _stands_by(standby))
        assert _posted(standby, [payload(number) for number in range(10, 15)]) == 200
        assert _posted(active, [payload(number) for number in range(15, 20)]) == 200
        active.kill()
        assert _posted(standby, [payload(number) for number in range(20, 30)]) == 200
        standby.wait_until(lambda: count(dsn, "charge_receipts") == 30)
        standby.wait_until(lambda: list(spool.glob("handed-over-*")) == [])
        standby.wait_until(lambda: _everything_is_committed(dsn, spool))
        found = outcomes(dsn)
        assert found["spend_record"] == 30
        assert set(found) <= {"fact", "spend_record", "replayed"}
        assert len(rows(dsn, "select 1 from tail_files where path like '%%callbacks-%%'")) <= 5
        assert rows(dsn, "select 1 from tail_files where state = 'missing'") == []
        assert "spool.trouble" not in active.log() + standby.log()
        assert_sound(dsn)


@pytest.mark.e2e
def test_a_full_disk_loses_nothing_that_was_acknowledged(dsn: str, tmp_path: Path) -> None:
    """Callbacks are refused and the alarm is raised; with room again both end by themselves, and no line is mixed."""
    spool = tmp_path / "spool"
    with _daemon(dsn, tmp_path) as daemon:
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        safe: set[str] = set()
        codes: list[int | None] = []
        for number in range(60):
            call_ids = [f"call-{number}-{index}" for index in range(50)]
            codes.append(_posted(daemon, [event(call_id) for call_id in call_ids]))
            safe |= set(call_ids) if codes[-1] == 200 else set()
            if number == 20:
                (path,) = spool.iterdir()
                _let_files_grow(daemon, path.stat().st_size + 5000)
            elif number == 40:
                assert daemon.metric("billing_tailer_spool_alarm") == 1
                _let_files_grow(daemon, resource.RLIM_INFINITY)
                daemon.wait_until(lambda: daemon.metric("billing_tailer_spool_alarm") == 0)
        assert codes == [200] * 21 + [503] * 20 + [200] * 19
        daemon.wait_until(lambda: _everything_is_committed(dsn, spool))
        found = {row["call_id"] for row in rows(dsn, "select call_id from spend_records")}
        assert safe <= found
        assert rows(dsn, "select 1 from spend_records group by call_id having count(*) > 1") == []
        assert set(outcomes(dsn)) == {"spend_record", "torn"}
        assert_sound(dsn)


def _let_files_grow(daemon: Daemon, bytes_max: int) -> None:
    """No file of the daemon becomes longer: a write that would make it so ends half way, as on a full disk."""
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (bytes_max, resource.RLIM_INFINITY))
