"""The page, `/v1/activity`, `receipts`, `export`, `reconcile`, `explain`, the API of runs and plain SQL say the same of
the same calls, to the last digit."""

import csv
import html
import io
import re
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from billing_tailer.settle import Rules
from tests.support.proof import rows
from tests.support.site import DAY, Site, site
from tests.support.spendlines import failure, spool_line
from tests.support.verbs import Verb

WHY = ("--reason", "agreed", "--by", "ann")
PLAIN_SQL = """
with money as (
    select source_reference as call_id, charged_credits as credits, provider_cost_usd as cost
    from billing.charge_receipts
    union all
    select source_reference, delta_credits, delta_cost_usd from billing.charge_adjustments
)
select r.source_reference as call_id, r.billing_account_id as account, r.run_id, d.model, d.tokens_in, d.tokens_out,
       d.cached_tokens, sum(m.credits)::bigint as credits, sum(m.cost) as cost
from billing.charge_receipts r
join billing.llm_charge_details d using (source_system, source_reference)
join money m on m.call_id = r.source_reference
group by 1, 2, 3, 4, 5, 6, 7 order by 1
"""
"""What was charged for each call, by one statement that knows nothing of ours."""


def call(number: int) -> str:
    return f"call-{number:08d}"


@pytest.fixture
def billed(dsn: str, tmp_path: Path, verb: Verb) -> Iterator[Site]:
    """Several models and accounts at a markup that leaves no round credits; retries, a cache hit, a late record,
    adjustments both ways, a manual release, and calls that are held, unattributed, not charged, closed and pending."""
    with site(dsn, tmp_path, rules=Rules(markup=Decimal("1.2")), quiet_seconds=0) as page:
        page.bill(*range(10), cost=1 / 3, cached_tokens=7)
        page.bill(*range(10, 20), cost=0.000123456789, end_user="account-2", model_group="dear", model="dear-1")
        page.bill(20, cost=0.0, cache_hit=True)
        page.log(21, end_user="account-3")
        page.spend(21, cost=0.1)
        page.spend(21, cost=0.07, attempt=1)
        page.log(*range(22, 30))
        page.spend(22, cost=0.0)  # held, and released
        page.spend(23, 24, cost=0.0)  # held; 24 is closed
        page.spend(25, cost=-1.0)  # held for its cost
        with (page.volume / "callbacks-test.jsonl").open("ab") as spool:
            spool.write(spool_line(failure(26)))  # not charged
            spool.write(spool_line(failure(27, 0.25)))  # a failure that cost
        page.log(30, end_user="")  # unattributed
        page.log(31, end_user="")  # unattributed, and released
        page.spend(30, 31, cost=0.5, model_group="dear")
        page.rig.turn()
        page.spend(1, cost=0.05, attempt=1)  # late
        assert page.rig.tailer._settler is not None
        page.rig.tailer._settler._next_sweep = 0.0
        page.rig.turn()
        verb.environment(DATABASE_URL=dsn, MARKUP_FACTOR="1.2")
        verb("exceptions", "release", call(22), "--cost-usd", "0.000000000001", *WHY)
        verb("exceptions", "release", call(31), "--account", "account-4", *WHY)
        verb("exceptions", "close", call(24), "held_zero_cost", *WHY)
        verb("adjust", call(2), "--cost-usd", "-0.333333333333", *WHY)
        verb("adjust", call(11), "--credits", "-7", *WHY)
        verb("adjust", call(12), "--cost-usd", "0.000000000001", *WHY)
        yield page


def by(found: list[dict[str, Any]], name: str) -> dict[Any, tuple[int, Decimal, int, int, int, int]]:
    """Calls, cost, credits and tokens of each."""
    sums: dict[Any, list[Any]] = defaultdict(lambda: [0, Decimal(0), 0, 0, 0, 0])
    for row in found:
        amounts = (1, row["cost"], row["credits"], row["tokens_in"], row["tokens_out"], row["cached_tokens"])
        sums[row[name]] = [a + (b or 0) for a, b in zip(sums[row[name]], amounts, strict=True)]
    return {key: tuple(values) for key, values in sums.items()}


def told(part: dict[str, Any], calls: str = "calls") -> tuple[int, Decimal, int, int, int, int]:
    """The same of a part of /v1/activity."""
    tokens = (part["tokens_in"], part["tokens_out"], part["cached_tokens"])
    return (part[calls], Decimal(part["provider_cost_usd"]), int(part["charged_credits"]), *tokens)


def test_everybody_says_the_same(billed: Site, verb: Verb, dsn: str) -> None:
    with psycopg.connect(dsn, row_factory=dict_row) as owner:
        true = owner.execute(PLAIN_SQL).fetchall()
    calls = {row["call_id"]: row for row in true}
    cost, credits_ = sum(row["cost"] for row in true), sum(row["credits"] for row in true)
    assert {row["account"] for row in true} == {"account-1", "account-2", "account-3", "account-4"}
    assert len(true) == 10 + 10 + 2 + 1 + 1 + 1
    assert rows(dsn, "select count(*) as n from charge_adjustments") == [{"n": 4}]

    activity = billed.activity()
    everything = {"all": by([{**row, "one": "all"} for row in true], "one")["all"]}
    assert told(activity["totals"], "charged_calls") == everything["all"]
    assert {one["model"]: told(one) for one in activity["models"]} == by(true, "model")
    assert {one["account"]: told(one) for one in activity["accounts"]} == by(true, "account")
    assert sum(Decimal(bar["provider_cost_usd"]) for bar in activity["series"]) == cost
    for account, sums in by(true, "account").items():
        assert told(billed.activity(f"{DAY}&account={account}")["totals"], "charged_calls") == sums
    for model, sums in by(true, "model").items():
        assert told(billed.activity(f"{DAY}&model={model}")["totals"], "charged_calls") == sums

    page = html.unescape(billed.get(f"/?{DAY}").text)
    values = re.findall(r'<data value="([^"]+)" title="exactly', page)
    tokens = everything["all"][3:]
    assert values[:3] == [f"{cost:,f}", f"{credits_:,}", f"{activity['totals']['calls']:,}"]
    assert values[3:6] == [f"{tokens[0]:,}", f"{tokens[2]:,}", f"{tokens[1]:,}"]
    shown = re.findall(r'/calls/(call-[0-9]+)".*?<data class="num" value="([^"]+)">.*?credits">([0-9,]+)</td>', page)
    assert {one: (Decimal(usd), int(n.replace(",", ""))) for one, usd, n in shown} == {
        one: (row["cost"], row["credits"]) for one, row in calls.items()
    }

    exported = list(csv.DictReader(io.StringIO(billed.get(f"/export.csv?{DAY}").text, newline="")))
    listed = verb.json("receipts")
    assert {row["call_id"] for row in exported} == {row["call_id"] for row in listed} == set(calls)
    for row in exported:
        amounts = (Decimal(row["total_cost_usd"]), int(row["total_credits"]))
        assert amounts == (calls[row["call_id"]]["cost"], calls[row["call_id"]]["credits"])
    for row in listed:
        amounts = (Decimal(row["provider_cost_usd"]) + Decimal(row["adjusted_cost_usd"]), row["total_credits"])
        assert amounts == (calls[row["call_id"]]["cost"], calls[row["call_id"]]["credits"])

    window = verb.json("reconcile", "--from", "2026-11-22", "--to", "2026-11-22T00:39:00")["windows"][0]
    assert (Decimal(window["provider_cost_usd"]), window["charged_credits"]) == (cost, credits_)
    totals = activity["totals"]
    standings = ("settled", "not_charged", "pending", "held", "unattributed", "overdue", "unapplied", "closed")
    assert {name: window[name] for name in standings} == {name: totals[name] for name in standings}
    assert (window["billable"], window["capture_rate"]) == (totals["calls"], totals["capture_rate"]) == (32, "0.812500")
    assert [totals[name] for name in standings] == [25, 1, 2, 2, 1, 0, 0, 1]

    for call_id, row in calls.items():
        explained = verb.json("explain", call_id)
        costs = [explained["receipt"]["provider_cost_usd"], *(a["delta_cost_usd"] for a in explained["adjustments"])]
        assert (sum(map(Decimal, costs)), explained["total_credits"]) == (row["cost"], row["credits"])
