"""Every check of bills.py can fail: right bills of made-up calls pass, and each change to one is noticed."""

import dataclasses
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from tests.e2e.litellm import bills
from tests.e2e.litellm.bills import Bill, Rules
from tests.e2e.litellm.cases import ACCOUNT, GRAPH, MINI, Call, Expect, Outcome, cases, chatted

RULES = Rules(ACCOUNT, Decimal("1.2"), {"callback"})
COST = Decimal("0.0000081")
SAID = Decimal("0.000008100000")
CHARGED = Call("nonstream", "run-1", 200, chatted(MINI, "0.0000081"))


def call_of(outcome: Outcome, **more: Any) -> Call:
    return Call(outcome, "run-1", 200, dataclasses.replace(CHARGED.expect, outcome=outcome, **more))


def fact(**more: Any) -> dict[str, Any]:
    row = {"call_id": "call-1", "run_id": "run-1", "billing_account_id": ACCOUNT, "provenance": "response"}
    return row | more


def exception(kind: str, **more: Any) -> dict[str, Any]:
    return {"call_id": "call-1", "kind": kind, "closed_at": None} | more


def right_bill() -> Bill:
    """The bill of CHARGED."""
    receipt = {
        "source_system": "litellm",
        "source_reference": "call-1",
        "litellm_call_id": "call-1",
        "run_id": "run-1",
        "billing_account_id": ACCOUNT,
        "provider_cost_usd": Decimal("0.000008100000"),
        "user_cost_usd": Decimal("0.000009720000"),
        "charged_credits": 98,  # 97.2
        "markup_factor": Decimal("1.2"),
        "provenance": "response",
        "spend_source": "callback",
        "record_ids": ["record-1"],
        "charge_reason": "llm_usage",
        "receipt_kind": "llm",
    }
    details = {
        "source_system": "litellm",
        "source_reference": "call-1",
        "provider_call_id": "chatcmpl-1",
        "model": MINI,
        "tokens_in": 1000,
        "tokens_out": 200,
        "cached_tokens": 600,
        "reasoning_tokens": 64,
        "response_cost_usd": Decimal("0.0000081"),
        "cache_hit": None,
        "graph_id": GRAPH,
    }
    return Bill([fact()], [receipt], [details])


def check(call: Call, bill: Bill, said: Decimal | None = SAID) -> list[str]:
    return bills.differences(call, bill, said, RULES)


# --- right bills --------------------------------------------------------------------------------------------------


def test_the_right_bill_passes() -> None:
    assert check(CHARGED, right_bill()) == []
    assert check(CHARGED, right_bill(), None) == []


def test_a_cost_that_only_litellm_knows() -> None:
    call = call_of(Outcome.CHARGED, cost_usd=None)
    assert check(call, right_bill()) == []
    assert check(call, right_bill(), Decimal("0.0000082")) != []
    assert check(call, right_bill(), Decimal(0)) == ["LiteLLM says that it cost 0"]
    assert check(call, right_bill(), None) == ["LiteLLM says that it cost None"]


@pytest.mark.parametrize("outcome", [Outcome.NOT_CHARGED, Outcome.HELD, Outcome.OVERDUE])
def test_an_exception_in_place_of_a_receipt(outcome: Outcome) -> None:
    call = call_of(outcome)
    bill = Bill([fact()], call_exceptions=[exception(outcome)])
    assert check(call, bill) == []
    assert check(call, Bill([fact()])) == [f"open exceptions [] instead of ['{outcome}']"]
    assert len(check(call, Bill([fact()], call_exceptions=[exception("conflict")]))) == 1
    assert len(check(call, Bill([fact()], call_exceptions=[exception(outcome, closed_at="now")]))) == 1
    with_receipt = right_bill()
    with_receipt.call_exceptions.append(exception(outcome))
    assert check(call, with_receipt) == [
        "1 rows in charge_receipts instead of 0",
        "1 rows in llm_charge_details instead of 0",
    ]


def test_an_unattributed_call_has_no_account() -> None:
    call = call_of(Outcome.UNATTRIBUTED)
    bill = Bill([fact(billing_account_id=None)], call_exceptions=[exception("unattributed")])
    assert check(call, bill) == []
    bill.usage_facts[0] = fact(billing_account_id="chosen-by-the-client")
    assert len(check(call, bill)) == 1


def test_no_call_leaves_nothing() -> None:
    call = call_of(Outcome.NO_CALL)
    assert check(call, Bill()) == []
    assert check(call, Bill([fact()])) == ["1 rows in usage_facts"]


def test_a_late_exception_that_was_closed_is_no_difference() -> None:
    bill = right_bill()
    bill.call_exceptions.append(exception("overdue", closed_at="now"))
    assert check(CHARGED, bill) == []


def test_a_model_mismatch_is_shown_once_and_changes_nothing() -> None:
    call = call_of(Outcome.CHARGED, model_mismatch=True)
    bill = right_bill()
    assert check(call, bill) == ["0 rows of kind model_mismatch"]
    bill.call_exceptions.append(exception("model_mismatch"))
    assert check(call, bill) == []
    assert check(CHARGED, bill) == ["1 rows of kind model_mismatch"]


# --- wrong bills --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["usage_facts", "charge_receipts", "llm_charge_details"])
@pytest.mark.parametrize("change", [list.clear, lambda rows: rows.append(rows[0])], ids=["none", "two"])
def test_a_missing_or_doubled_row_is_noticed(table: str, change: Callable[[list[Any]], None]) -> None:
    bill = right_bill()
    change(getattr(bill, table))
    assert len(check(CHARGED, bill)) == 1


@pytest.mark.parametrize("table", ["charge_adjustments", "call_exceptions"])
def test_a_row_too_many_is_noticed(table: str) -> None:
    bill = right_bill()
    getattr(bill, table).append(exception("cost_mismatch"))
    assert len(check(CHARGED, bill)) == 1


@pytest.mark.parametrize(
    ("table", "name", "value"),
    [
        ("usage_facts", "billing_account_id", "other"),
        ("usage_facts", "provenance", "stream"),
        ("charge_receipts", "source_reference", "call-2"),
        ("charge_receipts", "litellm_call_id", "call-2"),
        ("charge_receipts", "run_id", "run-2"),
        ("charge_receipts", "billing_account_id", "other"),
        ("charge_receipts", "provider_cost_usd", Decimal("0.000008100001")),
        ("charge_receipts", "user_cost_usd", Decimal("0.000009720001")),
        ("charge_receipts", "charged_credits", 97),
        ("charge_receipts", "markup_factor", Decimal(1)),
        ("charge_receipts", "provenance", "stream"),
        ("charge_receipts", "spend_source", "spend_logs"),
        ("charge_receipts", "record_ids", []),
        ("charge_receipts", "charge_reason", "other"),
        ("charge_receipts", "receipt_kind", "other"),
        ("llm_charge_details", "source_system", "other"),
        ("llm_charge_details", "model", "other"),
        ("llm_charge_details", "tokens_in", 999),
        ("llm_charge_details", "tokens_out", 0),
        ("llm_charge_details", "cached_tokens", None),
        ("llm_charge_details", "reasoning_tokens", 0),
        ("llm_charge_details", "response_cost_usd", Decimal("0.0000082")),
        ("llm_charge_details", "cache_hit", True),
        ("llm_charge_details", "graph_id", None),
        ("llm_charge_details", "provider_call_id", None),
    ],
)
def test_a_wrong_value_is_noticed(table: str, name: str, value: Any) -> None:
    bill = right_bill()
    rows = getattr(bill, table)
    rows[0] = rows[0] | {name: value}
    assert len(check(CHARGED, bill)) == 1


def test_another_word_of_litellm_is_noticed() -> None:
    assert check(CHARGED, right_bill(), Decimal("0.0000082")) == [
        "LiteLLM says that it cost 0.0000082 instead of 0.0000081"
    ]


def test_a_hit_that_is_no_hit_is_noticed() -> None:
    assert len(check(call_of(Outcome.CHARGED, cache_hit=True), right_bill())) == 1


# --- tables -------------------------------------------------------------------------------------------------------


def tables_of(bill: Bill) -> dict[str, list[Any]]:
    return {table: list(getattr(bill, table)) for table in bills.KEYS}


def test_rows_find_their_run() -> None:
    tables = tables_of(right_bill())
    assert bills.by_run(tables) == {"run-1": right_bill()}
    assert bills.strays(tables, {"run-1"}) == []


def test_rows_without_a_fact_are_strays() -> None:
    bill = right_bill()
    bill.charge_receipts.append({"source_reference": "call-2"})
    bill.call_exceptions.append(exception("overdue", call_id="call-3"))
    tables = tables_of(bill)
    assert bills.by_run(tables) == {"run-1": right_bill()}
    assert len(bills.strays(tables, {"run-1"})) == 2
    assert len(bills.strays(tables_of(right_bill()), {"run-2"})) == 1


# --- money --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (Fraction("0.0000000000005"), "0"),
        (Fraction("0.0000000000015"), "0.000000000002"),
        (Fraction("0.0000000000025"), "0.000000000002"),
        (Fraction("0.00000000000250001"), "0.000000000003"),
        (Fraction("5.9999999999999995e-05"), "0.000060000000"),
    ],
)
def test_costs_are_rounded_half_to_even(cost: Fraction, expected: str) -> None:
    assert bills.rounded(cost) == Decimal(expected)


def test_attempts_are_added_before_they_are_rounded() -> None:
    assert bills.total([Decimal("4e-13"), Decimal("4e-13")]) == Decimal("1e-12")
    assert bills.total([]) == 0


@pytest.mark.parametrize(("cost", "expected"), [("0", 0), ("1e-12", 1), ("1e-7", 1), ("0.000000100001", 2)])
def test_credits_are_rounded_up(cost: str, expected: int) -> None:
    assert bills.credits_of(Decimal(cost)) == expected


# --- cases --------------------------------------------------------------------------------------------------------


def test_cases_are_complete_and_their_models_are_configured() -> None:
    every = cases()
    names = list(every)
    for name, case in every.items():
        assert case.after is None or names.index(case.after) < names.index(name)
        if case.expect.outcome is Outcome.CHARGED:
            assert case.expect.model_group
            assert case.expect.cost_usd is not None or case.hang_up is not None
    assert {case.expect.outcome for case in every.values()} == set(Outcome) - {Outcome.OVERDUE}


def test_each_set_of_cases_has_its_own_prompts() -> None:
    one, other = cases(), cases()
    assert one["nonstream"].body != other["nonstream"].body
    assert one["cache_miss"].body == one["cache_hit"].body != other["cache_miss"].body


def test_expectations_can_be_compared() -> None:
    assert Expect(Outcome.CHARGED) == Expect(Outcome.CHARGED) != Expect(Outcome.HELD)
