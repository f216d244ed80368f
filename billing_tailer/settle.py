"""One call, its spend records and what was done so far -> what to do now. Pure, deterministic.

`decide` is called after every arrival (of the line, of a record, of the end of a waiting time) with everything that is
committed about the call, and its decision is committed in one transaction. It may be called again at any time: with
nothing new it decides nothing.

The amount is a function of the set of records: each source's records are summed, and the larger sum is billed, because
both sources lose records and neither invents them. Costs are never negative and records never vanish, so that sums only
grow; the first sum makes the receipt, later ones adjustments up to what the whole set costs.

What a person decided stays: the program never changes an amount that somebody named (`release`, `adjust`). Records that
arrive afterwards and say something new raise `cost_mismatch`; the second source's copies of what was known do not.

Holds (tests/test_settle.py, names of the tests)
- ORDER_DOES_NOT_MATTER: test_any_order_ends_with_the_same_amount, also across the release of a held call;
- ONE_RECEIPT_PER_CALL: test_any_order_ends_with_the_same_amount;
- NO_PLACEHOLDER_RECEIPTS: test_zero_is_believed_only_where_it_can_be_true, test_unknown_cost_is_never_charged;
- LITELLM_IS_USAGE_TRUTH: test_details_are_litellms.

With COST_SOURCE=header a call without a receipt is decided by what its line says of the cost, and by nothing else. The
source that made a receipt is the one that corrects it: a receipt by header is never corrected, and one by LiteLLM's
records still is (test_the_header_bills_only_what_it_can_know, test_a_receipt_by_header_is_left_alone).
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from fnmatch import translate
from functools import lru_cache
from typing import Any

import orjson

from billing_tailer import pricing
from billing_tailer.model import (
    SETTLER,
    Adjustment,
    CallException,
    ChargeDetails,
    Corrections,
    ExceptionKind,
    Provenance,
    Receipt,
    Release,
    SpendRecord,
    SpendSource,
    SpendStatus,
    UsageFact,
)
from billing_tailer.pricing import Price, Unpriceable

LATE_RECORD = "late_record"
APPLIED = "applied"
NO_LONGER_SO = "no_longer_so"
SUPERSEDED = "superseded"
HEADER = "x-litellm-response-cost"
"""The id of what stands in for a record, in receipts by header."""


class Standing(StrEnum):
    """Where a call stands after a decision. The first two wait for something; only `settled` is final."""

    PENDING = "pending"
    OVERDUE = "overdue"
    HELD = "held"
    UNATTRIBUTED = "unattributed"
    NOT_CHARGED = "not_charged"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator configured: MARKUP_FACTOR, FREE_MODELS (globs), CORRECTIONS, TRUST_LITELLM_END_USER.

    header_cost_max_usd: COST_MAX_USD where COST_SOURCE is `header`; None: LiteLLM's records say what a call costs.
    """

    markup: Decimal = Decimal(1)
    free_models: tuple[str, ...] = ()
    corrections: Corrections = Corrections.APPLY
    trust_litellm_end_user: bool = False
    header_cost_max_usd: Decimal | None = None


@dataclass(frozen=True, slots=True)
class CallState:
    """Everything that is committed about one call.

    conflict_accounts: of the further lines under the same call id. adjustments: oldest first. exceptions: open and
    closed. quiet_over: no record has come for FAILURE_QUIET_SECONDS; deadline_over: SETTLE_DEADLINE_SECONDS have passed
    and every source could have told. release: what a person decides with this very call of `decide`.
    """

    fact: UsageFact
    records: tuple[SpendRecord, ...] = ()
    receipt: Receipt | None = None
    adjustments: tuple[Adjustment, ...] = ()
    exceptions: tuple[CallException, ...] = ()
    conflict_accounts: tuple[str | None, ...] = ()
    quiet_over: bool = False
    deadline_over: bool = False
    release: Release | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What one transaction writes. opened: new rows; closed: open rows with closed_by and reason set."""

    standing: Standing
    receipt: Receipt | None = None
    details: ChargeDetails | None = None
    adjustment: Adjustment | None = None
    opened: tuple[CallException, ...] = ()
    closed: tuple[CallException, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return self.receipt is None and self.adjustment is None and not self.opened and not self.closed


@dataclass(frozen=True, slots=True)
class Bill:
    """The source whose records are billed. total: USD, unrounded; main: the record that describes the call."""

    source: SpendSource
    record_ids: tuple[str, ...]
    total_usd: Decimal
    provider_cost_usd: Decimal
    main: SpendRecord


_Wanted = dict[ExceptionKind, dict[str, object]]
"""The exceptions that should be open now, with their details. `evidence`: see CallException."""

_HELD = (ExceptionKind.HELD_ZERO_COST, ExceptionKind.HELD_BAD_COST)
_INFORMATIONAL = (ExceptionKind.CALL_ID_NOT_FORWARDED, ExceptionKind.MODEL_MISMATCH)
_SUMMARIES_MAX = 20
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


# --- the header


def why_no_header_cost(fact: UsageFact) -> str | None:
    """Why the line's cost header is no price; None where it is one."""
    if fact.provenance == Provenance.STREAM:
        return "a stream: its header comes before its cost is known"
    if fact.cache_key is not None:
        return "a cache hit: its header has the full price"
    if not 200 <= fact.status < 300:
        return f"status {fact.status}: an error's header says 0, whatever its attempts cost"
    return None if fact.header_cost_usd else f"its header says {'nothing' if fact.header_cost_usd is None else 0}"


def evident(call: CallState, rules: Rules | None = None) -> CallState:
    """The call with the records that decide it: LiteLLM's, or one that says what the header says. rules: needed where
    there is no receipt yet."""
    cost_max = None if rules is None else rules.header_cost_max_usd
    if call.receipt is None:
        by_header = cost_max is not None
    else:
        by_header, cost_max = call.receipt.spend_source is SpendSource.HEADER, None
    return replace(call, records=_header_records(call.fact, cost_max)) if by_header else call


def _header_records(fact: UsageFact, cost_max: Decimal | None) -> tuple[SpendRecord, ...]:
    cost = fact.header_cost_usd
    if why_no_header_cost(fact) is not None or cost is None:
        return ()
    is_too_much = cost_max is not None and cost > cost_max
    unknown = dict.fromkeys(field.name for field in fields(SpendRecord))
    told: dict[str, Any] = {
        "call_id": fact.call_id,
        "source": SpendSource.HEADER,
        "record_id": HEADER,
        "status": SpendStatus.SUCCESS,
        "model_group": fact.header_model_group,
        "cost_usd": None if is_too_much else cost,
        "cost_text": f"{cost:f}" if is_too_much else None,
    }
    return (SpendRecord(**{**unknown, **told}),)


# --- the records


def bill(records: Sequence[SpendRecord]) -> Bill | None:
    """The records to bill: those of the source with the larger sum, compared at 1e-12 USD; None without records.

    On a tie, a source that knows of a success, for the sake of the details; then the callback.
    """
    sources = {record.source for record in records}
    bills = [_bill_of(source, [record for record in records if record.source is source]) for source in sources]
    return max(bills, key=_precedence, default=None)


def _precedence(one: Bill) -> tuple[Decimal, bool, bool]:
    return (one.provider_cost_usd, one.main.status is SpendStatus.SUCCESS, one.source is SpendSource.CALLBACK)


def _bill_of(source: SpendSource, records: Sequence[SpendRecord]) -> Bill:
    total = pricing.total(record.cost_usd or Decimal(0) for record in records)
    return Bill(
        source=source,
        record_ids=tuple(sorted(record.record_id for record in records)),
        total_usd=total,
        provider_cost_usd=pricing.quantized(total),
        main=max(records, key=_lateness),
    )


def _lateness(record: SpendRecord) -> tuple[bool, datetime, datetime, str]:
    """Orders records so that the last success comes last, after every failure."""
    ended, started = record.ended_at or _LONG_AGO, record.started_at or _LONG_AGO
    return (record.status is SpendStatus.SUCCESS, ended, started, record.record_id)


def hold(record: SpendRecord, free_models: tuple[str, ...]) -> ExceptionKind | None:
    """Why this record holds its call, if it does.

    A success of cost 0 (or none) is believed only for a cache hit, without tokens, or for a model on the free list: an
    unpriced model looks the same as a free one. Token counts that LiteLLM did not give are not known to be 0.
    """
    if record.cost_usd is None and record.cost_text is not None:
        return ExceptionKind.HELD_BAD_COST
    if record.status is not SpendStatus.SUCCESS or record.cost_usd or record.cache_hit:
        return None
    if record.prompt_tokens == 0 and record.completion_tokens == 0:
        return None
    return None if is_free(record, free_models) else ExceptionKind.HELD_ZERO_COST


def is_free(record: SpendRecord, free_models: tuple[str, ...]) -> bool:
    """Whether the model group or the model matches one of the globs."""
    pattern = _globs(free_models)
    return any(pattern.fullmatch(name) is not None for name in (record.model_group, record.model) if name is not None)


@lru_cache(maxsize=8)
def _globs(globs: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(translate(glob) for glob in globs) or "(?!)")


def _attempts(held: Iterable[SpendRecord]) -> int:
    """How many attempts are held. Both sources describe the same ones, so the other's copy is nothing new."""
    sources = [record.source for record in held]
    return max(sources.count(source) for source in SpendSource)


def evidence_hash(*evidence: object) -> str:
    """One hash per evidence, whatever the order in which it arrived: lists of record ids must be sorted."""
    return hashlib.sha256(orjson.dumps(evidence)).hexdigest()


# --- the decision


def decide(call: CallState, rules: Rules) -> Decision:
    """What to do now. Never raises for anything that a record, a line or a person can contain.

    A release does all it says or nothing. It does nothing where it is not enough to charge the call (a held one needs a
    cost, an unattributed one an account), names another account than the receipt's, or repeats what was decided.
    """
    _check(call)
    seen, call = _all_ids(call.records), evident(call, rules)
    wanted: _Wanted = {}
    charged = bill(call.records)
    _inform(wanted, call, charged)
    _want_conflict(wanted, call)
    if call.receipt is None:
        decision = _first(call, rules, wanted, charged, seen)
        released = decision.receipt is not None
    else:
        adjustment = _later(call, call.receipt, rules, wanted, charged)
        decision = Decision(Standing.SETTLED, adjustment=adjustment)
        released = call.release is not None and (call.release.cost_usd is None or adjustment is not None)
    if call.release is not None and not (released and _fits(call.release, call.receipt)):
        return decide(replace(call, release=None), rules)
    return replace(decision, opened=_to_open(call, wanted), closed=_to_close(call, wanted, decision))


def _check(call: CallState) -> None:
    """Pair assertion: what the keys of the tables promise."""
    keys = {(record.source, record.record_id) for record in call.records}
    if len(keys) != len(call.records) or any(record.call_id != call.fact.call_id for record in call.records):
        raise AssertionError(f"records of {call.fact.call_id} are not one call's, each once")


def _inform(wanted: _Wanted, call: CallState, charged: Bill | None) -> None:
    """The exceptions that change nothing about the bill."""
    fact = call.fact
    if fact.id_echoed and fact.proxy_call_id is not None and fact.proxy_call_id != fact.call_id:
        wanted[ExceptionKind.CALL_ID_NOT_FORWARDED] = {"evidence": fact.proxy_call_id, "proxy": fact.proxy_call_id}
    if fact.requested_model is None or charged is None or charged.main.status is not SpendStatus.SUCCESS:
        return
    group, model = charged.main.model_group, charged.main.model
    ran = {group, model, model.rpartition("/")[2] if model is not None else None} - {None}
    if ran and fact.requested_model not in ran:
        detail = {"requested": fact.requested_model, "model_group": group, "model": model}
        wanted[ExceptionKind.MODEL_MISMATCH] = {"evidence": fact.requested_model, **detail}


def _want_conflict(wanted: _Wanted, call: CallState) -> None:
    """Further lines under the same call id for another account, unless a person who saw it has released the call."""
    accounts = {call.fact.billing_account_id, *call.conflict_accounts}
    if len(accounts) < 2:
        return
    named = sorted(accounts, key=lambda account: (account is not None, account))
    evidence = evidence_hash(named)
    is_seen = any(
        row.kind is ExceptionKind.CONFLICT and row.is_open and row.evidence == evidence for row in call.exceptions
    )
    is_accepted = call.receipt is not None and _is_accepted(call, ExceptionKind.CONFLICT, evidence)
    if not is_accepted and not (is_seen and call.release is not None):
        wanted[ExceptionKind.CONFLICT] = {"evidence": evidence, "accounts": named}


def _fits(release: Release, receipt: Receipt | None) -> bool:
    """Whether a release names nobody else than a receipt that is there: what is charged to an account stays there."""
    return receipt is None or release.billing_account_id in (None, receipt.billing_account_id)


def _want_held(wanted: _Wanted, call: CallState, rules: Rules) -> None:
    """The records that hold the call. Where there is a receipt, a person may have closed the matter."""
    for kind in _HELD:
        held = [record for record in call.records if hold(record, rules.free_models) is kind]
        if not held:
            continue
        evidence = _attempts(held)
        if call.receipt is None or not _is_accepted(call, kind, evidence):
            wanted[kind] = {
                "evidence": evidence,
                "records": [_summary(record) for record in sorted(held, key=_lateness)[-_SUMMARIES_MAX:]],
            }


def _is_accepted(call: CallState, kind: ExceptionKind, evidence: object) -> bool:
    """Whether a person closed an exception of this kind about this evidence."""
    return any(
        row.kind is kind and row.evidence == evidence and row.closed_by not in (None, SETTLER)
        for row in call.exceptions
    )


def _summary(record: SpendRecord) -> dict[str, object]:
    return {
        "source": record.source.value,
        "record_id": record.record_id,
        "model_group": record.model_group,
        "model": record.model,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "cost": record.cost_text if record.cost_usd is None else f"{record.cost_usd:f}",
    }


# --- without a receipt


def _first(call: CallState, rules: Rules, wanted: _Wanted, charged: Bill | None, seen: tuple[str, ...]) -> Decision:
    """Makes the receipt, or says why not. seen: the ids of all of LiteLLM's records, for whoever names the cost."""
    named_cost = call.release.cost_usd if call.release is not None else None
    if named_cost is None:
        _want_held(wanted, call, rules)
        standing = _waits(call, rules, wanted, charged)
        if standing is not None:
            return Decision(standing)
    account = _account(call, rules)
    if account is None:
        wanted[ExceptionKind.UNATTRIBUTED] = {"evidence": "no_account"}
    if not wanted.keys().isdisjoint((*_HELD, ExceptionKind.CONFLICT)):
        return Decision(Standing.HELD)
    if account is None:
        return Decision(Standing.UNATTRIBUTED)
    costs = [named_cost] if named_cost is not None else [charged.total_usd] if charged is not None else []
    price = pricing.price(costs, rules.markup)
    if isinstance(price, Unpriceable):
        wanted[ExceptionKind.HELD_BAD_COST] = {"evidence": price.detail, "why": price.detail}
        return Decision(Standing.HELD)
    receipt = _receipt(call, account, price, rules.markup, None if named_cost is not None else charged, seen)
    return Decision(Standing.SETTLED, receipt=receipt, details=_details(call.fact, charged))


def _waits(call: CallState, rules: Rules, wanted: _Wanted, charged: Bill | None) -> Standing | None:
    """Where a call stands that the records do not settle (yet); None where they do, or are held."""
    if charged is None:
        if call.deadline_over or _is_open(call, ExceptionKind.OVERDUE):
            wanted[ExceptionKind.OVERDUE] = {"evidence": "no_record"}
            if rules.header_cost_max_usd is not None:
                wanted[ExceptionKind.OVERDUE]["why"] = f"COST_SOURCE=header: {why_no_header_cost(call.fact)}"
            return Standing.OVERDUE
        return Standing.PENDING
    if any(record.status is SpendStatus.SUCCESS for record in call.records) or not wanted.keys().isdisjoint(_HELD):
        return None
    # failures only: a retry or a fallback may still succeed, unless the client has its answer
    answered = call.fact.request_completed and call.fact.id_echoed
    over = call.deadline_over or (answered and call.quiet_over)
    if charged.provider_cost_usd > 0:
        return None if over else Standing.PENDING
    if over or _is_open(call, ExceptionKind.NOT_CHARGED):
        wanted[ExceptionKind.NOT_CHARGED] = {"evidence": "failures_only"}
        return Standing.NOT_CHARGED
    return Standing.PENDING


def _is_open(call: CallState, kind: ExceptionKind) -> bool:
    return any(row.kind is kind and row.is_open for row in call.exceptions)


def _account(call: CallState, rules: Rules) -> str | None:
    """Whom to charge: as a person said, else the proxy's account, else, if trusted, LiteLLM's, if it names one only."""
    if call.release is not None and call.release.billing_account_id is not None:
        return call.release.billing_account_id
    if call.fact.billing_account_id is not None or not rules.trust_litellm_end_user:
        return call.fact.billing_account_id
    told = {record.end_user for record in call.records} - {None}
    return told.pop() if len(told) == 1 else None


def _receipt(
    call: CallState, account: str, price: Price, markup: Decimal, charged: Bill | None, seen: tuple[str, ...]
) -> Receipt:
    """charged: the records that were summed; None where a person named the cost, who has seen `seen`."""
    fact = call.fact
    return Receipt(
        source_reference=fact.call_id,
        billing_account_id=account,
        run_id=fact.run_id,
        attempt=fact.attempt,
        litellm_call_id=fact.call_id,
        charged_credits=price.charged_credits,
        provider_cost_usd=price.provider_cost_usd,
        user_cost_usd=price.user_cost_usd,
        markup_factor=markup,
        provenance=Provenance.MANUAL if charged is None else Provenance(fact.provenance),
        spend_source=None if charged is None else charged.source,
        record_ids=seen if charged is None else charged.record_ids,
        occurred_at=fact.occurred_at,
    )


def _details(fact: UsageFact, charged: Bill | None) -> ChargeDetails:
    """From the billed source's last success, else its last failure. Nothing from the request side but graph_id."""
    main = None if charged is None else charged.main
    return ChargeDetails(
        source_reference=fact.call_id,
        provider_call_id=None if main is None else main.request_id,
        model=None if main is None else main.model_group,
        provider_model=None if main is None else main.model,
        provider=None if main is None else main.provider,
        tokens_in=None if main is None else main.prompt_tokens,
        tokens_out=None if main is None else main.completion_tokens,
        cached_tokens=None if main is None else main.cached_tokens,
        reasoning_tokens=None if main is None else main.reasoning_tokens,
        response_cost_usd=None if main is None else main.cost_usd,
        cache_hit=None if main is None else main.cache_hit,
        latency_ms=None if main is None else _latency_ms(main),
        graph_id=fact.graph_id,
    )


def _latency_ms(record: SpendRecord) -> int | None:
    if record.started_at is None or record.ended_at is None or record.ended_at < record.started_at:
        return None
    return round((record.ended_at - record.started_at).total_seconds() * 1000)


def _all_ids(records: Iterable[SpendRecord]) -> tuple[str, ...]:
    return tuple(sorted(record.record_id for record in records))


# --- with a receipt


def _later(call: CallState, receipt: Receipt, rules: Rules, wanted: _Wanted, charged: Bill | None) -> Adjustment | None:
    """Brings what is charged to what it should be, or says why not."""
    if call.release is not None and call.release.cost_usd is not None:
        return _named(call, receipt, call.release, call.release.cost_usd)
    known = _known_to_a_person(call)
    if known is None:
        _want_held(wanted, call, rules)
    if charged is None or not wanted.keys().isdisjoint((*_HELD, ExceptionKind.CONFLICT)):
        return None
    price = pricing.price([charged.total_usd], receipt.markup_factor)
    if isinstance(price, Unpriceable):
        wanted[ExceptionKind.HELD_BAD_COST] = {"evidence": price.detail, "why": price.detail}
        return None
    evidence = _evidence(charged, price)
    delta_credits, delta_cost = _delta(call, receipt, price)
    differs = delta_credits != 0 or delta_cost != 0
    if known is not None:
        held, held_before = _attempts_held(call.records, rules), _attempts_held(_among(call.records, known), rules)
        if held > held_before or (differs and _is_another_sum(call, known, charged)):
            told = evidence_hash(charged.source.value, charged.record_ids, held)
            _want_mismatch(wanted, call, {"evidence": told, **evidence}, delta_credits, delta_cost)
        return None
    told = evidence_hash(charged.source.value, charged.record_ids)
    is_replay = any(adjustment.evidence_hash == told for adjustment in call.adjustments)
    if not differs or is_replay or _is_accepted(call, ExceptionKind.COST_MISMATCH, told):
        return None
    if rules.corrections is Corrections.REPORT:
        _want_mismatch(wanted, call, {"evidence": told, **evidence}, delta_credits, delta_cost)
        return None
    return Adjustment(receipt.source_reference, told, delta_credits, delta_cost, LATE_RECORD, evidence, SETTLER)


def _want_mismatch(
    wanted: _Wanted, call: CallState, detail: dict[str, object], delta_credits: int, delta_cost: Decimal
) -> None:
    if not _is_accepted(call, ExceptionKind.COST_MISMATCH, detail["evidence"]):
        delta = {"delta_credits": delta_credits, "delta_cost_usd": f"{delta_cost:f}"}
        wanted[ExceptionKind.COST_MISMATCH] = {**detail, **delta}


def _delta(call: CallState, receipt: Receipt, price: Price) -> tuple[int, Decimal]:
    """From what is charged to `price`: credits, and provider cost in USD."""
    charged_credits = receipt.charged_credits + sum(adjustment.delta_credits for adjustment in call.adjustments)
    costs = [receipt.provider_cost_usd, *(adjustment.delta_cost_usd for adjustment in call.adjustments)]
    return price.charged_credits - charged_credits, pricing.difference(price.provider_cost_usd, pricing.total(costs))


def _evidence(charged: Bill, price: Price) -> dict[str, object]:
    return {
        "spend_source": charged.source.value,
        "record_ids": list(charged.record_ids),
        "sum_usd": f"{charged.total_usd:f}",
        "provider_cost_usd": f"{price.provider_cost_usd:f}",
        "user_cost_usd": f"{price.user_cost_usd:f}",
        "credits": price.charged_credits,
    }


def _named(call: CallState, receipt: Receipt, release: Release, cost_usd: Decimal) -> Adjustment | None:
    """A person names the cost of a settled call: an adjustment even where nothing changes, so that it is known."""
    price = pricing.price([cost_usd], receipt.markup_factor)
    if isinstance(price, Unpriceable):
        return None
    delta_credits, delta_cost = _delta(call, receipt, price)
    ids = _all_ids(call.records)
    if delta_credits == 0 and delta_cost == 0 and _known_to_a_person(call) == frozenset(ids):
        return None  # a replay
    evidence = {"record_ids": list(ids), "provider_cost_usd": f"{price.provider_cost_usd:f}"}
    return Adjustment(
        source_reference=receipt.source_reference,
        evidence_hash=named_hash(ids, price.provider_cost_usd, len(call.adjustments)),
        delta_credits=delta_credits,
        delta_cost_usd=delta_cost,
        reason=release.reason,
        evidence=evidence,
        created_by=release.released_by,
    )


def adjust(call: CallState, delta_credits: int, delta_cost_usd: Decimal, reason: str, created_by: str) -> Adjustment:
    """A person's correction of a settled call, by credits and USD of provider cost (rounded to 1e-12).

    The same correction with the same reason in the same situation has the same evidence hash: it is made once.
    """
    ids, delta_cost = _all_ids(evident(call).records), pricing.quantized(delta_cost_usd)
    return Adjustment(
        source_reference=call.fact.call_id,
        evidence_hash=adjusted_hash(ids, delta_credits, delta_cost, reason),
        delta_credits=delta_credits,
        delta_cost_usd=delta_cost,
        reason=reason,
        evidence={"record_ids": list(ids)},
        created_by=created_by,
    )


def named_hash(ids: Sequence[str], provider_cost_usd: Decimal, earlier: int) -> str:
    """The evidence hash of a release of a settled call. ids: of the records that were there; earlier: how many
    adjustments there were before."""
    return evidence_hash("release", ids, pricing.canonical(provider_cost_usd), earlier)


def adjusted_hash(ids: Sequence[str], delta_credits: int, delta_cost_usd: Decimal, reason: str) -> str:
    """The evidence hash of a person's correction. ids: of the records that were there."""
    return evidence_hash("adjust", ids, delta_credits, pricing.canonical(delta_cost_usd), reason)


def _known_to_a_person(call: CallState) -> frozenset[str] | None:
    """The ids of the records that were there when somebody last named the amount; None if nobody has."""
    for adjustment in reversed(call.adjustments):
        ids = adjustment.evidence.get("record_ids")
        if adjustment.created_by != SETTLER:
            return frozenset(ids) if isinstance(ids, list | tuple) else frozenset()
    if call.receipt is not None and call.receipt.provenance is Provenance.MANUAL:
        return frozenset(call.receipt.record_ids)
    return None


def _among(records: Iterable[SpendRecord], ids: frozenset[str]) -> list[SpendRecord]:
    return [record for record in records if record.record_id in ids]


def _attempts_held(records: Iterable[SpendRecord], rules: Rules) -> int:
    return _attempts(record for record in records if hold(record, rules.free_models) is not None)


def _is_another_sum(call: CallState, known: frozenset[str], charged: Bill) -> bool:
    """Whether the larger sum is another one than when a person decided."""
    before = bill(_among(call.records, known))
    return before is None or before.provider_cost_usd != charged.provider_cost_usd


# --- exceptions


def _to_open(call: CallState, wanted: _Wanted) -> tuple[CallException, ...]:
    opened = []
    for kind, detail in wanted.items():
        rows = [row for row in call.exceptions if row.kind is kind]
        if any(row.is_open and not _is_superseded(row, wanted) for row in rows):
            continue
        if _is_accepted(call, kind, detail["evidence"]):
            continue
        seq = 1 + max((row.seq for row in rows), default=0)
        opened.append(CallException(call.fact.call_id, kind, seq, detail))
    return tuple(opened)


def _to_close(call: CallState, wanted: _Wanted, decision: Decision) -> tuple[CallException, ...]:
    closed_by = SETTLER if call.release is None else call.release.released_by
    return tuple(
        replace(row, closed_by=closed_by, reason=_why(row, call, wanted, decision))
        for row in call.exceptions
        if row.is_open and row.kind not in _INFORMATIONAL and (row.kind not in wanted or _is_superseded(row, wanted))
    )


def _is_superseded(row: CallException, wanted: _Wanted) -> bool:
    """Whether the matter is another one by now: another sum differs, more attempts are held."""
    return wanted[row.kind]["evidence"] != row.evidence


def _why(row: CallException, call: CallState, wanted: _Wanted, decision: Decision) -> str:
    if call.release is not None:
        return call.release.reason
    if row.kind in (ExceptionKind.OVERDUE, ExceptionKind.NOT_CHARGED):
        return LATE_RECORD
    if row.kind is ExceptionKind.COST_MISMATCH and decision.adjustment is not None:
        return APPLIED
    return SUPERSEDED if row.kind in wanted else NO_LONGER_SO
