"""Other content where known content stood: noticed, read from its beginning, and what was lost is declared."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from billing_tailer.ledger import Committed, Ledger
from billing_tailer.model import Plan
from tests.scenarios.outcome import assert_exactly, states
from tests.support.follow import following
from tests.support.logfiles import append, replaced
from tests.support.loglines import line, lines
from tests.support.proof import count
from tests.support.verbs import Verb

HEAD = b"".join(line(number, uri="/health") for number in range(8))
"""More than the 4 KiB of a frontier, so that only the bytes right before an offset tell two contents apart."""
OLD, NEW = range(20, 40), range(120, 180)
"""Calls whose lines are of the same width."""
BEFORE = HEAD + lines(20, 20)


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to a file that is committed to its end, and what must follow. after: what stands there then.
    reason: of the gap behind what was committed, the end of which nobody knows; None where nothing was destroyed."""

    act: Callable[[Path, bytes], None]
    after: bytes
    reason: str | None


def truncated(log: Path, content: bytes) -> None:
    os.truncate(log, 0)
    append(log, content)


def rewritten(log: Path, content: bytes) -> None:
    with log.open("r+b") as out:
        out.write(content)


CHANGES = {
    "to 0 and appended": Change(truncated, lines(120, 5), "truncated"),
    "to 0 and regrown to the same size": Change(truncated, HEAD + lines(120, 20), "regrown"),
    "to 0 and regrown past the offset": Change(truncated, HEAD + lines(120, 60), "regrown"),
    "in-place rewrite, same size": Change(rewritten, HEAD + lines(120, 20), "regrown"),
    "in-place rewrite, longer": Change(rewritten, HEAD + lines(120, 60), "regrown"),
    "in-place rewrite of the beginning": Change(rewritten, line(9, uri="/health"), "regrown"),
    "atomic replace, shorter": Change(replaced, lines(120, 5), None),
    "atomic replace, equal heads": Change(replaced, HEAD + lines(120, 60), None),
}


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_content_where_known_content_stood(dsn: str, log: Path, change: Change, stopped: bool) -> None:
    assert len({len(line(number)) for number in (*OLD, *NEW)}) == 1
    log.write_bytes(BEFORE)
    with following(dsn, log.parent) as rig:
        if not stopped:
            change.act(log, change.after)
            rig.turn()
    if stopped:
        change.act(log, change.after)
    with following(dsn, log.parent) as rig:
        assert not rig.health.reasons()
    after = log.read_bytes()
    kept = after.count(b"/health")
    again = sum(line(number) in after for number in OLD)
    assert_exactly(
        dsn,
        [*OLD, *(number for number in NEW if line(number) in after)],
        contents={1: BEFORE, 2: after},
        gaps=[(1, len(BEFORE), None, change.reason)] if change.reason else [],
        replayed=again,
        not_llm_route=8 + kept,
    )


def test_an_in_place_rewrite_of_the_middle(dsn: str, log: Path, verb: Verb) -> None:
    """Of the one kind that following cannot notice, committed bytes amid others that stay: `verify` names the range,
    the lines behind it are read, and nothing is read twice."""
    log.write_bytes(BEFORE)
    with following(dsn, log.parent) as rig:
        with log.open("r+b") as out:
            out.seek(2000)
            out.write(b"#")
        append(log, lines(40, 5))
        rig.turn()
    assert_exactly(dsn, range(20, 45), contents={1: BEFORE + lines(40, 5)}, not_llm_route=8)
    (found,) = [one for one in verb.json("verify", code=1)["differences"] if "the hash differs" in one["what"]]
    assert found["start_offset"] <= 2000 < found["end_offset"]


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_truncated_to_the_middle_of_a_committed_line(dsn: str, log: Path, stopped: bool) -> None:
    """Blocked, and nothing is read; once the file is what it was, it is read on as if nothing had been."""
    log.write_bytes(BEFORE)
    middle = len(BEFORE) - 250
    with following(dsn, log.parent) as rig:
        if not stopped:
            os.truncate(log, middle)
            rig.turn()
            assert f"{log}: blocked, offset_past_end, at byte {len(BEFORE)}" in str(rig.health.reasons())
    os.truncate(log, middle)
    with following(dsn, log.parent) as rig:
        assert states(dsn) == [("audit.jsonl", "blocked", "offset_past_end")]
        append(log, BEFORE[middle : middle + 100])
        rig.turn()
        assert states(dsn) == [("audit.jsonl", "blocked", "offset_past_end")]
        append(log, BEFORE[middle + 100 :] + lines(40, 5))
        rig.turn()
        assert not rig.health.reasons()
    assert states(dsn) == [("audit.jsonl", "live", None)]
    assert_exactly(dsn, range(20, 45), contents={1: BEFORE + lines(40, 5)}, not_llm_route=8)


def test_truncated_to_the_middle_of_a_committed_line_and_regrown(dsn: str, log: Path) -> None:
    """The writer goes on behind the cut: the torn line is merged with the next one, which is a dead letter, and lines
    that are there again are replays."""
    log.write_bytes(BEFORE)
    middle = len(BEFORE) - 250
    with following(dsn, log.parent) as rig:
        os.truncate(log, middle)
        rig.turn()
        append(log, lines(120, 5))
        rig.turn()
        assert not rig.health.reasons()
    after = BEFORE[:middle] + lines(120, 5)
    torn = len(HEAD) + len(lines(20, 19))
    assert_exactly(
        dsn,
        [*OLD, *range(121, 125)],
        contents={1: BEFORE, 2: after},
        letters=[(2, torn, middle + len(line(120)), "invalid_json")],
        gaps=[(1, len(BEFORE), None, "regrown")],
        replayed=19,
        not_llm_route=16,
    )


@pytest.mark.parametrize("after", [b"", lines(120, 5), HEAD + lines(120, 60)], ids=["cut", "appended", "regrown"])
@pytest.mark.parametrize("moment", ["before COMMIT", "after COMMIT"])
def test_truncated_during_a_commit_in_flight(
    dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch, moment: str, after: bytes
) -> None:
    """What was verified and sent is committed; what was read ahead of it is not, and is declared as far as it was
    seen."""
    real, calls = Ledger.commit, threading.Event()

    def commit(self: Ledger, plan: Plan, meanwhile: Callable[[], None]) -> Committed:
        strikes = count(dsn, "usage_facts") >= 5 and not calls.is_set()
        if strikes and moment == "before COMMIT":
            calls.set()
            truncated(log, after)
        committed = real(self, plan, meanwhile)
        if strikes and moment == "after COMMIT":
            calls.set()
            truncated(log, after)
        return committed

    monkeypatch.setattr(Ledger, "commit", commit)
    log.touch()
    with following(dsn, log.parent, batch_lines_max=5) as rig:
        log.write_bytes(BEFORE)
        rig.follower._next_scan = time.monotonic() + 60  # no look at the directory comes between
        while rig.tailer._turn():
            pass
        rig.turn()
        assert not rig.health.reasons()
    assert calls.is_set()
    numbers = [number for number in NEW if line(number) in after]
    committed = 12  # the fourth batch of five lines is struck, and the first eight are no calls
    sent = len(HEAD) + len(lines(20, committed))
    assert_exactly(
        dsn,
        [*OLD[:committed], *numbers],
        contents={1: BEFORE, 2: after},
        gaps=[(1, sent, len(BEFORE), "truncated" if len(after) < sent else "regrown")],
        not_llm_route=8 + after.count(b"/health"),
    )


@pytest.mark.parametrize("where", ["the same name", "another name"])
def test_inode_reuse(dsn: str, log: Path, where: str) -> None:
    """The file was deleted while nobody looked, and a new one has its inode. The kernel does that at once or not at
    all, by file system: where it does not, the recorded number is made the new one."""
    log.write_bytes(BEFORE)
    inode = log.stat().st_ino
    with following(dsn, log.parent):
        pass
    append(log, lines(40, 5))  # nobody will ever read these
    log.unlink()
    new = log if where == "the same name" else log.with_name("audit-new.jsonl")
    new.write_bytes(HEAD + lines(120, 60))
    if new.stat().st_ino != inode:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("update billing.tail_files set inode = %s", [new.stat().st_ino])
    with following(dsn, log.parent) as rig:
        assert not rig.health.reasons()
    assert_exactly(
        dsn,
        [*OLD, *NEW],
        contents={1: BEFORE, 2: HEAD + lines(120, 60)},
        gaps=[(1, len(BEFORE), None, "regrown" if where == "the same name" else "inode_reused")],
        not_llm_route=16,
    )
