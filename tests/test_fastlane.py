"""The fast lane is the long way, only faster: every line has the same outcome and the same row on both."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from billing_tailer import audit, fastlane, plan
from billing_tailer.files import Chunk
from billing_tailer.model import FactRow, FileState, Position, Rejected, Skip, UsageFact
from billing_tailer.rows import row_of
from billing_tailer.settings import LLM_ROUTES
from tests.support.factrows import fact_of, read_line
from tests.support.loglines import line

LLM_PATH = audit.routes(LLM_ROUTES)
RECORDED = (Path(__file__).parent / "data/audit.jsonl").read_bytes().splitlines()
FIELDS: dict[str, str] = json.loads(line(1))


class Parser:
    """Lines one by one, as `plan` takes them."""

    def __init__(self) -> None:
        self.lines = fastlane.AuditLines(LLM_PATH)

    def parse(self, text: bytes) -> FactRow | Skip | Rejected:
        return read_line(self.lines, text)[0]

    def is_fast(self, text: bytes) -> bool:
        found, common = read_line(self.lines, text)
        assert isinstance(found, FactRow)
        return common

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
    parser.agrees(long := compact({**FIELDS, "end_user": "a" * 200, "spend_logs_metadata": "x" * 1500}))
    assert not parser.is_fast(long)
    parser.agrees(
        odd := compact(
            {**FIELDS, "run_id": "\N{GRINNING FACE}", "end_user": "x" * 250, "spend_logs_metadata": "x" * 300}
        )
    )
    assert not parser.is_fast(odd)
    parser.agrees(like := compact({**FIELDS, "run_id": "ü", "end_user": "x" * 250, "spend_logs_metadata": "x" * 300}))
    assert parser.is_fast(like)


def behind(before: bytes) -> Position:
    """The position in a file of which so much is committed."""
    size = len(before)
    return Position(3, "/x", 1, 1, 1, None, before, size, sha256(before).digest(), size, size, FileState.LIVE)


def slow(text: bytes) -> FactRow | Skip | Rejected:
    outcome = audit.parse(text, LLM_PATH)
    return row_of(outcome) if isinstance(outcome, UsageFact) else outcome


@given(
    st.lists(st.sampled_from([*RECORDED, *(line(number)[:-1] for number in range(40)), b"", b"{"]), max_size=80),
    st.integers(1, 90),
    st.sampled_from([700, 1100, 1 << 16]),
    st.sampled_from([1, 700, 5000, 1 << 16]),
)
def test_many_lines_agree(many: list[bytes], lines_max: int, line_bytes_max: int, piece_bytes: int) -> None:
    """Taken as `plan` takes them: the same rows with the same places, the same counts, the same hash."""
    content = b"before\n" + b"".join(text + b"\n" for text in many)
    place = behind(b"before\n")
    chunk = Chunk(content[:7], content[7:], len(content))

    def works(parse: plan.Parse) -> object:
        work = plan.take_lines(
            place, chunk, None, parse, lines_max=lines_max, line_bytes_max=line_bytes_max, held_bytes_max=1 << 30
        )
        if work is None:
            return None
        texts = [fact.text.rsplit("\t", 3) for fact in work.facts]  # a number may be written in more than one way
        facts = [fact_of(FactRow("", values, 0)) for values, *_ in texts]
        places = [(fact._replace(text=""), numbers) for fact, (_, *numbers) in zip(work.facts, texts, strict=True)]
        return facts, places, replace(work, row=None, facts=[], held_bytes=0)

    fast = fastlane.AuditLines(LLM_PATH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "PIECE_BYTES", piece_bytes)
        expected = works(slow)
        for _ in range(2):  # before the shapes are known, and after
            assert works(fast) == expected


def test_common_lines_count_as_memory() -> None:
    """A row with an odd character takes four times as much as its text."""
    held = []
    for run_id in "run", "\N{GRINNING FACE}":
        content = b"".join(compact({**FIELDS, "run_id": run_id}) + b"\n" for _ in range(300))
        work = plan.take_lines(
            behind(b""),
            Chunk(b"", content, len(content)),
            None,
            fastlane.AuditLines(LLM_PATH),
            lines_max=1000,
            line_bytes_max=1 << 16,
            held_bytes_max=250_000,
        )
        assert work is not None
        held.append((len(work.facts), work.held_bytes))
    (plain, plain_held), (odd, odd_held) = held
    assert plain == 300
    assert plain_held < 250_000 <= odd_held < 250_000 + 150_000
    assert odd < 300


def test_common_lines_end_where_they_should() -> None:
    fast, many = fastlane.AuditLines(LLM_PATH), [line(number)[:-1] for number in range(100, 105)]
    for one in many:
        fast(one)
    text = b"\n".join([*many, b"another", *many, b""]).decode()
    length = len(many[0]) + 1

    def starts(at: int, lines_max: int, line_bytes_max: int) -> list[int]:
        return [fact.start_offset for fact in fast.common(text, at, lines_max, line_bytes_max, 1, 1000)]

    assert starts(0, 100, 2000) == [1000 + length * number for number in range(5)]
    assert starts(0, 3, 2000) == [1000 + length * number for number in range(3)]
    assert starts(length, 1, length - 1) == [1000 + length]
    assert starts(0, 100, length - 2) == []
    assert starts(5 * length, 100, 2000) == []
    assert len(starts(5 * length + 8, 100, 2000)) == 5
    assert starts(len(text), 100, 2000) == []


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
