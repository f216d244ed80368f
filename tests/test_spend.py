"""Spend records: the recorded payloads and rows against a table, every odd value, and properties of all."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import ijson  # type: ignore[import-untyped]  # it has no types
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from billing_tailer import audit
from billing_tailer.model import (
    DeadLetterReason,
    Rejected,
    Skip,
    SkipReason,
    SpendRecord,
    SpendSource,
    SpendStatus,
    UsageFact,
)
from billing_tailer.settings import LLM_ROUTES
from billing_tailer.spend import TOKENS_MAX, parse_callback, parse_row, parse_spool_line, slim
from tests.support.loglines import line

DATA = Path(__file__).parent / "data"
COST_MAX = Decimal(1000)
R = DeadLetterReason
HALF = chr(0xD800)
"""Half of a surrogate pair: JSON can say it, UTF-8 cannot."""
OK, FAILED = SpendStatus.SUCCESS, SpendStatus.FAILURE


def payload(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = orjson.loads((DATA / "payloads" / f"{name}.json").read_bytes())
    return loaded


def answer(name: str) -> Any:
    return orjson.loads((DATA / "spendlogs" / f"{name}.json").read_bytes())


PAYLOADS = sorted(path.stem for path in (DATA / "payloads").iterdir())
ROWS: list[dict[str, Any]] = [*answer("tom_rows"), *answer("v2_page")["data"], *answer("by_dup_call")]


def callback(raw: object) -> SpendRecord:
    record = parse_callback(raw, COST_MAX)
    assert isinstance(record, SpendRecord), record
    return record


def row(raw: object) -> SpendRecord:
    record = parse_row(raw, COST_MAX)
    assert isinstance(record, SpendRecord), record
    return record


# --- what was recorded

SEEN = """
abort_nonstream success up-slow openai/gpt-4o-mini-slow openai 1000 200 600 64 0.000225 - -
abort_stream success up-slow openai/gpt-4o-mini-slow openai 32 17 0 0 0.000014999999999999999 False 499
auth_failure failure up-gpt-4o-mini openai/gpt-4o-mini openai 0 0 - - 0 False 400
cache_hit success up-gpt-4o-mini openai/gpt-4o-mini openai 1000 200 600 64 0 True -
cache_hit_stream success up-gpt-4o-mini openai/gpt-4o-mini openai 1000 200 - 0 0 True -
declared_free success up-free-declared openai/other-model:free openai 1000 200 600 64 0 - -
embedding success up-emb openai/text-embedding-3-small openai 500 0 - - 0.00001 - -
embedding_cache_hit success up-emb openai/text-embedding-3-small openai 500 0 - - 0 True -
failure_badmodel failure no-such-model no-such-model - 0 0 - - 0 False 400
failure_midstream failure up-diestream openai/gpt-4o-mini-diestream openai 35 9 0 0 0.00001065 False -
failure_timeout failure up-hang openai/gpt-4o-mini-hang openai 0 0 - - 0 False 408
failure_upstream500 failure up-err500 openai/gpt-4o-mini-err500 openai 0 0 - - 0 False internal
fallback failure up-fb openai/gpt-4o-mini-err500 openai 0 0 - - 0 False internal
fallback_2 success up-gpt-4o-mini openai/gpt-4o-mini openai 1000 200 600 64 0.000225 - -
messages_nonstream success up-haiku anthropic/claude-haiku-4-5 anthropic 1100 200 600 0 0.001585 - -
messages_stream success up-haiku anthropic/claude-haiku-4-5 anthropic 1100 200 600 0 0.001585 False -
nginx_set_call_id success up-gpt-4o-mini openai/gpt-4o-mini openai 1000 200 600 64 0.000225 - -
nonstream success up-gpt-4o-mini openai/gpt-4o-mini openai 1000 200 600 64 0.000225 - -
nonstream_virtualkey success up-gpt-4o-mini openai/gpt-4o-mini openai 1000 200 600 64 0.000225 - -
responses_api success mock-claude-haiku-4-5 anthropic/claude-haiku-4-5 - 36 87 0 - 0.00047100000000000006 - -
retry failure up-flaky openai/gpt-4o-mini-flaky openai 0 0 - - 0 False internal
retry_2 success up-flaky openai/gpt-4o-mini-flaky openai 1000 200 600 64 0.000225 - -
stream success up-gpt-4o-mini openai/gpt-4o-mini openai 1000 200 600 64 0.000225 False -
unpriced success mock-claude-3-5-haiku anthropic/claude-3-5-haiku anthropic 10 20 - - 0 - -
wildcard success wild/gpt-4o openai/gpt-4o openai 1000 200 600 64 0.000225 - -
"""
"""Payload, status, model group, model, provider; prompt, completion, cached, reasoning tokens; USD, hit, error."""


def told(record: SpendRecord) -> str:
    cost = None if record.cost_usd is None else f"{record.cost_usd:f}"
    fields = [record.status, record.model_group, record.model, record.provider]
    counts = [record.prompt_tokens, record.completion_tokens, record.cached_tokens, record.reasoning_tokens]
    last = ["0" if cost == "0.0" else cost, record.cache_hit, record.error_code]
    return " ".join("-" if field is None else str(field) for field in (*fields, *counts, *last))


def test_payloads() -> None:
    """On cache hits the payload shows the full price elsewhere, which must not be taken."""
    assert [f"{name} {told(callback(payload(name)))}" for name in PAYLOADS] == SEEN.strip().splitlines()


@pytest.mark.parametrize("name", PAYLOADS)
def test_payload_identity(name: str) -> None:
    raw = payload(name)
    record = callback(raw)
    assert record.source is SpendSource.CALLBACK
    assert record.call_id == raw["litellm_call_id"], "not id, not trace_id"
    assert record.request_id == raw["id"]
    assert record.end_user == (None if name == "auth_failure" else "enduser-42")
    assert record.run_id == (None if name == "auth_failure" else raw["metadata"]["spend_logs_metadata"]["run_id"])
    assert record.cost_text is None
    assert record.started_at is not None
    assert record.ended_at is not None
    assert record.started_at.timestamp() == pytest.approx(raw["startTime"], abs=1e-6)
    assert record.ended_at.timestamp() == pytest.approx(raw["endTime"], abs=1e-6)


def test_rows() -> None:
    seen = {record.request_id: record for record in map(row, answer("tom_rows"))}
    assert len(seen) == 15
    total = sum((record.cost_usd or Decimal(0) for record in seen.values()), Decimal(0))
    assert round(total, 12) == Decimal(repr(answer("tom_sum")[0]["spend"])), "LiteLLM's own sum"
    gone = seen["chatcmpl-up00082"]
    assert told(gone) == "success up-slow openai/gpt-4o-mini-slow openai 37 17 0 0 0.000015749999999999997 False 499"
    died = seen["c736441e-5300-45c4-aa8a-9c10184b813e"]
    assert (died.status, died.cost_usd, died.error_code) == (FAILED, Decimal("0.0000108"), "500")
    failed = seen["553fcfb7-b874-4867-a89b-801dc4797b98"]
    assert (failed.status, failed.cost_usd, failed.prompt_tokens) == (FAILED, Decimal(0), 35)
    hit = seen["chatcmpl-up00075_cache_hit1795309167.0730343"]
    assert (hit.status, hit.cost_usd, hit.cache_hit) == (OK, Decimal(0), True)
    assert hit.call_id == "c67eb9fd-ca91-48d6-9333-9c81d8a8d2ef"


def test_a_row() -> None:
    assert row(answer("by_call_id")[0]) == SpendRecord(
        call_id="e00abc57-cf57-4a8d-bff0-582b6f118433",
        source=SpendSource.SPEND_LOGS,
        record_id="chatcmpl-up00073",
        status=OK,
        model_group="up-gpt-4o-mini",
        model="openai/gpt-4o-mini",
        provider="openai",
        prompt_tokens=1000,
        completion_tokens=200,
        cached_tokens=600,
        reasoning_tokens=64,
        cost_usd=Decimal("0.000225"),
        cost_text=None,
        cache_hit=None,
        end_user="enduser-42",
        run_id="run-db-nonstream",
        error_code=None,
        request_id="chatcmpl-up00073",
        started_at=datetime(2026, 11, 22, 0, 59, 3, 524_000, UTC),
        ended_at=datetime(2026, 11, 22, 0, 59, 4, 46_000, UTC),
    )


def test_the_same_row_in_every_version() -> None:
    expected = row(answer("by_call_id")[0])
    assert row(answer("v2_call")["data"][0]) == expected, "v2 has times without Z"
    assert row(answer("raw_row")) == expected
    older = answer("raw_row")
    del older["litellm_call_id"]
    assert row(older) == expected, "the call id may be in the metadata only"
    older["metadata"] = json.dumps(older["metadata"])
    assert row(older) == expected, "which may be text"


def test_a_callback_and_its_row_agree() -> None:
    posted, written = callback(payload("nonstream_virtualkey")), row(answer("by_call_id")[0])
    for name in ("call_id", "status", "model_group", "model", "provider", "prompt_tokens", "completion_tokens"):
        assert getattr(posted, name) == getattr(written, name)
    for name in ("cached_tokens", "reasoning_tokens", "cost_usd", "end_user", "run_id", "request_id"):
        assert getattr(posted, name) == getattr(written, name)


def test_two_rows_of_one_call_id() -> None:
    records = [row(raw) for raw in answer("by_dup_call")]
    assert {record.call_id for record in records} == {"dup-call"}
    assert len({record.record_id for record in records}) == 2


@pytest.mark.parametrize("name", ["dt_rows", "v2_nodates", "tom_sum", "none"])
def test_what_is_no_row_is_rejected(name: str) -> None:
    """Errors and summaries, taken for rows by mistake."""
    raw = answer(name)
    for one in raw if isinstance(raw, list) else [raw]:
        rejected = parse_row(one, COST_MAX)
        assert isinstance(rejected, Rejected)
        assert rejected.reason is R.MISSING_FIELD


# --- the identity of a callback


def test_record_id_never_changes() -> None:
    """Pinned: with another hash, every record that comes again would be charged again."""
    stream = callback(payload("stream"))
    assert stream.record_id == "83e2f9fa57735beaad34acc3b96d18ed64cc9c723cd8010bc153d2ed197568e0"
    assert (
        callback(payload("failure_badmodel")).record_id
        == "3266ccf3f5178e0dc9ca1bc808139f2be6e01126cb8050254ecfbbee568524e0"
    )


def test_every_recorded_attempt_has_its_own_record_id() -> None:
    assert len({callback(payload(name)).record_id for name in PAYLOADS}) == len(PAYLOADS)


def test_a_failed_and_a_successful_embedding_share_their_id_but_not_the_record_id() -> None:
    success = payload("embedding")
    failure = {**success, "status": "failure", "response_cost": 0.0, "model_id": "dep-emb-broken"}
    assert callback(success).record_id != callback(failure).record_id


@pytest.mark.parametrize("name", ["id", "status", "model_id", "startTime", "endTime", "response_cost"])
def test_record_id_covers(name: str) -> None:
    raw = payload("embedding")
    other = {"status": "failure", "startTime": 1795307915.3, "endTime": 1795307915.4, "response_cost": 2e-05}
    changed = {**raw, name: other.get(name, "another")}
    assert callback(raw).record_id != callback(changed).record_id
    assert callback({**raw, name: None}).record_id != callback(raw).record_id


def test_record_id_covers_nothing_else() -> None:
    raw = payload("embedding")
    only = {name: raw[name] for name in ("litellm_call_id", "id", "status", "model_id", "startTime", "endTime")}
    assert callback({**only, "response_cost": raw["response_cost"]}).record_id == callback(raw).record_id


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_same_record_whichever_parser_read_it(name: str) -> None:
    """Large bodies are read by ijson, which gives Decimal where orjson and json give float."""
    data = (DATA / "payloads" / f"{name}.json").read_bytes()
    expected = callback(orjson.loads(data))
    assert callback(json.loads(data)) == expected
    assert callback(json.loads(data, parse_float=Decimal)) == expected
    (slowly,) = ijson.items(b"[" + data + b"]", "item")
    assert callback(slowly) == expected
    assert orjson.dumps(slim(slowly)) == orjson.dumps(slim(orjson.loads(data)))


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(min_value=1.7e9, max_value=1.9e9))
def test_numbers_make_the_same_record_as_float_decimal_and_text(cost: float, time: float) -> None:
    raw = payload("embedding")
    records = {
        callback({**raw, "response_cost": kind(repr(cost)), "startTime": kind(repr(time))}).record_id
        for kind in (float, Decimal, str)
    }
    assert len(records) == 1


def test_long_ids_are_kept_apart() -> None:
    raw = payload("responses_api")
    assert len(raw["id"]) == 457
    assert callback(raw).request_id == raw["id"]
    one, two = (callback({**raw, "id": "x" * 100_000 + end}) for end in ("1", "2"))
    assert one.record_id != two.record_id
    assert one.request_id is not None
    assert len(one.request_id) < 100
    long = row({**answer("raw_row"), "request_id": "é" * 500})
    assert len(long.record_id.encode()) < 100, "it is a part of a database key"


# --- odd values


def with_(**changes: object) -> dict[str, Any]:
    return {**payload("nonstream"), **changes}


@given(
    st.text(min_size=1, max_size=8) | st.sampled_from(["a b", " a", "a ", "a" * 256, "a" * 257, "\N{NO-BREAK SPACE}a"])
)
@example("a b")
def test_an_id_is_one_for_the_line_and_for_the_record(call_id: str) -> None:
    """What is the key of a call in the log must be one in a callback, or the call would never be settled."""
    text = json.dumps({**json.loads(line(1)), "litellm_call_id": call_id}).encode()
    fact, record = audit.parse(text, audit.routes(LLM_ROUTES)), parse_callback(with_(litellm_call_id=call_id), COST_MAX)
    assert isinstance(record, SpendRecord) == (isinstance(fact, UsageFact) and fact.id_echoed)
    if isinstance(record, SpendRecord) and isinstance(fact, UsageFact):
        assert record.call_id == fact.call_id == call_id


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"litellm_call_id": None}, R.MISSING_FIELD),
        ({"litellm_call_id": ""}, R.MISSING_FIELD),
        ({"litellm_call_id": "-"}, R.MISSING_FIELD),
        ({"litellm_call_id": 5}, R.BAD_VALUE),
        ({"litellm_call_id": ["a"]}, R.BAD_VALUE),
        ({"litellm_call_id": "a" * 257}, R.BAD_VALUE),
        ({"litellm_call_id": "a\0b"}, R.BAD_VALUE),
        ({"litellm_call_id": "a" + HALF}, R.BAD_VALUE),
        ({"litellm_call_id": "a\N{REPLACEMENT CHARACTER}"}, R.BAD_VALUE),
        ({"litellm_call_id": " a"}, R.BAD_VALUE),
        ({"status": "perhaps"}, R.BAD_VALUE),
        ({"status": 1}, R.BAD_VALUE),
        ({"status": {}}, R.BAD_VALUE),
        ({"id": {"a": 1}}, R.BAD_VALUE),
        ({"model_id": [1]}, R.BAD_VALUE),
        ({"startTime": {}}, R.BAD_VALUE),
    ],
)
def test_rejected(changes: dict[str, object], reason: DeadLetterReason) -> None:
    raw = with_(**changes)
    rejected = parse_callback(raw, COST_MAX)
    assert isinstance(rejected, Rejected)
    assert rejected.reason is reason
    assert next(iter(changes)) in rejected.detail, "names the field"
    assert parse_callback(slim(raw), COST_MAX) == rejected
    assert parse_callback(orjson.loads(orjson.dumps(slim(raw))), COST_MAX) == rejected


def test_a_record_without_call_id_is_rejected() -> None:
    raw = payload("nonstream")
    del raw["litellm_call_id"]
    assert parse_callback(raw, COST_MAX) == Rejected(R.MISSING_FIELD, "litellm_call_id")
    old = answer("raw_row")
    del old["litellm_call_id"], old["metadata"]["litellm_call_id"]
    assert parse_row(old, COST_MAX) == Rejected(R.MISSING_FIELD, "litellm_call_id"), "the request id is no join key"


def test_a_row_without_request_id_is_rejected() -> None:
    assert parse_row({**answer("raw_row"), "request_id": None}, COST_MAX) == Rejected(R.MISSING_FIELD, "request_id")


@pytest.mark.parametrize("raw", [None, 1, "text", [], [{}], True, 1.5])
def test_what_is_no_object_is_rejected(raw: object) -> None:
    for rejected in (parse_callback(raw, COST_MAX), parse_row(raw, COST_MAX)):
        assert isinstance(rejected, Rejected)
        assert rejected.reason is R.NOT_AN_OBJECT


@pytest.mark.parametrize(
    ("status", "metadata", "errors", "expected"),
    [
        ("success", {"status": "failure"}, {"error_code": "500"}, OK),
        ("failure", {}, {}, FAILED),
        ("SUCCESS", {}, {}, OK),
        (None, {}, {}, OK),
        ("", {}, {}, OK),
        (None, {"status": None}, {"error_code": "", "error_class": ""}, OK),
        (None, {"status": "failure"}, {}, FAILED),
        (None, {"status": "success"}, {"error_code": "500"}, OK),
        (None, {}, {"error_code": "500"}, FAILED),
        (None, {}, {"error_code": 500}, FAILED),
        (None, {}, {"error_code": "", "error_class": "ReadError"}, FAILED),
        (None, {}, {"error_code": "499", "error_class": "ClientDisconnected"}, OK),
        (None, {"error_information": {"error_code": "400"}}, None, FAILED),
        (None, {"error_information": None}, None, OK),
        (None, None, "text", OK),
    ],
)
def test_status(status: object, metadata: object, errors: object, expected: SpendStatus) -> None:
    assert callback(with_(status=status, metadata=metadata, error_information=errors)).status is expected
    in_row = {**answer("raw_row"), "status": status, "metadata": metadata, "error_information": errors}
    assert row(in_row).status is expected


COSTS: list[tuple[object, str | None, str | None]] = [
    (0.000225, "0.000225", None),
    (5.9999999999999995e-05, "0.000059999999999999995", None),
    (0, "0", None),
    (-0.0, "0", None),
    (1000, "1000", None),
    (Decimal("0.0001050000000000000100000001"), "0.0001050000000000000100000001", None),
    ("0.000225", "0.000225", None),
    ("1e-05", "0.00001", None),
    (5e-324, f"{Decimal('5e-324'):f}", None),
    (None, None, None),
    ("", None, None),
    (1000.01, None, "1000.01"),
    (-0.5, None, "-0.5"),
    (float("nan"), None, "nan"),
    (float("inf"), None, "inf"),
    (float("-inf"), None, "-inf"),
    (Decimal("NaN"), None, "NaN"),
    ("NaN", None, "NaN"),
    ("about a cent", None, "about a cent"),
    ("a\0b\ud800", None, "a?b?"),
    (True, None, "true"),
    (False, None, "false"),
    ([0.1], None, "a JSON list"),
    ({"usd": 0.1}, None, "a JSON dict"),
    (1e300, None, "1e+300"),
    (10**30, None, "1" + "0" * 30),
    pytest.param(2**9999, None, "an integer of 10000 bits", id="huge"),  # type: ignore[list-item]  # beside tuples
    ("1e-9999", None, "1e-9999"),
    ("9" * 100, None, "9" * 77 + "..."),
    (Decimal("0." + "3" * 100), None, "0." + "3" * 75 + "..."),
]


@pytest.mark.parametrize(("cost", "usd", "text"), COSTS)
def test_costs(cost: object, usd: str | None, text: str | None) -> None:
    raw = with_(response_cost=cost)
    record = callback(raw)
    assert record.cost_usd == (None if usd is None else Decimal(usd))
    assert record.cost_text == text
    spooled = orjson.dumps({"received_at": 1795307912.6, "payload": slim(raw)})
    assert parse_spool_line(spooled, COST_MAX) == record, "nothing is lost on the way through the spool"
    in_row = row({**answer("raw_row"), "spend": cost})
    assert (in_row.cost_usd, in_row.cost_text) == (record.cost_usd, record.cost_text)


def test_a_payload_without_cost_has_none() -> None:
    raw = payload("cache_hit")
    del raw["response_cost"]
    record = callback(raw)
    assert (record.cost_usd, record.cost_text) == (None, None)


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        (0, 0),
        (1000, 1000),
        (1000.0, 1000),
        (Decimal(1000), 1000),
        (TOKENS_MAX, TOKENS_MAX),
        (TOKENS_MAX + 1, None),
        (10**30, None),
        (-1, None),
        (1.5, None),
        (float("nan"), None),
        (float("inf"), None),
        (Decimal("sNaN"), None),
        (True, None),
        ("1000", None),
        (None, None),
        ([], None),
    ],
)
def test_tokens(value: object, tokens: int | None) -> None:
    usage = {
        "prompt_tokens_details": {"cached_tokens": value},
        "completion_tokens_details": {"reasoning_tokens": value},
    }
    record = callback(with_(prompt_tokens=value, completion_tokens=value, metadata={"usage_object": usage}))
    assert (record.prompt_tokens, record.completion_tokens) == (tokens, tokens)
    assert (record.cached_tokens, record.reasoning_tokens) == (tokens, tokens)


@pytest.mark.parametrize(
    ("usage", "cached", "reasoning"),
    [
        ({"cache_read_input_tokens": 600, "cache_creation_input_tokens": 100}, 600, None),
        ({"cache_read_input_tokens": 600, "prompt_tokens_details": None}, 600, None),
        ({"cache_read_input_tokens": 0, "prompt_tokens_details": {"cached_tokens": 7}}, 7, None),
        ({"completion_tokens_details": {"reasoning_tokens": 0}}, None, 0),
        ({"completion_tokens_details": []}, None, None),
        ({}, None, None),
        (None, None, None),
        ("text", None, None),
    ],
)
def test_usage(usage: object, cached: int | None, reasoning: int | None) -> None:
    record = callback(with_(metadata={"usage_object": usage}))
    assert (record.cached_tokens, record.reasoning_tokens) == (cached, reasoning)


@pytest.mark.parametrize(
    ("value", "hit"),
    [(True, True), (False, False), ("True", True), ("False", False), ("true", True), ("FALSE", False)],
)
def test_cache_hit(value: object, hit: bool) -> None:
    assert callback(with_(cache_hit=value)).cache_hit is hit
    assert row({**answer("raw_row"), "cache_hit": value}).cache_hit is hit


@pytest.mark.parametrize("value", [None, "None", "", "yes", 1, 0, [], {}])
def test_no_cache_hit(value: object) -> None:
    assert callback(with_(cache_hit=value)).cache_hit is None
    assert row({**answer("raw_row"), "cache_hit": value}).cache_hit is None


@pytest.mark.parametrize(
    ("value", "time"),
    [
        (1795307914.565605, datetime(2026, 11, 22, 0, 38, 34, 565_605, UTC)),
        (1795307914, datetime(2026, 11, 22, 0, 38, 34, 0, UTC)),
        ("1795307914.565605", datetime(2026, 11, 22, 0, 38, 34, 565_605, UTC)),
        ("2026-11-22T00:59:03.524000Z", datetime(2026, 11, 22, 0, 59, 3, 524_000, UTC)),
        ("2026-11-22T00:59:03.524000", datetime(2026, 11, 22, 0, 59, 3, 524_000, UTC)),
        ("2026-11-22 00:59:03.524", datetime(2026, 11, 22, 0, 59, 3, 524_000, UTC)),
        ("2026-11-22T02:59:03+02:00", datetime(2026, 11, 22, 0, 59, 3, 0, UTC)),
        (None, None),
        ("", None),
        ("yesterday", None),
        ("0001-01-01T00:00:00+23:00", None),
        ("9999-12-31T23:59:59-23:00", None),
        (0, None),
        (-1.5, None),
        (1e300, None),
        (float("nan"), None),
        (10**30, None),
        (True, None),
        ("2026\ud800", None),
    ],
)
def test_times(value: object, time: datetime | None) -> None:
    record = callback(with_(startTime=value, endTime=value))
    assert (record.started_at, record.ended_at) == (time, time)


@pytest.mark.parametrize(
    "value", ["", "-", None, 5, [], {}, True, "a\0b", HALF, "a\N{REPLACEMENT CHARACTER}", "a" * 257, "a" * 10**6]
)
def test_soft_text_becomes_none(value: object) -> None:
    record = callback(
        with_(
            model_group=value,
            model=value,
            custom_llm_provider=value,
            end_user=value,
            error_information={"error_code": value if value != 5 else None},
            metadata={"spend_logs_metadata": {"run_id": value}},
        )
    )
    assert (record.model_group, record.model, record.provider, record.end_user) == (None,) * 4
    assert (record.error_code, record.run_id) == (None, None)


@pytest.mark.parametrize(
    ("metadata", "run_id"),
    [
        ({"spend_logs_metadata": {"run_id": "a"}, "requester_custom_headers": {"x-cogni-run-id": "b"}}, "a"),
        ({"spend_logs_metadata": None, "requester_custom_headers": {"x-cogni-run-id": "b"}}, "b"),
        ({"spend_logs_metadata": '{"run_id": "a"}'}, "a"),
        ({"spend_logs_metadata": '{"run_id": '}, None),
        ({"spend_logs_metadata": "[1]"}, None),
        ({"spend_logs_metadata": ["run_id"]}, None),
        ('{"spend_logs_metadata": {"run_id": "a"}}', "a"),
        ('{"spend_logs_metadata": "\ud800', None),
        (None, None),
        ([], None),
    ],
)
def test_run_id(metadata: object, run_id: str | None) -> None:
    raw = with_(metadata=metadata)
    assert callback(raw).run_id == run_id
    assert callback(slim(raw)).run_id == run_id


# --- the spool


@pytest.mark.parametrize("name", PAYLOADS)
def test_spool_line(name: str) -> None:
    raw = payload(name)
    line = orjson.dumps({"received_at": 1795307912.609, "payload": slim(raw)})
    assert len(line) < 1500, "a tenth of the payload"
    assert parse_spool_line(line, COST_MAX) == callback(raw)
    assert parse_spool_line(line + b"\n", COST_MAX) == callback(raw)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", R.INVALID_JSON),
        (b"{", R.INVALID_JSON),
        (b"\xff", R.INVALID_JSON),
        (b'{"received_at": 1, "payload": {"litellm_call_id": "\\ud800"}}', R.INVALID_JSON),
        (b"[" * 5000, R.INVALID_JSON),
        (b"[]", R.NOT_AN_OBJECT),
        (b'{"received_at": 1, "payload": []}', R.NOT_AN_OBJECT),
        (b'{"received_at": 1}', R.MISSING_FIELD),
        (b'{"received_at": 1, "payload": {}}', R.MISSING_FIELD),
        (b'{"received_at": 1, "rejected": {"reason": "too_long", "detail": "sha256 ab"}}', R.TOO_LONG),
        (b'{"received_at": 1, "rejected": {"reason": "odd", "detail": 5}}', R.BAD_VALUE),
    ],
)
def test_bad_spool_line(line: bytes, reason: DeadLetterReason) -> None:
    rejected = parse_spool_line(line, COST_MAX)
    assert isinstance(rejected, Rejected)
    assert rejected.reason is reason
    assert rejected.detail


@pytest.mark.parametrize("line", [b'{"received_at": 1, "payload": {"litellm_ca\x18', b"\x18\n", b"\x18", b"\0\0\x18"])
def test_a_torn_spool_line_is_skipped(line: bytes) -> None:
    assert parse_spool_line(line, COST_MAX) == Skip(SkipReason.TORN)


# --- nothing survives but what a bill needs

CANARY = "CANARY-a-prompt-or-a-key"

ALLOWED = {
    ("litellm_call_id",),
    ("id",),
    ("status",),
    ("model_id",),
    ("startTime",),
    ("endTime",),
    ("response_cost",),
    ("model_group",),
    ("model",),
    ("custom_llm_provider",),
    ("end_user",),
    ("error_information", "error_code"),
    ("error_information", "error_class"),
    ("metadata", "status"),
    ("metadata", "error_information", "error_code"),
    ("metadata", "error_information", "error_class"),
    ("metadata", "spend_logs_metadata", "run_id"),
    ("metadata", "requester_custom_headers", "x-cogni-run-id"),
}
"""The places of a payload from which text may survive."""
FLAGS_AND_COUNTS = ("cache_hit", "prompt_tokens", "completion_tokens")

Place = tuple[str | int, ...]


def places(value: object, here: Place = ()) -> Iterator[Place]:
    """Every place in a JSON value, containers included."""
    if here:
        yield here
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*here, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*here, number))


def planted(value: Any, at: Place, what: object) -> Any:
    """A copy of a JSON value with something else at one place."""
    if not at:
        return what
    result = copy.copy(value)
    result[at[0]] = planted(result[at[0]], at[1:], what)
    return result


def keys_planted(value: Any) -> Any:
    """A copy in which every object has one key more."""
    if isinstance(value, dict):
        return {**{key: keys_planted(inner) for key, inner in value.items()}, CANARY: CANARY}
    return [keys_planted(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_else_survives(name: str) -> None:
    raw = payload(name)
    everywhere = [place for place in places(raw) if place not in ALLOWED]
    assert len(everywhere) > 80
    assert ("messages",) in everywhere
    shapes: list[Callable[[str], object]] = [
        lambda text: text,
        lambda text: [text],
        lambda text: {text: text},
        lambda text: {"content": text, "run_id": [text], "error_code": {"a": text}, "cached_tokens": text},
    ]
    for place in everywhere:
        for shape in shapes:
            changed = planted(raw, place, shape(CANARY))
            assert CANARY not in json.dumps(slim(changed)), place
            assert CANARY not in repr(parse_callback(changed, COST_MAX)), place
    assert CANARY not in json.dumps(slim(keys_planted(raw)))
    whole: dict[str, Any] = raw
    for place in everywhere:
        if len(place) == 1 and place[0] not in ("metadata", "error_information", *FLAGS_AND_COUNTS):
            whole = planted(whole, place, {"role": "user", "content": CANARY * 1000})
    assert slim(whole) == slim(raw), "all at once"


@pytest.mark.parametrize("place", sorted(ALLOWED), ids=".".join)
def test_containers_at_allowed_places_lose_their_content(place: tuple[str, ...]) -> None:
    raw = payload("failure_midstream")
    raw["metadata"]["status"] = "failure"
    raw["metadata"]["error_information"] = {"error_code": "1", "error_class": "E"}
    for what in ([CANARY], {CANARY: CANARY}, [{"a": [CANARY]}]):
        changed = planted(raw, place, what)
        assert CANARY not in json.dumps(slim(changed))
        assert CANARY not in repr(parse_callback(changed, COST_MAX))


def test_text_at_allowed_places_is_bounded() -> None:
    raw = payload("failure_midstream")
    for place in ALLOWED - {("metadata", "status"), ("metadata", "error_information", "error_code")}:
        if place[:2] != ("metadata", "error_information"):
            raw = planted(raw, place, CANARY * 100_000)
    assert len(orjson.dumps(slim(raw))) < 2000
    assert CANARY * 4 not in json.dumps(slim(raw))


# --- properties

numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.decimals(allow_nan=True, allow_infinity=True),
    st.sampled_from([2**9999, -(2**9999), Decimal("1e99999"), Decimal("sNaN"), 1795307914.565605]),
)
texts = st.one_of(
    st.text(max_size=20),
    st.text(alphabet=st.characters(codec=None, categories=["Cs", "Cc", "Lu", "Nd"]), max_size=300),
    st.sampled_from(
        ["success", "failure", "True", "None", "0.000225", "1e-05", "NaN", "9" * 300, "2026-11-22T00:59:03Z"]
    ),
    st.sampled_from(['{"status": "failure"}', '{"run_id": "a"}', "{", "[1]", "x" * 5000]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
KEYS = (
    "litellm_call_id",
    "id",
    "request_id",
    "status",
    "model_id",
    "startTime",
    "endTime",
    "response_cost",
    "spend",
    "cache_hit",
    "model_group",
    "model",
    "custom_llm_provider",
    "prompt_tokens",
    "completion_tokens",
    "end_user",
    "error_information",
    "metadata",
    "error_code",
    "error_class",
    "spend_logs_metadata",
    "requester_custom_headers",
    "x-cogni-run-id",
    "run_id",
    "usage_object",
    "prompt_tokens_details",
    "cached_tokens",
    "cache_read_input_tokens",
    "completion_tokens_details",
    "reasoning_tokens",
    "messages",
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), texts), inner, max_size=8),
    ),
    max_leaves=25,
)
objects = st.dictionaries(st.sampled_from(KEYS), anything, max_size=len(KEYS))
changed_payloads = st.builds(lambda name, changes: {**payload(name), **changes}, st.sampled_from(PAYLOADS), objects)


@given(st.one_of(objects, changed_payloads))
@example({"litellm_call_id": "a", "metadata": '{"metadata": "' + "{" * 1000})
@example({"litellm_call_id": "a", "response_cost": float("nan"), "status": "success"})
def test_slim_is_idempotent_and_loses_nothing(raw: dict[str, Any]) -> None:
    slimmed = slim(raw)
    written = orjson.dumps(slimmed)
    assert slim(slimmed) == slimmed
    assert orjson.dumps(slim(orjson.loads(written))) == written, "also through JSON"
    record = parse_callback(raw, COST_MAX)
    assert parse_callback(slimmed, COST_MAX) == record
    assert parse_spool_line(orjson.dumps({"received_at": 1.5, "payload": slimmed}), COST_MAX) == record
    assert len(written) < 8000


@given(anything)
def test_arbitrary_json_never_raises(raw: Any) -> None:
    parse_callback(raw, COST_MAX)
    parse_row(raw, COST_MAX)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise(line: bytes) -> None:
    parse_spool_line(line, COST_MAX)


def is_storable(text: str | None) -> bool:
    return text is None or ("\0" not in text and text.encode() == text.encode("utf-8", "surrogatepass"))


@given(st.one_of(objects, changed_payloads))
def test_a_record_can_be_stored(raw: Mapping[str, Any]) -> None:
    for record in (parse_callback(raw, COST_MAX), parse_row(raw, COST_MAX)):
        if isinstance(record, Rejected):
            assert is_storable(record.detail)
            assert len(record.detail) <= 300
            continue
        for value in (record.call_id, record.record_id, record.model, record.end_user, record.request_id):
            assert is_storable(value)
        for value in (record.run_id, record.error_code, record.cost_text, record.model_group, record.provider):
            assert is_storable(value)
        assert 0 < len(record.record_id.encode()) <= 512
        assert record.cost_usd is None or 0 <= record.cost_usd <= COST_MAX
        assert record.cost_usd is None or record.cost_text is None
        for count in (record.prompt_tokens, record.completion_tokens, record.cached_tokens, record.reasoning_tokens):
            assert count is None or 0 <= count <= TOKENS_MAX
        for time in (record.started_at, record.ended_at):
            assert time is None or time.tzinfo is UTC
