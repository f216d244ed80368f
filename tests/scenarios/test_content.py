"""Lines that no log should have: each costs one dead letter, and nothing beside it."""

from pathlib import Path

import psycopg
import pytest

from tests.scenarios.outcome import assert_exactly
from tests.support.follow import following
from tests.support.logfiles import append
from tests.support.loglines import line, lines
from tests.support.proof import rows

STATUS = b'"status":"200"'
POISON = {
    "\\u0000": (line(77_777).replace(b"call-00077777", b"call-\\u0000"), "bad_value"),
    "NUL": (line(77_777).replace(b"call-00077777", b"call-\0"), "invalid_json"),
    "lone surrogate": (line(77_777).replace(b"account-1", b"\\ud800"), "invalid_json"),
    "number overflow": (line(77_777).replace(STATUS, b'"status":1e400'), "invalid_json"),
    "NaN": (line(77_777).replace(STATUS, b'"status":NaN'), "invalid_json"),
    "refused by Postgres": (line(77_777, run_id="poison"), "refused_by_postgres"),
}
REFUSE = "alter table billing.usage_facts add check (run_id <> 'poison')"


@pytest.mark.parametrize(("poison", "reason"), POISON.values(), ids=POISON)
def test_a_poison_row_among_10_000(dsn: str, log: Path, poison: bytes, reason: str) -> None:
    """One dead letter; the other 9,999 are committed in the same transaction as it."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(REFUSE)
    before, after = lines(0, 6_000), lines(6_000, 3_999)
    content = before + poison + after
    log.write_bytes(content)
    with following(dsn, log.parent, batch_lines_max=10_000, batch_bytes_max=4 * len(content)):
        pass
    letter = (1, len(before), len(before) + len(poison), reason)
    assert_exactly(dsn, range(9_999), contents={1: content}, letters=[letter])
    assert rows(dsn, "select raw from dead_letters") == [{"raw": poison}]
    transactions = "select count(distinct x)::int as n from (select xmin::text as x from usage_facts union all "
    assert rows(dsn, transactions + "select xmin::text from dead_letters) t") == [{"n": 1}]


def test_a_file_of_nothing_but_poison(dsn: str, log: Path) -> None:
    """Beside a good one; over a restart; its descriptor and its descendants are as welcome as any other's."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(REFUSE)
    kinds = list(POISON.values())
    letters, content = [], b""
    for number in range(600):
        poison, reason = kinds[number % len(kinds)]
        letters.append((1, len(content), len(content) + len(poison), reason))
        content += poison
    half = len(content) // 2
    log.write_bytes(content[:half])
    good = log.with_name("audit-good.jsonl")
    with following(dsn, log.parent) as rig:
        append(log, content[half : half + 9_000])
        good.write_bytes(lines(0, 50))
        rig.turn()
    append(log, content[half + 9_000 :])
    with following(dsn, log.parent) as rig:
        assert not rig.health.reasons()
    assert_exactly(dsn, range(50), contents={1: content, 2: lines(0, 50)}, letters=letters)


def test_duplicate_keys_1e400_and_20_digit_integers(dsn: str, log: Path) -> None:
    """Bad where the value is needed, or where nobody can say which one is meant; of no interest elsewhere."""
    cases = (
        (line(0), None),
        (line(1)[:-2] + b',"litellm_call_id":"call-00000002"}\n', "duplicate_key"),
        (line(1)[:-2] + b',"litellm\\u005fcall_id":"call-00000001"}\n', "duplicate_key"),
        (line(1)[:-2] + b',"nobody":{"knows":1,"knows":1}}\n', "duplicate_key"),
        (line(1).replace(STATUS, b'"status":1e400'), "invalid_json"),
        (line(1)[:-2] + b',"nobody":-1e400}\n', "invalid_json"),
        (line(1).replace(STATUS, b'"status":12345678901234567890'), "bad_value"),
        (line(1).replace(STATUS, b'"status":"12345678901234567890"'), "bad_value"),
        (line(1)[:-2] + b',"nobody":12345678901234567890}\n', None),
        (line(2).replace(b'"request_time":"0.425"', b'"request_time":"1e400"'), None),
        (line(3), None),
    )
    content, letters = b"", []
    for text, reason in cases:
        if reason is not None:
            letters.append((1, len(content), len(content) + len(text), reason))
        content += text
    log.write_bytes(content)
    with following(dsn, log.parent):
        pass
    assert_exactly(dsn, range(4), contents={1: content}, letters=letters)


def test_the_same_call_id_at_two_offsets(dsn: str, log: Path) -> None:
    """The same request again is a replay, another request under its id a conflict: in one batch, in the next one, after
    a restart and in another file."""
    taken = [line(1, nginx_request_id=digit * 32, end_user="somebody else") for digit in "def"]
    first = lines(0, 3) + line(1) + taken[0]
    log.write_bytes(first)
    with following(dsn, log.parent) as rig:
        append(log, line(2) + taken[1])
        rig.turn()
    append(log, line(0) + taken[0] + line(3))
    other = log.with_name("audit-other.jsonl")
    other.write_bytes(line(9, uri="/health") + line(4) + taken[2] + line(3))
    with following(dsn, log.parent) as rig:
        assert not rig.health.reasons()
    assert_exactly(
        dsn,
        range(5),
        contents={1: log.read_bytes(), 2: other.read_bytes()},
        replayed=5,
        conflict=3,
        not_llm_route=1,
    )
    found = rows(dsn, "select call_id, file_id, start_offset, billing_account_id from call_conflicts order by 2, 3")
    assert [(row["file_id"], row["start_offset"]) for row in found] == [
        (1, len(lines(0, 3) + line(1))),
        (1, len(first + line(2))),
        (2, len(line(9, uri="/health") + line(4))),
    ]
    assert {(row["call_id"], row["billing_account_id"]) for row in found} == {("call-00000001", "somebody else")}
    assert rows(dsn, "select distinct billing_account_id as account from usage_facts") == [{"account": "account-1"}]
