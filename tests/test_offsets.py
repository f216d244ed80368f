"""Generations that nothing is read from, missing or blocked: how they are shown, given up, and let go on elsewhere."""

import gzip
import os
import shutil
import threading
from pathlib import Path

import psycopg
import pytest

from billing_tailer.errors import PositionMoved
from billing_tailer.files import LogFiles
from billing_tailer.ledger import reports
from billing_tailer.rulings import plan_acceptance, plan_adoption
from tests.support.daemon import Daemon
from tests.support.follow import Rig, following
from tests.support.logfiles import append, busy_writer
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows
from tests.support.verbs import Verb

WHY = ("--reason", "ticket 7", "--by", "ada")
WORDS = {"reset_id": "x", "reason": "y", "by": "z"}


def follow(dsn: str, log: Path) -> None:
    with following(dsn, log.parent):
        pass


def noticed(rig: Rig) -> None:
    """A running tailer asks every two seconds what operators did: now."""
    rig.tailer._next_check = 0.0
    rig.turn()


def states(dsn: str) -> list[tuple[str, str | None, int]]:
    found = rows(dsn, "select state, blocked_reason, committed_offset from tail_files order by file_id")
    return [(row["state"], row["blocked_reason"], row["committed_offset"]) for row in found]


def gaps(dsn: str) -> list[tuple[int, int, int | None, str]]:
    found = rows(dsn, "select * from log_gaps order by file_id, start_offset")
    return [(row["file_id"], row["start_offset"], row["end_offset"], row["reason"]) for row in found]


def proven(verb: Verb, dsn: str) -> None:
    assert verb.json("verify")["differences"] == []
    assert_sound(dsn)


def past_its_end(dsn: str, log: Path, *, half: bytes = b"") -> None:
    """Ten lines committed, and what was seen behind them; then cut to five lines."""
    append(log, lines(0, 10) + half)
    follow(dsn, log)
    os.truncate(log, len(lines(0, 5)))
    follow(dsn, log)
    assert states(dsn) == [("blocked", "offset_past_end", 7100)]


def ambiguous(dsn: str, log: Path) -> tuple[Path, Path]:
    """Ten lines committed; the file is gone, and two others go on from it, each in its way."""
    append(log, lines(0, 10))
    follow(dsn, log)
    one, other = log.with_name("audit.jsonl.1"), log.with_name("audit.jsonl.2")
    for number, copy in enumerate((one, other)):
        shutil.copyfile(log, copy)
        append(copy, lines(10 + number, 5))
    log.unlink()
    follow(dsn, log)
    assert states(dsn) == [("blocked", "ambiguous", 7100)]
    return one, other


def missing(dsn: str, log: Path, *, half: bytes = b"") -> Path:
    """Ten lines committed, and what was seen behind them; then out of sight."""
    append(log, lines(0, 10) + half)
    follow(dsn, log)
    away = log.parent.parent / "away"
    log.rename(away)
    follow(dsn, log)
    assert states(dsn) == [("missing", None, 7100)]
    return away


# --- giving up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("half", [b"", b'{"half'])
def test_a_file_that_is_too_short_is_given_up(verb: Verb, dsn: str, log: Path, running: bool, half: bytes) -> None:
    """What is left of it, and what is written to it, is a file of its own; nothing of it blocks again."""
    past_its_end(dsn, log, half=half)
    end = 7100 + len(half) if half else None
    if running:
        with following(dsn, log.parent) as rig:
            assert "`billing-tailer offsets accept-gap 1 --reason TEXT`" in rig.health.reasons()["files"][0]
            verb("offsets", "accept-gap", "1", *WHY)
            noticed(rig)
            assert rig.health.reasons() == {}
            append(log, lines(10, 20))
            rig.turn()
            assert rig.health.reasons() == {}
    else:
        verb("offsets", "accept-gap", "1", *WHY)
        append(log, lines(10, 2))
        follow(dsn, log)
        append(log, lines(12, 18))  # longer than what was committed of the old one
        follow(dsn, log)
    assert states(dsn) == [("final", None, 7100), ("live", None, log.stat().st_size)]
    assert gaps(dsn) == [(1, 7100, end, "accepted")]
    assert outcomes(dsn) == {"fact": 30, "replayed": 5}
    proven(verb, dsn)


@pytest.mark.parametrize("running", [True, False])
def test_copies_of_what_was_given_up_are_read(verb: Verb, dsn: str, log: Path, running: bool) -> None:
    one, other = ambiguous(dsn, log)
    if running:
        with following(dsn, log.parent) as rig:
            assert count(dsn, "tail_files") == 1
            verb("offsets", "accept-gap", "1", *WHY)
            noticed(rig)
            assert rig.health.reasons() == {}
            append(one, line(20))
            rig.turn()
    else:
        verb("offsets", "accept-gap", "1", *WHY)
        append(one, line(20))
        follow(dsn, log)
    follow(dsn, log)
    sizes = [(one.stat().st_size), (other.stat().st_size)]
    assert states(dsn) == [("final", None, 7100), *(("live", None, size) for size in sizes)]
    assert gaps(dsn) == [(1, 7100, None, "accepted")]
    assert outcomes(dsn) == {"fact": 17, "replayed": 24}
    proven(verb, dsn)


def test_a_missing_file_is_given_up(verb: Verb, dsn: str, log: Path) -> None:
    away = missing(dsn, log, half=b'{"half')
    append(log, line(50))
    verb("offsets", "accept-gap", "1", *WHY)
    follow(dsn, log)
    assert states(dsn) == [("final", None, 7100), ("live", None, len(line(50)))]
    assert gaps(dsn) == [(1, 7100, 7106, "accepted")]
    proven(verb, dsn)
    # should it come back after all, it is read on, and nothing of it counts as given up
    append(away, b'": 1}\n' + line(10))
    away.rename(log.with_name("audit.jsonl.1"))
    os.link(log.with_name("audit.jsonl.1"), log.with_name("audit.jsonl.3"))
    follow(dsn, log)
    assert outcomes(dsn)["fact"] == 12
    proven(verb, dsn)


def test_what_is_given_up_can_be_shown_first(verb: Verb, dsn: str, log: Path) -> None:
    past_its_end(dsn, log, half=b'{"half')
    planned = verb.json("offsets", "accept-gap", "1", *WHY, "--dry-run")
    assert planned == {
        "reset_id": None,
        "applied": False,
        "file_id": 1,
        "path": str(log),
        "path_was": str(log),
        "state": "final",
        "state_was": "blocked",
        "blocked_reason_was": "offset_past_end",
        "committed_offset": 7100,
        "gap": {"start_offset": 7100, "end_offset": 7106, "reason": "accepted"},
        "ended_file_ids": [],
    }
    assert (count(dsn, "log_gaps"), count(dsn, "offset_resets")) == (0, 0)
    assert states(dsn) == [("blocked", "offset_past_end", 7100)]
    done = verb.json("offsets", "accept-gap", "1", *WHY)
    assert done == {**planned, "applied": True, "reset_id": done["reset_id"]}
    (row,) = rows(dsn, "select * from offset_resets")
    assert (row["reset_id"], row["source"], row["requested"]) == (done["reset_id"], "cli", "accept-gap 1")
    assert (row["reason"], row["applied_by"], row["source_id"]) == ("ticket 7", "ada", "default")
    assert (row["old_offset"], row["new_offset"]) == (7100, 7100)


def test_what_cannot_be_given_up(verb: Verb, dsn: str, log: Path) -> None:
    append(log, lines(0, 10))
    follow(dsn, log)

    def refused(*words: str, file_id: str = "1") -> None:
        verb("offsets", "accept-gap", file_id, "--reason", "r", code=2)
        for word in words:
            assert word in verb.stderr

    refused(f"generation 1 ({log}) is live", "offsets reset")
    refused("there is no generation 7 of source default", "billing-tailer files", file_id="7")
    log.rename(log.with_name("audit.jsonl.1"))
    follow(dsn, log)
    refused("is rotated")
    log.with_name("audit.jsonl.1").write_bytes(b"other\n")
    follow(dsn, log)
    refused("is final: there is nothing to decide")
    verb("offsets", "accept-gap", "1", "--reason", " ", code=2)
    assert "--reason is empty" in verb.stderr
    assert count(dsn, "offset_resets") == 0


@pytest.mark.parametrize("target", ["end", "7100", "beginning"])
def test_a_reset_of_what_was_given_up(verb: Verb, dsn: str, log: Path, target: str) -> None:
    """Whatever is then read, or left out, is not given up as well."""
    away = missing(dsn, log)
    verb("offsets", "accept-gap", "1", *WHY)
    append(away, lines(10, 5))
    away.rename(log)
    verb("offsets", "reset", f"{log}={target}", *WHY)
    follow(dsn, log)
    append(log, line(15))
    follow(dsn, log)
    assert gaps(dsn) == ([(1, 7100, len(lines(0, 15)), "skipped")] if target == "end" else [])
    assert states(dsn) == [("rotated", None, log.stat().st_size)]
    proven(verb, dsn)


# --- going on elsewhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [True, False])
def test_one_of_several_is_chosen(verb: Verb, dsn: str, log: Path, running: bool) -> None:
    """The other one goes its own way, and what both have are replays."""
    one, other = ambiguous(dsn, log)
    if running:
        with following(dsn, log.parent) as rig:
            assert "`billing-tailer offsets adopt 1 PATH --reason TEXT`" in rig.health.reasons()["files"][0]
            verb("offsets", "adopt", "1", str(other), *WHY)
            noticed(rig)
            assert rig.health.reasons() == {}
    else:
        verb("offsets", "adopt", "1", str(other), *WHY)
        follow(dsn, log)
    files = rows(dsn, "select path, state, committed_offset from tail_files order by file_id")
    assert [tuple(row.values()) for row in files] == [
        (str(other), "rotated", other.stat().st_size),
        (str(one), "live", one.stat().st_size),
    ]
    assert gaps(dsn) == []
    assert outcomes(dsn) == {"fact": 16, "replayed": 14}
    (row,) = rows(dsn, "select requested, applied_by, path, old_offset, new_offset from offset_resets")
    assert tuple(row.values()) == (f"adopt 1 {other}", "ada", str(log), 7100, 7100)
    proven(verb, dsn)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_backup_of_a_file_that_is_too_short(verb: Verb, dsn: str, log: Path, compressed: bool) -> None:
    """Its lines were cut off; a backup has them and more. What is left of it is a copy until it goes its own way."""
    past_its_end(dsn, log)
    backup = log.with_name("audit.jsonl.1.gz" if compressed else "audit.jsonl.1")
    content = lines(0, 15)
    backup.write_bytes(gzip.compress(content) if compressed else content)
    os.utime(backup, (1, 1))
    planned = verb.json("offsets", "adopt", "1", str(backup), *WHY, "--dry-run")
    assert (planned["state_was"], planned["state"], planned["gap"]) == ("blocked", "rotated", None)
    assert (planned["path_was"], planned["path"], planned["applied"]) == (str(log), str(backup), False)
    assert states(dsn) == [("blocked", "offset_past_end", 7100)]
    verb("offsets", "adopt", "1", str(backup), *WHY)
    assert states(dsn) == [("rotated", None, 7100)]

    def is_read() -> bool:
        follow(dsn, log)
        return states(dsn)[0] == ("final" if compressed else "rotated", None, len(content))

    deadline = 20  # a gzip file that has just been written is left alone for two seconds
    while not is_read():
        deadline -= 1
        assert deadline
        threading.Event().wait(0.2)
    append(log, lines(20, 3))
    follow(dsn, log)
    assert states(dsn)[1] == ("live", None, len(lines(0, 5) + lines(20, 3)))
    assert count(dsn, "usage_facts") == 18
    assert gaps(dsn) == []
    proven(verb, dsn)


def test_at_its_own_name(verb: Verb, dsn: str, log: Path) -> None:
    """A file that nobody looked at meanwhile has another inode, and its own name."""
    append(log, lines(0, 10))
    follow(dsn, log)
    away = log.parent.parent / "away"
    log.rename(away)
    follow(dsn, log)
    log.write_bytes(lines(0, 12))
    done = verb.json("offsets", "adopt", "1", str(log), *WHY)
    assert (done["state"], done["path"], done["ended_file_ids"]) == ("live", str(log), [])
    follow(dsn, log)
    assert outcomes(dsn) == {"fact": 12}
    proven(verb, dsn)


def test_a_file_of_which_nothing_is_committed(verb: Verb, dsn: str, log: Path) -> None:
    """It was found, but not read: the generation that had it ends, with nothing lost."""
    missing(dsn, log)
    found = log.with_name("audit-found.jsonl")
    found.write_bytes(b'{"half')
    follow(dsn, log)
    assert states(dsn)[1] == ("live", None, 0)
    found.write_bytes(lines(0, 12))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("update billing.tail_files set size_seen = 0 where file_id = 2")
    done = verb.json("offsets", "adopt", "1", str(found), *WHY)
    assert done["ended_file_ids"] == [2]
    follow(dsn, log)
    assert states(dsn) == [("rotated", None, found.stat().st_size), ("final", None, 0)]
    assert outcomes(dsn) == {"fact": 12}
    assert gaps(dsn) == []
    proven(verb, dsn)


CHANGED = lines(0, 10)[:700] + b"X" + lines(0, 10)[701:]
CHANGED_LATE = lines(0, 10)[:-100] + b"X" + lines(0, 10)[-99:]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CHANGED, "they differ at byte 700"),
        (CHANGED_LATE, "they differ between byte 3004 and byte 7100"),
        (lines(0, 9), "ends at byte 6390, and 7100 bytes are committed of generation 1"),
        (lines(0, 1), "ends at byte 710, and 7100 bytes are committed of generation 1"),
        (b"", "ends at byte 0, and 7100"),
        (lines(0, 10) + b"{", "ends at byte 7101, and generation 1 was seen to byte 7106"),
        (gzip.compress(lines(0, 12)), "is compressed, and its name says otherwise"),
        (None, "cannot read"),
    ],
    ids=["head", "frontier", "shorter", "much_shorter", "empty", "less_than_seen", "name", "none"],
)
def test_a_file_that_is_not_it(verb: Verb, dsn: str, log: Path, content: bytes | None, words: str) -> None:
    missing(dsn, log, half=b'{"half')
    found = log.with_name("audit.jsonl.5")
    if content is not None:
        found.write_bytes(content)
    verb("offsets", "adopt", "1", str(found), *WHY, code=2)
    assert words in verb.stderr
    assert "\n  -> " in verb.stderr
    assert states(dsn) == [("missing", None, 7100)]
    assert count(dsn, "offset_resets") == 0


def test_a_file_where_it_would_not_be_found(verb: Verb, dsn: str, log: Path) -> None:
    away = missing(dsn, log)
    other = log.with_name("other")
    shutil.copyfile(away, other)
    for name in (away, other):
        verb("offsets", "adopt", "1", str(name), *WHY, code=2)
        assert "matches no glob of BILLING_TAILER_AUDIT_GLOBS" in verb.stderr
    assert count(dsn, "offset_resets") == 0


def test_a_file_that_is_another_generation(verb: Verb, dsn: str, log: Path) -> None:
    """What it holds is read, or was, from 0: it must not be read under a second name."""
    append(log, lines(0, 10))
    follow(dsn, log)
    log.rename(log.parent.parent / "away")
    follow(dsn, log)
    found = log.with_name("audit-found.jsonl")
    found.write_bytes(lines(0, 5))
    follow(dsn, log)
    append(found, lines(5, 7))
    follow(dsn, log)
    assert states(dsn)[1] == ("live", None, len(lines(0, 12)))
    verb("offsets", "adopt", "1", str(found), *WHY, code=2)
    assert f"{found} is generation 2 (live), read to byte {len(lines(0, 12))}" in verb.stderr
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("update billing.tail_files set state = 'final' where file_id = 2")
    verb("offsets", "adopt", "1", str(found), *WHY, code=2)
    assert "is generation 2 (final)" in verb.stderr
    verb("offsets", "adopt", "2", str(found), *WHY, code=2)
    assert "is final: there is nothing to decide" in verb.stderr
    assert count(dsn, "offset_resets") == 0


def test_nothing_to_be_known_by(verb: Verb, dsn: str, log: Path) -> None:
    append(log, b'{"half')
    follow(dsn, log)
    log.rename(log.parent.parent / "away")
    follow(dsn, log)
    log.with_name("audit.jsonl.5").write_bytes(b'{"half"}')
    verb("offsets", "adopt", "1", str(log.with_name("audit.jsonl.5")), *WHY, code=2)
    assert "nothing is committed of generation 1" in verb.stderr


# --- beside a daemon that was faster ---------------------------------------------------------------------------------


def test_a_daemon_that_was_faster(verb: Verb, dsn: str, log: Path) -> None:
    """Between the operator's look and the decision the file has come back, and is read."""
    away = missing(dsn, log)
    copy = log.with_name("audit.jsonl.1")
    with reports(dsn, "billing", "default") as ledger:
        (position,) = ledger.positions()
        accept = plan_acceptance(position, **WORDS)
        append(away, lines(10, 5))
        away.rename(copy)
        with following(dsn, log.parent) as rig:
            adopt = plan_adoption(position, str(copy), [position], rig.files, **WORDS)
            for ruling in (accept, adopt):
                with pytest.raises(PositionMoved, match=r"generation 1 .* is not missing at byte 7100 any more"):
                    ledger.rule(ruling)
            append(copy, line(15))
            rig.turn()
    assert outcomes(dsn) == {"fact": 16}
    assert (gaps(dsn), count(dsn, "offset_resets")) == ([], 0)
    proven(verb, dsn)


def test_a_file_that_another_generation_has_taken(verb: Verb, dsn: str, log: Path) -> None:
    away = missing(dsn, log)
    found = log.with_name("audit-found.jsonl")
    found.write_bytes(lines(0, 5))
    with reports(dsn, "billing", "default") as ledger:
        follow(dsn, log)
        position = ledger.positions()[0]
        append(found, lines(5, 7))
        follow(dsn, log)
        files = LogFiles([f"{log.parent}/audit*.jsonl*"], 10)
        ruling = plan_adoption(position, str(found), [position], files, **WORDS)
        with pytest.raises(PositionMoved, match="generation 2 is read from"):
            ledger.rule(ruling)
    assert states(dsn)[0] == ("missing", None, 7100)
    assert count(dsn, "offset_resets") == 0
    away.unlink()
    proven(verb, dsn)


def test_a_tailer_that_has_not_noticed_yet(verb: Verb, dsn: str, log: Path) -> None:
    """What it finds before it asks what operators did stands: the content has come back."""
    one, other = ambiguous(dsn, log)
    with following(dsn, log.parent) as rig:
        rig.tailer._next_check = float("inf")
        verb("offsets", "accept-gap", "1", *WHY)
        other.unlink()
        rig.turn()
        assert states(dsn)[0] == ("rotated", None, one.stat().st_size)
        noticed(rig)
        append(one, line(20))
        rig.turn()
    assert gaps(dsn) == []
    assert outcomes(dsn) == {"fact": 17, "replayed": 14}  # the other one was held open, and had a line of its own
    proven(verb, dsn)


def test_a_running_daemon(verb: Verb, dsn: str, log: Path, tmp_path: Path) -> None:
    """A process, with files that are written while operators decide."""
    append(log, lines(0, 10))
    busy = log.with_name("audit-busy.jsonl")
    variables = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*.jsonl*",
        "BILLING_TAILER_DATABASE_URL": dsn,
    }

    with Daemon(variables, tmp_path / "log") as daemon:
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 10)
        with busy_writer(busy, 100) as written:
            os.truncate(log, len(lines(0, 5)))
            daemon.wait_until(lambda: ("blocked", "offset_past_end", 7100) in states(dsn))
            (blocked,) = [row for row in verb.json("files") if row["state"] == "blocked"]
            verb(*blocked["decide"][0].split()[1:-1], "ticket 7")
            daemon.wait_until(lambda: ("live", None, len(lines(0, 5))) in states(dsn))
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 10 + written[0] - 100)
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        assert daemon.alive()
        assert "Traceback" not in daemon.log()
        assert daemon.terminate() == 0
    assert gaps(dsn) == [(1, 7100, None, "accepted")]
    proven(verb, dsn)


# --- what is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["files"], ["offsets", "list"]])
def test_what_is_shown(verb: Verb, dsn: str, log: Path, arguments: list[str]) -> None:
    past_its_end(dsn, log, half=b'{"half')
    (row,) = verb.json(*arguments)
    accept, adopt = (
        "billing-tailer offsets accept-gap 1 --reason TEXT",
        "billing-tailer offsets adopt 1 PATH --reason TEXT",
    )
    assert (row["state"], row["blocked_reason"]) == ("blocked", "offset_past_end")
    assert (row["decide"], row["gaps"]) == ([accept, adopt], [])
    assert verb(*arguments).splitlines()[2:] == [
        "         blocked: offset_past_end",
        f"         decide: {accept}",
        f"         or:     {adopt}",
    ]
    verb("offsets", "accept-gap", "1", *WHY)
    (row,) = verb.json(*arguments)
    (gap,) = row["gaps"]
    assert gap == {"start_offset": 7100, "end_offset": 7106, "reason": "accepted", "declared_at": gap["declared_at"]}
    assert row["decide"] == []
    assert verb(*arguments).splitlines()[2:] == ["         gap: accepted, byte 7100 to byte 7106"]


def test_missing_is_shown(verb: Verb, dsn: str, log: Path) -> None:
    missing(dsn, log)
    (row,) = verb.json("files")
    assert [command.split()[2] for command in row["decide"]] == ["adopt", "accept-gap"]
    verb("offsets", "accept-gap", "1", *WHY)
    assert verb("files").splitlines()[-1] == "         gap: accepted, byte 7100 to nobody knows where"
    assert max(map(len, verb("files").splitlines())) <= 100 + len(str(log))


def test_many_gaps_are_counted(verb: Verb, dsn: str, log: Path) -> None:
    append(log, lines(0, 10))
    follow(dsn, log)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "insert into billing.log_gaps select 1, 8000 + 10 * n, 8005 + 10 * n, 'truncated' "
            "from generate_series(1, 7) n"
        )
    shown = verb("files").splitlines()[2:]
    assert shown[0] == "         2 older gaps: see --json"
    assert shown[1:] == [f"         gap: truncated, byte {8000 + 10 * n} to byte {8005 + 10 * n}" for n in range(3, 8)]
    (row,) = verb.json("files")
    assert len(row["gaps"]) == 7
