"""`verify --settlement`: sound receipts have no difference, and whatever is changed in the tables of money is named."""

import sys
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest

from billing_tailer.settle import Rules
from tests.support.loglines import line, lines
from tests.support.proof import rows
from tests.support.spendlines import failure, payload
from tests.support.verbs import Verb
from tests.test_money_cli import call, settle

DEAR = Rules(markup=Decimal("1.2"))


def execute(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"set search_path to billing; {statement}".encode())


@pytest.fixture
def settled(verb: Verb, dsn: str, log: Path) -> Verb:
    """Receipts of every kind: plain, of several attempts, a later adjustment, by hand, adjusted by hand, given up."""
    verb.environment(MARKUP_FACTOR="1.2")
    events = [payload(0), failure(1, 0.0001), payload(1, 0.00025, attempt=1), payload(2), payload(3, 0.0), payload(4)]
    settle(dsn, log, lines(0, 7), *events, rules=DEAR)
    settle(dsn, log, b"", payload(2, 0.0003333333333333, attempt=1), failure(6), rules=DEAR, quiet_seconds=0)
    settle(dsn, log, b"", payload(2, 0.0001, attempt=2), rules=DEAR)
    verb("exceptions", "release", call(3), "--cost-usd", "0.5", "--reason", "r")
    verb("adjust", call(4), "--credits", "-100", "--reason", "goodwill")
    verb("adjust", call(4), "--cost-usd", "0.001", "--reason", "more")
    settle(dsn, log, b"", deadline_seconds=0, rules=DEAR)
    verb("exceptions", "close", call(5), "overdue", "--reason", "r")
    return verb


def test_sound_receipts(settled: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = settled.json("verify", "--settlement")
    assert answer["differences"] == []
    counted = {name: answer[name] for name in ("ok", "receipts", "manual", "adjustments", "facts", "details")}
    assert counted == {"ok": True, "receipts": 5, "manual": 1, "adjustments": 4, "facts": 7, "details": 5}
    charged = sum(row["total_credits"] for row in settled.json("receipts"))
    assert answer["charged_credits"] == charged > 6_000_000
    monkeypatch.setattr(sys.modules["billing_tailer.ledger.proofs"], "PAGE_ROWS", 2)
    assert settled.json("verify", "--settlement") == answer
    assert settled("verify", "--settlement").splitlines()[-1] == "differences  0"
    settled("verify", "--settlement", "--file", "/x", code=2)


FIRST = f"where source_reference = '{call(0)}'"
SECOND = f"where source_reference = '{call(2)}'"
COPY = (
    "insert into charge_receipts select 'other', source_reference, billing_account_id, run_id, attempt, "
    "litellm_call_id, charged_credits, provider_cost_usd, user_cost_usd, markup_factor, provenance, "
    "spend_source, record_ids, charge_reason, receipt_kind, occurred_at from charge_receipts"
)
GOODWILL = f"where source_reference = '{call(4)}' and reason = 'goodwill'"
INFORMED = (
    f"delete from charge_receipts {FIRST}; delete from llm_charge_details {FIRST}; insert into call_exceptions "
    f"(call_id, kind, seq, detail, closed_at, closed_by) "
    f"values ('{call(0)}', 'model_mismatch', 1, '{{}}', now(), 'ann')"
)
BY_HAND = f"where source_reference = '{call(3)}'"


@pytest.mark.parametrize(
    ("statement", "number", "words"),
    [
        (f"update charge_receipts set charged_credits = 2710, user_cost_usd = 0.000271 {FIRST}", 0, "charged_credits"),
        (f"update charge_receipts set provider_cost_usd = 0.000226 {FIRST}", 0, "provider_cost_usd is 0.000226"),
        (f"update charge_receipts set markup_factor = 1.1 {FIRST}", 0, "user_cost_usd"),
        (f"update charge_receipts set record_ids = '{{}}' {FIRST}", 0, "without records"),
        (f"update charge_receipts set record_ids = '{{x}}' {FIRST}", 0, "names the record x"),
        (f"update charge_receipts set run_id = 'x' {FIRST}", 0, "run, attempt or time"),
        (f"update charge_receipts set billing_account_id = 'x' {FIRST}", 0, "charged to x"),
        (f"update spend_records set cost_usd = 0.0002 where call_id = '{call(0)}'", 0, "the records give 0.0002"),
        (f"delete from spend_records where call_id = '{call(0)}'", 0, "which is not there"),
        (f"delete from usage_facts where call_id = '{call(0)}'", 0, "without an audit line"),
        (f"delete from llm_charge_details {FIRST}", 0, "without charge details"),
        (f"delete from charge_receipts {FIRST}", 0, "it has no receipt"),
        (f"delete from charge_receipts {FIRST}", 0, "charge details without a receipt"),
        (f"delete from charge_receipts {SECOND}", 2, "an adjustment without a receipt"),
        (f"delete from charge_adjustments {SECOND}", 2, "nothing was adjusted"),
        (f"update charge_adjustments set delta_credits = delta_credits + 1 {SECOND}", 2, "its evidence gives"),
        (f"update charge_adjustments set delta_cost_usd = 1 {SECOND}", 2, "its evidence gives"),
        (f"update charge_adjustments set evidence_hash = evidence_hash || 'x' {SECOND}", 2, "its hash"),
        (
            f"""update charge_adjustments set evidence = evidence || '{{"record_ids": ["x"]}}' {SECOND}""",
            2,
            "not there",
        ),
        (f"update charge_receipts set user_cost_usd = 0.5, charged_credits = 5000000 {BY_HAND}", 3, "user_cost_usd"),
        (f"update charge_adjustments set delta_credits = -99 {GOODWILL}", 4, "not that of its amounts"),
        (f"update charge_adjustments set delta_cost_usd = -0.0001 {GOODWILL}", 4, "not that of its amounts"),
        (f"update charge_adjustments set reason = 'x' {GOODWILL}", 4, "not that of its amounts and its reason"),
        (
            f"{COPY} {FIRST}",
            0,
            "two receipts",
        ),
        (f"update charge_receipts set source_system = 'other' {FIRST}", 0, "of the source system other"),
        (
            INFORMED,
            0,
            "it has no receipt",
        ),
        ("alter table charge_receipts drop constraint charge_receipts_pkey", None, "has no unique key"),
    ],
)
def test_one_wrong_row_is_named(settled: Verb, dsn: str, statement: str, number: int | None, words: str) -> None:
    execute(dsn, statement)
    answer = settled.json("verify", "--settlement", code=1)
    assert {one["call_id"] for one in answer["differences"]} == {"" if number is None else call(number)}
    assert any(words in one["what"] for one in answer["differences"]), answer["differences"]


def test_what_a_person_named_later_is_proven(verb: Verb, dsn: str, log: Path) -> None:
    """A settled call is held by a later record, and two people name its cost one after the other."""
    settle(dsn, log, lines(0, 2), payload(0))
    for attempt, cost in ((1, "0.3"), (2, "0.2")):
        settle(dsn, log, b"", payload(0, 0.0, attempt=attempt), payload(0, 0.0, attempt=attempt + 5))
        verb("exceptions", "release", call(0), "--cost-usd", cost, "--reason", "r")
        (state,) = rows(dsn, "select kind, closed_by is null as open from call_exceptions order by seq desc limit 1")
        assert not state["open"]
    assert verb.json("verify", "--settlement")["adjustments"] == 2
    execute(
        dsn,
        """update charge_adjustments set evidence = evidence || '{"provider_cost_usd": "0.1"}',
        delta_credits = delta_credits - 1000000, delta_cost_usd = delta_cost_usd - 0.1
        where evidence->>'provider_cost_usd' like '0.2%'""",
    )
    (one,) = verb.json("verify", "--settlement", code=1)["differences"]
    assert one["what"].endswith("its hash is not that of its evidence")


def test_a_record_that_was_not_looked_at_yet_is_no_difference(settled: Verb, dsn: str, log: Path) -> None:
    """The daemon is between the commit of a record and its decision."""
    copy = "insert into spend_records select call_id, source, 'later', status, model_group, model, provider, "
    copy += "prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, 9 from spend_records where call_id = "
    execute(dsn, f"{copy}'{call(0)}'; insert into touched_calls values ('{call(0)}')")
    assert settled.json("verify", "--settlement")["ok"]
    execute(dsn, "delete from touched_calls")
    assert not settled.json("verify", "--settlement", code=1)["ok"]


def test_calls_that_wait_are_no_difference(verb: Verb, dsn: str, log: Path) -> None:
    settle(dsn, log, lines(0, 3) + line(3, end_user=""), payload(0, 0.0), payload(3))
    answer = verb.json("verify", "--settlement")
    assert (answer["ok"], answer["receipts"], answer["facts"]) == (True, 0, 4)


BY_HEADER = Rules(header_cost_max_usd=Decimal(1000))


def test_receipts_by_header_are_proven_from_their_lines(verb: Verb, dsn: str, log: Path) -> None:
    """Also back at LiteLLM's records, which say something else; one by hand among them; and a changed one is named."""
    settle(dsn, log, lines(0, 3) + line(3, end_user=""), rules=BY_HEADER)
    verb("adjust", call(1), "--credits", "-100", "--reason", "goodwill")
    verb("exceptions", "release", call(3), "--cost-usd", "0.5", "--account", "account-1", "--reason", "r")
    settle(dsn, log, b"", payload(0, 5.0), payload(3, 5.0))
    for source in ("header", "litellm"):
        verb.environment(COST_SOURCE=source)
        answer = verb.json("verify", "--settlement")
        assert (answer["differences"], answer["receipts"], answer["manual"]) == ([], 4, 1)
    execute(dsn, f"update usage_facts set header_cost_usd = 0.000226 where call_id = '{call(2)}'")
    execute(dsn, f"update usage_facts set provenance = 'stream' where call_id = '{call(1)}'")
    differences = verb.json("verify", "--settlement", code=1)["differences"]
    assert {one["call_id"] for one in differences} == {call(1), call(2)}
