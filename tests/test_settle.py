"""Settlement, rule by rule, and any order of arrival against an independent computation."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_tailer.model import (
    SETTLER,
    Adjustment,
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
from billing_tailer.settle import (
    HEADER,
    CallState,
    Decision,
    Rules,
    Standing,
    adjust,
    bill,
    decide,
    evidence_hash,
    hold,
)
from billing_tailer.spend import parse_callback

DATA = Path(__file__).parent / "data"
CALL = "call-1"
K = ExceptionKind
CALLBACK, SPEND_LOGS = SpendSource.CALLBACK, SpendSource.SPEND_LOGS
OK, FAILED = SpendStatus.SUCCESS, SpendStatus.FAILURE
RULES = Rules()
REPORT = Rules(corrections=Corrections.REPORT)
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
FACT = UsageFact(
    call_id=CALL,
    nginx_request_id="request-1",
    proxy_call_id=CALL,
    id_echoed=True,
    run_id="run-1",
    attempt=2,
    graph_id="graph-1",
    billing_account_id="account-1",
    method="POST",
    path="/v1/chat/completions",
    status=200,
    request_completed=True,
    provenance="response",
    requested_model=None,
    header_cost_usd=Decimal("9.99"),
    header_model_group="header-model",
    cache_key=None,
    request_seconds=Decimal("0.5"),
    occurred_at=NOON,
    line_sha256=None,
)


def record(name: str, cost: str | None = "0.000225", status: SpendStatus = OK, **changes: Any) -> SpendRecord:
    """A record of the call. Callbacks and rows of the same name are told apart by their source."""
    values: dict[str, Any] = {
        "call_id": CALL,
        "source": CALLBACK,
        "record_id": name,
        "status": status,
        "model_group": "gpt",
        "model": "openai/gpt-4o-mini",
        "provider": "openai",
        "prompt_tokens": 1000,
        "completion_tokens": 200,
        "cached_tokens": 600,
        "reasoning_tokens": 64,
        "cost_usd": None if cost is None else Decimal(cost),
        "cost_text": None,
        "cache_hit": None,
        "end_user": "litellm-account",
        "run_id": "litellm-run",
        "error_code": None,
        "request_id": f"provider-{name}",
        "started_at": NOON,
        "ended_at": NOON + timedelta(milliseconds=250),
    }
    return SpendRecord(**{**values, **changes})


def row(name: str, cost: str | None = "0.000225", status: SpendStatus = OK, **changes: Any) -> SpendRecord:
    return record(name, cost, status, source=SPEND_LOGS, **changes)


def failure(name: str, cost: str | None = "0", **changes: Any) -> SpendRecord:
    return record(name, cost, FAILED, **changes)


def bad(name: str, text: str = "NaN", status: SpendStatus = OK) -> SpendRecord:
    return record(name, None, status, cost_text=text)


class World:
    """One call and what was committed about it: applies decisions as the ledger does."""

    def __init__(self, rules: Rules = RULES, **fact: Any) -> None:
        self.rules = rules
        self.state = CallState(FACT._replace(**fact))
        self.details: ChargeDetails | None = None
        self.standing = Standing.PENDING
        self.receipts = 0

    def decide(self, *records: SpendRecord, release: Release | None = None, **changes: Any) -> Decision:
        """Commit records, decide with everything that is committed, and commit the decision."""
        self.state = replace(self.state, records=(*self.state.records, *records), **changes)
        decision = decide(replace(self.state, release=release), self.rules)
        self.apply(decision)
        again = decide(self.state, self.rules)
        assert again.is_empty, f"with nothing new it decides nothing: {again}"
        assert again.standing is decision.standing
        return decision

    def apply(self, decision: Decision) -> None:
        self.standing = decision.standing
        if decision.receipt is not None:
            self.receipts += 1
            self.details = decision.details
            self.state = replace(self.state, receipt=decision.receipt)
        if decision.adjustment is not None:
            known = [adjustment.evidence_hash for adjustment in self.state.adjustments]
            assert decision.adjustment.evidence_hash not in known, "the key of charge_adjustments"
            stored = replace(decision.adjustment, evidence=through_json(decision.adjustment.evidence))
            self.state = replace(self.state, adjustments=(*self.state.adjustments, stored))
        rows = {(one.kind, one.seq): one for one in self.state.exceptions}
        for one in decision.closed:
            assert rows[one.kind, one.seq].is_open
            assert not one.is_open
            assert one.reason
            rows[one.kind, one.seq] = one
        for one in decision.opened:
            assert one.is_open
            assert (one.kind, one.seq) not in rows
            rows[one.kind, one.seq] = replace(one, detail=through_json(one.detail))
        self.state = replace(self.state, exceptions=tuple(rows.values()))

    def close(self, kind: ExceptionKind) -> None:
        """A person closes an exception without releasing anything."""
        rows = self.state.exceptions
        closed = [
            replace(one, closed_by="ann", reason="fine") if one.kind is kind and one.is_open else one for one in rows
        ]
        self.state = replace(self.state, exceptions=tuple(closed))

    def adjust(self, delta_credits: int, delta_cost_usd: str, reason: str = "goodwill") -> None:
        adjustment = adjust(self.state, delta_credits, Decimal(delta_cost_usd), reason, "ann")
        self.apply(Decision(Standing.SETTLED, adjustment=adjustment))

    @property
    def receipt(self) -> Receipt:
        assert self.state.receipt is not None
        return self.state.receipt

    @property
    def credits(self) -> int:
        return self.receipt.charged_credits + sum(one.delta_credits for one in self.state.adjustments)

    @property
    def cost(self) -> Decimal:
        return self.receipt.provider_cost_usd + sum(one.delta_cost_usd for one in self.state.adjustments)

    @property
    def open(self) -> list[str]:
        return sorted(one.kind.value for one in self.state.exceptions if one.is_open)

    @property
    def closed(self) -> dict[str, tuple[str | None, str | None]]:
        return {one.kind.value: (one.closed_by, one.reason) for one in self.state.exceptions if not one.is_open}


def through_json(value: Any) -> Any:
    return orjson.loads(orjson.dumps(value))


def released(cost_usd: str | None = None, account: str | None = None) -> Release:
    return Release("seen", "ann", None if cost_usd is None else Decimal(cost_usd), account)


# --- a success settles


def test_a_success_settles_at_once() -> None:
    world = World(Rules(markup=Decimal("1.2")))
    assert world.decide(record("a", "0.00022500000000000002")).standing is Standing.SETTLED
    assert world.receipt == Receipt(
        source_reference=CALL,
        billing_account_id="account-1",
        run_id="run-1",
        attempt=2,
        litellm_call_id=CALL,
        charged_credits=2700,
        provider_cost_usd=Decimal("0.000225"),
        user_cost_usd=Decimal("0.00027"),
        markup_factor=Decimal("1.2"),
        provenance=Provenance.RESPONSE,
        spend_source=CALLBACK,
        record_ids=("a",),
        occurred_at=NOON,
    )
    assert world.receipt.source_system == "litellm"
    assert (world.receipt.charge_reason, world.receipt.receipt_kind) == ("llm_usage", "llm")
    assert world.state.exceptions == ()


def test_without_a_record_a_call_is_pending() -> None:
    world = World()
    assert world.decide().is_empty
    assert world.decide(quiet_over=True).standing is Standing.PENDING


def test_details_are_litellms() -> None:
    """Model, tokens and cost of LiteLLM, not of the line; only the graph id is the line's."""
    world = World()
    world.decide(record("a", "0.00022500000000000002", cache_hit=False))
    assert world.details == ChargeDetails(
        source_reference=CALL,
        provider_call_id="provider-a",
        model="gpt",
        provider_model="openai/gpt-4o-mini",
        provider="openai",
        tokens_in=1000,
        tokens_out=200,
        cached_tokens=600,
        reasoning_tokens=64,
        response_cost_usd=Decimal("0.00022500000000000002"),
        cache_hit=False,
        latency_ms=250,
        graph_id="graph-1",
    )


def test_the_run_is_the_lines_never_litellms() -> None:
    world = World(run_id=None, attempt=None, graph_id=None)
    world.decide(record("a", run_id="chosen-by-the-client"))
    assert (world.receipt.run_id, world.receipt.attempt) == (None, None)
    assert world.details is not None
    assert world.details.graph_id is None


@pytest.mark.parametrize("provenance", ["stream", "response"])
def test_provenance_is_how_the_answer_came(provenance: str) -> None:
    world = World(provenance=provenance)
    world.decide(record("a"))
    assert world.receipt.provenance == provenance


@pytest.mark.parametrize(
    ("started", "ended", "latency_ms"),
    [
        (NOON, NOON, 0),
        (NOON, NOON + timedelta(microseconds=1_234_567), 1235),
        (None, NOON, None),
        (NOON, None, None),
        (NOON + timedelta(seconds=1), NOON, None),
    ],
)
def test_latency(started: datetime | None, ended: datetime | None, latency_ms: int | None) -> None:
    world = World()
    world.decide(record("a", started_at=started, ended_at=ended))
    assert world.details is not None
    assert world.details.latency_ms == latency_ms


# --- which records are billed


def test_attempts_of_one_source_are_summed() -> None:
    world = World()
    world.decide(failure("a", "0.0001"), record("b", "0.0002"))
    assert (world.cost, world.credits) == (Decimal("0.0003"), 3000)
    assert world.receipt.record_ids == ("a", "b")


def test_the_larger_sum_is_billed() -> None:
    for callbacks, rows, source, cost in (
        ([record("a", "0.0002")], [row("x", "0.0003")], SPEND_LOGS, "0.0003"),
        ([record("a", "0.0002"), record("b", "0.0002")], [row("x", "0.0003")], CALLBACK, "0.0004"),
        ([failure("a", "0.0002")], [row("x", "0.0001")], CALLBACK, "0.0002"),
    ):
        world = World()
        world.decide(*callbacks, *rows)
        assert (world.receipt.spend_source, world.cost) == (source, Decimal(cost))
        billed = callbacks if source is CALLBACK else rows
        assert world.receipt.record_ids == tuple(one.record_id for one in billed)


def test_a_tie_is_the_callbacks() -> None:
    world = World()
    world.decide(row("x", model_group="row"), record("a", model_group="callback"))
    assert world.receipt.spend_source is CALLBACK
    assert world.receipt.record_ids == ("a",)
    assert world.details is not None
    assert world.details.model == "callback"


def test_sums_are_compared_at_1e_12() -> None:
    charged = bill([row("x", "0.0002250000000000004"), record("a", "0.000225")])
    assert charged is not None
    assert charged.source is CALLBACK
    charged = bill([row("x", "0.000225000001"), record("a", "0.000225")])
    assert charged is not None
    assert charged.source is SPEND_LOGS


def test_a_tie_goes_to_the_source_that_knows_of_the_success() -> None:
    """The callback of a cache hit was lost, that of the failed attempt before it was not."""
    world = World()
    world.decide(failure("a"), row("x", "0", cache_hit=True))
    assert world.receipt.spend_source is SPEND_LOGS
    assert world.details is not None
    assert world.details.provider_call_id == "provider-x"


def test_details_come_from_the_last_success_else_the_last_failure() -> None:
    later: dict[str, Any] = {"ended_at": NOON + timedelta(seconds=9)}
    world = World()
    world.decide(record("a"), record("b", ended_at=NOON + timedelta(seconds=3)), failure("c", **later))
    assert world.details is not None
    assert world.details.provider_call_id == "provider-b"
    world = World()
    world.decide(failure("a", "0.0001", **later), failure("b", "0.0001"), deadline_over=True)
    assert world.details is not None
    assert world.details.provider_call_id == "provider-a"


def test_records_of_another_call_or_twice_are_a_defect_of_the_caller() -> None:
    for records in ([record("a", call_id="other")], [record("a"), record("a")]):
        with pytest.raises(AssertionError):
            decide(CallState(FACT, tuple(records)), RULES)


# --- failures only


def test_a_failure_waits_for_the_retry() -> None:
    world = World()
    assert world.decide(failure("a")).standing is Standing.PENDING
    world.decide(record("b"))
    assert world.credits == 2250


def test_a_quiet_failure_that_costs_nothing_is_not_charged() -> None:
    world = World()
    assert world.decide(failure("a"), quiet_over=True).standing is Standing.NOT_CHARGED
    assert world.open == ["not_charged"]
    assert world.state.receipt is None


def test_a_quiet_failure_that_costs_is_charged() -> None:
    """The provider died in mid-stream: LiteLLM says failure, and what the delivered tokens cost."""
    world = World(provenance="stream")
    assert world.decide(failure("a", "0.0000081")).standing is Standing.PENDING
    assert world.decide(quiet_over=True).standing is Standing.SETTLED
    assert world.credits == 81
    assert world.details is not None
    assert world.details.provider_call_id == "provider-a"


@pytest.mark.parametrize("fact", [{"request_completed": False}, {"id_echoed": False}])
@pytest.mark.parametrize(("cost", "standing"), [("0", Standing.NOT_CHARGED), ("0.0001", Standing.SETTLED)])
def test_a_failure_whose_answer_did_not_end_waits_for_the_deadline(
    fact: dict[str, Any], cost: str, standing: Standing
) -> None:
    world = World(**fact)
    assert world.decide(failure("a", cost), quiet_over=True).standing is Standing.PENDING
    assert world.decide(deadline_over=True).standing is standing


def test_a_failure_without_cost_counts_as_nothing() -> None:
    world = World()
    assert world.decide(failure("a", None), quiet_over=True).standing is Standing.NOT_CHARGED


def test_a_success_after_a_quiet_failure_reopens_the_call() -> None:
    world = World()
    world.decide(failure("a"), quiet_over=True)
    assert world.decide(record("b"), quiet_over=False).standing is Standing.SETTLED
    assert world.credits == 2250
    assert world.open == []
    assert world.closed == {"not_charged": (SETTLER, "late_record")}


def test_another_free_failure_leaves_it_not_charged() -> None:
    world = World()
    world.decide(failure("a"), quiet_over=True)
    assert world.decide(failure("b"), quiet_over=False).is_empty
    assert world.standing is Standing.NOT_CHARGED


def test_a_failure_that_costs_reopens_the_call_and_waits_again() -> None:
    world = World()
    world.decide(failure("a"), quiet_over=True)
    assert world.decide(failure("b", "0.0001"), quiet_over=False).standing is Standing.PENDING
    assert world.closed == {"not_charged": (SETTLER, "late_record")}
    world.decide(quiet_over=True)
    assert world.credits == 1000


def test_failure_with_cost_then_success_is_a_receipt_and_an_adjustment() -> None:
    world = World()
    world.decide(failure("a", "0.0000081"), quiet_over=True)
    decision = world.decide(record("b", "0.000225"))
    assert decision.adjustment is not None
    assert decision.adjustment.delta_credits == 2250
    assert world.credits == 2331


# --- deadline


def test_no_record_by_the_deadline_is_overdue_and_stays_so() -> None:
    world = World()
    assert world.decide(quiet_over=True, deadline_over=True).standing is Standing.OVERDUE
    assert world.open == ["overdue"]
    assert world.decide(deadline_over=False).is_empty, "the spool has uncommitted bytes again"
    assert world.standing is Standing.OVERDUE


@pytest.mark.parametrize(
    ("late", "standing"),
    [
        (record("a"), Standing.SETTLED),
        (failure("a"), Standing.NOT_CHARGED),
        (failure("a", "0.1"), Standing.SETTLED),
        (record("a", "0"), Standing.HELD),
    ],
)
def test_a_late_record_reopens_an_overdue_call(late: SpendRecord, standing: Standing) -> None:
    world = World()
    world.decide(deadline_over=True)
    assert world.decide(late).standing is standing
    assert world.closed == {"overdue": (SETTLER, "late_record")}


def test_a_person_may_close_an_overdue_call_and_it_still_settles() -> None:
    world = World()
    world.decide(deadline_over=True)
    world.close(K.OVERDUE)
    assert world.decide().standing is Standing.OVERDUE
    assert world.open == []
    world.decide(record("a"))
    assert world.credits == 2250


def test_after_an_outage_of_four_hours_calls_settle_as_if_nothing_had_been() -> None:
    """The deadline does not pass while anything is uncommitted (the caller's part); then all of it is there at once."""
    world = World()
    assert world.decide(deadline_over=False, quiet_over=False).is_empty
    assert world.decide(failure("a"), record("b"), row("x"), deadline_over=True, quiet_over=True).receipt is not None
    assert world.state.exceptions == ()


# --- zero


@pytest.mark.parametrize(
    "believed",
    [
        record("a", "0", cache_hit=True),
        record("a", None, cache_hit=True),
        record("a", "0", prompt_tokens=0, completion_tokens=0),
        record("a", None, prompt_tokens=0, completion_tokens=0),
        record("a", "0", model_group="free/llama"),
        record("a", None, model_group="x", model="openai/other:free"),
        record("a", "0", model_group=None, model="openai/other:free"),
    ],
)
def test_zero_is_believed_only_where_it_can_be_true(believed: SpendRecord) -> None:
    world = World(Rules(free_models=("free/*", "*:free"), markup=Decimal("1.5")))
    assert world.decide(believed).standing is Standing.SETTLED
    assert world.credits == world.cost == world.receipt.user_cost_usd == 0
    assert world.open == []


@pytest.mark.parametrize(
    "doubted",
    [
        record("a", "0"),
        record("a", None),
        record("a", "0", cache_hit=False),
        record("a", "0", prompt_tokens=0, completion_tokens=1),
        record("a", "0", prompt_tokens=500, completion_tokens=0),
        record("a", "0", prompt_tokens=None, completion_tokens=None),
        record("a", "0", prompt_tokens=0, completion_tokens=None),
        record("a", "0", model_group="freedom", model="openai/free"),
        record("a", "0", model_group="FREE/llama"),
        record("a", "0", model_group=None, model=None),
        row("a", "0"),
    ],
)
def test_any_other_zero_is_held(doubted: SpendRecord) -> None:
    world = World(Rules(free_models=("free/*", "*:free")))
    assert world.decide(doubted, quiet_over=True, deadline_over=True).standing is Standing.HELD
    assert world.open == ["held_zero_cost"]
    assert world.state.receipt is None


def test_a_model_that_is_put_on_the_free_list_releases_its_calls() -> None:
    world = World()
    world.decide(record("a", "0"))
    world.rules = Rules(free_models=("gpt",))
    assert world.decide().standing is Standing.SETTLED
    assert world.credits == 0
    assert world.closed == {"held_zero_cost": (SETTLER, "no_longer_so")}


def test_the_free_list_and_the_cache_do_not_make_a_cost_vanish() -> None:
    """They say that a 0 may be believed. What LiteLLM says a call costs is billed."""
    world = World(Rules(free_models=("*",)))
    world.decide(record("a", "0.0001", cache_hit=True))
    assert world.credits == 1000


def test_no_free_list_frees_nothing() -> None:
    assert hold(record("a", "0", model_group="", model=""), ()) is K.HELD_ZERO_COST
    assert hold(record("a", "0"), ("g?t",)) is None
    assert hold(record("a", "0"), ("gp",)) is K.HELD_ZERO_COST, "a glob matches the whole name"


def test_a_cost_too_small_to_charge_is_no_zero() -> None:
    world = World()
    world.decide(record("a", "1e-15"))
    assert (world.credits, world.open) == (0, [])


def test_an_unpriced_success_holds_the_whole_call() -> None:
    for records in permutations([record("a", "0"), failure("b", "0.1"), row("x", "0")]):
        world = World()
        for one in records:
            world.decide(one)
        assert (world.standing, world.open) == (Standing.HELD, ["held_zero_cost"])


def test_a_hold_stays_whatever_comes() -> None:
    """No receipt until someone decides, also where the other source has a price."""
    world = World()
    world.decide(record("a", "0"))
    assert world.decide(row("x", "0.0005")).standing is Standing.HELD
    assert world.decide(record("b", "0.0005"), deadline_over=True).standing is Standing.HELD


def test_unknown_cost_is_never_charged() -> None:
    for broken in (bad("a"), bad("a", "-1"), bad("a", "1000.01"), bad("a", "NaN", FAILED)):
        world = World()
        assert world.decide(broken, quiet_over=True, deadline_over=True).standing is Standing.HELD
        assert world.open == ["held_bad_cost"]
        world.decide(record("b", "0.1"), row("x", "0.1"))
        assert world.state.receipt is None


def test_a_bad_cost_is_believed_of_no_model_and_no_cache() -> None:
    world = World(Rules(free_models=("*",)))
    world.decide(replace(bad("a"), cache_hit=True, prompt_tokens=0, completion_tokens=0))
    assert world.open == ["held_bad_cost"]


def test_a_held_call_tells_what_holds_it() -> None:
    world = World()
    world.decide(record("a", "0"), bad("b", "inf"))
    details = {one.kind: one.detail for one in world.state.exceptions}
    assert details[K.HELD_ZERO_COST]["records"] == [
        {
            "source": "callback",
            "record_id": "a",
            "model_group": "gpt",
            "model": "openai/gpt-4o-mini",
            "prompt_tokens": 1000,
            "completion_tokens": 200,
            "cost": "0",
        }
    ]
    held: Any = details[K.HELD_BAD_COST]
    assert held["records"][0]["cost"] == "inf"


def test_a_sum_that_no_receipt_can_hold_is_held() -> None:
    world = World(Rules(markup=Decimal(10**9)))
    assert world.decide(record("a", "999"), record("b", "999")).standing is Standing.HELD
    assert world.open == ["held_bad_cost"]


def test_a_later_sum_that_no_receipt_can_hold_is_held() -> None:
    world = World(Rules(markup=Decimal(10**9)))
    world.decide(record("a", "900"))
    world.decide(record("b", "900"))
    assert world.open == ["held_bad_cost"]
    assert world.state.adjustments == ()


# --- release


def test_release_with_a_cost_is_a_manual_receipt() -> None:
    world = World(Rules(markup=Decimal("1.2")), provenance="stream")
    world.decide(record("a", "0"), failure("b", "0.0001"), row("x", "0"))
    assert world.decide(release=released("0.0005")).standing is Standing.SETTLED
    receipt = world.receipt
    assert (receipt.provenance, receipt.spend_source) == (Provenance.MANUAL, None)
    assert receipt.record_ids == ("a", "b", "x"), "what the person could see"
    assert (receipt.provider_cost_usd, receipt.user_cost_usd) == (Decimal("0.0005"), Decimal("0.0006"))
    assert receipt.charged_credits == 6000
    assert world.closed == {"held_zero_cost": ("ann", "seen")}
    assert world.details is not None
    assert world.details.provider_call_id == "provider-a"


def test_release_of_zero_must_be_said() -> None:
    world = World()
    world.decide(record("a", "0"))
    assert world.decide(release=released()).is_empty
    assert world.standing is Standing.HELD
    world.decide(release=released("0"))
    assert (world.credits, world.receipt.provenance) == (0, Provenance.MANUAL)


def test_release_of_a_call_without_records() -> None:
    world = World()
    world.decide(deadline_over=True)
    world.decide(release=released("0.01"))
    assert world.credits == 100_000
    assert world.receipt.record_ids == ()
    assert world.details is not None
    assert (world.details.model, world.details.tokens_in, world.details.graph_id) == (None, None, "graph-1")
    assert world.decide(row("x", "0.01")).is_empty, "the row says what the person said"
    world.decide(record("a", "0.02"))
    assert world.open == ["cost_mismatch"]
    assert world.credits == 100_000


@pytest.mark.parametrize("cost", ["NaN", "-1", "1e12", "Infinity"])
def test_release_with_an_impossible_cost_does_nothing(cost: str) -> None:
    world = World()
    world.decide(record("a", "0"))
    assert world.decide(release=released(cost)).is_empty
    world = World()
    world.decide(record("a"))
    assert world.decide(release=released(cost)).is_empty


def test_the_other_sources_copy_of_a_released_call_is_nothing_new() -> None:
    world = World()
    world.decide(record("a", "0"))
    world.decide(release=released("0.0005"))
    assert world.decide(row("x", "0"), deadline_over=True).is_empty
    assert world.credits == 5000


def test_the_other_source_may_confirm_what_a_person_said() -> None:
    world = World()
    world.decide(record("a", "0"))
    world.decide(release=released("0.0005"))
    assert world.decide(row("x", "0.0005")).is_empty


@pytest.mark.parametrize(
    "news",
    [[row("x", "0.0007")], [record("b", "0.0001")], [record("b", "0")], [failure("b", "0.0001")], [bad("b")]],
)
def test_news_about_a_released_call_are_for_a_person(news: list[SpendRecord]) -> None:
    """The program never changes an amount that somebody named, not even with CORRECTIONS=apply."""
    world = World()
    world.decide(record("a", "0"))
    world.decide(release=released("0.0005"))
    world.decide(*news)
    assert world.open == ["cost_mismatch"]
    assert (world.credits, world.state.adjustments) == (5000, ())
    world.decide(release=released("0.0007"))
    assert (world.credits, world.cost, world.open) == (7000, Decimal("0.0007"), [])
    assert world.receipts == 1
    assert world.state.adjustments[0].created_by == "ann"
    assert world.decide(release=released("0.0007")).is_empty, "saying it again changes nothing"
    world.decide(release=released("0"))
    assert world.credits == 0
    world.decide(release=released("0.0007"))
    assert world.credits == 7000


def test_a_mismatch_that_a_person_accepts_does_not_come_back() -> None:
    world = World()
    world.decide(record("a", "0"))
    world.decide(release=released("0.0005"))
    world.decide(row("x", "0.0007"))
    world.close(K.COST_MISMATCH)
    assert world.decide().is_empty
    world.decide(row("y", "0.0001"))
    assert world.open == ["cost_mismatch"], "until there is something new"


def test_a_held_record_after_the_receipt_waits_for_a_person() -> None:
    world = World()
    world.decide(record("a", "0.0005"))
    world.decide(record("b", "0"), record("c", "0.0001"))
    assert world.open == ["held_zero_cost"]
    assert world.credits == 5000, "nothing is corrected while a cost is unknown"
    world.decide(release=released("0.0009"))
    assert (world.credits, world.open, world.receipts) == (9000, [], 1)
    assert world.receipt.provenance is Provenance.RESPONSE


def test_a_release_that_changes_nothing_is_remembered() -> None:
    world = World()
    world.decide(record("a", "0.0005"))
    world.decide(row("x", "0"))
    decision = world.decide(release=released("0.0005"))
    assert decision.adjustment is not None
    assert decision.adjustment.delta_credits == decision.adjustment.delta_cost_usd == 0
    assert world.open == []


def test_a_held_record_that_a_person_waves_through_counts_as_it_stands() -> None:
    world = World()
    world.decide(record("a", "0.0005"))
    world.decide(record("b", "0"))
    world.close(K.HELD_ZERO_COST)
    world.decide(record("c", "0.0001"))
    assert (world.credits, world.open) == (6000, [])


def test_what_the_program_closed_it_may_open_again() -> None:
    world = World()
    world.decide(record("a", "0.0005"))
    world.decide(row("x", "0"))
    world.rules = Rules(free_models=("gpt",))
    world.decide()
    assert world.open == []
    world.rules = RULES
    world.decide()
    assert world.open == ["held_zero_cost"]


def test_another_unpriced_attempt_is_news_even_where_the_billed_records_are_the_same() -> None:
    world = World()
    world.decide(record("a", "0.0001"))
    world.decide(row("x", "0.0003"))
    world.adjust(-3000, "0")
    world.decide(row("y", "0.0001"))
    world.close(K.COST_MISMATCH)
    assert world.decide().is_empty
    world.decide(record("b", "0"))
    assert world.open == ["cost_mismatch"]


def test_closing_the_exception_of_a_held_call_gives_no_receipt() -> None:
    world = World()
    world.decide(record("a", "0"))
    world.close(K.HELD_ZERO_COST)
    assert world.decide(row("x", "0")).is_empty, "the other source's copy"
    assert world.standing is Standing.HELD
    world.decide(record("b", "0"))
    assert world.open == ["held_zero_cost"], "another unpriced attempt"


# --- accounts


def test_without_an_account_there_is_no_receipt_until_someone_names_one() -> None:
    world = World(billing_account_id=None)
    assert world.decide(deadline_over=False).is_empty
    assert world.decide(record("a", end_user="chosen-by-the-client")).standing is Standing.UNATTRIBUTED
    assert world.open == ["unattributed"]
    assert world.decide(release=released()).is_empty
    world.decide(release=released(account="account-9"))
    assert world.receipt.billing_account_id == "account-9"
    assert world.receipt.provenance is Provenance.RESPONSE, "the cost is LiteLLM's"
    assert world.credits == 2250
    assert world.closed == {"unattributed": ("ann", "seen")}
    world.decide(row("x", "0.0005"))
    assert world.credits == 5000


def test_litellms_end_user_is_the_account_only_if_trusted() -> None:
    world = World(Rules(trust_litellm_end_user=True), billing_account_id=None)
    world.decide(failure("a", end_user=None), record("b"))
    assert world.receipt.billing_account_id == "litellm-account"
    world = World(Rules(trust_litellm_end_user=True))
    world.decide(record("b"))
    assert world.receipt.billing_account_id == "account-1", "the proxy's word goes first"
    world = World(Rules(trust_litellm_end_user=True), billing_account_id=None)
    world.decide(record("a"), row("x", end_user="somebody-else"))
    assert world.open == ["unattributed"]
    world = World(Rules(trust_litellm_end_user=True), billing_account_id=None)
    world.decide(record("a", end_user=None))
    assert world.open == ["unattributed"]


def test_a_free_call_without_an_account_is_unattributed_and_a_failed_one_is_not_charged() -> None:
    world = World(billing_account_id=None)
    world.decide(record("a", "0", cache_hit=True))
    assert world.open == ["unattributed"]
    world = World(billing_account_id=None)
    assert world.decide(failure("a"), quiet_over=True).standing is Standing.NOT_CHARGED
    world = World(billing_account_id=None)
    assert world.decide(failure("a", "0.1"), quiet_over=True).standing is Standing.UNATTRIBUTED


def test_a_held_call_without_an_account_needs_both() -> None:
    for held in (record("a", "0"), bad("a", "NaN", FAILED)):
        world = World(billing_account_id=None)
        assert world.decide(held).standing is Standing.HELD
        assert "unattributed" in world.open
        assert world.decide(release=released("0.1")).is_empty
        assert world.decide(release=released(account="b")).is_empty
        world.decide(release=released("0.1", "b"))
        assert (world.receipt.billing_account_id, world.credits, world.open) == ("b", 1_000_000, [])


def test_a_second_line_of_the_same_account_is_summed() -> None:
    world = World()
    world.decide(record("a"), record("b"), conflict_accounts=("account-1",))
    assert (world.credits, world.open) == (4500, [])


@pytest.mark.parametrize("other", ["account-2", None])
def test_a_call_id_of_two_accounts_is_held(other: str | None) -> None:
    world = World()
    assert world.decide(record("a"), record("b"), conflict_accounts=("account-1", other)).standing is Standing.HELD
    assert world.open == ["conflict"]
    accounts = world.state.exceptions[0].detail["accounts"]
    assert accounts == [None, "account-1"] if other is None else ["account-1", "account-2"]
    world.decide(release=released())
    assert world.receipt.billing_account_id == "account-1", "the first line's, if the person names no other"
    assert (world.credits, world.open) == (4500, [])


def test_a_conflict_may_be_charged_to_whom_a_person_names() -> None:
    world = World()
    world.decide(record("a"), conflict_accounts=("account-2",))
    world.decide(release=released(account="account-2"))
    assert world.receipt.billing_account_id == "account-2"


def test_a_conflict_after_the_receipt_stops_corrections() -> None:
    """The records that come now may be the other account's: they must not be charged to the first one's."""
    world = World()
    world.decide(record("a"))
    world.decide(record("b"), conflict_accounts=("account-2",))
    assert (world.credits, world.open) == (2250, ["conflict"])
    assert world.decide(release=released(account="account-2")).is_empty, "the receipt is account-1's and stays so"
    assert world.decide(release=released("0.1", "account-2")).is_empty
    world.decide(release=released())
    assert (world.credits, world.open) == (4500, [])
    world.decide(conflict_accounts=("account-2", "account-3"))
    assert world.open == ["conflict"], "a third account is another conflict"


def test_a_conflict_that_a_person_closes_does_not_come_back() -> None:
    world = World()
    world.decide(record("a"))
    world.decide(conflict_accounts=("account-2",))
    world.close(K.CONFLICT)
    world.decide(record("b"))
    assert (world.credits, world.open) == (4500, [])
    unsettled = World()
    unsettled.decide(conflict_accounts=("account-2",))
    unsettled.close(K.CONFLICT)
    unsettled.decide(record("a"))
    assert unsettled.state.receipt is None, "closing is not releasing"


# --- corrections


def test_a_late_attempt_is_an_adjustment() -> None:
    world = World(Rules(markup=Decimal("1.2")))
    world.decide(record("a", "0.0001"))
    decision = world.decide(record("b", "0.00005"))
    assert decision.receipt is None
    adjustment = decision.adjustment
    assert adjustment is not None
    assert adjustment == Adjustment(
        source_reference=CALL,
        evidence_hash=evidence_hash("callback", ["a", "b"]),
        delta_credits=600,
        delta_cost_usd=Decimal("0.00005"),
        reason="late_record",
        evidence={
            "spend_source": "callback",
            "record_ids": ["a", "b"],
            "sum_usd": "0.00015",
            "provider_cost_usd": "0.000150000000",
            "user_cost_usd": "0.000180000000",
            "credits": 1800,
        },
        created_by=SETTLER,
    )
    assert world.open == []


def test_the_second_source_changes_nothing_where_it_agrees() -> None:
    world = World()
    world.decide(record("a"))
    assert world.decide(row("x")).is_empty
    assert world.decide(row("y", "0", FAILED)).is_empty
    world = World()
    world.decide(row("x"))
    assert world.decide(record("a")).is_empty, "also where the tie would have been the callback's"
    assert world.receipt.spend_source is SPEND_LOGS


def test_a_smaller_sum_changes_nothing() -> None:
    world = World()
    world.decide(record("a", "0.0003"), record("b", "0.0001"))
    assert world.decide(row("x", "0.0003")).is_empty


def test_an_adjustment_uses_the_receipts_markup() -> None:
    world = World(Rules(markup=Decimal("1.5")))
    world.decide(record("a", "0.0001"))
    world.rules = Rules(markup=Decimal(9))
    world.decide(record("b", "0.0001"))
    assert world.credits == 3000


def test_an_adjustment_may_change_the_cost_and_no_credit() -> None:
    world = World()
    world.decide(record("a", "0.00000001"))
    decision = world.decide(record("b", "0.00000001"))
    assert decision.adjustment is not None
    assert (decision.adjustment.delta_credits, decision.adjustment.delta_cost_usd) == (0, Decimal("0.00000001"))
    assert (world.credits, world.cost) == (1, Decimal("0.00000002"))


def test_credits_of_the_sum_not_sums_of_credits() -> None:
    """Each attempt alone would be rounded up to a credit."""
    world = World()
    for number in range(10):
        world.decide(record(str(number), "0.00000001"))
    assert world.credits == 1


def test_a_replayed_adjustment_is_no_adjustment() -> None:
    world = World()
    world.decide(record("a", "0.0001"))
    before = world.state
    decision = world.decide(record("b", "0.0001"))
    assert decide(replace(before, records=world.state.records), RULES).adjustment == decision.adjustment, "the same key"


def test_report_only_tells() -> None:
    world = World(REPORT)
    world.decide(record("a", "0.0001"))
    assert world.decide(row("x", "0.0003")).adjustment is None
    assert (world.credits, world.open) == (1000, ["cost_mismatch"])
    detail = world.state.exceptions[0].detail
    assert (detail["delta_credits"], detail["delta_cost_usd"]) == (2000, "0.000200000000")
    assert (detail["spend_source"], detail["record_ids"]) == ("spend_logs", ["x"])


def test_report_still_makes_first_receipts() -> None:
    world = World(REPORT)
    world.decide(failure("a", "0.0001"), record("b", "0.0002"), row("x", "0.0005"))
    assert (world.credits, world.open) == (5000, [])


def test_each_new_difference_supersedes_the_last() -> None:
    world = World(REPORT)
    world.decide(record("a", "0.0001"))
    world.decide(row("x", "0.0003"))
    world.decide(row("y", "0.0001"))
    assert world.open == ["cost_mismatch"]
    assert world.closed == {"cost_mismatch": (SETTLER, "superseded")}
    assert [one.seq for one in world.state.exceptions] == [1, 2]


def test_switching_from_report_to_apply_applies() -> None:
    world = World(REPORT)
    world.decide(record("a", "0.0001"))
    world.decide(row("x", "0.0003"))
    world.rules = RULES
    world.decide()
    assert (world.credits, world.open) == (3000, [])
    assert world.closed == {"cost_mismatch": (SETTLER, "applied")}
    world.rules = REPORT
    world.decide(row("y", "0.0001"))
    assert (world.credits, world.open) == (3000, ["cost_mismatch"])


def test_a_difference_that_a_person_accepts_is_not_applied_later() -> None:
    world = World(REPORT)
    world.decide(record("a", "0.0001"))
    world.decide(row("x", "0.0003"))
    world.close(K.COST_MISMATCH)
    assert world.decide().is_empty
    world.rules = RULES
    assert world.decide().is_empty
    world.decide(row("y", "0.0001"))
    assert world.credits == 4000, "with new evidence, the whole sum counts"


def test_what_a_person_adjusts_stays() -> None:
    world = World()
    world.decide(record("a", "0.0001"))
    world.adjust(-1000, "0")
    assert world.decide(row("x", "0.0001"), deadline_over=True).is_empty, "goodwill is not undone by the second source"
    world.decide(record("b", "0.0001"))
    assert (world.credits, world.open) == (0, ["cost_mismatch"])
    world.adjust(1000, "0.0001", "the second attempt")
    world.decide()
    assert (world.credits, world.open) == (1000, [])
    assert world.closed == {"cost_mismatch": (SETTLER, "no_longer_so")}


def test_a_persons_adjustment_resolves_a_reported_difference() -> None:
    world = World(REPORT)
    world.decide(record("a", "0.0001"))
    world.decide(row("x", "0.0003"))
    world.adjust(2000, "0.0002")
    world.decide()
    assert (world.credits, world.open) == (3000, [])
    world.rules = RULES
    assert world.decide().is_empty, "and is not made a second time"


def test_the_same_adjustment_by_hand_has_the_same_key() -> None:
    state = CallState(FACT, (record("b"), record("a")))
    other = CallState(FACT, (record("a"), record("b")))
    one = adjust(state, 5, Decimal("0.1"), "why", "ann")
    assert adjust(other, 5, Decimal("0.10"), "why", "bob").evidence_hash == one.evidence_hash
    for changed in (
        adjust(state, 6, Decimal("0.1"), "why", "ann"),
        adjust(state, 5, Decimal("0.2"), "why", "ann"),
        adjust(state, 5, Decimal("0.1"), "why else", "ann"),
        adjust(CallState(FACT, (record("a"),)), 5, Decimal("0.1"), "why", "ann"),
    ):
        assert changed.evidence_hash != one.evidence_hash


def test_a_difference_below_1e_12_between_the_sources_may_move_a_credit_to_where_the_set_says() -> None:
    """Sums that tie at 1e-12 may end in different credits at some markups: the amount follows the winner of the tie."""
    for first, second in permutations([record("a", "0.0000000000004"), row("x", "0.0000000000003")]):
        world = World(Rules(markup=Decimal("1.5")))
        world.decide(first)
        world.decide(second)
        assert world.credits == 1


# --- what only informs


def test_model_mismatch_bills_what_ran() -> None:
    world = World(requested_model="up-fb")
    world.decide(failure("a", model_group="up-fb"), record("b", model_group="up-gpt"))
    assert world.credits == 2250
    assert world.details is not None
    assert world.details.model == "up-gpt"
    assert world.open == ["model_mismatch"]
    detail = world.state.exceptions[0].detail
    assert (detail["requested"], detail["model_group"]) == ("up-fb", "up-gpt")
    assert world.decide(record("c", model_group="third")).opened == (), "once"
    world.close(K.MODEL_MISMATCH)
    assert world.decide(record("d", model_group="fourth")).opened == ()


@pytest.mark.parametrize("requested", ["gpt", "openai/gpt-4o-mini", "gpt-4o-mini", None])
def test_no_model_mismatch(requested: str | None) -> None:
    world = World(requested_model=requested)
    world.decide(record("a"))
    assert world.open == []


def test_no_model_mismatch_without_a_success_or_a_name() -> None:
    for one in (failure("a", "0.1", model_group="x", model="x"), record("a", model_group=None, model=None)):
        world = World(requested_model="gpt")
        world.decide(one, deadline_over=True)
        assert world.open == []


def test_call_id_not_forwarded() -> None:
    world = World(proxy_call_id="what-the-proxy-sent")
    world.decide()
    assert world.open == ["call_id_not_forwarded"]
    world.decide(record("a"))
    assert world.credits == 2250, "LiteLLM's answer is the key"
    for fact in ({"proxy_call_id": None}, {"proxy_call_id": CALL}, {"proxy_call_id": "p", "id_echoed": False}):
        other = World(**fact)
        other.decide(record("a"))
        assert other.open == []


# --- the recorded attempts


def recorded(*names: str, **changes: Any) -> World:
    payloads = [orjson.loads((DATA / "payloads" / f"{name}.json").read_bytes()) for name in names]
    parsed = [parse_callback(payload, Decimal(1000)) for payload in payloads]
    records = [one for one in parsed if isinstance(one, SpendRecord)]
    assert len(records) == len(names)
    world = World(Rules(free_models=("up-free-declared",)), call_id=records[0].call_id, proxy_call_id=None)
    world.decide(*records, **changes)
    return world


@pytest.mark.parametrize(
    ("names", "credits_charged", "model", "tokens"),
    [
        (["nonstream"], 2250, "up-gpt-4o-mini", (1000, 200)),
        (["stream"], 2250, "up-gpt-4o-mini", (1000, 200)),
        (["nginx_set_call_id"], 2250, "up-gpt-4o-mini", (1000, 200)),
        (["embedding"], 100, "up-emb", (500, 0)),
        (["cache_hit"], 0, "up-gpt-4o-mini", (1000, 200)),
        (["cache_hit_stream"], 0, "up-gpt-4o-mini", (1000, 200)),
        (["embedding_cache_hit"], 0, "up-emb", (500, 0)),
        (["retry", "retry_2"], 2250, "up-flaky", (1000, 200)),
        (["fallback_2", "fallback"], 2250, "up-gpt-4o-mini", (1000, 200)),
        (["abort_stream"], 150, "up-slow", (32, 17)),
        (["abort_nonstream"], 2250, "up-slow", (1000, 200)),
        (["messages_stream"], 15850, "up-haiku", (1100, 200)),
        (["responses_api"], 4710, "mock-claude-haiku-4-5", (36, 87)),
        (["declared_free"], 0, "up-free-declared", (1000, 200)),
        (["wildcard"], 2250, "wild/gpt-4o", (1000, 200)),
    ],
)
def test_recorded_calls(names: list[str], credits_charged: int, model: str, tokens: tuple[int, int]) -> None:
    world = recorded(*names)
    assert world.credits == credits_charged
    assert world.details is not None
    assert world.details.model == model
    assert (world.details.tokens_in, world.details.tokens_out) == tokens
    assert world.open == []


@pytest.mark.parametrize("name", ["failure_badmodel", "failure_upstream500", "failure_timeout", "auth_failure"])
def test_recorded_failures(name: str) -> None:
    assert recorded(name).standing is Standing.PENDING
    assert recorded(name, quiet_over=True).standing is Standing.NOT_CHARGED


def test_recorded_death_of_a_provider() -> None:
    world = recorded("failure_midstream", quiet_over=True)
    assert (world.credits, world.cost) == (107, Decimal("0.00001065"))


def test_recorded_model_without_a_price() -> None:
    assert recorded("unpriced", deadline_over=True).open == ["held_zero_cost"]


def test_a_fallback_of_an_embedding_whose_failure_and_success_share_their_id() -> None:
    success = orjson.loads((DATA / "payloads" / "embedding.json").read_bytes())
    failed = {**success, "status": "failure", "response_cost": 0.0, "model_group": "up-emb-broken", "prompt_tokens": 0}
    records = [parse_callback(payload, Decimal(1000)) for payload in (failed, success)]
    for order in (records, records[::-1]):
        world = World(call_id=success["litellm_call_id"], proxy_call_id=None)
        for one in order:
            assert isinstance(one, SpendRecord)
            world.decide(one, quiet_over=False)
        assert world.credits == 100
        assert world.details is not None
        assert world.details.model == "up-emb"


# --- any order of arrival

costs = st.one_of(
    st.sampled_from(
        ["0", "0.000225", "0.00022500000000000002", "1e-05", "0.0000000000005", "0.0000000499999999999995"]
    ),
    st.floats(min_value=0, max_value=2, allow_nan=False).map(repr),
    st.integers(0, 3 * 10**6).map(lambda number: repr(number * 0.0002833333333333333)),
    st.decimals(min_value=0, max_value="0.00001", places=14).map(str),
)


@st.composite
def attempts(draw: st.DrawFn, *, with_holds: bool) -> list[SpendRecord]:
    """Records of one call, as two lossy sources tell them: copies, near copies, and what only one of them knows."""
    records = []
    for number in range(draw(st.integers(1, 5))):
        cost: str | None = draw(costs)
        status = draw(st.sampled_from([OK, FAILED]))
        more: dict[str, Any] = {"ended_at": NOON + timedelta(seconds=draw(st.integers(0, 3)))}
        if status is OK and Decimal(cost or 0) == 0 and not with_holds:
            more |= draw(st.sampled_from([{"cache_hit": True}, {"prompt_tokens": 0, "completion_tokens": 0}]))
        if with_holds and draw(st.integers(0, 5)) == 0:
            cost, more["cost_text"] = None, draw(st.sampled_from([None, "NaN"]))
        told = draw(st.sampled_from(["callback", "row", "both", "both", "both"]))
        noise = (
            draw(st.sampled_from(["0", "0", "0", "1e-16", "4e-13", "1e-9"])) if cost not in (None, "0", "0.0") else "0"
        )
        other = None if cost is None else str(Decimal(cost) + Decimal(noise))
        if told != "row":
            records.append(record(f"c{number}", cost, status, **more))
        if told != "callback":
            records.append(row(f"r{number}", other, status, **more))
    return records


def expected(records: Sequence[SpendRecord], markup: Decimal) -> tuple[int, Fraction] | None:
    """(credits, provider cost) of a set of records without holds, in rational arithmetic; None: nothing to charge."""

    def at_1e_12(amount: Fraction) -> Fraction:
        return Fraction(round(amount * 10**12), 10**12)

    sums = {}
    for source in (CALLBACK, SPEND_LOGS):
        mine = [one for one in records if one.source is source]
        if mine:
            total = sum((Fraction(one.cost_usd or 0) for one in mine), Fraction(0))
            success = any(one.status is OK for one in mine)
            sums[source] = (at_1e_12(total), success, source is CALLBACK, total)
    cost, _, _, total = max(sums.values())
    if cost == 0 and not any(one.status is OK for one in records):
        return None
    return math.ceil(at_1e_12(total * Fraction(markup)) * 10**7), cost


arrivals = st.sampled_from([{}, {}, {"quiet_over": True}, {"deadline_over": True}, {"quiet_over": True}])
markups = st.sampled_from([Decimal(1), Decimal("1.1"), Decimal("1.2"), Decimal("1.5")])


def arrive(data: st.DataObject, world: World, records: Sequence[SpendRecord]) -> None:
    """The records in any order, one or several at a time, with any waiting times over or not in between."""
    waiting = list(data.draw(st.permutations(records)))
    while waiting:
        count = data.draw(st.integers(0, len(waiting)))
        now, waiting = waiting[:count], waiting[count:]
        changes: dict[str, Any] = {"quiet_over": False, "deadline_over": False, **data.draw(arrivals)}
        world.decide(*now, **changes)
        if not count:
            break
    world.decide(*waiting, quiet_over=True, deadline_over=True)


@given(st.data(), attempts(with_holds=False), markups)
def test_any_order_ends_with_the_same_amount(data: st.DataObject, records: list[SpendRecord], markup: Decimal) -> None:
    world = World(Rules(markup=markup))
    arrive(data, world, records)
    amount = expected(records, markup)
    if amount is None:
        assert world.state.receipt is None
        assert world.open == ["not_charged"]
        return
    assert world.receipts == 1
    assert (world.credits, Fraction(world.cost)) == amount
    assert world.open == []
    assert world.standing is Standing.SETTLED
    user_costs = world.receipt.user_cost_usd * 10**7
    assert world.receipt.charged_credits == math.ceil(user_costs)
    assert all(one.delta_credits >= -1 for one in world.state.adjustments), "sums only grow, but for dust"


@given(st.data(), attempts(with_holds=False), markups)
def test_report_then_apply_ends_with_the_same_amount(
    data: st.DataObject, records: list[SpendRecord], markup: Decimal
) -> None:
    world = World(Rules(markup=markup, corrections=Corrections.REPORT))
    arrive(data, world, records)
    amount = expected(records, markup)
    assert world.state.adjustments == ()
    if amount is None or world.state.receipt is None:
        assert amount is None
        assert world.state.receipt is None
        return
    assert world.open == ([] if (world.credits, Fraction(world.cost)) == amount else ["cost_mismatch"])
    world.rules = replace(world.rules, corrections=Corrections.APPLY)
    world.decide()
    assert (world.credits, Fraction(world.cost)) == amount
    assert len(world.state.adjustments) <= 1
    assert world.open == []


@given(st.data(), attempts(with_holds=True), markups, st.booleans())
def test_any_order_with_holds_ends_with_what_the_person_says(
    data: st.DataObject, records: list[SpendRecord], markup: Decimal, report: bool
) -> None:
    """A held record may come before the receipt or after it; once a person has named the cost, that is the amount."""
    world = World(Rules(markup=markup, corrections=Corrections.REPORT if report else Corrections.APPLY))
    arrive(data, world, records)
    held = [one for one in records if hold(one, ()) is not None]
    if not held:
        return
    assert set(world.open) <= {"held_zero_cost", "held_bad_cost", "cost_mismatch"}
    assert {"held_zero_cost", "held_bad_cost"} & set(world.open)
    if world.state.receipt is not None:
        seen = [one for one in records if one.record_id in world.receipt.record_ids]
        assert all(hold(one, ()) is None for one in seen), "never a receipt with an unknown cost"
    world.decide(release=released("0.000283333333"))
    assert world.receipts == 1
    assert world.cost == Decimal("0.000283333333")
    assert world.credits == math.ceil(Decimal(f"{Decimal('0.000283333333') * markup:.12f}") * 10**7)
    assert world.open == []


@given(st.data(), attempts(with_holds=True))
def test_whatever_comes_there_is_one_receipt_and_no_unknown_cost(
    data: st.DataObject, records: list[SpendRecord]
) -> None:
    """With people deciding anything in between."""
    world = World(
        data.draw(st.sampled_from([RULES, REPORT])), billing_account_id=data.draw(st.sampled_from([None, "a"]))
    )
    releases = st.one_of(
        st.none(),
        st.builds(released, st.sampled_from([None, "0", "0.5", "-1", "NaN"]), st.sampled_from([None, "a", "b"])),
    )
    for one in data.draw(st.permutations(records)):
        release = data.draw(releases)
        amount = None if world.state.receipt is None else world.credits
        changes = {"conflict_accounts": data.draw(st.sampled_from([(), ("a",), ("b",)])), **data.draw(arrivals)}
        decision = world.decide(one, release=release, **changes)
        assert world.receipts <= 1
        for adjustment in (decision.adjustment,):
            if adjustment is not None and adjustment.created_by == SETTLER:
                assert world.rules.corrections is Corrections.APPLY
                assert "conflict" not in world.open
        if decision.receipt is not None:
            assert world.receipt.billing_account_id in ("a", "b")
            unknown = [r for r in world.state.records if hold(r, ()) is not None]
            assert not unknown or decision.receipt.provenance is Provenance.MANUAL
        if amount is not None and decision.adjustment is None:
            assert world.credits == amount
        if data.draw(st.integers(0, 4)) == 0 and world.open:
            world.close(K(data.draw(st.sampled_from(world.open))))


# --- by header ---------------------------------------------------------------------------------------------------

BY_HEADER = Rules(header_cost_max_usd=Decimal(1000))


def test_the_header_bills_only_what_it_can_know() -> None:
    world = World(replace(BY_HEADER, markup=Decimal("1.2")), header_cost_usd=Decimal("0.00047100000000000006"))
    assert world.decide(record("r1", "5")).standing is Standing.SETTLED, "LiteLLM's records do not count"
    receipt = world.state.receipt
    assert receipt is not None
    assert (receipt.provider_cost_usd, receipt.charged_credits) == (Decimal("0.000471"), 5652)
    assert (receipt.spend_source, receipt.provenance, receipt.record_ids) == (
        SpendSource.HEADER,
        Provenance.RESPONSE,
        (HEADER,),
    )
    assert world.details is not None
    assert (world.details.model, world.details.tokens_in, world.details.provider) == ("header-model", None, None)
    assert world.details.response_cost_usd == Decimal("0.00047100000000000006")


@pytest.mark.parametrize(
    ("fact", "why"),
    [
        ({"provenance": "stream"}, "a stream"),
        ({"cache_key": "k"}, "a cache hit"),
        ({"header_cost_usd": None}, "its header says nothing"),
        ({"header_cost_usd": Decimal(0)}, "its header says 0"),
        ({"header_cost_usd": Decimal("0E-30")}, "its header says 0"),
        ({"status": 500, "header_cost_usd": Decimal(0)}, "status 500"),
        ({"status": 503, "header_cost_usd": Decimal("0.5")}, "status 503"),
        ({"status": 499, "header_cost_usd": None}, "status 499"),
    ],
)
def test_what_the_header_cannot_know_is_never_charged(fact: dict[str, Any], why: str) -> None:
    """Not as 0 either: it waits, and becomes overdue with the reason, also where the model is free."""
    world = World(replace(BY_HEADER, free_models=("*",)), **fact)
    world.decide(record("r1"), quiet_over=True)
    assert (world.standing, world.receipts) == (Standing.PENDING, 0)
    decision = world.decide(deadline_over=True)
    assert (world.standing, world.receipts) == (Standing.OVERDUE, 0)
    (overdue,) = decision.opened
    assert str(overdue.detail["why"]).startswith(f"COST_SOURCE=header: {why}")
    assert world.decide(release=Release("as invoiced", "ann", Decimal("0.5"))).receipt is not None


def test_a_header_above_the_maximum_is_held() -> None:
    world = World(Rules(header_cost_max_usd=Decimal("9.98")))
    (held,) = world.decide().opened
    assert (world.standing, held.kind) == (Standing.HELD, K.HELD_BAD_COST)
    world.rules = Rules(header_cost_max_usd=Decimal("9.99"))
    world.decide()
    assert (world.standing, world.receipts) == (Standing.SETTLED, 1)
    world.rules = Rules(header_cost_max_usd=Decimal(1))
    assert world.decide().is_empty, "a receipt stays"


@pytest.mark.parametrize("rules", [BY_HEADER, RULES, REPORT])
def test_a_receipt_by_header_is_left_alone(rules: Rules) -> None:
    """Whatever comes later, and whatever the source is by then; a person may still correct it."""
    world = World(BY_HEADER)
    world.decide()
    world.rules = rules
    assert world.decide(record("r1", "100"), row("r2", "0"), bad("r3")).is_empty
    adjustment = adjust(world.state, -100, Decimal(0), "goodwill", "ann")
    world.apply(Decision(Standing.SETTLED, adjustment=adjustment))
    assert world.decide(record("r4", "200")).is_empty
    assert world.decide(conflict_accounts=("account-2",)).opened[0].kind is K.CONFLICT


def test_a_receipt_by_records_is_corrected_by_records() -> None:
    world = World()
    world.decide(record("r1", "0.0001"))
    world.rules = BY_HEADER
    assert world.decide().is_empty
    adjustment = world.decide(record("r2", "0.0002")).adjustment
    assert adjustment is not None
    assert adjustment.delta_credits == 2000


def test_a_held_call_is_billed_by_header_when_that_is_asked_for() -> None:
    world = World()
    world.decide(record("r1", "0"))
    assert world.standing is Standing.HELD
    world.rules = BY_HEADER
    (closed,) = world.decide().closed
    assert (closed.kind, world.standing) == (K.HELD_ZERO_COST, Standing.SETTLED)
