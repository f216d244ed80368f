"""Settlement against a real Postgres: any order of arrival, crashes between the two transactions, time, adjustments."""

import random
import uuid
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import psycopg
import pytest

from billing_tailer import settler
from billing_tailer.errors import LedgerUnavailable
from billing_tailer.model import Corrections, SpendRecord, SpendSource
from billing_tailer.settle import CallState, Decision, Rules, decide
from billing_tailer.settler import Settler
from billing_tailer.spend import parse_row
from tests.support.follow import Rig, following
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows
from tests.support.spendlines import failure, payload, spool_line


def spool(volume: Path, *events: dict[str, Any]) -> None:
    """Append events to the spool file of the test."""
    with (volume / f"callbacks-{'0' * 32}-000000.jsonl").open("ab") as out:
        out.write(b"".join(map(spool_line, events)))


def log(volume: Path, data: bytes) -> None:
    with (volume / "audit.jsonl").open("ab") as out:
        out.write(data)


def sweep(rig: Rig) -> None:
    """What happens every few seconds."""
    rig.tailer._settler._next_sweep = 0.0
    rig.turn()


def billed(dsn: str) -> dict[str, tuple[int, Decimal]]:
    """Call id -> (credits, provider cost) of receipt and adjustments together."""
    found = rows(
        dsn,
        "select r.source_reference as id, r.charged_credits + coalesce(sum(a.delta_credits), 0)::bigint as credits, "
        "r.provider_cost_usd + coalesce(sum(a.delta_cost_usd), 0) as cost "
        "from charge_receipts r left join charge_adjustments a using (source_reference) "
        "group by r.source_system, r.source_reference",
    )
    return {row["id"]: (row["credits"], row["cost"]) for row in found}


def kinds(dsn: str) -> dict[str, str]:
    """Open exceptions: call id -> kind."""
    found = rows(dsn, "select call_id, kind from call_exceptions where closed_at is null")
    return {row["call_id"]: row["kind"] for row in found}


@pytest.mark.parametrize("first", ["line", "record"])
def test_the_second_half_settles_the_call(dsn: str, tmp_path: Path, first: str) -> None:
    with following(dsn, tmp_path) as rig:
        for half in ("line", "record") if first == "line" else ("record", "line"):
            assert count(dsn, "charge_receipts") == 0
            if half == "line":
                log(tmp_path, line(1))
            else:
                spool(tmp_path, payload(1))
            rig.turn()
    assert billed(dsn) == {"call-00000001": (2250, Decimal("0.000225"))}
    (receipt,) = rows(dsn, "select * from charge_receipts")
    assert (receipt["billing_account_id"], receipt["run_id"], receipt["attempt"]) == ("account-1", "run-1", 1)
    assert (receipt["provenance"], receipt["spend_source"], receipt["source_system"]) == (
        "response",
        "callback",
        "litellm",
    )
    (details,) = rows(dsn, "select * from llm_charge_details")
    assert (details["model"], details["provider_model"], details["provider"]) == (
        "up-gpt-4o-mini",
        "gpt-4o-mini",
        "openai",
    )
    assert (details["tokens_in"], details["tokens_out"], details["provider_call_id"]) == (1000, 200, "chatcmpl-1-0")
    assert (count(dsn, "unsettled_facts"), count(dsn, "touched_calls")) == (0, 0)


def test_a_stream_is_billed_at_its_real_cost(dsn: str, tmp_path: Path) -> None:
    """What the old reader got wrong: a stream's line has no cost, and a run's lines may lie megabytes back."""
    streamed = line(1, upstream_content_type="text/event-stream; charset=utf-8", litellm_response_cost="")
    log(tmp_path, streamed + lines(2, 4500))
    assert (tmp_path / "audit.jsonl").stat().st_size > 3_000_000
    with following(dsn, tmp_path) as rig:
        spool(tmp_path, payload(1))
        rig.turn()
    assert billed(dsn) == {"call-00000001": (2250, Decimal("0.000225"))}
    (receipt,) = rows(dsn, "select provenance from charge_receipts")
    assert receipt["provenance"] == "stream"


def test_duplicates_count_once(dsn: str, tmp_path: Path) -> None:
    log(tmp_path, line(1))
    spool(tmp_path, payload(1), payload(1), payload(1))
    with following(dsn, tmp_path) as rig:
        spool(tmp_path, payload(1))
        rig.turn()
    assert billed(dsn) == {"call-00000001": (2250, Decimal("0.000225"))}
    assert outcomes(dsn) == {"fact": 1, "spend_record": 1, "replayed": 3}
    assert_sound(dsn)


def _expected(events: Sequence[dict[str, Any]], markup: Decimal) -> dict[str, int]:
    """Credits by call id, from the events alone, with exact arithmetic."""
    sums: dict[str, Fraction] = {}
    for event in {str(event): event for event in events}.values():
        cost = Fraction(Decimal(repr(event["response_cost"])))
        sums[event["litellm_call_id"]] = sums.get(event["litellm_call_id"], Fraction(0)) + cost
    return {key: -(-cost * Fraction(markup) * 10**7 // 1) for key, cost in sums.items()}


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_arrival_ends_with_the_same_bill(dsn: str, tmp_path: Path, seed: int) -> None:
    """Lines and records shuffled, in batches of any size, with retries, fallbacks, duplicates and late attempts."""
    dice = random.Random(seed)
    markup = Decimal("1.2")
    events: list[dict[str, Any]] = []
    for number in range(60):
        events.append(payload(number, round(dice.random() / 100, 6)))
        if dice.random() < 0.3:
            events.append(failure(number, round(dice.random() / 1000, 6), attempt=1))
        if dice.random() < 0.2:
            events.append(payload(number, round(dice.random() / 100, 6), attempt=2))
    arrivals: list[Any] = [line(number) for number in range(60)] + events + dice.sample(events, 20)
    dice.shuffle(arrivals)
    with following(dsn, tmp_path, rules=Rules(markup=markup)) as rig:
        while arrivals:
            for _ in range(dice.randint(1, 12)):
                if arrivals:
                    one = arrivals.pop()
                    log(tmp_path, one) if isinstance(one, bytes) else spool(tmp_path, one)
            rig.turn()
    assert {key: credit for key, (credit, _) in billed(dsn).items()} == _expected(events, markup)
    assert (count(dsn, "charge_receipts"), count(dsn, "unsettled_facts")) == (60, 0)
    assert kinds(dsn) == {}


def test_a_crash_between_the_two_transactions(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path, lines(0, 20))
    spool(tmp_path, *(payload(number) for number in range(20)))
    with monkeypatch.context() as patch:
        patch.setattr(Settler, "after_commit", lambda *_: None)
        patch.setattr(Settler, "turn", lambda *_, **__: False)
        with following(dsn, tmp_path):
            pass
    assert (count(dsn, "usage_facts"), count(dsn, "charge_receipts")) == (20, 0)
    with following(dsn, tmp_path):
        pass
    assert (count(dsn, "charge_receipts"), count(dsn, "unsettled_facts"), count(dsn, "touched_calls")) == (20, 0, 0)


@pytest.mark.parametrize("trouble", ["ours", "Postgres"])
def test_a_batch_that_breaks_off_leaves_nothing(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    log(tmp_path, lines(0, 20))
    with following(dsn, tmp_path) as rig:

        def break_off(call: CallState, rules: Rules) -> Decision:
            if call.fact.call_id == "call-00000011":
                if trouble == "ours":
                    raise ZeroDivisionError
                pid = rig.ledger._session.info.backend_pid
                rows(dsn, "select pg_terminate_backend(%s, 5000)", pid)
            return decide(call, rules)

        spool(tmp_path, *(payload(number) for number in range(20)))
        with monkeypatch.context() as patch:
            patch.setattr(settler, "decide", break_off)
            with pytest.raises(ZeroDivisionError if trouble == "ours" else LedgerUnavailable):
                rig.turn()
        assert (count(dsn, "charge_receipts"), count(dsn, "touched_calls")) == (0, 20)
        if trouble == "Postgres":
            assert rig.tailer._become_owner()
        sweep(rig)
    assert (count(dsn, "charge_receipts"), count(dsn, "unsettled_facts"), count(dsn, "touched_calls")) == (20, 0, 0)


def test_failures_only_wait_for_silence(dsn: str, tmp_path: Path) -> None:
    log(tmp_path, line(1, status="500") + line(2))
    spool(tmp_path, failure(1), failure(2, 0.0000081))
    with following(dsn, tmp_path, quiet_seconds=3600) as rig:
        sweep(rig)
        assert (billed(dsn), kinds(dsn)) == ({}, {})
    with following(dsn, tmp_path, quiet_seconds=0) as rig:
        sweep(rig)
        assert billed(dsn) == {"call-00000002": (81, Decimal("0.0000081"))}
        assert kinds(dsn) == {"call-00000001": "not_charged"}
        spool(tmp_path, payload(1, attempt=1))
        rig.turn()
    assert billed(dsn)["call-00000001"] == (2250, Decimal("0.000225"))
    assert kinds(dsn) == {}
    (closed,) = rows(dsn, "select kind, reason from call_exceptions where closed_at is not null")
    assert closed == {"kind": "not_charged", "reason": "late_record"}


def test_silence_begins_with_what_came_last(dsn: str, tmp_path: Path) -> None:
    """The line's commit, or the newest of the records."""
    log(tmp_path, b"".join(line(number, status="500") for number in (1, 2, 3)))
    spool(tmp_path, *(failure(number, attempt=attempt) for number in (1, 2, 3) for attempt in (0, 1)))
    with following(dsn, tmp_path, quiet_seconds=600, deadline_seconds=7200) as rig:
        with psycopg.connect(dsn, autocommit=True) as postgres:
            # of the first all are old, of the second all records but one, of the third its line is not
            postgres.execute(
                "update billing.usage_facts set committed_at = now() - interval '1 hour' where call_id not like '%3'"
            )
            postgres.execute("update billing.spend_records set received_at = now() - interval '1 hour'")
            postgres.execute(
                "update billing.spend_records set received_at = now() where record_id = "
                "(select min(record_id) from billing.spend_records where call_id like '%2')"
            )
            postgres.execute("insert into billing.touched_calls select call_id from billing.usage_facts")
        sweep(rig)
    assert kinds(dsn) == {"call-00000001": "not_charged"}


def test_overdue_and_reopened(dsn: str, tmp_path: Path) -> None:
    log(tmp_path, line(1))
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        sweep(rig)
        assert kinds(dsn) == {"call-00000001": "overdue"}
        assert count(dsn, "unsettled_facts") == 1
        spool(tmp_path, payload(1))
        rig.turn()
    assert (kinds(dsn), billed(dsn)) == ({}, {"call-00000001": (2250, Decimal("0.000225"))})


def test_no_deadline_passes_while_the_spool_is_behind(dsn: str, tmp_path: Path) -> None:
    log(tmp_path, line(1))
    spool(tmp_path, payload(2))
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        with (tmp_path / f"callbacks-{'0' * 32}-000000.jsonl").open("ab") as out:
            out.write(b'{"half')
        sweep(rig)
        assert kinds(dsn) == {}


def test_holds_and_what_is_free(dsn: str, tmp_path: Path) -> None:
    log(tmp_path, lines(1, 5) + line(6, end_user=""))
    spool(
        tmp_path,
        payload(1, 0.0),
        payload(2, 0.0, model_group="free-model"),
        payload(3, 0.0, cache_hit=True),
        payload(4, None),
        payload(5, 5000.0),
        payload(6),
    )
    with following(dsn, tmp_path, rules=Rules(free_models=("free-*",))):
        pass
    assert billed(dsn) == {"call-00000002": (0, Decimal(0)), "call-00000003": (0, Decimal(0))}
    assert kinds(dsn) == {
        "call-00000001": "held_zero_cost",
        "call-00000004": "held_zero_cost",
        "call-00000005": "held_bad_cost",
        "call-00000006": "unattributed",
    }


@pytest.mark.parametrize("corrections", list(Corrections))
def test_a_later_attempt_corrects_the_bill(dsn: str, tmp_path: Path, corrections: Corrections) -> None:
    log(tmp_path, line(1))
    spool(tmp_path, payload(1))
    with following(dsn, tmp_path, rules=Rules(corrections=corrections)) as rig:
        spool(tmp_path, failure(1, 0.0000081, attempt=1))
        rig.turn()
        sweep(rig)
    if corrections is Corrections.APPLY:
        assert billed(dsn) == {"call-00000001": (2331, Decimal("0.0002331"))}
        assert kinds(dsn) == {}
    else:
        assert billed(dsn) == {"call-00000001": (2250, Decimal("0.000225"))}
        assert kinds(dsn) == {"call-00000001": "cost_mismatch"}


def test_the_larger_source_is_billed(dsn: str, tmp_path: Path) -> None:
    """The callback of one attempt was lost; the spend logs have it."""
    log(tmp_path, line(1))
    spool(tmp_path, payload(1, 0.0001))
    with following(dsn, tmp_path) as rig:
        row = {"request_id": "r1", "litellm_call_id": "call-00000001", "spend": 0.000225, "status": "success"}
        record = parse_row({**payload(1), **row}, Decimal(1000))
        assert isinstance(record, SpendRecord)
        assert record.source is SpendSource.SPEND_LOGS
        assert rig.ledger.add_records([record]) == 1
        assert rig.ledger.add_records([record]) == 0
        sweep(rig)
    assert billed(dsn) == {"call-00000001": (2250, Decimal("0.000225"))}


def test_a_call_id_used_by_two_accounts_is_held(dsn: str, tmp_path: Path) -> None:
    spoofed = line(1, nginx_request_id=uuid.uuid4().hex, end_user="account-2")
    log(tmp_path, line(1) + spoofed)
    spool(tmp_path, payload(1), payload(1, attempt=1))
    with following(dsn, tmp_path):
        pass
    assert (billed(dsn), kinds(dsn)) == ({}, {"call-00000001": "conflict"})


def test_spend_without_a_line_gets_no_receipt(dsn: str, tmp_path: Path) -> None:
    log(tmp_path, line(1))
    spool(tmp_path, payload(1), payload(2))
    with following(dsn, tmp_path):
        pass
    assert set(billed(dsn)) == {"call-00000001"}
    assert count(dsn, "spend_records") == 2


def test_the_schema_refuses_a_second_receipt_and_wrong_credits(dsn: str, tmp_path: Path) -> None:
    log(tmp_path, line(1))
    spool(tmp_path, payload(1))
    with following(dsn, tmp_path):
        pass
    copy = "insert into billing.charge_receipts select (r).* from (select r from billing.charge_receipts r) x"
    with psycopg.connect(dsn, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.UniqueViolation):
            connection.execute(copy)
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute("update billing.charge_receipts set charged_credits = charged_credits + 1")


BY_HEADER = Rules(header_cost_max_usd=Decimal(1000))


def test_by_header_and_back(dsn: str, tmp_path: Path) -> None:
    """At once, without any record; what the header cannot know becomes overdue. Back at LiteLLM's records, receipts by
    header stay as they are, and what was overdue settles."""
    stream = line(2, upstream_content_type="text/event-stream", litellm_response_cost="")
    hit = line(3, litellm_cache_key="key")
    log(tmp_path, line(1) + stream + hit + line(4, litellm_response_cost="0"))
    with following(dsn, tmp_path, rules=BY_HEADER) as rig:
        assert billed(dsn) == {"call-00000001": (2250, Decimal("0.000225"))}
        assert (kinds(dsn), count(dsn, "unsettled_facts")) == ({}, 3)
        sweep(rig)
        spool(tmp_path, payload(1, 7.0), payload(2, 7.0))
        rig.turn()
        assert set(billed(dsn)) == {"call-00000001"}
    with following(dsn, tmp_path, rules=BY_HEADER, deadline_seconds=0) as rig:
        sweep(rig)
    assert kinds(dsn) == dict.fromkeys(("call-00000002", "call-00000003", "call-00000004"), "overdue")
    (receipt,) = rows(dsn, "select provenance, spend_source, record_ids from charge_receipts")
    assert receipt == {"provenance": "response", "spend_source": "header", "record_ids": ["x-litellm-response-cost"]}
    spool(tmp_path, payload(1, 8.0, attempt=1), payload(2, 8.0, attempt=1), payload(3, 0.0, cache_hit=True))
    with following(dsn, tmp_path) as rig:
        sweep(rig)
    assert billed(dsn) == {
        "call-00000001": (2250, Decimal("0.000225")),
        "call-00000002": (150_000_000, Decimal(15)),
        "call-00000003": (0, Decimal(0)),
    }
    assert kinds(dsn) == {"call-00000004": "overdue"}


def test_by_header_a_crash_forgets_nothing(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fact is committed, and the process is gone before its receipt is."""
    log(tmp_path, line(1) + line(2, end_user=""))
    with monkeypatch.context() as patch:
        patch.setattr(Settler, "after_commit", lambda *_: None)
        patch.setattr(Settler, "turn", lambda *_, **__: False)
        with following(dsn, tmp_path, rules=BY_HEADER):
            pass
    assert (count(dsn, "usage_facts"), count(dsn, "charge_receipts")) == (2, 0)
    with following(dsn, tmp_path, rules=BY_HEADER) as rig:
        sweep(rig)
    assert (set(billed(dsn)), kinds(dsn)) == ({"call-00000001"}, {"call-00000002": "unattributed"})


def test_the_source_of_costs_changes_while_calls_are_overdue(dsn: str, tmp_path: Path) -> None:
    """Records that came under the header are looked at when LiteLLM's count again, and the header of what was overdue
    for want of a record when that counts."""
    log(tmp_path, line(1, upstream_content_type="text/event-stream", litellm_response_cost=""))
    with following(dsn, tmp_path, rules=BY_HEADER, deadline_seconds=0) as rig:
        sweep(rig)
        spool(tmp_path, payload(1))
        rig.turn()
        assert (kinds(dsn), count(dsn, "touched_calls")) == ({"call-00000001": "overdue"}, 0)
    log(tmp_path, line(2))
    with following(dsn, tmp_path, deadline_seconds=0) as rig:
        sweep(rig)
        assert (set(billed(dsn)), kinds(dsn)) == ({"call-00000001"}, {"call-00000002": "overdue"})
    with following(dsn, tmp_path, rules=BY_HEADER, deadline_seconds=0) as rig:
        sweep(rig)
    assert (set(billed(dsn)), kinds(dsn)) == ({"call-00000001", "call-00000002"}, {})


def test_what_is_prepared_while_tables_are_empty_reads_no_whole_table_later(dsn: str, tmp_path: Path) -> None:
    """The first calls of a new installation come one by one; Postgres would keep a plan for all values from then, and
    autovacuum, which would have it make another one, comes once a minute."""
    with following(dsn, tmp_path) as rig:
        for number in range(20):
            log(tmp_path, line(number))
            rig.turn()
            spool(tmp_path, payload(number))
            rig.turn()
        log(tmp_path, lines(100, 2000))
        spool(tmp_path, *(payload(number) for number in range(100, 2100)))
        rig.turn()
        before = rows_read_whole(dsn)
        for number in range(3000, 3020):
            log(tmp_path, line(number))
            rig.turn()
            spool(tmp_path, payload(number))
            rig.turn()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select pg_sleep(1.5)")  # what the session did is told when it has ended
    assert len(billed(dsn)) == 2040
    assert rows_read_whole(dsn) - before < 40_000, "40 turns read 2,000 rows each"


def rows_read_whole(dsn: str) -> int:
    """Of the tables of lines and records, by sequential scans."""
    found = rows(
        dsn,
        "select sum(seq_tup_read)::bigint as n from pg_stat_user_tables "
        "where relname in ('usage_facts', 'spend_records')",
    )
    return int(found[0]["n"])
