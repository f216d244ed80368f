"""A fixed small scenario that has something of everything, in phases, and the exact result it must have.

A backlog with poison, a line beyond the limit, a replayed line and one that Postgres refuses; a dead writer's spool
file with a torn end; half a line; callbacks; a rotation with a late write; two truncations, one regrown past the
offset; a correction. A phase begins only when everything of the phases before it is committed and settled, so whatever
dies in between, nothing may be missing at the end.
"""

import http.client
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg

from tests.support.loglines import line, lines
from tests.support.proof import assert_sound
from tests.support.spendlines import payload, spool_line
from tests.torture.table import Tally

TOKEN: Final = "callback-token-0123456789"
CREDITS: Final = 2250
"""What the payloads' cost comes to."""
LINE_BYTES_MAX: Final = 4096
LIMITS: Final = {"batch_lines_max": 50, "batch_bytes_max": 65536, "line_bytes_max": LINE_BYTES_MAX}
POISON_CHECK: Final = "alter table billing.usage_facts add constraint poison check (run_id <> 'poison')"
"""Makes Postgres refuse what the parser lets through."""
_REPLAYED: Final = 5
_REFUSED: Final = 70


@dataclass
class Expected:
    """What must be in the database so far. receipts: call number -> credits of receipt and adjustments together."""

    facts: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)
    receipts: dict[str, int] = field(default_factory=dict)
    letters: Counter[str] = field(default_factory=Counter)
    contents: list[bytes] = field(default_factory=list)  # of every generation that may be found
    gaps: int = 0
    unanswered: int = 0  # records that were sent, and sent again because no answer came: each may be there twice

    def calls(self, *numbers: int) -> None:
        """These lines are there."""
        self.facts |= {_call(number) for number in numbers}
        self.outcomes["fact"] += len(numbers)

    def charged(self, *numbers: int) -> None:
        """These calls are charged, once more."""
        self.outcomes["spend_record"] += len(numbers)
        for number in numbers:
            self.receipts[_call(number)] = self.receipts.get(_call(number), 0) + CREDITS

    def letter(self, reason: str) -> None:
        """One dead letter more."""
        self.letters[reason] += 1
        self.outcomes["dead_letter"] += 1


def _call(number: int) -> str:
    return f"call-{number:08d}"


class Scenario:
    """The scenario in a directory of its own. `post`: sends callbacks until they are acknowledged."""

    def __init__(self, volume: Path, spool: Path, post: Callable[[list[dict[str, Any]]], None]) -> None:
        self.expected = Expected()
        self.phases = (self._backlog, self._half_a_line, self._rotation, self._truncation, self._regrown)
        self._log = volume / "audit.jsonl"
        self._volume = volume
        self._spool = spool
        self._post = post
        self._half = b""

    def _backlog(self) -> None:
        expected = self.expected
        rotated = lines(0, 30)
        refused = line(_REFUSED, run_id="poison")
        current = b"".join(
            (
                lines(30, 30),
                b"{not json\n",
                b"x" * 200_000 + b"\n",
                line(_REPLAYED),
                lines(60, 10),
                refused,
                lines(71, 19),
                b"\r\n\n",
            )
        )
        (self._volume / "audit.jsonl.1").write_bytes(rotated)
        self._log.write_bytes(current)
        torn = b'{"received_at": 17'
        spooled = b"".join(spool_line(payload(number)) for number in range(40)) + torn
        (self._spool / f"callbacks-{'0' * 32}-000000.jsonl").write_bytes(spooled)
        expected.calls(*(number for number in range(90) if number != _REFUSED))
        expected.charged(*range(40))
        for reason in ("invalid_json", "too_long", "refused_by_postgres"):
            expected.letter(reason)
        expected.outcomes.update(replayed=1, blank_line=2, torn=1)
        expected.contents += [rotated, spooled + b"\x18\n", current]

    def _half_a_line(self) -> None:
        self._half = line(103)
        added = lines(100, 3) + self._half[:50]
        with self._log.open("ab") as out:
            out.write(added)
        self.expected.contents[-1] += added
        self.expected.calls(100, 101, 102)
        self._post([payload(number) for number in (100, 101, 102)])
        self.expected.charged(100, 101, 102)

    def _rotation(self) -> None:
        rotated = self._volume / "audit.jsonl.2"
        self._log.rename(rotated)
        self._log.write_bytes(lines(110, 2))
        with rotated.open("ab") as late:
            late.write(self._half[50:])
        self.expected.contents[-1] += self._half[50:]
        self.expected.contents.append(lines(110, 2))
        self.expected.calls(103, 110, 111)

    def _truncation(self) -> None:
        self._log.write_bytes(line(120))  # O_TRUNC, then one write: shorter than what was committed
        self.expected.contents.append(line(120))
        self.expected.calls(120)
        self.expected.gaps += 1

    def _regrown(self) -> None:
        self._log.write_bytes(lines(130, 4))  # longer than what was committed
        self.expected.contents.append(lines(130, 4))
        self.expected.calls(130, 131, 132, 133)
        self.expected.gaps += 1
        self._post([payload(100, attempt=1), payload(130)])
        self.expected.charged(100, 130)


class State:
    """What is in the database, through one connection that stays open."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection = psycopg.connect(dsn, autocommit=True)
        self._connection.execute(
            "set search_path to billing; set session_replication_role to replica"
        )  # any order of deletes

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def empty(self) -> None:
        """Remove every row but the migrations'."""
        while self.sessions():
            os.sched_yield()
        names = self._all("select tablename from pg_tables where schemaname = 'billing'")
        tables = [name for (name,) in names if name != "schema_migrations"]
        self._connection.execute("; ".join(f"delete from {name}" for name in tables).encode())

    def sessions(self) -> int:
        """How many daemons' sessions there are, dying ones included."""
        return int(
            self._all(
                "select count(*) from pg_stat_activity "
                "where datname = current_database() and application_name like 'billing_tailer%'"
            )[0][0]
        )

    def reached(self, expected: Expected) -> bool:
        """Whether everything that is expected so far is committed and settled."""
        (found,) = self._all(
            "select (select coalesce(sum(value::int), 0)::int from tail_batches, jsonb_each_text(counts) "
            "where key <> 'replayed'), "
            "(select count(*) from usage_facts), "
            "(select coalesce(sum(charged_credits), 0)::bigint from charge_receipts), "
            "(select coalesce(sum(delta_credits), 0)::bigint from charge_adjustments)"
        )
        lines_found, facts, charged, corrected = found
        return bool(
            lines_found >= sum(expected.outcomes.values()) - expected.outcomes["replayed"]
            and facts >= len(expected.facts)
            and charged + corrected >= sum(expected.receipts.values())
        )

    def judge(self, expected: Expected, scenario: str, what: str) -> Tally:
        """Compare with what must be there. what: how to see it again, for the problems."""
        tally = Tally(scenario, runs=1)
        facts = {row[0] for row in self._all("select call_id from usage_facts")}
        receipts = dict(
            self._all(
                "select source_reference, charged_credits + coalesce((select sum(delta_credits) "
                "from charge_adjustments a where a.source_reference = r.source_reference), 0)::bigint "
                "from charge_receipts r"
            )
        )
        outcomes = Counter(
            dict(
                self._all(
                    "select key, sum(value::int)::int from tail_batches, jsonb_each_text(counts) where value::int > 0 "
                    "group by key"
                )
            )
        )
        again = outcomes["replayed"] - expected.outcomes["replayed"]
        if 0 < again <= expected.unanswered:
            outcomes["replayed"] -= again
        letters = Counter(dict(self._all("select reason, count(*)::int from dead_letters group by reason")))
        gaps = self._all(
            "select path, generation, start_offset, end_offset, reason, committed_offset, size_seen "
            "from log_gaps join tail_files using (file_id) order by declared_at"
        )
        known_gaps = [gap for gap in gaps if gap[3] is not None]
        tally.lost = len(expected.facts - facts) + len(expected.receipts.keys() - receipts.keys())
        tally.doubled = len(facts - expected.facts) + sum((outcomes - expected.outcomes).values())
        tally.doubled += sum(charged > expected.receipts.get(call, 0) for call, charged in receipts.items())
        tally.undeclared = sum((expected.letters - letters).values()) + max(0, expected.gaps - len(gaps))
        found = (outcomes, receipts, letters, len(gaps), known_gaps)
        wanted: tuple[object, ...] = (expected.outcomes, expected.receipts, expected.letters, expected.gaps, [])
        names = ("outcomes", "receipts", "dead letters", "gaps", "gaps of known size")
        tally.problems = [
            f"{what}: {name}: {is_now!r}, not {must!r}"
            for name, is_now, must in zip(names, found, wanted, strict=True)
            if is_now != must
        ]
        tally.problems += self._unsound(expected, what)
        return tally

    def _unsound(self, expected: Expected, what: str) -> list[str]:
        """The proof of tests/support: ranges tile, hashes match the bytes of the generation that has this head."""
        generations = self._all("select file_id, path, head from tail_files where committed_offset > 0")
        contents = {}
        for file_id, path, head in generations:
            matching = [content for content in expected.contents if content.startswith(bytes(head))]
            if len(matching) == 1:
                contents[file_id] = matching[0]
            elif "/callbacks-" not in path:
                return [f"{what}: {path} has a head that is no file's: {bytes(head)[:80]!r}"]
        try:
            assert_sound(self._dsn, contents)
        except AssertionError as error:
            return [f"{what}: {str(error).splitlines()[0]}"]
        return []

    def _all(self, statement: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement.encode()).fetchall()


def post(port: int, events: list[dict[str, Any]]) -> bool | None:
    """Send callbacks once. True: acknowledged. False: not received. None: nobody knows, the answer is missing."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    try:
        connection.connect()
        connection.request("POST", "/v1/callbacks/litellm", json.dumps(events), headers)
        return connection.getresponse().status == 200
    except ConnectionRefusedError:
        return False
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
