"""`dead-letters retry` and `discard`: what becomes of a letter, with which bytes, and that the accounts still hold."""

import getpass
import gzip
from pathlib import Path

import psycopg
import pytest

from billing_tailer.settler import Settler
from tests.support.follow import following
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows
from tests.support.spendlines import payload, spool_line
from tests.support.verbs import Verb, run_verb
from tests.test_money_cli import call, settle

LIMIT = 1 << 16  # of the rig
RETRY = ("dead-letters", "retry")


def letters(dsn: str) -> list[int]:
    return [row["dead_letter_id"] for row in rows(dsn, "select dead_letter_id from dead_letters order by 1")]


def long_line(number: int) -> bytes:
    """A line beyond the rig's limit, below that of the verbs: it became a dead letter of which 4 KiB were kept."""
    return line(number, uri="/v1/chat/completions?" + "x" * LIMIT)


def test_a_line_that_is_understood_now(verb: Verb, dsn: str, log: Path) -> None:
    """The fact, the settlement by the daemon, and the proof."""
    content = lines(0, 3) + long_line(3) + b"not json\n"
    settle(dsn, log, content, payload(3))
    assert verb.json("status", code=1)["dead_letters_open"] == 2
    first, second = letters(dsn)
    planned = verb.json(*RETRY, str(first), str(second), "--reason", "larger limit", "--dry-run", code=1)
    assert [(one["applied"], one["resolution"]) for one in planned] == [(False, "retried: fact"), (False, None)]
    assert planned[1]["why"].startswith("still invalid_json: ")
    assert (count(dsn, "usage_facts"), verb.json("status", code=1)["dead_letters_open"]) == (3, 2)
    (done,) = verb.json(*RETRY, str(first), "--reason", "larger limit", "--by", "ann")
    assert (done["applied"], done["resolution"]) == (True, "retried: fact")
    (fact,) = rows(dsn, "select * from usage_facts where call_id = %s", call(3))
    assert (fact["start_offset"], fact["end_offset"]) == (done["start_offset"], done["end_offset"])
    (letter,) = [one for one in verb.json("dead-letters", "list", "--all") if one["dead_letter_id"] == first]
    assert (letter["resolution"], letter["resolved_by"]) == ("retried: fact", "ann")
    assert (letter["resolved_reason"], letter["resolved_at"] is not None) == ("larger limit", True)
    settle(dsn, log, b"")
    assert rows(dsn, "select source_reference as id from charge_receipts") == [{"id": call(3)}]
    assert verb.json("verify")["ok"], "a dead letter of its range, and a fact at its place"
    assert verb.json("verify", "--settlement")["ok"]
    (again,) = verb.json(*RETRY, str(first), "--reason", "again")
    assert (again["applied"], again["resolution"], again["why"]) == (False, "retried: fact", "it was decided before")
    verb("dead-letters", "discard", str(second), "--reason", "a test of the proxy")
    assert verb.json("status")["dead_letters_open"] == 0
    assert rows(dsn, "select resolution, resolved_by from dead_letters where dead_letter_id = %s", second) == [
        {"resolution": "discarded", "resolved_by": getpass.getuser()}
    ]
    assert verb.json("verify")["ok"]
    assert_sound(dsn, {1: content})
    assert outcomes(dsn)["dead_letter"] == 2


@pytest.mark.parametrize(
    ("second", "resolution"),
    [
        (long_line(0), "retried: replayed"),
        (line(0, uri="/v1/chat/completions?" + "x" * LIMIT, nginx_request_id="f" * 32), "retried: conflict"),
        (line(0, uri="/health?" + "x" * LIMIT), "retried: not_llm_route"),
    ],
)
def test_other_outcomes(verb: Verb, dsn: str, log: Path, second: bytes, resolution: str) -> None:
    settle(dsn, log, line(0) + second)
    (letter,) = letters(dsn)
    (done,) = verb.json(*RETRY, str(letter), "--reason", "r")
    assert done["resolution"] == resolution
    assert (count(dsn, "usage_facts"), count(dsn, "call_conflicts")) == (1, int("conflict" in resolution))
    assert verb.json("verify")["ok"]


def test_the_bytes_must_be_the_recorded_ones(verb: Verb, dsn: str, log: Path) -> None:
    """Not all bytes were kept: they come from the file, also a compressed one, and from no other file."""
    settle(dsn, log, lines(0, 2) + long_line(2))
    (letter,) = letters(dsn)
    sound = log.read_bytes()
    log.write_bytes(sound.replace(b"xx", b"yx", 1))
    (done,) = verb.json(*RETRY, str(letter), "--reason", "r", code=1)
    assert (done["resolution"], "no file in sight has them" in done["why"]) == (None, True)
    log.unlink()
    verb(*RETRY, str(letter), "--reason", "r", code=1)
    Path(f"{log}.1.gz").write_bytes(gzip.compress(sound))
    (done,) = verb.json(*RETRY, str(letter), "--reason", "r")
    assert done["resolution"] == "retried: fact"


def test_too_long_for_today(verb: Verb, dsn: str, log: Path) -> None:
    settle(dsn, log, long_line(0))
    verb.environment(LINE_BYTES_MAX="5000")
    (done,) = verb.json(*RETRY, str(letters(dsn)[0]), "--reason", "r", code=1)
    assert done["why"].endswith(" bytes, and LINE_BYTES_MAX is 5000")


def test_a_spool_letter(verb: Verb, dsn: str, log: Path) -> None:
    name = log.parent / f"callbacks-{'0' * 32}-000000.jsonl"
    settle(dsn, log, line(0))
    name.write_bytes(spool_line(payload(0, pad="x" * LIMIT)) + spool_line(payload(0, pad="y" * LIMIT)))
    settle(dsn, log, b"")
    done = verb.json(*RETRY, *map(str, letters(dsn)), "--reason", "r")
    assert [one["resolution"] for one in done] == ["retried: spend_record", "retried: replayed"]
    settle(dsn, log, b"")
    assert count(dsn, "charge_receipts") == 1


def test_refused_by_postgres(verb: Verb, dsn: str, log: Path) -> None:
    """It stays open, with Postgres' words."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("alter table billing.usage_facts add check (run_id <> 'run-1')")
        settle(dsn, log, lines(0, 3))
        (letter,) = letters(dsn)
        (done,) = verb.json(*RETRY, str(letter), "--reason", "r", code=1)
        assert "violates check constraint" in done["why"]
        connection.execute("alter table billing.usage_facts drop constraint usage_facts_run_id_check")
    (done,) = verb.json(*RETRY, str(letter), "--reason", "r")
    assert done["resolution"] == "retried: fact"
    assert verb.json("verify")["ok"]


def test_wrong_usage(verb: Verb, dsn: str, log: Path) -> None:
    settle(dsn, log, b"not json\n")
    (letter,) = map(str, letters(dsn))
    verb(*RETRY, "999", "--reason", "r", code=2)
    assert "there is no dead letter 999" in verb.stderr
    verb("dead-letters", "discard", letter, "--reason", " ", code=2)
    verb(*RETRY, letter, code=2)
    verb(*RETRY, letter, "--reason", "r", "--by", "settler", code=2)
    environment = {"BILLING_TAILER_DATABASE_URL": dsn, "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*"}
    found = run_verb(environment, "dead-letters", "discard", letter, "--reason", "r", "--dry-run")
    assert (found.returncode, found.stderr, count(dsn, "dead_letters")) == (0, "", 1)
    assert verb.json("status", code=1)["dead_letters_open"] == 1


def test_a_conflict_about_a_settled_call_is_looked_at(verb: Verb, dsn: str, log: Path) -> None:
    """The letter's line names another account than the receipt's: corrections stop until somebody decides."""
    other = line(1, uri="/v1/chat/completions?" + "x" * LIMIT, nginx_request_id="f" * 32, end_user="account-2")
    settle(dsn, log, line(1) + other, payload(1))
    (done,) = verb.json(*RETRY, *map(str, letters(dsn)), "--reason", "larger limit")
    assert done["resolution"] == "retried: conflict"
    settle(dsn, log, b"")
    assert rows(dsn, "select call_id, kind from call_exceptions") == [{"call_id": call(1), "kind": "conflict"}]


def test_a_conflict_at_the_place_of_a_letter(verb: Verb, dsn: str, log: Path) -> None:
    """Given up, and then read again from the beginning, within the limit now."""
    other = line(1, uri="/v1/chat/completions?" + "x" * LIMIT, nginx_request_id="f" * 32)
    settle(dsn, log, line(1) + other)
    verb("dead-letters", "discard", *map(str, letters(dsn)), "--reason", "r")
    verb("offsets", "reset", f"{log}=beginning", "--reason", "larger limit")
    settle(dsn, log, b"", line_bytes_max=2 * LIMIT)
    assert outcomes(dsn) == {"replayed": 1, "conflict": 1}
    assert verb.json("verify")["differences"] == []


def test_a_skip_by_retry_is_remembered(verb: Verb, dsn: str, log: Path) -> None:
    """A spend record under its id is to raise the alarm, as for a line that was skipped at once."""
    refused = line(1, status="401", litellm_call_id="", call_id="call-00000001", extra="x" * 3000)
    settle(dsn, log, refused, line_bytes_max=2000)
    verb("dead-letters", "retry", "1", "--reason", "a longer limit")
    assert [row["call_id"] for row in rows(dsn, "select call_id from skipped_calls")] == ["call-00000001"]


def test_a_crash_between_a_conflict_and_its_decision(dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is settled: only the list of touched calls brings it back."""
    settle(dsn, log, line(1), payload(1))
    with monkeypatch.context() as patch, log.open("ab") as out:
        patch.setattr(Settler, "after_commit", lambda *_: None)
        patch.setattr(Settler, "turn", lambda *_, **__: False)
        out.write(line(1, nginx_request_id="f" * 32, end_user="account-2"))
        out.flush()
        with following(dsn, log.parent):
            pass
    assert count(dsn, "call_conflicts") == 1
    settle(dsn, log, b"")
    assert [row["kind"] for row in rows(dsn, "select kind from call_exceptions where closed_at is null")] == [
        "conflict"
    ]
