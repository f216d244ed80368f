"""Fuzzing what reads lines: whatever stands in a log or a spool file has one outcome, which Postgres takes.

Every example is a file of mutated real lines. Examples are checked one by one; at the end many of them are followed by
a real tailer into real Postgres, which must not refuse a single row.
"""

import copy
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from hypothesis import note
from hypothesis import strategies as st

from billing_tailer import audit, fastlane, plan
from billing_tailer.files import Chunk
from billing_tailer.model import FactRow, FileState, Outcome, Position, Rejected, Skip, SpendRecord, UsageFact
from billing_tailer.plan import FileWork, Parse
from billing_tailer.rows import row_of
from billing_tailer.settings import LLM_ROUTES
from billing_tailer.spend import KEY_BYTES_MAX, TOKENS_MAX, parse_row, parse_spool_line
from tests.support.callbacks import DATA, SAMPLES
from tests.support.factrows import fact_of, read_line
from tests.support.follow import following
from tests.support.fuzzing import SECONDS, Mutator, fuzz, seeds
from tests.support.loglines import RECORDED, line
from tests.support.proof import assert_sound, count, outcomes, rows

pytestmark = pytest.mark.timeout(120 + 3 * SECONDS)

COST_MAX = Decimal(1000)
KEPT_MAX = 1500
"""So many examples are committed at the end."""
FOREVER = Position(1, "/x", 1, 1, 1, None, b"", 0, hashlib.sha256().digest(), 0, 0, FileState.LIVE)

LLM_PATH = audit.routes(LLM_ROUTES)
fast_line = fastlane.AuditLines(LLM_PATH)
spool_line: Parse = partial(parse_spool_line, cost_max=COST_MAX)

LINES = [*RECORDED.read_bytes().splitlines(), *(DATA / "litellm/audit.jsonl").read_bytes().splitlines()]
FIELDS = sorted({name for text in LINES for name in json.loads(text)} | {"ts", "requested_model"})
RECORDS = [orjson.dumps({"received_at": 1795307913.0, "payload": sample}) for sample in SAMPLES]
RECORDS.append(b'{"received_at":1.5,"rejected":{"reason":"too_long","detail":"more","sha256":"ab","bytes":5}}')


def audit_line(text: bytes) -> FactRow | Skip | Rejected:
    """Both ways of a line, which agree."""
    (found, _), expected = read_line(fast_line, text), audit.parse(text, LLM_PATH)
    assert (fact_of(found) if isinstance(found, FactRow) else found) == expected
    return found


def audit_text(mutator: Mutator) -> bytes:
    """A mutated audit line."""
    fields = json.loads(mutator.random.choice(LINES))
    if "nginx_request_id" in fields:  # calls of their own, of which all columns come to Postgres
        fields["nginx_request_id"] = fields["call_id"] = f"{mutator.random.getrandbits(128):032x}"
    if fields["litellm_call_id"]:
        fields["litellm_call_id"] = f"fuzz-{mutator.random.getrandbits(64):x}"
    if mutator.random.random() < 0.4:
        return mutator.edited(json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode())
    for _ in range(mutator.random.randrange(4)):
        fields[mutator.random.choice(FIELDS)] = mutator.text() if mutator.random.random() < 0.6 else mutator.value()
    if mutator.random.random() < 0.2:
        fields.pop(mutator.random.choice(FIELDS), None)
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=mutator.random.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def spool_text(mutator: Mutator) -> bytes:
    """A mutated line of a spool file."""
    whole = json.loads(mutator.random.choice(RECORDS))
    if "payload" in whole:
        whole["payload"]["litellm_call_id"] = f"fuzz-{mutator.random.getrandbits(64):x}"
    if mutator.random.random() < 0.4:
        return mutator.edited(orjson.dumps(whole))
    for _ in range(mutator.random.randrange(1, 4)):
        mutator.planted(whole.get("payload", whole))
    return json.dumps(whole, default=str).encode("utf-8", "surrogatepass")


# --- what must hold for every line -----------------------------------------------------------------------------------


def assert_stores(text: str | None, chars_max: int) -> None:
    assert text is None or (len(text) <= chars_max and "\0" not in text and text.encode())  # no half surrogate pair


def assert_fact(fact: UsageFact) -> None:
    """Every value fits its column."""
    for name, value in fact._asdict().items():
        if isinstance(value, str):
            assert_stores(value or "x", audit.TEXT_CHARS_MAX if name == "path" else audit.ID_CHARS_MAX)
        elif isinstance(value, Decimal):
            assert value.is_finite(), name
            assert 0 <= value < 10**20, name
    assert fact.call_id
    assert 0 <= fact.status <= 999
    assert fact.attempt is None or 0 <= fact.attempt < 2**31
    assert fact.provenance in ("stream", "response")
    assert 2001 <= fact.occurred_at.year <= 2286
    assert fact.occurred_at.tzinfo is UTC


def assert_record(record: SpendRecord) -> None:
    """Every value fits its column."""
    for text in (record.call_id, record.run_id, record.end_user, record.model, record.model_group, record.provider):
        assert_stores(text or None, 256)
    for text in (record.error_code, record.cost_text, record.request_id):
        assert_stores(text or None, KEY_BYTES_MAX)
    assert record.call_id
    assert 0 < len(record.record_id.encode()) <= KEY_BYTES_MAX
    assert record.cost_usd is None or (record.cost_usd.is_finite() and 0 <= record.cost_usd <= COST_MAX)
    for tokens in (record.prompt_tokens, record.completion_tokens, record.cached_tokens, record.reasoning_tokens):
        assert tokens is None or 0 <= tokens <= TOKENS_MAX
    for time in (record.started_at, record.ended_at):
        assert time is None or (2001 <= time.year <= 2286 and time.tzinfo is UTC)


def assert_rejected(rejected: Rejected) -> None:
    assert_stores(rejected.detail or "x", audit.DETAIL_CHARS_MAX)


def written(fact: UsageFact) -> bytes:
    """A line that says what the fact says, as nginx writes it; in the older format where the fact is from there."""
    fields: dict[str, Any] = {
        "status": f"{fact.status:03d}",
        "run_id": fact.run_id or "-",
        "end_user": fact.billing_account_id or "",
        "litellm_call_id": fact.call_id if fact.id_echoed else "",
        "litellm_response_cost": "" if fact.header_cost_usd is None else str(fact.header_cost_usd),
        "spend_logs_metadata": json.dumps({"attempt": fact.attempt, "graph_id": fact.graph_id}),
    }
    if fact.method is None:
        return json.dumps({**fields, "ts": fact.occurred_at.isoformat()}).encode()
    fields |= {
        "method": fact.method,
        "uri": quote(fact.path or ""),
        "nginx_request_id": fact.nginx_request_id or "",
        "call_id": fact.proxy_call_id or "-",
        "request_completion": "OK" if fact.request_completed else "",
        "upstream_content_type": "text/event-stream" if fact.provenance == "stream" else "",
        "upstream_connect_time": "0.001",
        "upstream_status": "200",
        "requested_model": fact.requested_model,
        "litellm_model_group": fact.header_model_group,
        "litellm_cache_key": fact.cache_key,
        "request_time": "-" if fact.request_seconds is None else str(fact.request_seconds),
        "time": fact.occurred_at.isoformat(),
        "msec": "",
    }
    return json.dumps(fields).encode()


def assert_reads_back(fact: UsageFact) -> None:
    """What a fact says, written down, is read as the same fact."""
    if fact.path is not None and len(fact.path) == audit.TEXT_CHARS_MAX:
        return  # cut: what is left need not be a route
    again = audit.parse(written(fact), LLM_PATH)
    assert isinstance(again, UsageFact), again
    assert again._replace(line_sha256=None) == fact._replace(line_sha256=None)


def looked_at(outcome: object) -> None:
    """Exactly one of the outcomes there are, and all its values can be stored."""
    if type(outcome) is FactRow:
        fact = fact_of(outcome)
        assert_fact(fact)
        assert_reads_back(fact)
    elif type(outcome) is SpendRecord:
        assert_record(outcome)
    elif type(outcome) is Rejected:
        assert_rejected(outcome)
    else:
        assert type(outcome) is Skip
        assert_stores(outcome.call_id, audit.ID_CHARS_MAX)


def taken(content: bytes, parse: Parse, lines_max: int) -> list[FileWork]:
    """The work on a file's whole lines, in steps of `lines_max` lines; NUL bytes at a line's begin are left out."""
    works: list[FileWork] = []
    position, before, row = FOREVER, b"", None
    while (rest := content[len(before) :]) and b"\n" in rest:
        if rest.startswith(b"\0"):
            end = len(before) + len(rest) - len(rest.lstrip(b"\0"))
            work = plan.take_hole(position, before[-4096:], end, len(content))
        else:
            chunk = Chunk(before[-4096:], rest, len(content))
            found = plan.take_lines(
                position, chunk, row, parse, lines_max=lines_max, line_bytes_max=1 << 16, held_bytes_max=1 << 30
            )
            assert found is not None
            work, row = found, found.row
        works.append(work)
        assert work.step.end_offset > position.committed_offset
        before = content[: work.step.end_offset]
        position = work.step.after()
    return works


def assert_tiles(content: bytes, works: list[FileWork]) -> None:
    """Steps follow each other to the last newline, each line is in one count, and each row lies on one whole line."""
    at = 0
    for work in works:
        step = work.step
        assert step.position.committed_offset == at
        part = content[at : step.end_offset]
        lines = 0 if step.gap is not None else part.count(b"\n")
        assert sum(step.counts.values()) == lines
        places = [(fact.start_offset, fact.end_offset) for fact in work.facts]
        places += [(letter.start_offset, letter.end_offset) for letter in work.dead_letters]
        assert len(work.facts) == step.counts.get(Outcome.FACT, 0)
        assert len(work.records) == step.counts.get(Outcome.SPEND_RECORD, 0)
        assert len(work.dead_letters) == step.counts.get(Outcome.DEAD_LETTER, 0)
        for (_, end), (start, _) in itertools.pairwise(sorted(places)):
            assert end <= start
        for start, end in places:
            assert at <= start < end <= step.end_offset
            assert content[start:end].count(b"\n") == 1
            assert content[end - 1 : end] == b"\n"
        for letter in work.dead_letters:
            assert letter.sha256 == hashlib.sha256(content[letter.start_offset : letter.end_offset]).digest()
        at = step.end_offset
    whole = content.rfind(b"\n") + 1
    assert at == whole or content[at:whole].strip(b"\0") == b"", "to the last newline, or a hole after it"


def fuzzed(parse: Parse, text_of: Callable[[Mutator], bytes]) -> tuple[list[bytes], int]:
    """Some of the lines that were tried, evenly spread over the time; how many there were."""
    kept: list[bytes] = []
    seen = 0
    choose = random.Random()  # not the global one, which hypothesis holds still

    def example(seed: int, garbage: bytes, lines_max: int) -> None:
        nonlocal seen
        mutator = Mutator(seed)
        content = b"".join(text + b"\n" for text in [garbage, *(text_of(mutator) for _ in range(8))])
        for text in content.split(b"\n"):
            note(text)
            looked_at(parse(text))
            seen += 1
            if len(kept) < KEPT_MAX:
                kept.append(text)
            elif (place := choose.randrange(seen)) < KEPT_MAX:
                kept[place] = text
        assert_tiles(content, taken(content, parse, lines_max))

    fuzz(example, 0.4, seed=seeds, garbage=st.binary(max_size=40), lines_max=st.sampled_from([1, 2, 100]))
    return kept, seen


def assert_postgres_takes(dsn: str, file: Path, kept: list[bytes]) -> None:
    """A tailer follows these lines into real Postgres, which refuses none."""
    file.write_bytes(b"".join(text + b"\n" for text in kept if not text.startswith(b"\0")))
    with following(dsn, file.parent) as rig:
        rig.turn()
    assert_sound(dsn, {1: file.read_bytes()})
    assert rows(dsn, "select * from dead_letters where reason = 'refused_by_postgres'") == []
    assert rows(dsn, "select committed_offset from tail_files")[0]["committed_offset"] == file.stat().st_size


# --- the tests -------------------------------------------------------------------------------------------------------


def test_audit_lines(dsn: str, tmp_path: Path) -> None:
    kept, seen = fuzzed(audit_line, audit_text)
    assert_postgres_takes(dsn, tmp_path / "audit.jsonl", kept)
    found = outcomes(dsn)
    print(f"\n{seen} audit lines; of {len(kept)} in Postgres: {found}", end=" ")
    for outcome in ("fact", "dead_letter", "not_llm_route", "rejected_before_llm"):
        assert found.get(outcome, 0) > 0, f"the mutations reach no {outcome}: {found}"


def test_spool_lines(dsn: str, tmp_path: Path) -> None:
    kept, seen = fuzzed(spool_line, spool_text)
    assert_postgres_takes(dsn, tmp_path / "callbacks-fuzz.jsonl", kept)
    found = outcomes(dsn)
    print(f"\n{seen} spool lines; of {len(kept)} in Postgres: {found}", end=" ")
    assert count(dsn, "spend_records") > 0
    for outcome in ("spend_record", "dead_letter"):
        assert found.get(outcome, 0) > 0, f"the mutations reach no {outcome}: {found}"


def test_rows_of_spend_logs() -> None:
    """LiteLLM's answers go the same way, without a file."""
    samples = json.loads((DATA / "spendlogs/by_call_id.json").read_bytes())
    assert samples
    kept: Counter[str] = Counter()

    def example(seed: int) -> None:
        mutator = Mutator(seed)
        for _ in range(8):
            row = mutator.planted(mutator.planted(copy.deepcopy(mutator.random.choice(samples))))
            outcome = parse_row(row, COST_MAX)
            looked_at(outcome)
            kept[type(outcome).__name__] += 1

    fuzz(example, 0.2, seed=seeds)
    assert min(kept["SpendRecord"], kept["Rejected"]) > 10, kept


def test_the_checks_can_fail() -> None:
    """What they are to notice, they notice."""
    fact = audit.parse(line(1)[:-1], LLM_PATH)
    assert isinstance(fact, UsageFact)
    looked_at(row_of(fact))
    wrong = (
        {"run_id": "a\0"},
        {"graph_id": "\ud800"},
        {"call_id": "x" * 257},
        {"attempt": 2**31},
        {"header_cost_usd": Decimal("Infinity")},
        {"request_seconds": Decimal(10) ** 20},
        {"occurred_at": datetime(1, 1, 1, tzinfo=UTC)},
        {"status": 1000},
    )
    for changes in wrong:
        with pytest.raises((AssertionError, UnicodeEncodeError)):
            assert_fact(fact._replace(**changes))
    content = line(1) + line(2)
    works = taken(content, audit_line, 1)
    assert_tiles(content, works)
    with pytest.raises(AssertionError):
        assert_tiles(content, works[1:])
    with pytest.raises(AssertionError):
        assert_tiles(content.replace(b"\n", b" "), works)
