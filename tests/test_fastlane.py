"""The fast lane is the long way, only faster: every line has the same outcome and the same row on both."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from billing_tailer import audit, fastlane
from billing_tailer.model import FactRow, Rejected, Skip, UsageFact
from billing_tailer.rows import row_of
from billing_tailer.settings import LLM_ROUTES
from tests.support.factrows import fact_of
from tests.support.loglines import line

LLM_PATH = audit.routes(LLM_ROUTES)
RECORDED = (Path(__file__).parent / "data/audit.jsonl").read_bytes().splitlines()
FIELDS: dict[str, str] = json.loads(line(1))


class Parser:
    """A parser, and whether it went the long way: the fast one does not look at the URI again."""

    def __init__(self) -> None:
        self.looks = 0
        self.parse = fastlane.parser(self._look)

    def _look(self, uri: str) -> str | None:
        self.looks += 1
        return LLM_PATH(uri)

    def is_fast(self, text: bytes) -> bool:
        before = self.looks
        found = self.parse(text)
        assert isinstance(found, FactRow)
        return self.looks == before

    def agrees(self, text: bytes) -> None:
        """Before the line's shape is known, and after."""
        expected = audit.parse(text, LLM_PATH)
        for _ in range(2):
            found = self.parse(text)
            if isinstance(found, FactRow):
                assert isinstance(expected, UsageFact)
                assert fact_of(found) == expected
                assert found.call_id == expected.call_id
                assert found.second == row_of(expected).second
            else:
                assert found == expected


def compact(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def test_both_ways_agree() -> None:
    """On every recorded line, each before and after the others."""
    parser = Parser()
    for text in RECORDED + RECORDED:
        parser.agrees(text)


def test_common_lines_are_fast() -> None:
    parser = Parser()
    assert [parser.is_fast(line(number)[:-1]) for number in range(201)] == [False] * 100 + [True] * 101
    recorded = [text for text in RECORDED if isinstance(parser.parse(text), FactRow)]
    assert sum(map(parser.is_fast, recorded)) > 0.7 * len(recorded)


@pytest.mark.parametrize("value", ["ends with \\", '"', '\\"', "\\\\", "ü", "a\nb"])
def test_no_client_keeps_his_lines_off_the_fast_lane(value: str) -> None:
    """Whatever has to be escaped in what he sends."""
    parser = Parser()
    parser.agrees(odd := compact({**FIELDS, "run_id": value, "end_user": value}))
    assert parser.is_fast(odd)


@pytest.mark.parametrize(
    "changes",
    [
        {"litellm_call_id": ""},
        {"litellm_call_id": "a"},
        {"litellm_call_id": "x" * 257},
        {"litellm_call_id": "two words"},
        {"litellm_call_id": "back\\slash"},
        {"litellm_call_id": "tab\there"},
        {"litellm_call_id": "ü1"},
        {"litellm_call_id": 1},
        {"litellm_call_id": "a\u0000b"},
        {"nginx_request_id": ""},
        {"nginx_request_id": "-"},
        {"call_id": "another"},
        {"call_id": "-"},
        {"call_id": None},
        {"request_time": ""},
        {"request_time": "-1"},
        {"request_time": "1e9"},
        {"request_time": "0.4, 0.5"},
        {"request_time": 0.25},
        {"request_time": "7"},
        {"request_time": "0.1234567"},
        {"request_time": "999999999.999999"},
        {"litellm_response_cost": ""},
        {"litellm_response_cost": "2.25e-05"},
        {"litellm_response_cost": "1e5"},
        {"litellm_response_cost": "1e99"},
        {"litellm_response_cost": "9" * 20},
        {"litellm_response_cost": "9" * 21},
        {"litellm_response_cost": "nan"},
        {"litellm_response_cost": "-0.1"},
        {"litellm_response_cost": "٣"},
        {"litellm_cache_key": "key-1"},
        {"litellm_cache_key": "x" * 256},
        {"litellm_cache_key": "x" * 257},
        {"litellm_cache_key": "white space"},
        {"msec": "1795307912"},
        {"msec": "1795307912."},
        {"msec": "1795307912.1234567"},
        {"msec": "179530791"},
        {"msec": "9548528405.901877"},
        {"msec": "17953079123.5"},
        {"msec": 1795307912.5},
        {"msec": ""},
        {"status": 200},
        {"status": 200.0},
        {"status": True},
        {"status": "499"},
        {"status": "401", "litellm_call_id": ""},
        {"run_id": 1},
        {"run_id": 1.0},
        {"run_id": True},
        {"run_id": ["a"]},
        {"run_id": "line\nbreak\ttab\\"},
        {"requested_model": "gpt"},
        {"requested_model": None},
        {"requested_model": {}},
        {"upstream_content_type": "text/event-stream; charset=utf-8"},
        {"end_user": ""},
        {"ts": "2026-11-22T00:00:00+00:00"},
        {"run_id": "ends with \\"},
        {"run_id": "ends with \\", "end_user": ',"end_user":"me'},
        {"run_id": '\\","end_user":"me","x":"', "end_user": "\\"},
        {"request_completion": "\\", "upstream_addr": '"'},
        {"upstream_content_type": "\\", "litellm_model_group": "\\\\"},
        {"time": '"'},
        {"time": "\\"},
        {"time": "ü"},
        {"time": 1},
    ],
    ids=repr,
)
def test_uncommon_lines_agree(changes: dict[str, Any]) -> None:
    parser = Parser()
    parser.agrees(compact(FIELDS))
    parser.agrees(compact({**FIELDS, **changes}))
    parser.agrees(compact(FIELDS))


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_agrees(name: str) -> None:
    """Although the shape of the line is known."""
    parser = Parser()
    parser.agrees(compact(FIELDS))
    parser.agrees(compact({key: value for key, value in FIELDS.items() if key != name}))


@pytest.mark.parametrize(
    "damaged",
    [
        compact(FIELDS)[:-1] + b',"litellm_call_id":"call-2"}',
        compact(FIELDS)[:-1] + b',"status":"500"}',
        b" " + compact(FIELDS),
        compact(FIELDS) + b"\r",
        b"\xef\xbb\xbf" + compact(FIELDS),
        compact(FIELDS).replace(b"call-0", b"call\xff0"),
        b"[" + compact(FIELDS) + b"]",
        b"1",
        b"",
    ],
)
def test_damage_agrees(damaged: bytes) -> None:
    parser = Parser()
    parser.agrees(compact(FIELDS))
    parser.agrees(damaged)


texts = st.text(max_size=12) | st.from_regex(r"[0-9A-Za-z.:_-]{0,40}", fullmatch=True)
numbers = st.from_regex(r"[0-9]{1,22}(\.[0-9]{1,31})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
times = st.from_regex(r"[0-9]{8,11}(\.[0-9]{0,7})?", fullmatch=True)
anything = st.none() | st.booleans() | st.integers(-2, 300) | st.floats(allow_nan=False) | texts | st.lists(texts)


@given(
    st.lists(
        st.dictionaries(st.sampled_from([*FIELDS, "requested_model", "ts"]), texts | numbers | times | anything),
        min_size=1,
        max_size=6,
    )
)
@example([{"status": "200"}, {"status": 200}, {"status": 200.0}])
@example([{"run_id": "1"}, {"run_id": 1}, {"run_id": True}])
def test_any_lines_agree(many: list[dict[str, Any]]) -> None:
    """In one log: what one line taught must not change what another one is."""
    parser = Parser()
    for changes in many + many:
        parser.agrees(compact({**FIELDS, **changes}))


@given(texts, texts, texts, numbers | texts, numbers | texts, texts, times | texts)
@example("call", "request", "", "0.425", "", "", "1795307912.999999")
def test_any_own_values_agree(call: str, request: str, proxy: str, took: str, cost: str, cache: str, at: str) -> None:
    parser = Parser()
    parser.agrees(compact(FIELDS))
    own = {
        "litellm_call_id": call,
        "nginx_request_id": request,
        "call_id": proxy,
        "request_time": took,
        "litellm_response_cost": cost,
        "litellm_cache_key": cache,
        "msec": at,
    }
    parser.agrees(compact({**FIELDS, **own}))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients choose run ids: what is remembered of them is forgotten, and found out again."""
    monkeypatch.setattr(fastlane, "SHAPES_MAX", 8)
    parser = Parser()
    for number in range(50):
        parser.agrees(compact({**FIELDS, "run_id": f"run-{number}"}))
    assert parser.is_fast(compact({**FIELDS, "run_id": "run-49"}))
    assert not parser.is_fast(compact({**FIELDS, "run_id": "run-0"}))
    parser.agrees(long := compact({**FIELDS, "end_user": "a" * 200, "spend_logs_metadata": "x" * 1000}))
    assert not parser.is_fast(long)
    parser.agrees(odd := compact({**FIELDS, "spend_logs_metadata": "\N{GRINNING FACE}" + "x" * 400}))
    assert not parser.is_fast(odd)
    parser.agrees(like := compact({**FIELDS, "spend_logs_metadata": "ü" + "x" * 400}))
    assert parser.is_fast(like)


def test_skips_and_rejections_pass_through() -> None:
    parser = Parser()
    assert isinstance(parser.parse(compact({**FIELDS, "method": "GET"})), Skip)
    assert isinstance(parser.parse(b"{"), Rejected)


def test_a_line_of_nothing_but_names_is_no_format() -> None:
    """An expression for each would take seconds, and stay in memory."""
    parser = Parser()
    for names, fast in (range(100), True), (range(40_000), False), (["x" * 5000], False):
        parser.agrees(many := compact({**FIELDS, **{f"n{name}": "" for name in names}}))
        assert parser.is_fast(many) == fast
