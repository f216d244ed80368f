"""`verify`: sound logs have no difference, and whatever is changed on disk or in the tables is named by its range."""

import gzip
import hashlib
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import psycopg
import pytest

from billing_tailer import proof_cli
from billing_tailer import verify as verifying
from billing_tailer.files import regular_files
from billing_tailer.ledger import proofs
from tests.support.follow import following
from tests.support.loglines import RECORDED, line, lines
from tests.support.proof import rows
from tests.support.spendlines import payload, spool_line
from tests.support.verbs import Verb, answer_of, run_verb


def follow(dsn: str, log: Path, content: bytes, **changes: Any) -> None:
    with log.open("ab") as out:
        out.write(content)
    with following(dsn, log.parent, **changes):
        pass


def execute(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"set search_path to billing; {statement}".encode())


def mixed(number: int) -> bytes:
    """Lines of every outcome."""
    return b"".join(
        (
            lines(number, 20),
            b"not json\n",
            line(number, nginx_request_id="f" * 32),
            line(number),
            b"\n",
            line(number + 50, nginx_request_id=""),
            line(number + 51, uri="/health"),
        )
    )


@pytest.mark.parametrize("window", [1 << 22, 700, 64])
def test_a_sound_log(verb: Verb, dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Every outcome, many ranges, lines longer than what is held in memory, an end without newline."""
    monkeypatch.setattr(verifying, "WINDOW_BYTES", window)
    monkeypatch.setattr(verifying, "WINDOW_LINES", max(2, window // 100))
    for part in range(5):
        follow(dsn, log, mixed(100 * part) + b"x" * 70_000 + b"\n")
    follow(dsn, log, RECORDED.read_bytes() + b'{"half":')
    spool = log.parent / f"callbacks-{'0' * 32}-000000.jsonl"
    spool.write_bytes(spool_line(payload(0)) + spool_line(payload(0)) + b"poison\n")
    follow(dsn, log, b"")
    answer = verb.json("verify")
    assert (answer["ok"], answer["differences"], answer["not_on_disk"], answer["problems"]) == (True, [], [], [])
    first, second = answer["generations"]
    assert first["bytes_read"] == first["committed_offset"] == log.stat().st_size - len(b'{"half":')
    assert (first["is_whole"], second["is_whole"]) == (False, True)
    assert (first["conflicts"] >= 5, second["dead_letters"]) == (True, 1)
    assert first["dead_letters"] >= 10
    assert first["facts"] == rows(dsn, "select count(*) as n from usage_facts")[0]["n"]
    assert verb("verify").splitlines()[-3].split() == ["differences", "0"]


def test_one_flipped_byte_is_named(verb: Verb, dsn: str, log: Path) -> None:
    """Anywhere: in the head, at the frontier, in a newline, in the middle; and nothing else is accused."""
    for part in range(12):
        follow(dsn, log, mixed(100 * part))
    sound = log.read_bytes()
    ranges = rows(dsn, "select start_offset, end_offset from tail_batches order by 1")
    assert len(ranges) == 12
    dice = random.Random(4)
    places = [0, 1, len(sound) - 1, sound.index(b"\n"), *(dice.randrange(len(sound)) for _ in range(12))]
    for at in places:
        with log.open("r+b") as out:
            out.seek(at)
            out.write(bytes([sound[at] ^ 1 << dice.randrange(8)]))
        answer = verb.json("verify", code=1)
        (expected,) = [one for one in ranges if one["start_offset"] <= at < one["end_offset"]]
        hashes = [one for one in answer["differences"] if "the hash differs" in one["what"]]
        assert [(one["start_offset"], one["end_offset"]) for one in hashes] == [tuple(expected.values())]
        # a newline that is none any more damages the line behind it too
        assert all(one["start_offset"] <= at + 1 and at < one["end_offset"] for one in answer["differences"]), answer
        log.write_bytes(sound)
    assert f"DIFFERENCE {log} (file_id 1), bytes" not in verb("verify")


@pytest.mark.parametrize(
    ("statement", "place", "words"),
    [
        ("update tail_batches set end_offset = end_offset - 1 where start_offset = 0", (-1, 0), "neither a range"),
        ("delete from tail_batches where start_offset = 0", (None, 0), "neither a range"),
        ("update tail_batches set end_offset = end_offset + 1 where start_offset = 0", (0, 1), "two ranges"),
        ("delete from tail_batches where start_offset > 0", (0, None), "neither a range"),
        ("update tail_batches set end_offset = end_offset + 1 where start_offset > 0", None, "committed offset"),
        ("""update tail_batches set counts = counts || '{"fact": 19}'""", None, "19 lines are counted as fact, 21"),
        ("""update tail_batches set counts = counts || '{"blank_line": 2}'""", None, "lines are counted"),
        (
            "update usage_facts set start_offset = start_offset + 1 where call_id = 'call-00000003'",
            None,
            "a fact where",
        ),
        ("update usage_facts set end_offset = end_offset + 1 where call_id = 'call-00000003'", None, "a fact where"),
        ("delete from usage_facts where call_id = 'call-00000003'", None, "21 lines are counted as fact, 20 rows"),
        ("update usage_facts set line_sha256 = 'x' where line_sha256 is not null", None, "a fact with another hash"),
        ("delete from dead_letters", None, "1 lines are counted as dead_letter, 0 rows"),
        ("update dead_letters set end_offset = end_offset + 1", None, "a dead letter where no line is"),
        ("update dead_letters set sha256 = sha256('x')", None, "a dead letter with another hash"),
        ("delete from call_conflicts", None, "1 lines are counted as conflict, 0 rows"),
        ("update call_conflicts set start_offset = start_offset - 1", None, "a conflict where no line is"),
        ("update tail_files set head = overlay(head placing 'x' from 1)", None, "another beginning"),
        ("update tail_files set frontier_sha256 = sha256('x')", None, "another end"),
        ("insert into log_gaps values (1, 0, 10, 'skipped')", (0, 0), "two ranges"),
        ("update usage_facts set start_offset = 1e9, end_offset = 2e9 where call_id = 'call-00000003'", None, "behind"),
    ],
)
def test_one_wrong_row_is_named(
    verb: Verb, dsn: str, log: Path, statement: str, place: tuple[int | None, int | None] | None, words: str
) -> None:
    """place: relative to the border between the two ranges."""
    follow(dsn, log, mixed(0))
    follow(dsn, log, mixed(1000))
    border = len(mixed(0))
    execute(dsn, statement)
    answer = verb.json("verify", code=1)
    found = [one for one in answer["differences"] if words in one["what"]]
    assert found, answer["differences"]
    if place is not None:
        assert place[0] is None or found[0]["start_offset"] == border + place[0] or found[0]["start_offset"] == 0


def test_survivors(verb: Verb, dsn: str, log: Path) -> None:
    """Found when renamed, compressed, copied elsewhere within sight; files that begin alike are told apart."""
    same = line(0) * 3
    follow(dsn, log, same + lines(1, 10))
    log.rename(f"{log}.1")
    follow(dsn, log, same + lines(100, 10))
    log.rename(f"{log}.2")
    follow(dsn, log, lines(200, 10))
    for number in ("1", "2"):
        plain = Path(f"{log}.{number}")
        Path(f"{log}.{number}.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    Path(f"{log}.1.gz").rename(f"{log}.7.gz")
    answer = verb.json("verify")
    assert [one["found_at"] for one in answer["generations"]] == [f"{log}.7.gz", f"{log}.2.gz", str(log)]
    assert all(one["bytes_read"] == one["committed_offset"] for one in answer["generations"])
    answer = verb.json("verify", "--file", f"{log}.7.gz")
    assert [one["file_id"] for one in answer["generations"]] == [1]
    verb("verify", "--file", "/nowhere", code=2)
    assert "nothing is known of /nowhere" in verb.stderr
    Path(f"{log}.2.gz").unlink()
    answer = verb.json("verify")
    assert (answer["ok"], answer["not_on_disk"]) == (True, [2])


def test_damaged_gzip(verb: Verb, dsn: str, log: Path) -> None:
    follow(dsn, log, mixed(0))
    packed = bytearray(gzip.compress(log.read_bytes()))
    log.unlink()
    packed[-6] ^= 1  # its checksum
    Path(f"{log}.gz").write_bytes(packed)
    answer = verb.json("verify", code=1)
    assert "incorrect data check" in answer["differences"][-1]["what"]
    Path(f"{log}.gz").write_bytes(packed[: len(packed) // 2])
    answer = verb.json("verify", code=1)
    assert "in the middle of the compressed data" in answer["differences"][-1]["what"]


def test_truncated_and_shorter_files(verb: Verb, dsn: str, log: Path) -> None:
    follow(dsn, log, mixed(0))
    os.truncate(log, 1000)
    answer = verb.json("verify", code=1)
    assert (answer["differences"][0]["start_offset"], answer["differences"][0]["what"]) == (
        1000,
        "the file ends at byte 1000",
    )
    log.write_bytes(lines(500, 3))
    follow(dsn, log, b"")
    answer = verb.json("verify")
    assert [one["found_at"] for one in answer["generations"]] == [None, str(log)], "another content by now"


def test_gaps_and_rewinds(verb: Verb, dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 30))
    follow(dsn, log, b"", start_at_end=True)
    follow(dsn, log, mixed(100))
    assert verb.json("verify")["generations"][0]["gaps"] == 1
    execute(dsn, "update usage_facts set start_offset = 0, end_offset = 5 where call_id = 'call-00000101'")
    assert "a fact inside of a gap" in [one["what"] for one in verb.json("verify", code=1)["differences"]]
    for table in ("usage_facts", "unsettled_facts"):
        execute(dsn, f"delete from {table} where call_id = 'call-00000101'")
    verb("offsets", "reset", f"{log}=beginning", "--reason", "r")
    assert verb.json("verify")["ok"], "rows that wait to be read again"
    follow(dsn, log, b"")
    assert verb.json("verify")["ok"]
    verb("offsets", "reset", f"{log}=beginning", "--reason", "r")
    verb("offsets", "reset", f"{log}=end", "--reason", "r")
    assert verb.json("verify")["ok"], "facts of the first reading stand in the gap"


def test_while_it_grows(verb: Verb, dsn: str, log: Path) -> None:
    """What is committed after the beginning is not looked at, though the last range has grown meanwhile."""
    log.write_bytes(lines(0, 10))
    with following(dsn, log.parent) as rig, proofs(dsn, "billing", "default") as ledger:
        (generation,) = ledger.generations()
        (file,) = rig.follower.followed.values()
        with log.open("ab") as out:
            out.write(mixed(100))
        rig.turn()
        assert rows(dsn, "select count(*) as n from tail_batches")[0]["n"] == 1
        checked = verifying.verify(generation, file, ledger)
        assert (checked.differences, checked.facts, checked.is_whole) == ([], 10, False)
        assert verb.json("verify")["ok"]


def test_it_cannot_write(dsn: str) -> None:
    with (
        proofs(dsn, "billing", "default") as ledger,
        pytest.raises(psycopg.errors.ReadOnlySqlTransaction),
    ):
        ledger._connection.execute("delete from tail_files")


def test_inode_numbers_prove_nothing(verb: Verb, dsn: str, log: Path) -> None:
    """Two files, each with the number that is recorded for the other."""
    follow(dsn, log, lines(0, 10))
    log.rename(f"{log}.1")
    follow(dsn, log, lines(100, 10))
    swap = "select array_agg(inode order by file_id) as i from tail_files"
    execute(dsn, f"update tail_files set inode = s.i[3 - file_id] from ({swap}) s")
    answer = verb.json("verify")
    assert [one["found_at"] for one in answer["generations"]] == [f"{log}.1", str(log)]


def test_more_lines_than_were_committed_need_no_memory(dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was overwritten with newlines; and the short way finds what the long one finds."""
    follow(dsn, log, lines(0, 3000) + b"bad\n" + lines(3000, 5000))
    content = log.read_bytes()

    monkeypatch.setattr(verifying, "DIFFERENCES_MAX", 10_000)

    def differences() -> set[str]:
        with proofs(dsn, "billing", "default") as ledger:
            (generation,) = ledger.generations()
            seen, _ = regular_files([str(log.parent)])
            return {one.what for one in verifying.verify(generation, seen[0], ledger).differences}

    log.write_bytes(b"\n" * len(content))
    tracemalloc.start()
    try:
        found = differences()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert {"a fact where no line is", "a dead letter where no line is"} <= found
    assert peak < 48 << 20
    log.write_bytes(content)
    assert differences() == set()
    monkeypatch.setattr(verifying, "LINES_MAX", -1)
    assert differences() == set()
    log.write_bytes(content.replace(b"bad", b"b\nd").replace(b"account-1", b"account\n1", 1))
    named = differences()
    monkeypatch.setattr(verifying, "LINES_MAX", 1 << 30)
    assert named == differences() >= {"a fact where no line is", "a dead letter where no line is"}


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_offset_that_was_moved_by_hand(verb: Verb, dsn: str, log: Path, goes_on: bool) -> None:
    """Into the middle of a range, with all that belongs to it: named, also when a daemon has read on from there."""
    follow(dsn, log, lines(0, 10))
    middle = 4 * len(line(0))
    frontier = hashlib.sha256(log.read_bytes()[:middle]).hexdigest()
    execute(
        dsn,
        f"update tail_files set committed_offset = {middle}, frontier_bytes = {middle}, "
        f"frontier_sha256 = decode('{frontier}', 'hex')",
    )
    if goes_on:
        follow(dsn, log, line(11))
    found = verb.json("verify", code=1)["differences"]
    assert ("two ranges or gaps" if goes_on else "ends behind the committed offset") in " ".join(
        one["what"] for one in found
    )


def test_an_offset_reset_meanwhile(verb: Verb, dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before it and after it does not fit together: such a generation is looked at once more."""
    follow(dsn, log, lines(0, 10))
    find = proof_cli.find_survivors
    environment = {"BILLING_TAILER_DATABASE_URL": dsn, "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*"}

    def find_after_a_reset(*arguments: Any) -> Any:
        found = find(*arguments)
        answer_of(run_verb(environment, "offsets", "reset", f"{log}=beginning", "--reason", "r", "--json"))
        return found

    monkeypatch.setattr(proof_cli, "find_survivors", find_after_a_reset)
    (one,) = verb.json("verify")["generations"]
    assert (one["committed_offset"], one["differences"]) == (0, 0)
    monkeypatch.setattr(proof_cli, "find_survivors", find)
    follow(dsn, log, b"")
    assert verb.json("verify")["ok"]
