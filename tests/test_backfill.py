"""`backfill`: the outcomes of tailing, once, whatever is interrupted, beside a running daemon."""

import gzip
import threading
from pathlib import Path
from typing import Any

import pytest

from billing_tailer.errors import LedgerUnavailable
from billing_tailer.ledger import Ledger, writer
from tests.support.follow import following
from tests.support.loglines import RECORDED, line, lines
from tests.support.proof import assert_sound, count, outcomes, rows
from tests.support.spendlines import payload
from tests.support.verbs import Verb, run_verb
from tests.test_money_cli import call, settle, spool, sweep

WHY = ("--reason", "before the tailer")


def archived(log: Path, content: bytes, name: str = "old.jsonl") -> str:
    """An old log outside of the volume."""
    archive = log.parent.parent / "archive"
    archive.mkdir(exist_ok=True)
    (archive / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(archive / name)


def mixed(number: int) -> bytes:
    return lines(number, 50) + b"not json\n\n" + line(number) + line(number, nginx_request_id="f" * 32)


@pytest.mark.parametrize("name", ["old.jsonl", "old.jsonl.gz"])
def test_the_outcomes_of_tailing(verb: Verb, dsn: str, log: Path, name: str) -> None:
    """The same as of the file that is followed, in many batches, with a line beyond the limit and one without end."""
    verb.environment(LINE_BYTES_MAX="5000", BATCH_BYTES_MAX="65536")
    content = b"".join(mixed(100 * n) for n in range(20)) + b"x" * 200_000 + b"\n" + RECORDED.read_bytes() + b'{"half":'
    old = archived(log, content, name)
    (planned,) = verb.json("backfill", old, *WHY, "--dry-run")
    assert (planned["applied"], count(dsn, "tail_files")) == (False, 0)
    (done,) = verb.json("backfill", old, *WHY, "--by", "ann")
    assert (done["from_offset"], done["to_offset"], done["applied"]) == (0, len(content), True)
    assert sum(planned["outcomes"].values()) == sum(done["outcomes"].values()) == content.count(b"\n") + 1
    assert done["outcomes"] == outcomes(dsn)
    assert_sound(dsn, {})
    assert verb.json("verify")["generations"][0]["found_at"] == old
    (file,) = rows(dsn, "select source_id, state, path from tail_files")
    assert file == {"source_id": "default.backfill", "state": "final", "path": old}
    assert rows(dsn, "select file_id, from_offset, reason, started_by from backfills") == [
        {"file_id": 1, "from_offset": 0, "reason": "before the tailer", "started_by": "ann"}
    ]
    read = outcomes(dsn)
    assert len(rows(dsn, "select 1 from dead_letters where reason = 'unterminated'")) == 1
    settle(dsn, log, content, line_bytes_max=5000)
    again = {key: value for key, value in outcomes(dsn).items() if key != "replayed"}
    assert again["fact"] == read["fact"], "tailing the same lines finds every call known"


def test_twice_is_nothing(verb: Verb, dsn: str, log: Path) -> None:
    """Also compressed meanwhile, and under another name."""
    old = archived(log, mixed(0))
    verb("backfill", old, *WHY)
    before = rows(dsn, "select * from tail_files")
    moved = archived(log, mixed(0), "moved.jsonl.gz")
    Path(old).unlink()
    for _ in range(2):
        (done,) = verb.json("backfill", moved, *WHY)
        assert (done["outcomes"], done["from_offset"]) == ({}, len(mixed(0)))
    assert rows(dsn, "select * from tail_files") == before
    assert count(dsn, "backfills") == 1


def test_killed_at_any_moment(verb: Verb, dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every commit may be the last one, whether it arrived or not; the next run goes on from there."""
    verb.environment(BATCH_BYTES_MAX="65536")
    content = b"".join(mixed(100 * n) for n in range(8))
    old = archived(log, content)
    commit, calls = Ledger.commit, [0]

    def dying(self: Ledger, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] % 3 == 1:
            raise LedgerUnavailable("cut before")
        committed = commit(self, *args)
        if calls[0] % 3 == 2:
            raise LedgerUnavailable("cut after")
        return committed

    monkeypatch.setattr(Ledger, "commit", dying)

    def is_done() -> bool:
        try:
            verb("backfill", old, *WHY)
        except AssertionError:  # exit code 1
            return False
        return True

    runs = 1
    while not is_done():
        runs += 1
        assert runs < 50
    assert runs >= 5
    assert rows(dsn, "select committed_offset as o, state from tail_files") == [{"o": len(content), "state": "final"}]
    assert (count(dsn, "tail_files"), count(dsn, "usage_facts")) == (1, 400)
    assert verb.json("verify")["ok"]


def test_beside_a_daemon(verb: Verb, dsn: str, log: Path) -> None:
    """Its lock and positions stay its own; its settler looks after calls whose records come later."""
    log.write_bytes(lines(0, 10))
    with following(dsn, log.parent) as rig:
        spool(log, payload(100))
        rig.turn()
        verb("backfill", archived(log, lines(5, 10) + lines(100, 3)), *WHY)
        assert rows(dsn, "select source_reference as id from charge_receipts") == [{"id": call(100)}], "known: at once"
        with log.open("ab") as out:
            out.write(lines(20, 5))
        spool(log, payload(101))
        rig.turn()
        assert count(dsn, "charge_receipts") == 2
    assert outcomes(dsn)["replayed"] == 5
    assert verb.json("status")["facts"] == 23
    with following(dsn, log.parent, deadline_seconds=0) as rig:
        sweep(rig)
    overdue = rows(dsn, "select call_id from call_exceptions where kind = 'overdue' and call_id = %s", call(102))
    assert len(overdue) == 1, "the daemon's deadline"
    assert verb.json("verify")["ok"]
    assert verb.json("verify", "--settlement")["ok"]


def test_what_a_daemon_follows_is_refused(verb: Verb, dsn: str, log: Path) -> None:
    log.write_bytes(mixed(0))
    verb("backfill", str(log), *WHY, code=2)
    assert "stands in AUDIT_GLOBS" in verb.stderr
    settle(dsn, log, b"")
    copy = archived(log, log.read_bytes() + lines(900, 3), "copy.jsonl.gz")
    verb("backfill", copy, *WHY, code=2)
    assert "has the content of" in verb.stderr
    verb("backfill", str(log.parent / "none"), *WHY, code=2)
    name = archived(log, b"{}\n", f"callbacks-{'0' * 32}-000000.jsonl")
    verb("backfill", name, *WHY, code=2)
    assert "is a file of the spool" in verb.stderr
    assert rows(dsn, "select from tail_files where source_id <> 'default'") == []


def test_one_at_a_time(dsn: str, verb: Verb, log: Path) -> None:
    ledger = Ledger(dsn, schema="billing", source_id="default.backfill", stop=threading.Event())
    assert ledger.open(tick=lambda: None, may_stand_by=lambda _: True)
    try:
        verb("backfill", archived(log, lines(0, 3)), *WHY, code=3)
        assert "another backfill of source default.backfill is running" in verb.stderr
    finally:
        ledger.close()


def test_refused_by_postgres_costs_one_dead_letter(verb: Verb, dsn: str, log: Path) -> None:
    from tests.test_verify import execute

    execute(dsn, "alter table usage_facts add constraint odd check (run_id <> 'run-1')")
    (done,) = verb.json("backfill", archived(log, lines(0, 5)), *WHY)
    assert done["outcomes"] == {"fact": 4, "dead_letter": 1}
    assert verb.json("verify")["ok"]


def test_damaged_gzip(dsn: str, log: Path) -> None:
    """What came before the damage is committed; the verb fails."""
    old = Path(archived(log, lines(0, 2000), "old.gz"))
    old.write_bytes(old.read_bytes()[:-2000])
    environment = {
        "BILLING_TAILER_DATABASE_URL": dsn,
        "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*",
        "BILLING_TAILER_BATCH_BYTES_MAX": "65536",
    }
    found = run_verb(environment, "backfill", str(old), *WHY)
    assert found.returncode == 1
    assert "it ends in the middle of the compressed data" in found.stderr
    assert "Traceback" not in found.stderr
    assert 0 < count(dsn, "usage_facts") < 2000


def test_holes(dsn: str, log: Path) -> None:
    """Nobody writes to an old log any more: NUL bytes are not waited for."""
    content = bytes(3) + lines(0, 5) + bytes(200_000) + lines(5, 5) + bytes(70_000)
    old = archived(log, content)
    environment = {
        "BILLING_TAILER_DATABASE_URL": dsn,
        "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*",
        "BILLING_TAILER_BATCH_BYTES_MAX": "65536",
    }
    found = run_verb(environment, "backfill", old, *WHY)
    assert found.returncode == 0, found.stderr
    assert count(dsn, "usage_facts") == 10
    assert {row["reason"] for row in rows(dsn, "select reason from log_gaps")} == {"hole"}
    assert_sound(dsn, {1: content})
    assert run_verb(environment, "verify").returncode == 0


def test_known_calls_are_replayed(verb: Verb, dsn: str, log: Path) -> None:
    """In batch after batch of one range, whose counts are those that were stored."""
    settle(dsn, log, lines(0, 300))
    verb.environment(BATCH_BYTES_MAX="65536")
    (done,) = verb.json("backfill", archived(log, line(900) + lines(0, 300)), *WHY)
    assert done["outcomes"] == {"fact": 1, "replayed": 300}
    assert count(dsn, "usage_facts") == 301
    assert verb.json("verify")["ok"]


def test_a_large_archive_is_gone_on_with(
    verb: Verb, dsn: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To find its place again takes longer than Postgres lets the session that holds the lock be silent."""
    monkeypatch.setattr(writer, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(writer, "PING_SECONDS", 0.02)
    head, large = gzip.compress(line(1)), gzip.compress(b"x" * (8 << 20), 1) * 40 + gzip.compress(b"\n")
    old = archived(log, b"", "old.jsonl.gz")
    Path(old).write_bytes(head + large)
    assert verb.json("backfill", old, *WHY)[0]["outcomes"] == {"fact": 1, "dead_letter": 1}
    Path(old).write_bytes(head + large + gzip.compress(line(2)))
    (done,) = verb.json("backfill", old, *WHY)
    assert (done["outcomes"], done["file_id"]) == ({"fact": 1}, 1)
