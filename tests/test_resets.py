"""Moving an offset by an operator's will: where it lands, what is forgotten, and who adopts it when."""

import os
import random
import time
from pathlib import Path

import psycopg
import pytest

from billing_tailer import offsets_cli
from billing_tailer.errors import ConfigError
from billing_tailer.ledger import reports
from billing_tailer.model import Position
from billing_tailer.resets import NotInSight, OrderedReset, newest_at, parse_request, plan_reset
from billing_tailer.settings import OffsetReset, load
from tests.support.daemon import Daemon
from tests.support.follow import Rig, following
from tests.support.logfiles import append, busy_writer
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows

POISON = b"not json\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The log file of a volume of its own."""
    volume = tmp_path / "billing"
    volume.mkdir()
    return volume / "audit.jsonl"


def ordered(rig: Rig, request: str, reset_id: str = "one") -> OrderedReset:
    return OrderedReset(OffsetReset.parse(request), reset_id, rig.ledger, rig.files, rig.events, rig.health)


def waiting(reset: OrderedReset) -> bool:
    return reset.pending


def apply(rig: Rig, request: str, reset_id: str = "one") -> None:
    """As the daemon does when it becomes the owner."""
    reset = ordered(rig, request, reset_id)
    reset.apply()
    assert not reset.pending
    rig.tailer._load()
    rig.turn()


def three_rows(dsn: str, log: Path) -> list[int]:
    """Three rows of `tail_batches`, each of ten calls and a dead letter; returns their starts and the end."""
    starts = []
    for number in range(3):
        starts.append(log.stat().st_size if number else 0)
        append(log, lines(number * 10, 5) + POISON + lines(number * 10 + 5, 5))
        with following(dsn, log.parent):
            pass
    assert [row["start_offset"] for row in rows(dsn, "select start_offset from tail_batches order by 1")] == starts
    return [*starts, log.stat().st_size]


def position_of(rig: Rig, log: Path) -> Position:
    position = newest_at(rig.ledger.positions(), str(log))
    assert position is not None
    return position


# --- where it lands --------------------------------------------------------------------------------------------------


def test_a_rewind_lands_at_the_start_of_its_row(dsn: str, log: Path) -> None:
    starts = three_rows(dsn, log)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "update billing.dead_letters set resolved_at = now(), resolution = 'seen' where start_offset > %s",
            (starts[2],),
        )
    middle = starts[1] + len(lines(10, 3))
    with following(dsn, log.parent) as rig:
        reset = ordered(rig, f"{log}={middle}")
        reset.apply()
        assert position_of(rig, log).committed_offset == starts[1]
        assert [row["start_offset"] for row in rows(dsn, "select start_offset from tail_batches")] == [0]
        letters = rows(dsn, "select start_offset, resolution from dead_letters order by 1")
        assert [(row["start_offset"] >= starts[1], row["resolution"]) for row in letters] == [
            (False, None),
            (True, "seen"),
        ]
        kept = "select sum(octet_length(raw)) as n from dead_letters"
        assert rows(dsn, "select dead_letter_bytes as n from tail_files") == rows(dsn, kept)
        rig.tailer._load()
        rig.turn()
    assert outcomes(dsn) == {"fact": 10, "replayed": 20, "dead_letter": 3}
    assert count(dsn, "usage_facts") == 30
    (row,) = rows(dsn, "select * from offset_resets")
    assert (row["reset_id"], row["source"], row["requested"]) == ("one", "env", f"{log}={middle}")
    assert (row["old_offset"], row["new_offset"]) == (starts[3], starts[1])


def test_to_the_beginning(dsn: str, log: Path) -> None:
    three_rows(dsn, log)
    with following(dsn, log.parent) as rig:
        apply(rig, f"{log}=beginning")
        append(log, line(99))
        rig.turn()
    assert outcomes(dsn) == {"fact": 1, "replayed": 30, "dead_letter": 3}
    assert_sound(dsn, {1: log.read_bytes()})


def test_a_skip_forward_is_declared(dsn: str, log: Path) -> None:
    append(log, lines(0, 10))
    with following(dsn, log.parent) as rig:
        old = log.stat().st_size
        append(log, lines(10, 10) + b'{"half')
        apply(rig, f"{log}=end")
        (gap,) = rows(dsn, "select * from log_gaps")
        assert (gap["start_offset"], gap["end_offset"], gap["reason"]) == (old, log.stat().st_size - 6, "skipped")
        assert outcomes(dsn) == {"fact": 10}
        append(log, b'"}\n' + line(20))
        rig.turn()
    assert outcomes(dsn) == {"fact": 11, "dead_letter": 1}
    assert_sound(dsn, {1: log.read_bytes()})


def test_a_rewind_into_a_gap_reads_it(dsn: str, log: Path) -> None:
    append(log, lines(0, 10))
    with following(dsn, log.parent) as rig:
        append(log, lines(10, 10))
        apply(rig, f"{log}=end")
        append(log, lines(20, 10))
        rig.turn()
        apply(rig, f"{log}={len(lines(0, 15))}", "two")
    assert count(dsn, "log_gaps") == 0
    assert outcomes(dsn) == {"fact": 20, "replayed": 10}
    assert_sound(dsn, {1: log.read_bytes()})


def test_to_where_it_is_changes_nothing(dsn: str, log: Path) -> None:
    starts = three_rows(dsn, log)
    with following(dsn, log.parent) as rig:
        apply(rig, f"{log}={starts[3]}")
    assert outcomes(dsn) == {"fact": 30, "dead_letter": 3}
    assert count(dsn, "offset_resets") == 1
    assert_sound(dsn, {1: log.read_bytes()})


def test_an_odd_path(dsn: str, log: Path) -> None:
    odd = os.fsdecode(os.fsencode(log.parent) + b"/audit\xff=\\\n.jsonl")
    Path(odd).write_bytes(lines(0, 10))
    with following(dsn, log.parent) as rig:
        apply(rig, f"{odd}=beginning")
        assert parse_request(f"{odd}=0").path == rig.ledger.positions()[0].path
    assert outcomes(dsn) == {"replayed": 10}


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("byte", "words"), [(5, "in the middle of a line"), (7101, "the file has 7100 bytes")])
def test_a_byte_that_is_no_place(dsn: str, log: Path, byte: int, words: str) -> None:
    append(log, lines(0, 10))
    assert log.stat().st_size == 7100
    with following(dsn, log.parent) as rig, pytest.raises(ConfigError, match=words):
        ordered(rig, f"{log}={byte}").apply()
    assert count(dsn, "offset_resets") == 0
    assert outcomes(dsn) == {"fact": 10}


def test_an_id_is_for_one_reset(dsn: str, log: Path) -> None:
    append(log, lines(0, 10))
    with following(dsn, log.parent) as rig:
        apply(rig, f"{log}=beginning")
        apply(rig, f"{log}=beginning")
        assert count(dsn, "offset_resets") == 1
        with pytest.raises(
            ConfigError, match=r"OFFSET_RESET_ID=one was used for .*=beginning' of source default, not for .*=end' of"
        ):
            ordered(rig, f"{log}=end").apply()
    assert outcomes(dsn) == {"replayed": 10}


def test_an_id_of_another_source_is_not_ours(dsn: str, log: Path) -> None:
    """Two sidecars, both with /billing mounted and the same OFFSET_RESET_ID: the second reset must not vanish."""
    append(log, lines(0, 10))
    with following(dsn, log.parent, source_id="a") as rig:
        apply(rig, f"{log}=beginning")
    with following(dsn, log.parent, source_id="b") as rig:
        try:
            apply(rig, f"{log}=beginning")
        except ConfigError as error:
            assert "source a" in str(error)  # noqa: PT017 - refusing is one right answer, applying the other
        else:
            assert count(dsn, "offset_resets") == 2


@pytest.mark.parametrize("how", ["replaced", "truncated", "gone"])
def test_another_file_under_the_name(dsn: str, log: Path, how: str) -> None:
    """What another file contains says nothing about where a position belongs."""
    append(log, lines(0, 10))
    with following(dsn, log.parent):
        pass
    with following(dsn, log.parent) as rig:
        if how == "gone":
            rig.files.close()
            log.rename(log.parent.parent / "elsewhere")
        else:
            log.write_bytes(lines(50, 20 if how == "replaced" else 5))
        reset = ordered(rig, f"{log}=beginning")
        reset.apply()
        assert waiting(reset)
        assert "the id is not used up" in rig.health.reasons()["reset"][0]
        assert count(dsn, "offset_resets") == 0
        with pytest.raises(NotInSight):
            plan_reset(
                OffsetReset(str(log), 0),
                position_of(rig, log),
                rig.files,
                rig.ledger.range_start,
                reset_id="x",
                source="cli",
                reason="y",
            )
        rig.turn()
        if how != "gone":  # the new generation is known now
            assert reset.due(rig.follower.positions.values())
            reset.apply()
            assert not waiting(reset)
            assert "reset" not in rig.health.reasons()


def test_a_blocked_file_goes_on_from_where_the_operator_says(dsn: str, log: Path) -> None:
    append(log, lines(0, 10))
    with following(dsn, log.parent) as rig:
        os.truncate(log, len(lines(0, 5)) + 7)
        rig.turn()
        assert "offset_past_end" in str(rig.health.reasons())
        apply(rig, f"{log}=beginning")
        assert rig.health.reasons() == {}
        append(log, b"\n" + line(20))
        rig.turn()
    assert count(dsn, "tail_files") == 1
    assert count(dsn, "log_gaps") == 0
    assert outcomes(dsn) == {"replayed": 5, "dead_letter": 1, "fact": 1}


# --- the daemon ------------------------------------------------------------------------------------------------------


def variables(dsn: str, log: Path, **changes: str) -> dict[str, str]:
    found = {"AUDIT_GLOBS": f"{log.parent}/audit*.jsonl*", "DATABASE_URL": dsn, "HTTP_PORT": "0", **changes}
    return {f"BILLING_TAILER_{name}": value for name, value in found.items()}


def resets_total(daemon: Daemon, source: str) -> float | None:
    return daemon.metric("billing_tailer_offset_resets_total", f'{{source="{source}"}}')


def test_offset_reset_is_applied_once(dsn: str, log: Path, tmp_path: Path) -> None:
    append(log, lines(0, 10))
    with following(dsn, log.parent):
        pass
    environment = variables(dsn, log, OFFSET_RESET=f"{log}=beginning", OFFSET_RESET_ID="2026-11-22")
    with Daemon(environment, tmp_path / "log") as daemon:
        daemon.wait_until(lambda: outcomes(dsn) == {"replayed": 10})
        assert (resets_total(daemon, "env"), resets_total(daemon, "cli")) == (1, 0)
        assert daemon.terminate() == 0
        daemon.start()
        assert daemon.wait_for_event("offset.reset_known")["reset_id"] == "2026-11-22"
        append(log, line(10))
        daemon.wait_until(lambda: outcomes(dsn) == {"replayed": 10, "fact": 1})
        assert daemon.terminate() == 0
        daemon.variables["BILLING_TAILER_OFFSET_RESET"] = f"{log}=end"
        daemon.start()
        assert daemon.wait() == 2
        assert "BILLING_TAILER_OFFSET_RESET_ID=2026-11-22 was used for" in daemon.log()
        assert "Traceback" not in daemon.log()
    assert_sound(dsn, {1: log.read_bytes()})


def test_offset_reset_waits_for_its_file(dsn: str, log: Path, tmp_path: Path) -> None:
    """Once it appears, nothing of it is read before the reset."""
    environment = variables(dsn, log, OFFSET_RESET=f"{log}=end", OFFSET_RESET_ID="one")
    with Daemon(environment, tmp_path / "log") as daemon:
        daemon.wait_for_event("offset.reset_pending")
        answer = daemon.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["reasons"]["reset"] == [
            f"OFFSET_RESET {log}=end: nothing is known of {log} yet; the id is not used up"
        ]
        assert count(dsn, "offset_resets") == 0
        (log.parent / "audit-other.jsonl").write_bytes(lines(100, 10))
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 10)
        (log.parent / "new").write_bytes(lines(0, 50))
        (log.parent / "new").rename(log)
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        append(log, line(50))
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 11)
        assert (resets_total(daemon, "env"), resets_total(daemon, "cli")) == (1, 0)
        assert daemon.terminate() == 0
    (gap,) = rows(dsn, "select start_offset, end_offset, reason from log_gaps")
    assert gap == {"start_offset": 0, "end_offset": len(lines(0, 50)), "reason": "skipped"}
    assert_sound(dsn)


def test_offset_reset_waits_for_a_rotation(dsn: str, log: Path, tmp_path: Path) -> None:
    append(log, lines(0, 10))
    rotated = log.with_name("audit.jsonl.1")
    environment = variables(dsn, log, OFFSET_RESET=f"{rotated}=beginning", OFFSET_RESET_ID="one")
    with Daemon(environment, tmp_path / "log") as daemon:
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 10)
        log.rename(rotated)
        daemon.wait_until(lambda: outcomes(dsn) == {"replayed": 10})
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        assert daemon.terminate() == 0
    assert_sound(dsn)


@pytest.mark.parametrize(("target", "words"), [("5", "in the middle of a line"), ("9999", "the file has 7100 bytes")])
def test_offset_reset_to_no_place(dsn: str, log: Path, tmp_path: Path, target: str, words: str) -> None:
    append(log, lines(0, 10))
    with following(dsn, log.parent):
        pass
    environment = variables(dsn, log, OFFSET_RESET=f"{log}={target}", OFFSET_RESET_ID="one")
    with Daemon(environment, tmp_path / "log") as daemon:
        assert daemon.wait() == 2
        assert words in daemon.log()
        assert "Traceback" not in daemon.log()


def test_an_idle_daemon_adopts_a_reset(dsn: str, log: Path, tmp_path: Path) -> None:
    append(log, lines(0, 10))
    environment = variables(dsn, log)
    with Daemon(environment, tmp_path / "log") as daemon:
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 10)
        operator_resets(environment, f"{log}=beginning")
        started = time.monotonic()
        daemon.wait_until(lambda: outcomes(dsn) == {"replayed": 10})
        assert time.monotonic() - started < 4
        assert (resets_total(daemon, "env"), resets_total(daemon, "cli")) == (0, 1)
        assert daemon.terminate() == 0
    assert_sound(dsn, {1: log.read_bytes()})


def operator_resets(environment: dict[str, str], request: str) -> None:
    """As `offsets reset` does, without the cost of a process."""
    settings = load(environment)
    with reports(environment["BILLING_TAILER_DATABASE_URL"], "billing", "default") as ledger:
        offsets_cli._reset(settings, ledger, parse_request(request), "test", "operator", dry_run=False)


def test_a_busy_daemon_adopts_resets(dsn: str, log: Path, tmp_path: Path) -> None:
    """The offset moves hundreds of times a second, and operators win now and then."""
    append(log, lines(0, 10))
    environment = variables(dsn, log, LOG_LEVEL="warning")
    with Daemon(environment, tmp_path / "log") as daemon:
        with busy_writer(log, 10) as written:
            daemon.wait_until(lambda: count(dsn, "usage_facts") > 100)
            for _ in range(8):
                at = random.randrange(written[0])
                operator_resets(environment, f"{log}={random.choice(['beginning', len(lines(0, at))])}")
                time.sleep(random.random() / 5)
        daemon.wait_until(lambda: count(dsn, "usage_facts") == written[0])
        size = log.stat().st_size
        daemon.wait_until(lambda: rows(dsn, "select committed_offset as n from tail_files") == [{"n": size}])
        assert daemon.alive()
        assert "Traceback" not in daemon.log()
        failed = [event["reason"] for event in daemon.events("commit.failed")]
    assert count(dsn, "offset_resets") == 8
    assert_sound(dsn, {1: log.read_bytes()})
    assert "deadlock_detected" not in failed


def test_an_offset_moved_by_hand_ends_the_daemon(dsn: str, log: Path, tmp_path: Path) -> None:
    """Nobody may write beside it: the next commit finds out and rolls back."""
    append(log, lines(0, 10))
    with Daemon(variables(dsn, log), tmp_path / "log") as daemon:
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 10)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("update billing.tail_files set committed_offset = committed_offset - 710")
        append(log, line(10))
        assert daemon.wait(10) == 3
        assert "another process moved a position of source default" in daemon.log()
        assert "Traceback" not in daemon.log()
    assert count(dsn, "usage_facts") == 10
