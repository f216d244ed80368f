"""What the database says about each run, against what it must say. Knows neither how the calls were made nor how the
daemon came to know of their cost.

test_bills.py shows that every check in here can fail.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row

from tests.e2e.litellm.cases import GRAPH, Call, Outcome

Row = Mapping[str, Any]
Tables = Mapping[str, Sequence[Row]]

KEYS: Final = {
    "usage_facts": "call_id",
    "charge_receipts": "source_reference",
    "llm_charge_details": "source_reference",
    "charge_adjustments": "source_reference",
    "call_exceptions": "call_id",
}
"""The tables that are looked at, and where in each the call id stands."""
INFORMATIONAL: Final = "model_mismatch"
CREDITS_PER_USD: Final = 10_000_000


@dataclass(frozen=True, slots=True)
class Rules:
    """How the daemon was told to bill. `sources` are those it was given."""

    account: str
    markup: Decimal
    sources: Collection[str]


@dataclass(frozen=True, slots=True)
class Bill:
    """The rows of one run."""

    usage_facts: list[Row] = field(default_factory=list)
    charge_receipts: list[Row] = field(default_factory=list)
    llm_charge_details: list[Row] = field(default_factory=list)
    charge_adjustments: list[Row] = field(default_factory=list)
    call_exceptions: list[Row] = field(default_factory=list)


# --- reading ------------------------------------------------------------------------------------------------------


def fetch(dsn: str) -> dict[str, list[Row]]:
    """Every row of the tables, as of one moment."""
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        connection.execute("set transaction isolation level repeatable read")
        return {table: list(connection.execute(f"select * from billing.{table}")) for table in KEYS}


def by_run(tables: Tables) -> dict[str, Bill]:
    """The rows by run id. A row of a call that has no fact belongs to no run: see `strays`."""
    runs = {fact["call_id"]: fact["run_id"] for fact in tables["usage_facts"]}
    bills: dict[str, Bill] = {}
    for table, key in KEYS.items():
        for row in tables[table]:
            if row[key] in runs:
                getattr(bills.setdefault(runs[row[key]], Bill()), table).append(row)
    return bills


def strays(tables: Tables, run_ids: Collection[str]) -> list[str]:
    """Rows about calls that were never logged, and facts of runs that nobody made."""
    facts = {fact["call_id"] for fact in tables["usage_facts"]}
    found = [f"a fact of run {fact['run_id']}" for fact in tables["usage_facts"] if fact["run_id"] not in run_ids]
    for table, key in KEYS.items():
        found += [
            f"a row of {table} for {row[key]}, which has no fact" for row in tables[table] if row[key] not in facts
        ]
    return found


# --- money, worked out anew ---------------------------------------------------------------------------------------


def rounded(cost: Fraction) -> Decimal:
    """To 12 decimals, half to even."""
    return Decimal(round(cost * 10**12)).scaleb(-12)  # round() on a fraction goes half to even


def total(costs: Iterable[Decimal]) -> Decimal:
    """The sum of LiteLLM's costs of one call, as `provider_cost_usd` has it."""
    return rounded(sum((Fraction(cost) for cost in costs), Fraction()))


def credits_of(user_cost_usd: Decimal) -> int:
    """Credits, rounded up."""
    return math.ceil(Fraction(user_cost_usd) * CREDITS_PER_USD)


# --- comparing ----------------------------------------------------------------------------------------------------


def differences(call: Call, bill: Bill, said: Decimal | None, rules: Rules) -> list[str]:
    """What is wrong with the bill of a call. `said` is LiteLLM's own sum of it, where it is known."""
    expect = call.expect
    if expect.outcome is Outcome.NO_CALL:
        return [f"{len(rows)} rows in {table}" for table in KEYS if (rows := getattr(bill, table))]
    if len(bill.usage_facts) != 1:
        return [f"{len(bill.usage_facts)} facts"]
    fact = bill.usage_facts[0]
    account = None if expect.outcome is Outcome.UNATTRIBUTED else rules.account
    wrong = _compared("fact", fact, {"billing_account_id": account, "provenance": expect.provenance})
    wrong += _exceptions(call, bill)
    wrong += [f"{len(bill.charge_adjustments)} adjustments"] * bool(bill.charge_adjustments)
    receipts = 1 if expect.outcome is Outcome.CHARGED else 0
    for table in ("charge_receipts", "llm_charge_details"):
        if len(getattr(bill, table)) != receipts:
            wrong.append(f"{len(getattr(bill, table))} rows in {table} instead of {receipts}")
    if not receipts or len(bill.charge_receipts) != 1 or len(bill.llm_charge_details) != 1:
        return wrong
    cost = said if expect.cost_usd is None else expect.cost_usd
    if cost is None or (expect.cost_usd is None and cost <= 0):
        return [*wrong, f"LiteLLM says that it cost {cost}"]
    if said is not None and said != cost:
        wrong.append(f"LiteLLM says that it cost {said} instead of {cost}")
    return [*wrong, *_receipt(call, bill, cost, rules), *_details(call, bill, cost)]


def _exceptions(call: Call, bill: Bill) -> list[str]:
    expect = call.expect
    opened = sorted(row["kind"] for row in bill.call_exceptions if row["closed_at"] is None)
    due = [] if expect.outcome is Outcome.CHARGED else [expect.outcome.value]
    wrong = []
    if [kind for kind in opened if kind != INFORMATIONAL] != due:
        wrong.append(f"open exceptions {opened} instead of {due}")
    mismatches = sum(row["kind"] == INFORMATIONAL for row in bill.call_exceptions)
    if mismatches != expect.model_mismatch:
        wrong.append(f"{mismatches} rows of kind {INFORMATIONAL}")
    return wrong


def _receipt(call: Call, bill: Bill, cost: Decimal, rules: Rules) -> list[str]:
    receipt, call_id = bill.charge_receipts[0], bill.usage_facts[0]["call_id"]
    user_cost = rounded(Fraction(cost) * Fraction(rules.markup))
    wrong = _compared(
        "receipt",
        receipt,
        {
            "source_reference": call_id,
            "litellm_call_id": call_id,
            "run_id": call.run_id,
            "billing_account_id": rules.account,
            "provider_cost_usd": cost,
            "user_cost_usd": user_cost,
            "charged_credits": credits_of(user_cost),
            "markup_factor": rules.markup,
            "provenance": call.expect.provenance,
            "charge_reason": "llm_usage",
            "receipt_kind": "llm",
        },
    )
    if receipt["spend_source"] not in rules.sources:
        wrong.append(f"spend_source {receipt['spend_source']!r} is none of {sorted(rules.sources)}")
    if not receipt["record_ids"]:
        wrong.append("no record ids")
    return wrong


def _details(call: Call, bill: Bill, cost: Decimal) -> list[str]:
    expect, details, receipt = call.expect, bill.llm_charge_details[0], bill.charge_receipts[0]
    known = {
        "model": expect.model_group,
        "tokens_in": expect.prompt_tokens,
        "tokens_out": expect.completion_tokens,
        "cached_tokens": expect.cached_tokens,
        "reasoning_tokens": expect.reasoning_tokens,
    }
    wanted = {name: value for name, value in known.items() if value is not None}
    wanted |= {"graph_id": GRAPH, "source_system": receipt["source_system"]}
    wrong = _compared("details", details, wanted)
    said = total([details["response_cost_usd"]])
    if said != cost:
        wrong.append(f"details: response_cost_usd {said} instead of {cost}")
    if bool(details["cache_hit"]) is not expect.cache_hit:
        wrong.append(f"details: cache_hit {details['cache_hit']!r}")
    if not details["provider_call_id"]:
        wrong.append("details: no provider_call_id")
    return wrong


def _compared(what: str, row: Row, wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{what}: {name} {row[name]!r} instead of {value!r}" for name, value in wanted.items() if row[name] != value
    ]
