"""The loop on real files and a real Postgres: outcomes, rotation, truncation, restart, bad lines."""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import psycopg
import pytest

from billing_tailer import plan as plan_module
from billing_tailer.errors import LedgerUnavailable
from billing_tailer.ledger import Committed, Ledger
from billing_tailer.model import Plan
from billing_tailer.reader import Batch, Reader
from billing_tailer.tailer import WATCH_SECONDS
from billing_tailer.wake import Wake
from tests.support.follow import following
from tests.support.loglines import RECORDED, line, lines
from tests.support.proof import assert_sound, count, outcomes, rows


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return tmp_path


def test_recorded_lines(dsn: str, volume: Path) -> None:
    """122 real lines: 110 calls, 2 lines under a call id that another request has taken, 10 that are no calls."""
    content = RECORDED.read_bytes()
    (volume / "audit.jsonl").write_bytes(content)
    with following(dsn, volume):
        pass
    assert outcomes(dsn) == {"fact": 110, "conflict": 2, "not_llm_route": 7, "rejected_before_llm": 3}
    assert count(dsn, "usage_facts") == 110
    assert count(dsn, "dead_letters") == 0
    conflicts = rows(dsn, "select call_id from call_conflicts order by start_offset")
    assert [row["call_id"] for row in conflicts] == ["client-chosen-1", "dup-call"]
    assert_sound(dsn, {1: content})


@pytest.mark.parametrize("batch_lines_max", [1, 7, 122])
def test_outcomes_do_not_depend_on_the_batches(dsn: str, volume: Path, batch_lines_max: int) -> None:
    content = RECORDED.read_bytes()
    (volume / "audit.jsonl").write_bytes(content)
    with following(dsn, volume, batch_lines_max=batch_lines_max):
        pass
    assert outcomes(dsn) == {"fact": 110, "conflict": 2, "not_llm_route": 7, "rejected_before_llm": 3}
    assert_sound(dsn, {1: content})


def test_a_fact_has_what_the_line_says(dsn: str, volume: Path) -> None:
    (volume / "audit.jsonl").write_bytes(RECORDED.read_bytes().splitlines(keepends=True)[29])
    with following(dsn, volume):
        pass
    (fact,) = rows(dsn, "select * from usage_facts")
    assert fact["call_id"] == "ec2c7096-eca4-4bc7-b6fe-c5a6043b123a"
    assert (fact["run_id"], fact["billing_account_id"], fact["graph_id"]) == ("run-abort-stream", "enduser-42", 'g"1"')
    assert (fact["status"], fact["request_completed"], fact["provenance"]) == (200, False, "stream")
    assert fact["header_cost_usd"] is None
    assert str(fact["request_seconds"]) == "2.001"


def test_an_unfinished_line_waits(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    whole, half = line(1), line(2)
    log.write_bytes(whole + half[:100])
    with following(dsn, volume) as rig:
        assert count(dsn, "usage_facts") == 1
        with log.open("ab") as out:
            out.write(half[100:])
        rig.turn()
        assert count(dsn, "usage_facts") == 2
    assert_sound(dsn, {1: whole + half})


def test_restart_goes_on_at_the_committed_offset(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    log.write_bytes(lines(0, 50))
    with following(dsn, volume):
        pass
    with log.open("ab") as out:
        out.write(lines(50, 50))
    with following(dsn, volume):
        pass
    assert outcomes(dsn) == {"fact": 100}
    assert_sound(dsn, {1: log.read_bytes()})


def test_rotation_by_rename(dsn: str, volume: Path) -> None:
    """The writer goes on with the old descriptor after the rename, and so do we."""
    log = volume / "audit.jsonl"
    with log.open("ab", buffering=0) as old:
        old.write(lines(0, 10))
        with following(dsn, volume) as rig:
            log.rename(volume / "audit.jsonl.1")
            log.write_bytes(lines(100, 10))
            rig.turn()
            old.write(lines(10, 10))
            rig.turn()
    assert outcomes(dsn) == {"fact": 30}
    files = rows(dsn, "select path, state, generation, previous_file_id from tail_files order by file_id")
    assert [Path(row["path"]).name for row in files] == ["audit.jsonl.1", "audit.jsonl"]
    assert [row["state"] for row in files] == ["rotated", "live"]
    assert_sound(dsn, {1: (volume / "audit.jsonl.1").read_bytes(), 2: log.read_bytes()})


def test_several_rotations_while_stopped(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    log.write_bytes(lines(0, 10))
    with following(dsn, volume):
        pass
    with log.open("ab") as out:
        out.write(lines(10, 10))
    for rotation in (1, 2, 3):
        for number in (2, 1):
            if (volume / f"audit.jsonl.{number}").exists():
                (volume / f"audit.jsonl.{number}").rename(volume / f"audit.jsonl.{number + 1}")
        log.rename(volume / "audit.jsonl.1")
        log.write_bytes(lines(rotation * 100, 10))
    with following(dsn, volume):
        pass
    assert outcomes(dsn) == {"fact": 50}
    assert_sound(dsn)


def test_a_deleted_file_is_read_to_its_end(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    with log.open("ab", buffering=0) as writer, following(dsn, volume) as rig:
        writer.write(lines(0, 10))
        rig.turn()
        log.unlink()
        writer.write(lines(10, 10))
        rig.turn()
    assert outcomes(dsn) == {"fact": 20}
    assert_sound(dsn)


def test_truncation_to_zero(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    log.write_bytes(first := lines(0, 10))
    with following(dsn, volume) as rig:
        os.truncate(log, 0)
        rig.turn()
        log.write_bytes(second := lines(10, 5))
        rig.turn()
    assert outcomes(dsn) == {"fact": 15}
    files = rows(dsn, "select file_id, generation, previous_file_id, state from tail_files order by file_id")
    assert [(f["generation"], f["previous_file_id"], f["state"]) for f in files] == [(1, None, "final"), (2, 1, "live")]
    (gap,) = rows(dsn, "select file_id, start_offset, end_offset, reason from log_gaps")
    assert gap == {"file_id": 1, "start_offset": len(first), "end_offset": None, "reason": "truncated"}
    assert_sound(dsn, {1: first, 2: second})


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("rewrite", ["truncate", "in place"])
def test_regrown_past_the_offset(dsn: str, volume: Path, stopped: bool, rewrite: str) -> None:
    """Fixed-width lines with equal heads: only the bytes before the offset tell the two contents apart."""
    log = volume / "audit.jsonl"
    head = line(0) * 3
    log.write_bytes(first := head + lines(1, 20))
    second = head + lines(100, 60)

    def regrow() -> None:
        if rewrite == "truncate":
            log.write_bytes(second)
        else:
            with log.open("r+b") as out:
                out.write(second)

    with following(dsn, volume) as rig:
        if not stopped:
            regrow()
            rig.turn()
    if stopped:
        regrow()
        with following(dsn, volume):
            pass
    assert count(dsn, "usage_facts") == 1 + 20 + 60
    assert_sound(dsn, {1: first, 2: second})


def test_unread_bytes_lost_to_truncation_are_a_gap(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    log.write_bytes(first := lines(0, 10))
    with following(dsn, volume) as rig:
        with log.open("ab") as out:
            out.write(b"x" * 500)  # no newline: seen, but not committed
        rig.turn()
        os.truncate(log, 0)
        rig.turn()
    (gap,) = rows(dsn, "select start_offset, end_offset, reason from log_gaps")
    assert gap == {"start_offset": len(first), "end_offset": len(first) + 500, "reason": "truncated"}


def test_copytruncate_goes_on_in_the_copy(dsn: str, volume: Path) -> None:
    log, copy = volume / "audit.jsonl", volume / "audit.jsonl.1"
    log.write_bytes(lines(0, 10))
    with following(dsn, volume):
        pass
    with log.open("ab") as out:
        out.write(lines(10, 10))
    shutil.copyfile(log, copy)
    os.truncate(log, 0)
    with log.open("ab") as out:
        out.write(lines(20, 5))
    with following(dsn, volume):
        pass
    assert outcomes(dsn) == {"fact": 25}
    assert count(dsn, "log_gaps") == 0
    assert_sound(dsn)


def test_a_copy_is_not_read_while_the_original_is_there(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    log.write_bytes(lines(0, 10))
    with following(dsn, volume) as rig:
        shutil.copyfile(log, volume / "audit.jsonl.bak")
        rig.turn()
    assert outcomes(dsn) == {"fact": 10}
    assert count(dsn, "tail_files") == 1


def test_truncation_into_committed_bytes_blocks_the_file(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    log.write_bytes(lines(0, 10))
    with following(dsn, volume) as rig:
        os.truncate(log, 2500)
        rig.turn()
        assert "offset_past_end" in str(rig.health.reasons()["files"])
    (file,) = rows(dsn, "select state, blocked_reason from tail_files")
    assert file == {"state": "blocked", "blocked_reason": "offset_past_end"}


def test_a_mount_that_blinks_changes_nothing(dsn: str, volume: Path) -> None:
    directory = volume / "billing"
    directory.mkdir()
    log = directory / "audit.jsonl"
    log.write_bytes(lines(0, 10))
    with following(dsn, directory) as rig:
        directory.rename(volume / "elsewhere")
        rig.turn()
        assert "cannot list" in str(rig.health.reasons()["files"])
        (volume / "elsewhere").rename(directory)
        with log.open("ab") as out:
            out.write(lines(10, 10))
        rig.turn()
        assert rig.health.reasons() == {}
    assert outcomes(dsn) == {"fact": 20}
    assert count(dsn, "tail_files") == 1


def test_one_bad_line_costs_one_dead_letter(dsn: str, volume: Path) -> None:
    poison = b'{"method":"POST","uri":"/v1/chat/completions","status":"2\\u00000"}\n'
    content = lines(0, 500) + poison + b"\xff\xfe not json\n" + b"[]\n" + lines(500, 500)
    (volume / "audit.jsonl").write_bytes(content)
    with following(dsn, volume):
        pass
    assert outcomes(dsn) == {"fact": 1000, "dead_letter": 3}
    letters = rows(dsn, "select * from dead_letters order by start_offset")
    assert [letter["reason"] for letter in letters] == ["missing_field", "invalid_json", "not_an_object"]
    for letter in letters:
        part = content[letter["start_offset"] : letter["end_offset"]]
        assert (letter["raw"], letter["sha256"]) == (part, hashlib.sha256(part).digest())
    assert_sound(dsn, {1: content})


@pytest.mark.parametrize("extra", [-1, 0, 1, 100_000, 3_000_000])
def test_lines_around_the_limit(dsn: str, volume: Path, extra: int) -> None:
    limit = 1 << 16
    start = line(1)[:-2] + b',"padding":"'
    long = start + b"x" * (limit + extra - 2 - len(start)) + b'"}\n'
    assert len(long) - 1 == limit + extra
    content = line(0) + long + line(2)
    (volume / "audit.jsonl").write_bytes(content)
    with following(dsn, volume, line_bytes_max=limit):
        pass
    assert outcomes(dsn) == ({"fact": 3} if extra <= 0 else {"fact": 2, "dead_letter": 1})
    if extra > 0:
        (letter,) = rows(dsn, "select reason, raw, sha256 from dead_letters")
        assert letter == {"reason": "too_long", "raw": long[:4096], "sha256": hashlib.sha256(long).digest()}
    assert_sound(dsn, {1: content})


def test_an_endless_line_is_scanned_again_after_a_restart(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    log.write_bytes(line(0) + b"x" * 300_000)
    with following(dsn, volume):
        pass
    with log.open("ab") as out:
        out.write(b"x" * 200_000)
    with following(dsn, volume) as rig:
        assert outcomes(dsn) == {"fact": 1}
        with log.open("ab") as out:
            out.write(b"x\n" + line(1))
        rig.turn()
    assert outcomes(dsn) == {"fact": 2, "dead_letter": 1}
    assert_sound(dsn, {1: log.read_bytes()})


def test_two_files_with_the_same_beginning(dsn: str, volume: Path) -> None:
    same = line(0) * 10
    (volume / "audit.jsonl.1").write_bytes(same + lines(1, 10))
    (volume / "audit.jsonl.2").write_bytes(same + lines(11, 10))
    with following(dsn, volume):
        pass
    assert count(dsn, "usage_facts") == 21
    assert count(dsn, "tail_files") == 2
    assert_sound(dsn)


def test_many_files_within_the_bound_on_descriptors(dsn: str, volume: Path) -> None:
    for number in range(60):
        (volume / f"audit-{number:03d}.jsonl").write_bytes(lines(number * 10, 10))
    with following(dsn, volume, open_files_max=8) as rig:
        held = [entry for entry in Path("/proc/self/fd").iterdir() if str(volume) in str(entry.resolve())]
        assert 0 < len(held) <= 8
        for number in range(60):
            with (volume / f"audit-{number:03d}.jsonl").open("ab") as out:
                out.write(lines(1000 + number, 1))
        rig.turn()
    assert outcomes(dsn) == {"fact": 660}
    assert_sound(dsn)


def test_start_at_end_declares_what_it_leaves_out(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    log.write_bytes((before := lines(0, 10)) + b'{"half":')
    with following(dsn, volume, start_at_end=True) as rig:
        log.write_bytes(before + lines(10, 5))
        rig.turn()
    assert outcomes(dsn) == {"fact": 5}
    (gap,) = rows(dsn, "select start_offset, end_offset, reason from log_gaps")
    assert gap == {"start_offset": 0, "end_offset": len(before), "reason": "start_at"}
    assert_sound(dsn, {1: log.read_bytes()})


def test_refused_by_postgres_costs_one_dead_letter(dsn: str, volume: Path) -> None:
    """Belt and braces: what the parser lets through and Postgres refuses."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("alter table billing.usage_facts add check (run_id <> 'poison')")
    content = lines(0, 60) + (poison := line(60, run_id="poison")) + lines(61, 60)
    (volume / "audit.jsonl").write_bytes(content)
    with following(dsn, volume):
        pass
    assert outcomes(dsn) == {"fact": 120, "dead_letter": 1}
    (letter,) = rows(dsn, "select reason, raw from dead_letters")
    assert letter == {"reason": "refused_by_postgres", "raw": poison}
    assert_sound(dsn, {1: content})


@pytest.mark.parametrize("room", [1000, 0])
def test_refused_by_postgres_with_more_to_come(
    dsn: str, volume: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """The batch that was read ahead follows a place that has other counts now, and maybe more bytes of kept dead
    letters: it is read again."""
    monkeypatch.setattr(plan_module, "RAW_BYTES_MAX_PER_FILE", room)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("alter table billing.usage_facts add check (run_id <> 'poison')")
    content = lines(0, 60) + line(60, run_id="poison") + lines(61, 140)
    (volume / "audit.jsonl").write_bytes(content)
    with following(dsn, volume, batch_lines_max=70):
        pass
    assert outcomes(dsn) == {"fact": 200, "dead_letter": 1}
    assert_sound(dsn, {1: content})


def test_directories_are_watched_once_a_second(dsn: str, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = []
    monkeypatch.setattr(Wake, "watch", lambda _, directories: watched.append(directories))
    with following(dsn, volume) as rig:
        rig.tailer._next_watch = time.monotonic() + 60
        watched.clear()
        rig.turn()
        assert watched == []
        rig.tailer._next_watch = time.monotonic()
        rig.tailer._round()
        rig.tailer._round()
        assert watched == [[str(volume)]]
        assert WATCH_SECONDS / 2 < rig.tailer._next_watch - time.monotonic() <= WATCH_SECONDS


@pytest.mark.parametrize("batch_lines_max", [30, 70])
def test_the_next_batch_is_read_while_one_is_committed(
    dsn: str, volume: Path, monkeypatch: pytest.MonkeyPatch, batch_lines_max: int
) -> None:
    """Few lines and many go to Postgres by different ways."""
    ahead: list[int] = []
    commit, gather = Ledger.commit, Reader.gather
    read = threading.Semaphore(0)

    def gather_and_tell(self: Reader, *args: Any, **named: Any) -> Batch:
        batch = gather(self, *args, **named)
        if named.get("after"):
            ahead.append(batch.plan().lines)
            read.release()
        return batch

    def commit_slowly(self: Ledger, plan: Plan, meanwhile: Callable[[], None]) -> Committed:
        def and_wait() -> None:
            meanwhile()
            assert plan.lines < batch_lines_max or read.acquire(timeout=10), "nothing is read meanwhile"

        return commit(self, plan, and_wait)

    content = lines(0, 2 * batch_lines_max + 20)
    monkeypatch.setattr(Reader, "gather", gather_and_tell)
    monkeypatch.setattr(Ledger, "commit", commit_slowly)
    (volume / "audit.jsonl").write_bytes(content)
    with following(dsn, volume, batch_lines_max=batch_lines_max):
        pass
    assert ahead == [batch_lines_max, 20]
    assert outcomes(dsn) == {"fact": 2 * batch_lines_max + 20}
    assert_sound(dsn, {1: content})


@pytest.mark.parametrize("batch_lines_max", [10, 1000])
def test_a_question_after_the_commit_fails(
    dsn: str, volume: Path, monkeypatch: pytest.MonkeyPatch, batch_lines_max: int
) -> None:
    """While the next batch is read, and where there is none: what is committed was told once, and is gone on from."""
    with_records = Ledger.with_records

    def fail_once(self: Ledger, call_ids: Collection[str]) -> list[str]:
        monkeypatch.setattr(Ledger, "with_records", with_records)
        raise LedgerUnavailable("as if")

    content = lines(0, 30)
    with following(dsn, volume, batch_lines_max=batch_lines_max) as rig:
        (volume / "audit.jsonl").write_bytes(content)
        monkeypatch.setattr(Ledger, "with_records", fail_once)
        for _ in range(20):
            rig.follower.scan_soon()
            rig.tailer._turn()
        assert Ledger.with_records is with_records
        assert rig.events.registry.get_sample_value("billing_tailer_lines_total", {"outcome": "fact"}) == 30
        failures = rig.events.registry.get_sample_value(
            "billing_tailer_commit_failures_total", {"reason": "connection"}
        )
        assert failures == 1
    assert outcomes(dsn) == {"fact": 30}
    assert_sound(dsn, {1: content})


def test_other_compressed_files_are_not_read_as_text(dsn: str, volume: Path) -> None:
    (volume / "audit.jsonl.3.xz").write_bytes(lines(20, 10))
    (volume / "audit.jsonl").write_bytes(lines(10, 10))
    with following(dsn, volume):
        pass
    assert outcomes(dsn) == {"fact": 10}
    assert count(dsn, "tail_files") == 1


def test_what_was_removed_because_it_is_committed_is_final(dsn: str, volume: Path) -> None:
    """As the janitor of the spool does: not a file that is missing, and its descriptor is let go."""
    log = volume / "callbacks-old.jsonl"
    log.write_bytes(b"[]\n")
    with following(dsn, volume) as rig:
        path, size = os.fsencode(log), log.stat().st_size
        assert rig.follower.is_committed(path, size)
        assert not rig.follower.is_committed(path, size + 1)
        log.unlink()
        rig.follower.removed([path])
        rig.turn()
        assert rig.health.reasons() == {}
        assert str(log) not in {str(entry.resolve()) for entry in Path("/proc/self/fd").iterdir()}
    assert rows(dsn, "select state from tail_files") == [{"state": "final"}]


def test_another_session_holds_the_lock(dsn: str, volume: Path) -> None:
    with following(dsn, volume) as rig:
        second = Ledger(dsn, schema="billing", source_id="default", stop=rig.tailer._stop)
        assert second._try_open() is False
        second.close()


def test_a_half_line_over_a_small_limit(dsn: str, volume: Path) -> None:
    """The bytes before an over-long line belong to its frontier."""
    log = volume / "audit.jsonl"
    log.write_bytes(lines(0, 3) + b"x" * 1500)
    with following(dsn, volume, line_bytes_max=1024) as rig:
        with log.open("ab") as out:
            out.write(b"\n" + line(3))
        rig.turn()
    assert outcomes(dsn) == {"fact": 4, "dead_letter": 1}
    assert_sound(dsn, {1: log.read_bytes()})


def test_lost_content_that_comes_back_is_read_and_no_gap_any_more(dsn: str, volume: Path) -> None:
    log = volume / "audit.jsonl"
    log.write_bytes(lines(0, 10))
    with following(dsn, volume) as rig:
        os.truncate(log, 0)
        rig.turn()
        assert count(dsn, "log_gaps") == 1
        (volume / "audit.jsonl.restored").write_bytes(lines(0, 15))
        rig.turn()
    assert outcomes(dsn) == {"fact": 15}
    assert count(dsn, "log_gaps") == 0
    assert_sound(dsn)
