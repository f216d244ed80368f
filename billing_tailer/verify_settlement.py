"""The proof that every receipt is the price of its records, and that no call is charged twice.

Computes each receipt again with `pricing` from the spend records that it names, at its own markup, and each adjustment
from its evidence; reads only, page by page, each page of one moment, so that the daemon may go on meanwhile
(tests/test_verify_settlement.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from billing_tailer import pricing, settle
from billing_tailer.ledger import OddCalls, Proofs, ReceiptRow
from billing_tailer.model import SETTLER, SOURCE_SYSTEM, Adjustment, ExceptionKind, Provenance, Receipt
from billing_tailer.settle import CallState, Rules

DIFFERENCES_MAX = 1000
TABLES = ("charge_receipts", "llm_charge_details")


@dataclass(frozen=True, slots=True)
class CallDifference:
    """What is not as it should be about one call, in words. call_id: empty where it is about all of them."""

    call_id: str
    what: str


@dataclass(slots=True)
class Proven:
    """How much was looked at, and what differs; beyond DIFFERENCES_MAX only how many."""

    receipts: int = 0
    adjustments: int = 0
    manual: int = 0
    facts: int = 0
    details: int = 0
    charged_credits: int = 0
    differences: list[CallDifference] = field(default_factory=list)
    differences_not_shown: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def differ(self, call_id: str, what: str) -> None:
        """Note a difference."""
        if len(self.differences) == DIFFERENCES_MAX:
            self.differences_not_shown += 1
        else:
            self.differences.append(CallDifference(call_id, what))


def verify_settlement(ledger: Proofs, rules: Rules, progress: Callable[[int], None] = lambda _: None) -> Proven:
    """Check all receipts of the database. rules: as configured now; they decide what a later record should have
    changed. Raises LedgerUnavailable."""
    proven = Proven()
    for table in TABLES:
        if table not in ledger.money_keys():
            proven.differ("", f"{table} has no unique key over source_system and source_reference")
    for page in ledger.receipts():
        for row in page:
            for what in _differences(row, rules):
                proven.differ(row.call_id, what)
            if row.call is not None and row.call.receipt is not None and row.source_system == SOURCE_SYSTEM:
                _add(proven, row.call, row.call.receipt)
        progress(len(page))
    proven.facts = _odd(ledger, "unreceipted", "nothing waits for this call any more, and it has no receipt", proven)
    proven.details = _odd(ledger, "odd_details", "charge details without a receipt", proven)
    _odd(ledger, "odd_adjustments", "an adjustment without a receipt", proven)
    return proven


def _odd(ledger: Proofs, which: OddCalls, words: str, proven: Proven) -> int:
    """Note the calls of a kind that should not be there; how many were looked at."""
    looked_at = 0
    for count, call_ids in ledger.odd_calls(which):
        looked_at += count
        for call_id in call_ids:
            proven.differ(call_id, words)
    return looked_at


def _add(proven: Proven, call: CallState, receipt: Receipt) -> None:
    proven.receipts += 1
    proven.manual += receipt.provenance is Provenance.MANUAL
    proven.adjustments += len(call.adjustments)
    proven.charged_credits += receipt.charged_credits + sum(one.delta_credits for one in call.adjustments)


def _differences(row: ReceiptRow, rules: Rules) -> Iterator[str]:
    if row.is_second:
        yield "two receipts"
    elif row.source_system != SOURCE_SYSTEM:
        yield f"a receipt of the source system {row.source_system}, which nothing here writes"
    if not row.has_details:
        yield "a receipt without charge details"
    call = row.call
    if call is None:
        yield "a receipt without an audit line"
    if call is None or call.receipt is None or row.source_system != SOURCE_SYSTEM:
        return
    seen = settle.evident(call)
    yield from receipt_differences(seen, call.receipt)
    yield from adjustment_differences(seen, call.receipt)
    if not row.is_touched:
        yield from _missing(call, rules)


def receipt_differences(call: CallState, receipt: Receipt) -> Iterator[str]:
    """Where a receipt is not the price of the records it names; of one that a person gave, of the cost it names.

    call: with the records that decide it, which for a receipt by header are what the line says (`settle.evident`).
    """
    known = {record.record_id for record in call.records}
    for record_id in receipt.record_ids:
        if record_id not in known:
            yield f"the receipt names the record {record_id}, which is not there"
    if receipt.provenance is Provenance.MANUAL:
        costs = [receipt.provider_cost_usd]
        if receipt.spend_source is not None:
            yield "a receipt by hand that names a source"
    else:
        mine = [one for one in call.records if one.source is receipt.spend_source]
        named = [one for one in mine if one.record_id in receipt.record_ids]
        costs = [record.cost_usd or Decimal(0) for record in named]
        if not named:
            yield "a receipt without records"
        if len(set(receipt.record_ids)) != len(receipt.record_ids):
            yield "a receipt that names a record twice"
    price = pricing.price(costs, receipt.markup_factor)
    if isinstance(price, pricing.Unpriceable):
        yield f"the records have no price: {price.detail}"
        return
    for name in ("provider_cost_usd", "user_cost_usd", "charged_credits"):
        if getattr(price, name) != getattr(receipt, name):
            yield f"{name} is {getattr(receipt, name)}, the records give {getattr(price, name)}"
    fact = call.fact
    if (receipt.run_id, receipt.attempt, receipt.occurred_at) != (fact.run_id, fact.attempt, fact.occurred_at):
        yield "run, attempt or time are not those of the line"
    by_hand = any(one.closed_by not in (None, SETTLER) for one in call.exceptions)
    if fact.billing_account_id not in (None, receipt.billing_account_id) and not by_hand and not _is_manual(receipt):
        yield f"charged to {receipt.billing_account_id}, the line says {fact.billing_account_id}"


def _is_manual(receipt: Receipt) -> bool:
    return receipt.provenance is Provenance.MANUAL


def adjustment_differences(call: CallState, receipt: Receipt) -> Iterator[str]:
    """Where receipt and adjustments, one after the other, do not come to what each one's evidence says.

    The settler's come first: it changes nothing once a person has named an amount, and its sums only grow.
    """
    priced = [(one, _evident_price(one, call, receipt)) for one in call.adjustments]
    settlers = [(one, price) for one, price in priced if one.created_by == SETTLER]
    settlers.sort(key=lambda pair: pair[1].provider_cost_usd if isinstance(pair[1], pricing.Price) else Decimal(0))
    persons = [(one, price) for one, price in priced if one.created_by != SETTLER]
    credits_, cost = receipt.charged_credits, receipt.provider_cost_usd
    for one, price in (*settlers, *persons):
        credits_, cost = credits_ + one.delta_credits, pricing.total([cost, one.delta_cost_usd])
        name = f"the adjustment {one.evidence_hash[:12]} by {one.created_by}"
        if isinstance(price, str):
            yield f"{name}: {price}"
        elif price is not None and (price.charged_credits, price.provider_cost_usd) != (credits_, cost):
            yield f"{name} comes to {credits_} credits, its evidence gives {price.charged_credits}"
        elif credits_ < 0:
            yield f"{name} comes to {credits_} credits"


def _evident_price(one: Adjustment, call: CallState, receipt: Receipt) -> pricing.Price | str | None:
    """What the call costs after an adjustment, by its evidence; in words what is wrong with it; None where a person
    named the difference, which is what it is."""
    ids = one.evidence.get("record_ids")
    if not isinstance(ids, list):
        return "its evidence names no records"
    if one.created_by == SETTLER:
        named = [r for r in call.records if r.source == one.evidence.get("spend_source") and r.record_id in ids]
        if sorted(record.record_id for record in named) != ids:
            return "its evidence names records that are not there"
        if one.evidence_hash != settle.evidence_hash(one.evidence["spend_source"], tuple(ids)):
            return "its hash is not that of its evidence"
        costs: Sequence[Decimal] = [record.cost_usd or Decimal(0) for record in named]
    elif "provider_cost_usd" in one.evidence:
        given = pricing.exact(one.evidence["provider_cost_usd"])
        if given is None or one.evidence_hash not in [
            settle.named_hash(ids, given, earlier) for earlier in range(len(call.adjustments))
        ]:
            return "its hash is not that of its evidence"
        costs = [given]
    elif one.evidence_hash != settle.adjusted_hash(ids, one.delta_credits, one.delta_cost_usd, one.reason):
        return "its hash is not that of its amounts and its reason"
    else:
        return None
    price = pricing.price(costs, receipt.markup_factor)
    return f"no price: {price.detail}" if isinstance(price, pricing.Unpriceable) else price


def _missing(call: CallState, rules: Rules) -> Iterator[str]:
    """What the settler should have written about a record that came later."""
    decision = settle.decide(call, rules)
    if decision.adjustment is not None:
        yield f"later records say {decision.adjustment.delta_credits} credits more, and nothing was adjusted"
    if any(one.kind is ExceptionKind.COST_MISMATCH for one in decision.opened):
        yield "later records say another amount, and no exception is open"
