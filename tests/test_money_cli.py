"""The verbs about calls and money, on a real Postgres: what people read, what programs read, exit codes, races."""

import getpass
import threading
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from billing_tailer import settler
from billing_tailer.ledger import operator
from billing_tailer.litellm import SpendLogs
from billing_tailer.model import Corrections, Release, SpendRecord
from billing_tailer.settle import CallState, Decision, Rules, decide
from billing_tailer.spend import parse_row
from tests.support.follow import Rig, following
from tests.support.loglines import line, lines
from tests.support.proof import count, rows
from tests.support.spendlines import failure, payload, spool_line
from tests.support.spendlogs import row, spend_logs
from tests.support.verbs import Verb, answer_of, run_verb

TOKEN = "t" * 32
WAITING = "select from pg_locks where locktype = 'advisory' and not granted"
DAY = ("--from", "2026-11-22T00:00:00", "--to", "2026-11-22T00:39:00Z")


def call(number: int) -> str:
    return f"call-{number:08d}"


def spool(log: Path, *events: dict[str, Any]) -> None:
    with (log.parent / f"callbacks-{'0' * 32}-000000.jsonl").open("ab") as out:
        out.write(b"".join(map(spool_line, events)))


def settle(dsn: str, log: Path, audit: bytes, *events: dict[str, Any], **changes: Any) -> None:
    """Follow the log and the spool until everything is decided."""
    with log.open("ab") as out:
        out.write(audit)
    spool(log, *events)
    with following(dsn, log.parent, **changes) as rig:
        sweep(rig)


def sweep(rig: Rig) -> None:
    assert rig.tailer._settler is not None
    rig.tailer._settler._next_sweep = 0.0
    rig.turn()


def unsettled(dsn: str) -> list[str]:
    return [one["call_id"] for one in rows(dsn, "select call_id from unsettled_facts order by call_id")]


# --- explain


def test_explain_a_settled_call(verb: Verb, dsn: str, log: Path) -> None:
    settle(dsn, log, lines(0, 3), payload(1), rules=Rules(markup=Decimal("1.2")))
    told = verb.json("explain", call(1))
    assert set(told) == {
        "call_id",
        "standing",
        "line",
        "fact",
        "spend_records",
        "pricing",
        "receipt",
        "details",
        "adjustments",
        "total_credits",
        "exceptions",
        "conflicts",
    }
    assert (told["standing"], told["total_credits"]) == ("settled", 2700)
    length = len(line(0))
    assert told["line"] == {
        "file_id": 1,
        "path": str(log),
        "source_id": "default",
        "start_offset": length,
        "end_offset": 2 * length,
        "raw": line(1).decode().rstrip("\n"),
        "raw_unavailable": None,
    }
    assert told["fact"]["header_cost_usd"] == "0.000225"
    (record,) = told["spend_records"]
    assert (record["source"], record["cost_usd"], record["start_offset"]) == ("callback", "0.000225", 0)
    assert record["file_path"].endswith(".jsonl")
    assert told["pricing"] == {
        "sums": [{"source": "callback", "records": 1, "costs_usd": ["0.000225"], "sum_usd": "0.000225"}],
        "billed_source": "callback",
        "why": "the only source with records",
        "markup_factor": "1.2",
        "provider_cost_usd": "0.000225000000",
        "user_cost_usd": "0.000270000000",
        "charged_credits": 2700,
        "unpriceable": None,
        "by_hand": False,
    }
    assert told["receipt"]["charged_credits"] == 2700
    assert told["receipt"]["user_cost_usd"] == "0.000270000000"
    assert told["details"]["model"] == "up-gpt-4o-mini"
    printed = verb("explain", call(1))
    for words in ("LINE", "FACT", "SPEND RECORDS", "PRICING", "RECEIPT", "x markup 1.2 = 0.000270000000 USD", "2700"):
        assert words in printed
    log.unlink()
    assert "not in sight" in verb.json("explain", call(1))["line"]["raw_unavailable"]


def test_explain_says_which_source_is_billed(verb: Verb, dsn: str, log: Path) -> None:
    """Both sources, then a late attempt that makes the other one larger: receipt, adjustment, and why."""
    settle(dsn, log, lines(0, 1), payload(0))
    rows_there = [row(payload(0, 0.0002, attempt=1)), row(payload(0, 0.0001, attempt=2))]
    records = [parse_row(one, Decimal(1000)) for one in rows_there]
    with following(dsn, log.parent) as rig:
        rig.ledger.add_records([one for one in records if isinstance(one, SpendRecord)])
        sweep(rig)
    told = verb.json("explain", call(0))
    assert told["pricing"]["billed_source"] == "spend_logs"
    assert told["pricing"]["why"].startswith("the larger sum")
    assert [one["sum_usd"] for one in told["pricing"]["sums"]] == ["0.000225", "0.0003"]
    (adjustment,) = told["adjustments"]
    assert (adjustment["delta_credits"], adjustment["delta_cost_usd"]) == (750, "0.000075000000")
    assert told["total_credits"] == 3000
    assert "<- billed: the larger sum" in verb("explain", call(0))
    (receipt,) = verb.json("receipts")
    assert (receipt["charged_credits"], receipt["adjusted_credits"], receipt["total_credits"]) == (2250, 750, 3000)


def test_explain_what_is_not_settled(verb: Verb, dsn: str, log: Path) -> None:
    settle(dsn, log, lines(0, 2), payload(1, 0.0), payload(7))
    assert verb.json("explain", call(0))["standing"] == "pending"
    held = verb.json("explain", call(1))
    assert (held["standing"], held["receipt"]) == ("held", None)
    assert [one["kind"] for one in held["exceptions"]] == ["held_zero_cost"]
    assert "held_zero_cost" in verb("explain", call(1))
    unaudited = verb.json("explain", call(7))
    assert (unaudited["standing"], unaudited["line"], unaudited["fact"]) == ("unaudited", None, None)
    assert "no audit line" in verb("explain", call(7))


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "no\x1b[31m"],
        ["adjust", "no", "--credits", "1", "--reason", "r"],
        ["exceptions", "release", "no", "--reason", "r"],
        ["exceptions", "close", "no", "overdue", "--reason", "r"],
    ],
)
def test_an_unknown_call(dsn: str, log: Path, arguments: list[str]) -> None:
    environment = {"BILLING_TAILER_DATABASE_URL": dsn, "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*"}
    found = run_verb(environment, *arguments)
    assert (found.returncode, found.stdout) == (1, "")
    assert "\n  -> the id is the line's litellm_call_id" in found.stderr
    assert "\x1b" not in found.stderr


def test_strangers_do_not_write_to_the_terminal(verb: Verb, dsn: str, log: Path) -> None:
    bad = "\x1b]0;owned\x07"
    settle(dsn, log, line(0, run_id=bad, end_user=bad), payload(0, model_group=bad, response_cost="\x1b[2J"))
    for arguments in (["explain", call(0)], ["exceptions", "list"], ["receipts"]):
        assert all(c.isprintable() for c in verb(*arguments).replace("\n", ""))


# --- receipts


def test_receipts(verb: Verb, dsn: str, log: Path) -> None:
    assert verb("receipts") == "none\n"
    settle(dsn, log, line(0), payload(0))
    settle(dsn, log, line(1, end_user="account-2") + line(2), payload(1), payload(2))
    found = verb.json("receipts")
    assert {one["call_id"] for one in found[:2]} == {call(1), call(2)}
    assert found[2]["call_id"] == call(0), "the newest first"
    assert set(found[0]) == {
        "call_id",
        "billing_account_id",
        "run_id",
        "attempt",
        "charged_credits",
        "provider_cost_usd",
        "user_cost_usd",
        "markup_factor",
        "provenance",
        "spend_source",
        "record_ids",
        "occurred_at",
        "created_at",
        "model",
        "provider_model",
        "tokens_in",
        "tokens_out",
        "cache_hit",
        "adjusted_credits",
        "adjusted_cost_usd",
        "total_credits",
    }
    assert [one["call_id"] for one in verb.json("receipts", "--account", "account-2")] == [call(1)]
    assert [one["call_id"] for one in verb.json("receipts", "--run", "run-2")] == [call(2)]
    assert len(verb.json("receipts", "--limit", "1")) == 1
    assert verb.json("receipts", "--since", "2100-01-01") == []
    assert len(verb.json("receipts", "--since", found[1]["created_at"])) == 2
    printed = verb("receipts").splitlines()
    assert printed[0].split()[:3] == ["created_at", "call_id", "billing_account_id"]
    verb("receipts", "--since", "yesterday", code=2)
    assert "--since 'yesterday' is no time" in verb.stderr


# --- exceptions


def test_exceptions_list_and_release(verb: Verb, dsn: str, log: Path) -> None:
    settle(dsn, log, lines(0, 2), payload(0, 0.0), payload(1, -1.0))
    assert unsettled(dsn) == [call(0), call(1)]
    found = verb.json("exceptions", "list")
    assert {(one["call_id"], one["kind"]) for one in found} == {(call(0), "held_zero_cost"), (call(1), "held_bad_cost")}
    assert set(found[0]) == {
        "call_id",
        "kind",
        "seq",
        "opened_at",
        "closed_at",
        "closed_by",
        "reason",
        "run_id",
        "billing_account_id",
        "occurred_at",
        "detail",
    }
    assert [one["call_id"] for one in verb.json("exceptions", "list", "--kind", "held_bad_cost")] == [call(1)]
    assert "held_zero_cost" in verb("exceptions", "list")
    verb("exceptions", "list", "--kind", "nonsense", code=2)

    release = ["exceptions", "release", call(0), "--reason", "ticket 7", "--cost-usd", "0.5"]
    planned = verb.json(*release, "--dry-run")
    assert (planned["applied"], planned["receipt"]["charged_credits"]) == (False, 5_000_000)
    assert "would be written" in verb(*release, "--dry-run")
    assert count(dsn, "charge_receipts") == 0
    done = verb.json(*release)
    assert set(done) == {"call_id", "applied", "receipt", "adjustment", "opened", "closed"}
    assert done == {**planned, "applied": True}
    (receipt,) = rows(dsn, "select * from charge_receipts")
    assert (receipt["provenance"], receipt["spend_source"]) == ("manual", None)
    assert receipt["provider_cost_usd"] == Decimal("0.5")
    assert count(dsn, "llm_charge_details") == 1
    (closed,) = [one for one in verb.json("exceptions", "list", "--all") if one["call_id"] == call(0)]
    assert (closed["closed_by"], closed["reason"]) == (getpass.getuser(), "ticket 7")
    assert unsettled(dsn) == [call(1)], "what is settled is not looked at any more"
    printed = verb("exceptions", "release", call(1), "--reason", "free", "--cost-usd", "0", "--by", "ann")
    assert "closed held_bad_cost 1 by ann: free" in printed
    assert verb.json("exceptions", "list") == []
    settle(dsn, log, b"")
    assert count(dsn, "charge_receipts") == 2
    assert count(dsn, "charge_adjustments") == 0


def test_release_of_an_unattributed_call(verb: Verb, dsn: str, log: Path) -> None:
    settle(dsn, log, line(0, end_user=""), payload(0))
    found = run_release(dsn, log, call(0))
    assert "name whom to charge with --account" in found
    done = verb.json("exceptions", "release", call(0), "--reason", "r", "--account", "account-9")
    assert done["receipt"]["billing_account_id"] == "account-9"
    assert done["receipt"]["provider_cost_usd"] == "0.000225000000", "the records' own cost"
    assert done["receipt"]["provenance"] == "response"


def run_release(dsn: str, log: Path, call_id: str, *options: str) -> str:
    """A release that fails: exit code 1 and its complaint."""
    environment = {
        "BILLING_TAILER_DATABASE_URL": dsn,
        "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*",
        "BILLING_TAILER_CALLBACK_TOKEN": TOKEN,
    }
    found = run_verb(environment, "exceptions", "release", call_id, "--reason", "r", *options)
    assert (found.returncode, found.stdout) == (1, ""), found
    return found.stderr


def test_releases_that_say_too_little(dsn: str, log: Path) -> None:
    settle(dsn, log, lines(0, 3), payload(0, 0.0), payload(1))
    assert "name the cost of the whole call with --cost-usd (0 if it is free)" in run_release(dsn, log, call(0))
    assert "nothing is open about it: it was settled" in run_release(dsn, log, call(1), "--cost-usd", "1")
    assert "is pending: its spend record may still come" in run_release(dsn, log, call(2), "--cost-usd", "1")
    assert count(dsn, "charge_receipts") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reason", " "], "--reason is empty"),
        (["--reason", "r", "--cost-usd", "-1"], "is no cost"),
        (["--reason", "r", "--cost-usd", "1e40"], "is no amount"),
        (["--reason", "r", "--cost-usd", "NaN"], "is no amount"),
        (["--reason", "r", "--cost-usd", "1", "--by", "settler"], "the program itself"),
        (["--reason", "r", "--cost-usd", "1", "--account", ""], "--account is empty"),
    ],
)
def test_wrong_releases(verb: Verb, dsn: str, log: Path, options: list[str], words: str) -> None:
    settle(dsn, log, lines(0, 1), payload(0, 0.0))
    verb("exceptions", "release", call(0), *options, code=2)
    assert words in verb.stderr
    assert count(dsn, "charge_receipts") == 0


def test_close(verb: Verb, dsn: str, log: Path) -> None:
    """A call that is written off: no receipt, not looked at any more, until a later record settles it."""
    settle(dsn, log, lines(0, 1), deadline_seconds=0)
    assert [one["kind"] for one in verb.json("exceptions", "list")] == ["overdue"]
    close = ["exceptions", "close", call(0), "overdue", "--reason", "outage of the provider", "--by", "ann"]
    assert verb.json(*close, "--dry-run")["applied"] is False
    assert len(verb.json("exceptions", "list")) == 1
    done = verb.json(*close)
    assert [(one["kind"], one["closed_by"]) for one in done["closed"]] == [("overdue", "ann")]
    assert unsettled(dsn) == []
    assert verb.json("reconcile", *DAY)["total"]["closed"] == 1
    settle(dsn, log, b"", deadline_seconds=0)
    assert verb.json("exceptions", "list") == [], "it stays closed"
    environment = {"BILLING_TAILER_DATABASE_URL": dsn, "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*"}
    again = run_verb(environment, *close)
    assert (again.returncode, "has no open exception overdue" in again.stderr) == (1, True)
    settle(dsn, log, b"", payload(0), deadline_seconds=0)
    assert count(dsn, "charge_receipts") == 1


def test_a_closed_call_can_still_be_released(verb: Verb, dsn: str, log: Path) -> None:
    settle(dsn, log, lines(0, 1), deadline_seconds=0)
    verb("exceptions", "close", call(0), "overdue", "--reason", "r")
    assert verb.json("exceptions", "release", call(0), "--reason", "r", "--cost-usd", "1")["applied"] is True
    assert count(dsn, "charge_receipts") == 1


def test_closing_what_is_said_of_a_settled_call(verb: Verb, dsn: str, log: Path) -> None:
    """It waits for nothing, also where a record that is held is open about it."""
    with following(dsn, log.parent) as rig:
        log.write_bytes(line(0, requested_model="other"))
        spool(log, payload(0))
        rig.turn()
        spool(log, payload(0, 0.0, id="second"))
        rig.turn()
        assert {one["kind"] for one in verb.json("exceptions", "list")} == {"held_zero_cost", "model_mismatch"}
        verb("exceptions", "close", call(0), "model_mismatch", "--reason", "r")
        sweep(rig)
        assert unsettled(dsn) == []
        verb("exceptions", "close", call(0), "held_zero_cost", "--reason", "r")
        sweep(rig)
        assert (unsettled(dsn), count(dsn, "touched_calls"), count(dsn, "charge_receipts")) == ([], 0, 1)


def test_a_call_that_was_given_up_stays_so(verb: Verb, dsn: str, log: Path) -> None:
    """Also when something else about it is closed afterwards."""
    with following(dsn, log.parent, deadline_seconds=0) as rig:
        log.write_bytes(line(0, call_id="another"))
        rig.turn()
        sweep(rig)
        verb("exceptions", "close", call(0), "overdue", "--reason", "r")
        verb("exceptions", "close", call(0), "call_id_not_forwarded", "--reason", "r")
        sweep(rig)
        assert unsettled(dsn) == []


# --- adjust


def test_adjust(verb: Verb, dsn: str, log: Path) -> None:
    settle(dsn, log, lines(0, 2), payload(0), rules=Rules(markup=Decimal("1.2")))
    give = ["adjust", call(0), "--credits", "-500", "--reason", "goodwill", "--by", "ann"]
    planned = verb.json(*give, "--dry-run")
    assert count(dsn, "charge_adjustments") == 0
    assert verb.json(*give) == {**planned, "applied": True}
    adjustment = planned["adjustment"]
    assert (adjustment["delta_credits"], Decimal(adjustment["delta_cost_usd"])) == (-500, Decimal(0))
    assert adjustment["created_by"] == "ann"
    again = verb.json(*give)
    assert (again["applied"], again["adjustment"]) == (False, None)
    assert "done before" in verb(*give)
    more = verb.json("adjust", call(0), "--cost-usd", "0.0001", "--reason", "found an attempt")["adjustment"]
    assert (more["delta_credits"], Decimal(more["delta_cost_usd"])) == (1200, Decimal("0.0001")), "goodwill stays"
    assert verb.json("explain", call(0))["total_credits"] == 2700 - 500 + 1200
    assert verb.json("explain", call(0))["pricing"]["by_hand"] is True
    settle(dsn, log, b"", payload(0, 0.0, attempt=1, status="failure"))
    assert count(dsn, "charge_adjustments") == 2, "the program does not undo what a person decided"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "either --credits or --cost-usd"),
        (["--credits", "1", "--cost-usd", "1"], 2, "either --credits or --cost-usd"),
        (["--credits", "0"], 2, "changes nothing"),
        (["--cost-usd", "0.0000000000001"], 2, "at most 12 decimals"),
        (["--credits", "-2251"], 1, "give back what is charged at most"),
        (["--cost-usd", "-0.000226"], 1, "its cost cannot be below 0"),
    ],
)
def test_wrong_adjustments(dsn: str, log: Path, options: list[str], code: int, words: str) -> None:
    settle(dsn, log, lines(0, 1), payload(0))
    environment = {"BILLING_TAILER_DATABASE_URL": dsn, "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*"}
    found = run_verb(environment, "adjust", call(0), "--reason", "r", *options)
    assert (found.returncode, found.stdout) == (code, "")
    assert words in found.stderr
    assert count(dsn, "charge_adjustments") == 0


def test_adjust_of_a_call_without_receipt(dsn: str, log: Path) -> None:
    settle(dsn, log, lines(0, 1))
    environment = {"BILLING_TAILER_DATABASE_URL": dsn, "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*"}
    found = run_verb(environment, "adjust", call(0), "--reason", "r", "--credits", "1")
    assert (found.returncode, "has no receipt yet" in found.stderr) == (1, True)


# --- beside the daemon


class Racing:
    """A verb that begins while the settler has loaded a call and not yet written its decision."""

    def __init__(self, dsn: str, log: Path, *arguments: str) -> None:
        self.result: Any = None
        self._dsn = dsn
        self._environment = {
            "BILLING_TAILER_DATABASE_URL": dsn,
            "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*",
        }
        self._arguments = arguments
        self._thread = threading.Thread(target=self._run)

    def decide(self, state: CallState, rules: Rules) -> Decision:
        if self._thread.ident is None:
            self._thread.start()
            self._wait_until_it_waits()
        return decide(state, rules)

    def _run(self) -> None:
        self.result = run_verb(self._environment, *self._arguments)

    def _wait_until_it_waits(self) -> None:
        """The verb has reached the lock that the settler holds, or has ended without asking for it."""
        deadline = time.monotonic() + 20
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not connection.execute(WAITING).fetchall() and self._thread.is_alive():
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def join(self) -> Any:
        self._thread.join(30)
        return self.result


def test_a_release_races(dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The late record of an overdue call comes at the moment of its release: one receipt, and the verb says so."""
    settle(dsn, log, lines(0, 1), deadline_seconds=0)
    assert rows(dsn, "select kind from call_exceptions") == [{"kind": "overdue"}]
    racing = Racing(dsn, log, "exceptions", "release", call(0), "--reason", "r", "--cost-usd", "1")
    with following(dsn, log.parent, deadline_seconds=0) as rig:
        monkeypatch.setattr(settler, "decide", racing.decide)
        spool(log, payload(0))
        rig.turn()
        found = racing.join()
    assert found.returncode == 1, found
    assert "settled meanwhile" in found.stderr
    (receipt,) = rows(dsn, "select provenance, charged_credits from charge_receipts")
    assert receipt == {"provenance": "response", "charged_credits": 2250}
    assert count(dsn, "charge_adjustments") == 0


def test_an_adjustment_races(dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late attempt and a person's correction at the same moment: both are made, each on what the other left."""
    settle(dsn, log, lines(0, 1), payload(0))
    racing = Racing(dsn, log, "adjust", call(0), "--reason", "r", "--cost-usd", "-0.000325", "--json")
    with following(dsn, log.parent) as rig:
        monkeypatch.setattr(settler, "decide", racing.decide)
        spool(log, payload(0, 0.0001, attempt=1))
        rig.turn()
        found = racing.join()
    assert answer_of(found)["adjustment"]["delta_credits"] == -3250, "only possible on top of the late attempt"
    assert sum(one["delta_credits"] for one in rows(dsn, "select delta_credits from charge_adjustments")) == -2250


def test_the_settler_waits_for_a_verb(dsn: str, log: Path) -> None:
    """The other order: a receipt that a verb has written and not yet committed is not made twice."""
    settle(dsn, log, lines(0, 1), deadline_seconds=0)
    with operator(dsn, "billing", quiet_seconds=10, deadline_seconds=900) as ledger:
        with ledger.deciding():
            state = ledger.load(call(0))
            assert state is not None
            ledger.write(call(0), decide(replace(state, release=Release("r", "ann", Decimal(1))), Rules()))
            follower = threading.Thread(target=settle, args=(dsn, log, b"", payload(0)))
            follower.start()
            with psycopg.connect(dsn, autocommit=True) as connection:
                deadline = time.monotonic() + 20
                while not connection.execute(
                    "select from pg_locks where locktype='advisory' and not granted"
                ).fetchall():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
        follower.join(30)
    (receipt,) = rows(dsn, "select provenance, charged_credits from charge_receipts")
    assert receipt == {"provenance": "manual", "charged_credits": 10_000_000}
    assert [one["kind"] for one in rows(dsn, "select kind from call_exceptions where closed_at is null")] == [
        "cost_mismatch"
    ]


# --- reconcile


@pytest.fixture
def day(dsn: str, log: Path) -> None:
    """Calls 0 to 7: two settled; one each held, unattributed, overdue, not charged, pending, differing."""
    settle(dsn, log, line(4), deadline_seconds=0)
    audit = lines(0, 3) + line(3, end_user="") + lines(5, 3)
    events = [payload(0), payload(1), payload(2, 0.0), payload(3), failure(5), payload(7)]
    settle(dsn, log, audit, *events, quiet_seconds=0)
    settle(dsn, log, b"", payload(7, 0.0001, attempt=1), rules=Rules(corrections=Corrections.REPORT))


def test_reconcile(verb: Verb, day: None) -> None:
    found = verb.json("reconcile", *DAY)
    (window,) = found["windows"]
    assert window == {
        "from": "2026-11-22T00:00:00+00:00",
        "to": "2026-11-22T00:39:00+00:00",
        "billable": 8,
        "settled": 2,
        "not_charged": 1,
        "pending": 1,
        "held": 1,
        "unattributed": 1,
        "overdue": 1,
        "unapplied": 1,
        "closed": 0,
        "provider_cost_usd": "0.000675000000",
        "charged_credits": 6750,
        "capture_rate": "0.375000",
        "litellm": None,
    }
    assert set(found["total"]) == {*window} - {"from", "to", "litellm"}
    printed = verb("reconcile", *DAY)
    assert printed.splitlines()[0].split()[:4] == ["from", "to", "billable", "settled"]
    assert "LITELLM_URL is not set" in printed


def test_reconcile_days(verb: Verb) -> None:
    found = verb.json("reconcile", "--from", "2026-11-01", "--to", "2026-11-03T12:00:00")
    assert [(one["from"][:10], one["to"][:13]) for one in found["windows"]] == [
        ("2026-11-01", "2026-11-02T00"),
        ("2026-11-02", "2026-11-03T00"),
        ("2026-11-03", "2026-11-03T12"),
    ]
    assert found["total"]["capture_rate"] is None, "of no call at all there is no rate"
    assert len(verb.json("reconcile")["windows"]) == 1
    for options in (["--to", "2999-01-01"], ["--from", "2026-11-02", "--to", "2026-11-01"], ["--from", "1999-01-01"]):
        verb("reconcile", *options, code=2)


def test_reconcile_with_litellm(verb: Verb, dsn: str, log: Path, day: None) -> None:
    """One row each of: agreeing, differing, unknown here, unaudited, missing there; and no row of another window."""
    there = [payload(0), payload(1, 0.0005), payload(6, 0.0002), payload(99, 0.0003), payload(5000), failure(5)]
    with spend_logs([row(one) for one in there]) as url:
        verb.environment(LITELLM_URL=url, LITELLM_API_KEY="sk-1234")
        (window,) = verb.json("reconcile", *DAY[:3], "2026-11-22T00:40:30")["windows"]
        printed = verb("reconcile", *DAY[:3], "2026-11-22T00:40:30", "--limit", "1")
    found = window["litellm"]
    assert found["failure"] is None
    assert (found["rows"], found["rows_not_understood"]) == (5, 0)
    assert found["missing_here"] == {
        "count": 1,
        "cost_usd": "0.0002",
        "calls": [{"call_id": call(6), "litellm_usd": "0.0002", "standing": "pending"}],
    }
    assert [one["call_id"] for one in found["unaudited"]["calls"]] == [call(99)]
    assert {one["call_id"] for one in found["missing_there"]["calls"]} == {call(2), call(3), call(7)}
    (differing,) = found["amount_differs"]["calls"]
    assert differing == {"call_id": call(1), "charged_usd": "0.000225000000", "litellm_usd": "0.0005"}
    assert found["amount_differs"]["cost_usd"] == "0.000275000000"
    assert "missing_there: 3 calls" in printed
    assert [printed.count(f"call_id={call(number)}") for number in (2, 3, 7)] == [1, 0, 0], "bounded"


def test_reconcile_when_litellm_is_away(verb: Verb, day: None) -> None:
    verb.environment(LITELLM_URL="http://127.0.0.1:1", LITELLM_API_KEY="sk-1234")
    (window,) = verb.json("reconcile", *DAY, code=1)["windows"]
    assert window["billable"] == 8
    assert window["litellm"]["failure"]


# --- status and check


def test_status_counts_calls_and_money(verb: Verb, dsn: str, log: Path, day: None) -> None:
    found = verb.json("status", code=1)
    assert (found["facts"], found["pending_calls"], found["receipts"]) == (8, 4, 3)
    assert found["exceptions_open"] == {
        "cost_mismatch": 1,
        "held_zero_cost": 1,
        "not_charged": 1,
        "overdue": 1,
        "unattributed": 1,
    }
    assert "exceptions_open    cost_mismatch=1, held_zero_cost=1" in verb("status", code=1)
    settle(dsn, log.parent / "audit-2.jsonl", b"")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("update billing.tail_files set source_id = 'other'")
    other = verb.json("status")
    assert (other["pending_calls"], other["receipts"], other["exceptions_open"]) == (0, 0, {})


def by_topic(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["topic"]: one for one in found}


def test_check_of_the_cost_sources(verb: Verb, daemon_dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verb.environment(DATABASE_URL=daemon_dsn)
    log.write_bytes(lines(0, 1))
    found = by_topic(verb.json("check"))
    assert (found["callbacks"]["ok"], found["callbacks"]["warning"]) == (True, False)
    assert found["spend logs"]["warning"] is True
    monkeypatch.delenv("BILLING_TAILER_CALLBACK_TOKEN")
    assert by_topic(verb.json("check"))["cost source"]["warning"] is True
    assert "warn cost source" in verb("check")
    verb.environment(LITELLM_URL="http://127.0.0.1:1", LITELLM_API_KEY="sk-1234")
    found = by_topic(verb.json("check", code=1))
    assert (found["callbacks"]["ok"], found["callbacks"]["warning"]) == (True, True)
    assert (found["spend logs"]["ok"], bool(found["spend logs"]["hint"])) == (False, True)
    monkeypatch.setattr(SpendLogs, "reachable", lambda _: None)
    assert by_topic(verb.json("check"))["spend logs"]["message"] == "http://127.0.0.1:1 answers, and takes the key"


def test_by_header_it_is_said_what_that_gets_wrong(verb: Verb, dsn: str, daemon_dsn: str, log: Path) -> None:
    settle(dsn, log, line(1), payload(1, 7.0), rules=Rules(header_cost_max_usd=Decimal(1000)))
    verb.environment(COST_SOURCE="header", DATABASE_URL=daemon_dsn)
    found = by_topic(verb.json("check"))
    assert found["cost source"]["warning"] is True
    assert "streams, cache hits, failures" in found["cost source"]["message"]
    assert {"callbacks", "spend logs"}.isdisjoint(found)
    for source in ("header", "litellm"):
        verb.environment(COST_SOURCE=source)
        told = verb.json("explain", call(1))
        assert (told["standing"], told["total_credits"]) == ("settled", 2250)
        assert [one["source"] for one in told["pricing"]["sums"]] == ["header"]
        assert told["pricing"]["charged_credits"] == 2250


def test_check_of_the_free_models(verb: Verb, dsn: str, daemon_dsn: str, log: Path) -> None:
    settle(dsn, log, lines(0, 1), payload(0))
    verb.environment(DATABASE_URL=daemon_dsn, FREE_MODELS="up-*,local/*,gpt-4o-mini")
    found = by_topic(verb.json("check"))
    assert found["free models"]["warning"] is True
    assert found["free models"]["message"].endswith(": local/*")
    assert "warn free models" in verb("check")
