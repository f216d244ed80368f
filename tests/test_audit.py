"""Audit lines: the recorded real ones against a table written by hand, every odd one, and properties of all."""

import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from billing_tailer.audit import parse, routes
from billing_tailer.model import DeadLetterReason, Rejected, Skip, SkipReason, UsageFact
from billing_tailer.rows import row_of
from billing_tailer.settings import LLM_ROUTES
from tests.support.loglines import RECORDED

R = DeadLetterReason
IS_LLM_ROUTE = routes(LLM_ROUTES)
REQUEST_ID = "57f12d0299cf1194ba9e93d772036edb"
CALL_ID = "075dc317-b3f4-49f3-b0c5-c7c3e89827c5"

FIELDS: Mapping[str, bytes] = {
    "msec": b"1795307912.609",
    "time": b"2026-11-22T00:38:32+00:00",
    "call_id": REQUEST_ID.encode(),
    "nginx_request_id": REQUEST_ID.encode(),
    "method": b"POST",
    "uri": b"/v1/chat/completions",
    "status": b"200",
    "run_id": b"run-1",
    "end_user": b"account-1",
    "litellm_call_id": CALL_ID.encode(),
    "litellm_model_group": b"gpt",
    "litellm_response_cost": b"0.000225",
    "litellm_cache_key": b"",
    "spend_logs_metadata": b'{"run_id": "run-m", "graph_id": "graph-1", "attempt": 2}',
    "requested_model": b"gpt-4o",
    "request_time": b"0.425",
    "request_completion": b"OK",
    "upstream_status": b"200",
    "upstream_connect_time": b"0.001",
    "upstream_content_type": b"application/json",
}
"""The fields of a line as our nginx configuration writes them."""

CLIENT_CONTROLLED = (
    "run_id",
    "end_user",
    "spend_logs_metadata",
    "requested_model",
    "litellm_model_group",
    "litellm_response_cost",
    "litellm_cache_key",
)


SHORT_ESCAPES = {
    b"\b": b"\\b",
    b"\t": b"\\t",
    b"\n": b"\\n",
    b"\f": b"\\f",
    b"\r": b"\\r",
    b'"': b'\\"',
    b"\\": b"\\\\",
}


def escape_json(value: bytes) -> bytes:
    """As nginx does for `escape=json`: bytes from 0x20 on pass unchecked, but for the quote and the backslash."""
    return re.sub(rb'[\x00-\x1f"\\]', lambda m: SHORT_ESCAPES.get(m[0]) or b"\\u%04X" % m[0][0], value)


def nginx_line(**changes: bytes | None) -> bytes:
    """A line as nginx writes it, without the newline. None leaves a field out."""
    fields = {name: value for name, value in {**FIELDS, **changes}.items() if value is not None}
    return b"{" + b",".join(b'"%s":"%s"' % (name.encode(), escape_json(v)) for name, v in fields.items()) + b"}"


def json_line(**changes: object) -> bytes:
    """A line whose changed fields are any JSON value."""
    return json.dumps({**{k: v.decode() for k, v in FIELDS.items()}, **changes}, separators=(",", ":")).encode()


def outcome(line: bytes) -> UsageFact | Skip | Rejected:
    return parse(line, IS_LLM_ROUTE)


def fact_of(line: bytes) -> UsageFact:
    fact = outcome(line)
    assert isinstance(fact, UsageFact), fact
    return fact


def rejection(line: bytes) -> tuple[DeadLetterReason, str]:
    rejected = outcome(line)
    assert isinstance(rejected, Rejected), rejected
    return rejected.reason, rejected.detail


def skip_reason(line: bytes) -> SkipReason | None:
    found = outcome(line)
    assert not isinstance(found, Rejected), found
    return found.reason if isinstance(found, Skip) else None


def assert_storable(fact: UsageFact) -> None:
    """Postgres can take every value: UTF-8 without NUL, bounded ids, finite numbers, a time with an offset."""
    for name, value in fact._asdict().items():
        if isinstance(value, str):
            assert "\0" not in value, name
            value.encode()
            assert len(value) <= (2048 if name == "path" else 256), name
        elif isinstance(value, Decimal):
            assert 0 <= value < 10**20, name
    assert 0 < len(fact.call_id) <= 256
    assert 0 <= fact.status <= 999
    assert fact.attempt is None or 0 <= fact.attempt < 2**31
    assert fact.occurred_at.utcoffset() == timedelta(0)


# --- the 122 recorded lines -----------------------------------------------------------------------------------------

# Written by hand from the table "What a line looks like, per case" and the list of recorded cases, not from the code.
# Calls are all POSTs to chat/completions, embeddings, messages and responses, but for those LiteLLM never worked on.
BY_HAND = (
    (1, 31, "fact"),  # models, streams, embeddings, refused and failed calls, client aborts (30, 31)
    (32, 35, "not_llm_route"),  # /v1/models, two health checks, an unknown path: all GET
    (36, 42, "fact"),  # cache misses and hits
    (43, 47, "fact"),  # 504; a slow stream; refused, retried and sick upstreams
    (48, 48, "rejected_before_llm"),  # 502, every upstream down: connect time "-"
    (49, 67, "fact"),  # client aborts, call ids set by nginx and by clients, odd metadata, a 404 with a call id
    (68, 69, "not_llm_route"),  # GET /v1/models, GET /spend/logs
    (70, 71, "fact"),
    (72, 72, "not_llm_route"),  # OPTIONS
    (73, 110, "fact"),
    (111, 112, "rejected_before_llm"),  # 401, bad and missing key: no call id in the answer
    (113, 122, "fact"),
)
STREAMS = {6, 8, 9, 10, 12, 29, 30, 38, 39, 40, 44, 51, 77, 93, 101, 102, 120, 122}
STATUS = {
    400: {16, 17, 18, 20, 23, 98},
    404: {66, 67},
    408: {25},
    429: {24},
    499: {31, 52, 103},
    500: {19, 21, 22, 53, 70, 97},
    503: {47},
    504: {43, 55, 116},
}
NO_ID_IN_THE_ANSWER = {18, 19, 31, 43, 52, 55, 103, 116}
NOT_COMPLETED = {30, 31, 49, 51, 52, 102, 103}
CACHE_HITS = {37, 40, 95}
KEYS = {
    1: "075dc317-b3f4-49f3-b0c5-c7c3e89827c5",
    18: "40eee7a027f456b312555a0fee5bf634",  # no id in the answer: nginx's request id
    31: "ec5c317db432c902ebd07ecfc14ca82a",
    47: "BROKEN-REPLICA-CALL-ID",
    56: "client-chosen-1",
    57: "client-chosen-1",
    58: "6afcb8bf-ece5-47bf-9dcd-9b8e40558156",  # the client's was too long: LiteLLM made its own
    104: "dup-call",
    105: "dup-call",
}
COSTS = {
    1: "1.35e-05",
    6: None,  # a stream
    7: "0.000225",
    14: "1e-05",
    16: "0",  # a failure
    29: None,
    31: None,
    37: "0.000225",  # a cache hit: the full price
    47: "0.5",
    115: "0.00047100000000000006",
    119: "0.001585",
}
RUNS = {
    1: ("run-mock-4omini", 'g"1"'),
    59: ("run-meta-bad", None),
    60: ("run-meta-list", None),
    61: ("run-meta-none", None),
    62: ("run-meta-body", None),
    63: ("run-meta-both", 'g"1"'),
    64: ('ré"\\', None),
}


@pytest.fixture(scope="module")
def recorded() -> dict[int, UsageFact | Skip | Rejected]:
    """Outcomes by line number, from 1."""
    return {number: outcome(line) for number, line in enumerate(RECORDED.read_bytes().splitlines(), 1)}


@pytest.fixture(scope="module")
def recorded_facts(recorded: Mapping[int, UsageFact | Skip | Rejected]) -> dict[int, UsageFact]:
    return {number: found for number, found in recorded.items() if isinstance(found, UsageFact)}


def test_recorded_outcomes(recorded: Mapping[int, UsageFact | Skip | Rejected]) -> None:
    expected = {number: what for first, last, what in BY_HAND for number in range(first, last + 1)}
    assert sorted(expected) == list(range(1, 123))
    assert {n: "fact" if isinstance(found, UsageFact) else found.reason for n, found in recorded.items()} == expected
    assert Counter(expected.values()) == {"fact": 112, "not_llm_route": 7, "rejected_before_llm": 3}


def test_recorded_provenance(recorded_facts: Mapping[int, UsageFact]) -> None:
    assert {number for number, fact in recorded_facts.items() if fact.provenance == "stream"} == STREAMS
    assert {fact.provenance for fact in recorded_facts.values()} == {"stream", "response"}


def test_recorded_status(recorded_facts: Mapping[int, UsageFact]) -> None:
    expected = {number: status for status, numbers in STATUS.items() for number in numbers}
    assert {number: fact.status for number, fact in recorded_facts.items() if fact.status != 200} == expected


def test_recorded_keys(recorded_facts: Mapping[int, UsageFact]) -> None:
    assert {number: recorded_facts[number].call_id for number in KEYS} == KEYS
    assert {n for n, fact in recorded_facts.items() if not fact.id_echoed} == NO_ID_IN_THE_ANSWER
    for number in NO_ID_IN_THE_ANSWER:
        assert recorded_facts[number].call_id == recorded_facts[number].nginx_request_id
    again = {key for key, count in Counter(fact.call_id for fact in recorded_facts.values()).items() if count > 1}
    assert again == {"client-chosen-1", "dup-call"}
    # lines 57 and 105 become conflicts, because another request has taken the id
    assert recorded_facts[56].nginx_request_id != recorded_facts[57].nginx_request_id
    assert recorded_facts[104].nginx_request_id != recorded_facts[105].nginx_request_id


def test_recorded_accounts(recorded_facts: Mapping[int, UsageFact]) -> None:
    accounts = {number: fact.billing_account_id for number, fact in recorded_facts.items()}
    assert accounts.pop(61) is None
    assert set(accounts.values()) == {"enduser-42"}


def test_recorded_runs(recorded_facts: Mapping[int, UsageFact]) -> None:
    assert {n: (recorded_facts[n].run_id, recorded_facts[n].graph_id) for n in RUNS} == RUNS
    assert all(fact.run_id for fact in recorded_facts.values())


def test_recorded_costs(recorded_facts: Mapping[int, UsageFact]) -> None:
    costs = {n: recorded_facts[n].header_cost_usd for n in COSTS}
    assert costs == {n: None if cost is None else Decimal(cost) for n, cost in COSTS.items()}
    assert all(recorded_facts[n].header_cost_usd is None for n in STREAMS)


def test_recorded_details(recorded_facts: Mapping[int, UsageFact]) -> None:
    assert {n for n, fact in recorded_facts.items() if not fact.request_completed} == NOT_COMPLETED
    assert {n for n, fact in recorded_facts.items() if fact.cache_key} == CACHE_HITS
    first = recorded_facts[1]
    assert first.occurred_at == datetime(2026, 11, 22, 0, 38, 32, 609000, UTC)
    assert first.request_seconds == Decimal("0.425")
    assert (first.method, first.path, first.header_model_group) == ("POST", "/v1/chat/completions", "mock-gpt-4o-mini")
    assert {recorded_facts[n].path for n in (14, 66, 115)} == {"/v1/embeddings", "/v1/messages", "/v1/responses"}
    for fact in recorded_facts.values():
        assert_storable(fact)
        assert fact.line_sha256 is None


# --- which lines are calls ------------------------------------------------------------------------------------------


def test_all_fields_of_a_call() -> None:
    assert fact_of(nginx_line()) == UsageFact(
        call_id=CALL_ID,
        nginx_request_id=REQUEST_ID,
        proxy_call_id=REQUEST_ID,
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
        requested_model="gpt-4o",
        header_cost_usd=Decimal("0.000225"),
        header_model_group="gpt",
        cache_key=None,
        request_seconds=Decimal("0.425"),
        occurred_at=datetime(2026, 11, 22, 0, 38, 32, 609000, UTC),
        line_sha256=None,
    )


FACT, REJECTED = None, SkipReason.REJECTED_BEFORE_LLM


@pytest.mark.parametrize(
    ("status", "call_id", "upstream_status", "connect_time", "expected"),
    [
        # the client left: LiteLLM may go on and charge, whatever nginx knows of the upstream
        ("499", "", "-", "0.000", FACT),
        ("499", "", "-", "-", FACT),
        ("499", "", "", "", FACT),
        ("499", "id", "200", "0.000", FACT),
        ("504", "", "504", "0.000", FACT),
        ("504", "", "504, 504", "0.000, 0.001", FACT),
        ("504", "", "504", "-", FACT),
        ("504", "", "", "", FACT),
        # no upstream took the connection
        ("502", "", "502", "-", REJECTED),
        ("502", "", "502, 502", "-, -", REJECTED),
        ("502", "", "", "", REJECTED),
        ("502", "", "502", "0.001", FACT),
        ("502", "", "502, 502", "-, 0.001", FACT),
        ("502", "", "502, 502", "0.001, -", FACT),
        ("502", "", "502 : 502", "- : 0.001", FACT),
        ("502", "id", "502", "0.001", FACT),
        # refused before the work began, by LiteLLM or by nginx; with an id LiteLLM worked on it
        *((code, "", code, "0.001", REJECTED) for code in ("401", "403", "404", "405")),
        *((code, "", "", "", REJECTED) for code in ("401", "403", "404", "405")),
        *((code, "-", code, "0.001", REJECTED) for code in ("401", "403", "404", "405")),
        *((code, "id", code, "0.001", FACT) for code in ("401", "403", "404", "405")),
        # sent elsewhere, by nginx or by LiteLLM: the call is what comes there
        *((code, "", code, "0.001", REJECTED) for code in ("301", "302", "307", "308")),
        *((code, "", "", "", REJECTED) for code in ("301", "302", "307", "308")),
        ("307", "id", "307", "0.001", FACT),
        ("299", "", "299", "0.001", FACT),
        # nginx's own answers
        *((code, "", "", "", REJECTED) for code in ("400", "408", "411", "413", "414", "429", "500", "503")),
        *((code, "", "-", "-", REJECTED) for code in ("400", "413", "503")),
        *((code, "", code, "0.001", FACT) for code in ("400", "408", "413", "429", "500", "503")),
        ("503", "id", "503", "0.001", FACT),
        ("413", "", "413", "-", FACT),
        ("200", "", "200", "0.001", FACT),
        ("200", "", "-", "-", FACT),
    ],
)
def test_status_decides(
    status: str, call_id: str, upstream_status: str, connect_time: str, expected: SkipReason | None
) -> None:
    line = nginx_line(
        status=status.encode(),
        litellm_call_id=call_id.encode(),
        upstream_status=upstream_status.encode(),
        upstream_connect_time=connect_time.encode(),
    )
    assert skip_reason(line) == expected


@pytest.mark.parametrize(
    "uri",
    [
        *(f"/v1/{route}" for route in ("chat/completions", "completions", "embeddings", "messages", "responses")),
        *(f"/{route}" for route in ("chat/completions", "completions", "embeddings", "messages", "responses")),
        "/v1/images/generations",
        "/images/edits",
        "/v1/audio/speech",
        "/audio/transcriptions",
        "/v1/rerank",
        "/v1/chat/completions?beta=true",
        "/v1/chat/completions?next=/v1/models#x",
        "/v1/chat/completions?a=%ff%00",
        "/v1/chat/completions#fragment",
        "//v1//chat///completions",
        "/v1/chat/completions/",
        "/v1/chat/completions//?x",
        "/v1/./chat/completions",
        "/x/../v1/chat/completions",
        "/../v1/chat/completions",
        "/v1/models/%2e%2e/chat/completions",
        "/v1/chat%2fcompletions",
        "/%76%31/chat/complet%69ons",
        "http://gateway:4000/v1/chat/completions",
        "https://gateway/v1/chat/completions?x=1",
        "/v1/chat/completions?" + "x" * 100_000,
    ],
)
def test_spellings_of_a_call(uri: str) -> None:
    assert IS_LLM_ROUTE(uri)
    assert skip_reason(nginx_line(uri=uri.encode())) is None


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "-",
        "/",
        "*",
        "/v1/models",
        "/v2/chat/completions",
        "/v1/v1/chat/completions",
        "/v1/chat",
        "/v1/chat/completions/x",
        "/x/v1/chat/completions",
        "/v1/chat/completionsx",
        "/V1/Chat/Completions",  # LiteLLM's routes are case-sensitive: 404
        "/v1/images",
        "/v1/images/",
        "/v1/messages/count_tokens",
        "/spend/logs?uri=/v1/chat/completions",
        "/v1/chat/completions%3Fx",
        "/v1/chat/completions/..",
        "/v1/chat%252fcompletions",
        "http://v1/chat",
    ],
)
def test_no_spellings_of_a_call(uri: str) -> None:
    assert not IS_LLM_ROUTE(uri)
    assert skip_reason(nginx_line(uri=uri.encode())) is SkipReason.NOT_LLM_ROUTE


@pytest.mark.parametrize("method", ["GET", "PUT", "OPTIONS", "HEAD", "post", "", "-", "POST "])
def test_only_post_is_a_call(method: str) -> None:
    assert skip_reason(nginx_line(method=method.encode())) is SkipReason.NOT_LLM_ROUTE


def test_routes_can_be_chosen() -> None:
    chosen = routes(["custom/*", "x"])
    assert [uri for uri in ("/v1/custom/a/b", "/x", "/v1/x/", "/custom", "/y", "/v1/embeddings") if chosen(uri)] == [
        "/v1/custom/a/b",
        "/x",
        "/v1/x/",
    ]


def test_other_lines_need_no_more_fields() -> None:
    """What is no call is skipped, even if its line lacks fields that a call must have, or has odd ones."""
    assert outcome(b'{"method":"GET","uri":"/"}') == Skip(SkipReason.NOT_LLM_ROUTE)
    assert outcome(b'{"method":"POST","uri":"/v1/models","status":[],"msec":"x"}') == Skip(SkipReason.NOT_LLM_ROUTE)
    assert outcome(b'{"method":"","uri":"","status":"400"}') == Skip(SkipReason.NOT_LLM_ROUTE)


@pytest.mark.parametrize("line", [b"", b" ", b"\t \t", b"\r", b"  \r"])
def test_blank_lines(line: bytes) -> None:
    assert outcome(line) == Skip(SkipReason.BLANK_LINE)


def test_uris_of_clients_do_not_fill_the_memory() -> None:
    llm_path = routes(LLM_ROUTES)
    tracemalloc.start()
    try:
        for number in range(1000):
            assert llm_path(f"/v1/chat/completions?{number}{'x' * 8000}")
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


# --- fields ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "method",
        "uri",
        "status",
        "run_id",
        "end_user",
        "litellm_call_id",
        "request_time",
        "request_completion",
        "upstream_status",
        "upstream_connect_time",
        "upstream_content_type",
    ],
)
def test_missing_field_is_named(name: str) -> None:
    reason, detail = rejection(nginx_line(**{name: None}))
    assert reason is R.MISSING_FIELD
    assert detail.startswith(f"{name}: ")


@pytest.mark.parametrize("changes", [{}, {"msec": b""}, {"msec": b"-", "time": b"-"}, {"time": b""}])
def test_missing_time_is_named(changes: dict[str, bytes]) -> None:
    reason, detail = rejection(nginx_line(**{"msec": None, "time": None, **changes}))
    assert reason is R.MISSING_FIELD
    assert detail.startswith("msec: ")


@pytest.mark.parametrize("absent", [b"", b"-", None])
def test_no_id_at_all(absent: bytes | None) -> None:
    line = nginx_line(litellm_call_id=b"", call_id=absent, nginx_request_id=absent)
    assert rejection(line) == (R.MISSING_FIELD, "litellm_call_id, call_id, nginx_request_id: none has a value")


@pytest.mark.parametrize(
    "name",
    ["call_id", "nginx_request_id", "requested_model", "spend_logs_metadata", "litellm_response_cost", "time"],
)
def test_fields_that_may_be_missing(name: str) -> None:
    assert fact_of(nginx_line(**{name: None})).call_id == CALL_ID


def test_absent_values() -> None:
    """Both "" and "-" say that nginx had no value."""
    for absent in (b"", b"-"):
        fact = fact_of(
            nginx_line(
                **dict.fromkeys((*CLIENT_CONTROLLED, "call_id", "request_time", "upstream_content_type"), absent),
                request_completion=absent,
                msec=absent,
            )
        )
        assert (fact.run_id, fact.graph_id, fact.attempt, fact.billing_account_id) == (None, None, None, None)
        assert (fact.header_cost_usd, fact.header_model_group, fact.cache_key) == (None, None, None)
        assert (fact.request_seconds, fact.requested_model, fact.proxy_call_id) == (None, None, None)
        assert (fact.provenance, fact.request_completed) == ("response", False)
        assert fact.occurred_at == datetime(2026, 11, 22, 0, 38, 32, tzinfo=UTC)  # from `time`


def test_key_of_a_call() -> None:
    assert fact_of(nginx_line(litellm_call_id=b"a", call_id=b"b", nginx_request_id=b"c")).call_id == "a"
    assert fact_of(nginx_line(litellm_call_id=b"", call_id=b"b", nginx_request_id=b"c")).call_id == "b"
    assert fact_of(nginx_line(litellm_call_id=b"-", call_id=b"-", nginx_request_id=b"c")).call_id == "c"
    fact = fact_of(nginx_line(litellm_call_id=b"a", call_id=b"b"))
    assert (fact.id_echoed, fact.proxy_call_id) == (True, "b")
    assert not fact_of(nginx_line(litellm_call_id=b"")).id_echoed


def test_line_hash_stands_in_for_a_request_id() -> None:
    one, other = nginx_line(nginx_request_id=b""), nginx_line(nginx_request_id=None, run_id=b"other")
    assert len(fact_of(one).line_sha256 or b"") == 32
    assert fact_of(one).line_sha256 == fact_of(one).line_sha256
    assert fact_of(one).line_sha256 != fact_of(other).line_sha256
    assert fact_of(nginx_line()).line_sha256 is None


NO_TEXT: tuple[object, ...] = (7.5, True, ["200"], {"a": 1})
BAD_VALUES: Mapping[str, tuple[object, ...]] = {
    "status": ("abc", "20", "2000", "-20", "\uff12\uff10\uff10", " 200", "200\n", 2000, -200, *NO_TEXT),
    "msec": ("x", "1e9", "-1795307912", "17953079120.1", "1795307912.", " 1795307912", "NaN", 1795307912, *NO_TEXT),
    "method": (5, *NO_TEXT),
    "uri": (5, *NO_TEXT),
    "upstream_content_type": (5, *NO_TEXT),
    **dict.fromkeys(
        ("litellm_call_id", "call_id", "nginx_request_id"),
        ("x" * 257, "a\0b", "a\ufffdb", " a", "a ", "a\n", "\u3000", 7, *NO_TEXT),
    ),
}
BAD_TIMES = ("yesterday", "2026-11-22T00:38:32", "0001-01-01T00:00Z", "9999-12-31T23:59:59-23:59", *NO_TEXT)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        *(({name: value}, name) for name, values in BAD_VALUES.items() for value in values),
        *(({"msec": "", "time": value}, "time") for value in BAD_TIMES),
        ({"status": "502", "litellm_call_id": "", "upstream_connect_time": 0.1}, "upstream_connect_time"),
    ],
)
def test_bad_value_is_named(changes: dict[str, object], name: str) -> None:
    reason, detail = rejection(json_line(**changes))
    assert reason is R.BAD_VALUE
    assert detail.startswith(f"{name}: ")
    assert len(detail) <= 300


@pytest.mark.parametrize("value", ["a", "7", "a b", "é", "é b", "a/b:c#d{}", "a\x01b", "\U0001f600"])
def test_odd_ids(value: str) -> None:
    """A client may have chosen it, where the proxy lets it: what can be a key is one."""
    fact = fact_of(json_line(litellm_call_id=value, call_id=value, nginx_request_id=value))
    assert (fact.call_id, fact.proxy_call_id, fact.nginx_request_id) == (value, value, value)


def test_longest_id() -> None:
    assert fact_of(nginx_line(litellm_call_id=b"x" * 256)).call_id == "x" * 256
    assert fact_of(json_line(litellm_call_id="é" * 256)).call_id == "é" * 256


@pytest.mark.parametrize(
    ("msec", "expected"),
    [
        ("1795307912.609", datetime(2026, 11, 22, 0, 38, 32, 609000, UTC)),
        ("1795307912", datetime(2026, 11, 22, 0, 38, 32, 0, UTC)),
        ("1795307912.000001", datetime(2026, 11, 22, 0, 38, 32, 1, UTC)),
        ("1795307912.5", datetime(2026, 11, 22, 0, 38, 32, 500000, UTC)),
        ("999999999.999", datetime(2001, 9, 9, 1, 46, 39, 999000, UTC)),
    ],
)
def test_msec(msec: str, expected: datetime) -> None:
    assert fact_of(nginx_line(msec=msec.encode())).occurred_at == expected
    assert fact_of(nginx_line(msec=b"", time=msec.encode())).occurred_at == expected


@given(st.integers(10**15, 4 * 10**15))
def test_msec_is_exact(microseconds: int) -> None:
    text = f"{microseconds // 10**6}.{microseconds % 10**6:06d}"
    expected = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
    assert fact_of(nginx_line(msec=text.encode())).occurred_at == expected


@pytest.mark.parametrize(
    "time", ["2026-11-22T00:38:32+00:00", "2026-11-22T01:38:32+01:00", "2026-11-21T14:38:32-10:00"]
)
def test_time_with_an_offset(time: str) -> None:
    fact = fact_of(nginx_line(msec=None, time=time.encode()))
    assert fact.occurred_at == datetime(2026, 11, 22, 0, 38, 32, tzinfo=UTC)
    assert fact.occurred_at.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("text/event-stream", "stream"),
        ("text/event-stream; charset=utf-8", "stream"),
        ("application/json, text/event-stream", "stream"),
        ("text/event-stream, application/json", "response"),
        ("application/json", "response"),
        ("", "response"),
        ("-", "response"),
    ],
)
def test_provenance(content_type: str, expected: str) -> None:
    assert fact_of(nginx_line(upstream_content_type=content_type.encode())).provenance == expected


def test_lists_of_a_retry() -> None:
    fact = fact_of(nginx_line(upstream_status=b"502, 200", upstream_connect_time=b"-, 0.000"))
    assert (fact.status, fact.call_id) == (200, CALL_ID)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        ("0.000225", "0.000225"),
        ("1.35e-05", "0.0000135"),
        ("5.9999999999999995e-05", "0.000059999999999999995"),
        ("0", "0"),
        ("0.0", "0"),
        ("12", "12"),
        ("99999999999999999999", "99999999999999999999"),
        *(
            (text, None)
            for text in ("NaN", "Infinity", "-0.5", "1e400", "1e21", "9e99", "0x1", "1_0", "٣", "1,5", ".5")
        ),
        *((text, None) for text in ("", "-", "None", " 1", "1\n", "1" * 21, "0.5, 0.1", "\0", "\ud7ff")),
    ],
)
def test_cost_witness(cost: str, expected: str | None) -> None:
    found = fact_of(nginx_line(litellm_response_cost=cost.encode())).header_cost_usd
    assert found == (None if expected is None else Decimal(expected))


@given(st.text() | st.floats().map(repr) | st.decimals().map(str))
def test_cost_header_is_only_a_witness(cost: str) -> None:
    """LITELLM_IS_USAGE_TRUTH: whatever the header says, nothing but `header_cost_usd` changes."""
    line = nginx_line(litellm_response_cost=cost.encode("utf-8", "surrogatepass"))
    assert fact_of(line)._replace(header_cost_usd=None) == fact_of(nginx_line())._replace(header_cost_usd=None)


# --- metadata: JSON in a string, from a client -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "run_id", "graph_id", "attempt"),
    [
        ('{"run_id":"r","graph_id":"g","attempt":3}', "r", "g", 3),
        ('{"run_id":"r","attempt":"3"}', "r", None, 3),
        ('{"run_id":"ré","graph_id":"g\\"1\\""}', "ré", 'g"1"', None),
        ("not json", None, None, None),
        ('{"run_id":"r"', None, None, None),
        ('{"run_id":"\\ud800"}', None, None, None),
        ('{"run_id":"a\\u0000b","graph_id":"g"}', None, "g", None),
        ('{"run_id":NaN}', None, None, None),
        ("[1,2]", None, None, None),
        ('"run"', None, None, None),
        ("null", None, None, None),
        ("{}", None, None, None),
        ('{"run_id":7,"graph_id":["g"],"attempt":-1}', None, None, None),
        ('{"run_id":{"run_id":"r"},"attempt":1.5}', None, None, None),
        ('{"run_id":"","graph_id":"-","attempt":true}', None, None, None),
        ('{"attempt":1000000000}', None, None, None),
        ('{"attempt":12345678901234567890123}', None, None, None),
        ('{"attempt":"٣"}', None, None, None),
        ('{"run_id":"' + "r" * 257 + '","graph_id":"g"}', None, "g", None),
        ('{"run_id":"' + "r" * 256 + '"}', "r" * 256, None, None),
        ('{"a":' * 500 + "1" + "}" * 500, None, None, None),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", None, None, None),
        ('{"run_id":"r","pad":"' + "x" * 1_000_000 + '"}', "r", None, None),
    ],
)
def test_metadata(metadata: str, run_id: str | None, graph_id: str | None, attempt: int | None) -> None:
    fact = fact_of(nginx_line(run_id=b"", spend_logs_metadata=metadata.encode("utf-8", "surrogatepass")))
    assert (fact.run_id, fact.graph_id, fact.attempt) == (run_id, graph_id, attempt)


def test_run_id_of_the_line_wins() -> None:
    assert fact_of(nginx_line()).run_id == "run-1"
    assert fact_of(nginx_line(run_id=b"-")).run_id == "run-m"
    assert fact_of(nginx_line(run_id=b"x" * 257)).run_id == "run-m"


def test_metadata_as_an_object() -> None:
    fact = fact_of(json_line(run_id="", spend_logs_metadata={"run_id": "r", "x": [[[[]]]]}))
    assert fact.run_id == "r"


# --- the older format -----------------------------------------------------------------------------------------------

OLDER: Mapping[str, object] = {
    "ts": "2025-03-01T10:00:00+00:00",
    "run_id": "run-1",
    "end_user": "account-1",
    "status": "200",
    "litellm_call_id": CALL_ID,
    "litellm_response_cost": "0.000225",
    "litellm_model_id": "m",
}


def older(**changes: object) -> bytes:
    return json.dumps({k: v for k, v in {**OLDER, **changes}.items() if v is not None}).encode()


def test_older_format() -> None:
    fact = fact_of(older())
    assert (fact.call_id, fact.run_id, fact.billing_account_id, fact.status) == (CALL_ID, "run-1", "account-1", 200)
    assert fact.header_cost_usd == Decimal("0.000225")
    assert fact.occurred_at == datetime(2025, 3, 1, 10, tzinfo=UTC)
    assert (fact.method, fact.path, fact.nginx_request_id, fact.request_completed) == (None, None, None, False)
    assert len(fact.line_sha256 or b"") == 32
    assert_storable(fact)


@pytest.mark.parametrize("ts", ["1740823200.000", "1740823200", 1740823200, 1740823200.0, "2025-03-01T11:00:00+01:00"])
def test_older_times(ts: object) -> None:
    assert fact_of(older(ts=ts)).occurred_at == datetime(2025, 3, 1, 10, tzinfo=UTC)


@pytest.mark.parametrize("status", ["307", "401", "403", "404", "405"])
def test_older_rejected(status: str) -> None:
    assert skip_reason(older(status=status, litellm_call_id="")) is SkipReason.REJECTED_BEFORE_LLM
    assert skip_reason(older(status=status)) is None


def test_older_bad_lines() -> None:
    assert rejection(older(litellm_call_id=""))[0] is R.MISSING_FIELD
    assert rejection(older(litellm_call_id=None))[0] is R.MISSING_FIELD
    assert rejection(older(status=None))[1].startswith("status: ")
    assert rejection(older(ts="soon")) == (R.BAD_VALUE, "ts: 'soon'")
    assert rejection(older(litellm_call_id="a\0"))[0] is R.BAD_VALUE
    reason, detail = rejection(b"{}")
    assert (reason, detail.split(":")[0]) == (R.MISSING_FIELD, "method")


def test_ts_beside_uri_is_not_the_older_format() -> None:
    assert fact_of(json_line(ts="soon")).path == "/v1/chat/completions"


# --- poison ---------------------------------------------------------------------------------------------------------

PLAIN = nginx_line()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"x", R.INVALID_JSON),
        (b"{", R.INVALID_JSON),
        (PLAIN[:-1], R.INVALID_JSON),
        (PLAIN + b"x", R.INVALID_JSON),
        (PLAIN + PLAIN, R.INVALID_JSON),
        (PLAIN.replace(b'"200"', b"NaN"), R.INVALID_JSON),
        (PLAIN.replace(b'"200"', b"Infinity"), R.INVALID_JSON),
        (PLAIN.replace(b'"200"', b"1e400"), R.INVALID_JSON),
        (PLAIN.replace(b'"200"', b"-1e400"), R.INVALID_JSON),
        (PLAIN.replace(b'"200"', b"12345678901234567890"), R.BAD_VALUE),
        (PLAIN.replace(b'"200"', b"9" * 5000), R.INVALID_JSON),
        (PLAIN.replace(b'"200"', b"200.0"), R.BAD_VALUE),
        (PLAIN.replace(b'"run-1"', b'"\\ud800"'), R.INVALID_JSON),
        (PLAIN.replace(b'"run-1"', b'"\\udc00\\ud800"'), R.INVALID_JSON),
        (PLAIN.replace(CALL_ID.encode(), b"a\\u0000b"), R.BAD_VALUE),
        (PLAIN.replace(CALL_ID.encode(), b"a\0b"), R.INVALID_JSON),
        (PLAIN.replace(b'"run-1"', b'"a\x01b"'), R.INVALID_JSON),
        (PLAIN.replace(CALL_ID.encode(), b"a\xffb"), R.BAD_VALUE),
        (PLAIN.replace(CALL_ID.encode(), b"a\xed\xa0\x80b"), R.BAD_VALUE),
        (b"\0" + PLAIN, R.INVALID_JSON),
        (b"\xff" + PLAIN, R.INVALID_JSON),
        (b"[" + PLAIN + b"]", R.NOT_AN_OBJECT),
        (b'"x"', R.NOT_AN_OBJECT),
        (b"null", R.NOT_AN_OBJECT),
        (b"7", R.NOT_AN_OBJECT),
        (b"true", R.NOT_AN_OBJECT),
        (b"{}", R.MISSING_FIELD),
        (b'{"method":"POST","method":"POST"}', R.DUPLICATE_KEY),
        (PLAIN[:-1] + b',"litellm_call_id":"other"}', R.DUPLICATE_KEY),
        (PLAIN[:-1] + b',"litellm\\u005fcall_id":"other"}', R.DUPLICATE_KEY),
        (b'\xef\xbb\xbf{"status":"200","status":"200"}', R.DUPLICATE_KEY),
        (PLAIN[:-1] + b',"x":"\xff","status":"200"}', R.DUPLICATE_KEY),
        (PLAIN[:-1] + b',"x":{"a":1,"a":2}}', R.DUPLICATE_KEY),
    ],
)
def test_poison(line: bytes, reason: DeadLetterReason) -> None:
    found, detail = rejection(line)
    assert (found, bool(detail)) == (reason, True)
    assert len(detail) <= 300


@pytest.mark.parametrize("depth", [200, 253, 254, 255, 256, 500, 900, 990, 1000, 1022, 1023, 1024, 1025, 100_000])
@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b'{"a":', b"}")])
def test_deep_nesting(depth: int, brackets: tuple[bytes, bytes]) -> None:
    nested = brackets[0] * depth + b"1" + brackets[1] * depth
    for line in (nested, b'{"x":' + nested + b"}", PLAIN[:-1] + b',"x":' + nested + b"}", nested[:-1]):
        assert isinstance(outcome(line), UsageFact | Rejected)
    for name in ("msec", "status", "litellm_call_id", "uri"):
        line = b'{"%s":%s,%s' % (name.encode(), nested, nginx_line(**{name: None})[1:])
        assert rejection(line)[0] in (R.BAD_VALUE, R.INVALID_JSON)


@pytest.mark.timeout(10)
def test_many_keys_take_no_time() -> None:
    keys = b",".join(b'"%d":0' % number for number in range(100_000))
    assert rejection(b"{" + keys + b',"99999":0}') == (R.DUPLICATE_KEY, "'99999' stands more than once")


@pytest.mark.timeout(10)
def test_ten_megabytes() -> None:
    huge = b"x" * 10_000_000
    assert fact_of(nginx_line(spend_logs_metadata=huge)).run_id == "run-1"
    assert fact_of(nginx_line(run_id=huge)).run_id == "run-m"
    assert len(fact_of(nginx_line(uri=b"/v1/chat/completions?" + huge)).path or "") == 20
    assert rejection(nginx_line(litellm_call_id=huge))[0] is R.BAD_VALUE
    assert rejection(huge)[0] is R.INVALID_JSON
    assert rejection(b"[" * 10_000_000)[0] is R.INVALID_JSON


@pytest.mark.parametrize("around", [(b"\xef\xbb\xbf", b""), (b"", b"\r"), (b"  ", b" \t"), (b"\xef\xbb\xbf", b"\r")])
def test_what_stands_around_a_line(around: tuple[bytes, bytes]) -> None:
    """A byte order mark, a carriage return and white space change nothing."""
    assert fact_of(around[0] + PLAIN + around[1]) == fact_of(PLAIN)


def test_not_utf8_is_no_account() -> None:
    """Two accounts in latin-1 must not become one with a replacement character in it."""
    for name in ("m\xfcller", "m\xe4ller"):
        fact = fact_of(nginx_line(end_user=name.encode("latin-1"), run_id=b"r\xff"))
        assert (fact.billing_account_id, fact.run_id, fact.call_id) == (None, "run-m", CALL_ID)
    assert fact_of(nginx_line(end_user="müller".encode())).billing_account_id == "müller"


@pytest.mark.parametrize(("text", "kept"), [("999999999.999", True), ("1000000000", False), ("70000000000", False)])
def test_a_duration_leads_to_a_date(text: str, kept: bool) -> None:
    """Otherwise no start could be computed of the call, and its batch would never be committed."""
    fact = fact_of(nginx_line(request_time=text.encode()))
    assert fact.request_seconds == (Decimal(text) if kept else None)
    assert row_of(fact).call_id == fact.call_id


# --- properties -----------------------------------------------------------------------------------------------------

any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["", "-", "200", "POST", "OK"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary())
@example(PLAIN)
@example(b"\xef\xbb\xbf")
@example(b'{"ts":"","ts":""}')
def test_any_bytes_have_one_outcome(line: bytes) -> None:
    assert type(outcome(line)) in (UsageFact, Skip, Rejected)


@given(st.binary(max_size=20), st.integers(0, len(PLAIN)), st.integers(0, 20))
def test_any_damage_has_one_outcome(damage: bytes, at: int, length: int) -> None:
    found = outcome(PLAIN[:at] + damage + PLAIN[at + length :])
    assert type(found) in (UsageFact, Skip, Rejected)
    if isinstance(found, UsageFact):
        assert_storable(found)


@given(st.dictionaries(st.sampled_from([*FIELDS, "ts"]), any_json), st.sets(st.sampled_from([*FIELDS])), st.booleans())
def test_any_object_has_one_outcome(changes: dict[str, Any], missing: set[str], ascii_only: bool) -> None:
    fields = {**{k: v.decode() for k, v in FIELDS.items() if k not in missing}, **changes}
    found = outcome(json.dumps(fields, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    assert type(found) in (UsageFact, Skip, Rejected)
    if isinstance(found, UsageFact):
        assert_storable(found)


header_bytes = st.binary() | st.text().map(str.encode) | any_json.map(json.dumps).map(str.encode)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(CLIENT_CONTROLLED, header_bytes)), header_bytes)
@example({"spend_logs_metadata": b'{"a":' * 2000}, b"")
@example({"run_id": b'"}\n{"'}, b'"\\\x00\xff')
def test_no_client_talks_its_way_out_of_a_bill(headers: dict[str, bytes], query: bytes) -> None:
    fact = fact_of(nginx_line(**headers, uri=b"/v1/chat/completions?" + query))
    assert (fact.call_id, fact.nginx_request_id, fact.status) == (CALL_ID, REQUEST_ID, 200)
    assert fact.occurred_at == datetime(2026, 11, 22, 0, 38, 32, 609000, UTC)
    assert_storable(fact)


@given(st.binary(max_size=40))
@example(b"x" * 3000)
@example(b"%00%ff%")
def test_no_path_breaks_a_line(path: bytes) -> None:
    """Whatever a client asks for is a call or none, and its path can be stored."""
    found = outcome(nginx_line(uri=b"/v1/images/" + path))
    assert isinstance(found, UsageFact | Skip)
    if isinstance(found, UsageFact):
        assert_storable(found)


@given(st.permutations(list(FIELDS)))
def test_order_of_fields_does_not_matter(names: list[str]) -> None:
    line = json.dumps({name: FIELDS[name].decode() for name in names}, indent=1).replace("\n", "")
    assert fact_of(line.encode()) == fact_of(PLAIN)


def spellings(route: str) -> Iterator[str]:
    yield from (f"/{route}", f"/v1/{route}", f"//v1/./{route}/", f"/a/../v1/{route}?q=1")


@given(st.sampled_from([route.replace("*", "x") for route in LLM_ROUTES]), st.integers(0, 3), st.data())
def test_percent_encoding_does_not_hide_a_call(route: str, spelling: int, data: st.DataObject) -> None:
    path, mark, query = list(spellings(route))[spelling].partition("?")
    encoded = "".join(f"%{ord(c):02x}" if data.draw(st.booleans()) and c != "/" else c for c in path)
    assert IS_LLM_ROUTE(encoded + mark + query)
