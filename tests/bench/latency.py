"""How long a single line takes to its COMMIT, and a call from its second half to the COMMIT of its receipt.

From the moment before the line is written or the callback is sent, to the line that the daemon logs when COMMIT has
returned, so the fsync is in it; nothing that looks on takes part. A peer says nothing when it has committed: against it
both are told by Postgres' commit timestamp, which is taken before the fsync.
"""

import os
import queue
import threading
import time
import uuid
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import psycopg

from tests.bench import logs
from tests.bench.client import Poster, port_of
from tests.bench.peers import RSYSLOG_PEER, Missing, running, wait_for_rows
from tests.bench.readings import Delays, Goal, Reading, delay_readings, median, skipped
from tests.bench.stops import Stops
from tests.bench.world import FACTS, RECEIPTS, World, daemon, wait_for_count, wait_until_ready
from tests.support.daemon import Daemon

RATE_OF_GOALS: Final = 200
LINE_GOALS: Final = (Goal(at_most=3), Goal(at_most=15), None)
SETTLED_GOALS: Final = (None, None, Goal(at_most=50))
NO_GOALS: Final = (None, None, None)
POSTS_PER_SECOND_MAX: Final = 100
"""Above that LiteLLM, too, sends several events in one POST."""
BULK: Final = 200
RECORDS: Final = "select count(*) from billing.spend_records"


def lines(world: World) -> list[Reading]:
    """From the write of a line to its COMMIT; one daemon, one rate after the other."""
    readings = []
    with world.database() as dsn, world.volume() as volume:
        log = volume / "audit.jsonl"
        log.touch()
        with daemon(dsn, volume) as running_:
            wait_until_ready(running_)
            total = 0
            for rate, seconds in world.amounts.latency:
                rounds = []
                for _ in range(_rounds(world, rate)):
                    rounds.append(_write(log, rate, seconds))
                    total += len(rounds[-1])
                    wait_for_count(running_, dsn, FACTS, total)
                what = f"a line to its COMMIT, {rate:,}/s"
                goals = LINE_GOALS if rate == RATE_OF_GOALS else NO_GOALS
                committed = [_committed(running_, dsn, written) for written in rounds]
                readings += delay_readings(committed, f"line_{rate}", what, goals)
                if rate == RATE_OF_GOALS:
                    statement = "select call_id, {} from billing.usage_facts"
                    stamped = [_stamped(dsn, statement, written) for written in rounds]
                    words = f"{what}, without its fsync"
                    readings += delay_readings(stamped, f"line_stamped_{rate}", words, NO_GOALS)
    return [*readings, *_rsyslog(world)]


def _rounds(world: World, rate: int) -> int:
    """The rate that goals are about is measured more than once: a disk that stops for a moment is in one round."""
    return world.amounts.rounds if rate == RATE_OF_GOALS else 1


def _committed(running_: Daemon, dsn: str, written: Mapping[str, float]) -> Delays:
    """By the daemon's log."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("select call_id, end_offset from billing.usage_facts").fetchall()
    last = max(end for _, end in rows)
    running_.wait_until(lambda: any(end >= last for end, _ in _commits(running_)), what="the last batch is logged")
    ends, moments = zip(*sorted(_commits(running_)), strict=True)
    return Delays([1000 * (moments[bisect_left(ends, end)] - written[call]) for call, end in rows if call in written])


def _commits(running_: Daemon) -> list[tuple[int, float]]:
    return [(event["files"][0]["to"], _moment(event)) for event in running_.events("batch.committed")]


def _moment(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def _write(log: Path, rate: int, seconds: float) -> dict[str, float]:
    """Call id -> when its line was written, so many lines a second."""
    written: dict[str, float] = {}
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in _paced(rate, seconds):
        call_id = uuid.uuid4().hex
        text = logs.line(call_id.encode(), number)
        written[call_id] = time.time()
        os.write(descriptor, text)
    os.close(descriptor)
    return written


def _paced(rate: int, seconds: float) -> Iterator[int]:
    """Numbers from 0, each at its time; never early, and late only where the machine is."""
    start = time.monotonic()
    for number in range(max(2, int(rate * seconds))):
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        yield number


def _stamped(dsn: str, statement: str, began: dict[str, float]) -> Delays:
    """By Postgres' commit timestamps. statement: call id and, in place of {}, the row's."""
    commit = "extract(epoch from pg_xact_commit_timestamp(xmin))::float8"
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(statement.format(commit).encode()).fetchall()
    return Delays([1000 * (committed - began[call_id]) for call_id, committed in rows if call_id in began])


def _rsyslog(world: World) -> list[Reading]:
    """The same at 200 lines/s: one line at a time there, too."""
    rate, seconds = next(found for found in world.amounts.latency if found[0] == RATE_OF_GOALS)
    what = f"a line to its COMMIT with rsyslog, {rate:,}/s, without its fsync"
    with world.database() as dsn, world.volume() as volume:
        log = volume / "audit.jsonl"
        log.touch()
        try:
            with running(RSYSLOG_PEER, volume, dsn) as process:
                time.sleep(1)
                written = _write(log, rate, seconds)
                wait_for_rows(RSYSLOG_PEER, process, volume, dsn, len(written))
        except Missing as why:
            names = (("p50", "median"), ("p99", "99 %"), ("max", "longest"))
            return [skipped(f"rsyslog_{rate}_{name}_ms", f"{what}, {word}", "ms", str(why)) for name, word in names]
        delays = _stamped(dsn, "select line::json->>'litellm_call_id', {} from lines", written)
    return delay_readings([delays], f"rsyslog_{rate}", what, NO_GOALS)


# --- settling


def settling(world: World) -> list[Reading]:
    """From a call's second half, the line or its callback by turns, to the COMMIT of its receipt; one daemon, one rate
    after the other. At the rate of the goals it is watched whether the machine stands still meanwhile."""
    began: dict[int, list[dict[str, float]]] = {}
    watched: list[Stops] = []
    with world.database() as dsn, world.volume() as volume:
        log = volume / "audit.jsonl"
        log.touch()
        with daemon(dsn, volume) as running_:
            wait_until_ready(running_)
            port = port_of(running_.url)
            total = 0
            for rate, seconds in world.amounts.latency:
                began[rate] = []
                for _ in range(_rounds(world, rate)):
                    calls = [uuid.uuid4().hex for _ in range(max(2, int(rate * seconds)))]
                    _first_halves(log, port, calls)
                    wait_for_count(running_, dsn, FACTS, total + len(calls[1::2]))
                    wait_for_count(running_, dsn, RECORDS, total + len(calls[::2]))
                    total += len(calls)
                    stops = Stops()
                    with stops if rate == RATE_OF_GOALS else nullcontext():
                        began[rate].append(_second_halves(log, port, calls, rate, seconds))
                        wait_for_count(running_, dsn, RECEIPTS, total)
                    if rate == RATE_OF_GOALS:
                        watched.append(stops)
            settled = _settled(running_, dsn)
    readings = []
    for rate, rounds in began.items():
        delays = [Delays([1000 * (settled[call_id] - moment) for call_id, moment in one.items()]) for one in rounds]
        goals = SETTLED_GOALS if rate == RATE_OF_GOALS else NO_GOALS
        readings += delay_readings(delays, f"settled_{rate}", f"second half to receipt, {rate:,}/s", goals)
        if rate == RATE_OF_GOALS:
            readings += _without_stops(rounds, settled, watched)
    return readings


def _without_stops(
    rounds: Sequence[Mapping[str, float]], settled: Mapping[str, float], watched: Sequence[Stops]
) -> list[Reading]:
    """The longest once more, less the time in which nothing could run."""
    keys = ("machine_stops_max_ms", "the machine itself stands still meanwhile, longest", "ms")
    less_keys = (
        f"settled_{RATE_OF_GOALS}_less_stops_max_ms",
        f"second half to receipt, {RATE_OF_GOALS}/s, less the machine's own stops, longest",
        "ms",
    )
    missing = next((stops.missing for stops in watched if stops.missing), None)
    if missing is not None:
        return [skipped(*keys, missing), skipped(*less_keys, missing)]
    less = [
        max(settled[call] - moment - stops.within(moment, settled[call]) for call, moment in one.items())
        for one, stops in zip(rounds, watched, strict=True)
    ]
    return [
        median(
            *keys,
            [1000 * stops.longest() for stops in watched],
            note="seen by a process of real-time priority on each processor",
        ),
        median(*less_keys, [1000 * seconds for seconds in less]),
    ]


def _settled(running_: Daemon, dsn: str) -> dict[str, float]:
    """When each call was settled, by the daemon's log: a line for each transaction that wrote receipts, in order."""
    with psycopg.connect(dsn) as connection:
        transactions = connection.execute(
            "select array_agg(source_reference) from billing.charge_receipts "
            "group by xmin::text order by min(pg_xact_commit_timestamp(xmin))"
        ).fetchall()
    running_.wait_until(lambda: len(list(running_.events("settled"))) == len(transactions), what="all is logged")
    events = list(running_.events("settled"))
    assert [event["receipts"] for event in events] == [len(calls) for (calls,) in transactions]
    return {call_id: _moment(event) for event, (calls,) in zip(events, transactions, strict=True) for call_id in calls}


def _first_halves(log: Path, port: int, calls: Sequence[str]) -> None:
    """Callbacks of the even calls, lines of the odd ones."""
    with log.open("ab", buffering=0) as out:
        out.write(b"".join(logs.line(calls[number].encode(), number) for number in range(1, len(calls), 2)))
    poster = Poster(port)
    events = [logs.callback(calls[number], number) for number in range(0, len(calls), 2)]
    for start in range(0, len(events), BULK):
        poster.post(events[start : start + BULK])
    poster.close()


def _second_halves(log: Path, port: int, calls: Sequence[str], rate: int, seconds: float) -> dict[str, float]:
    """The others, so many a second; call id -> when its half was written or its POST began."""
    began: dict[str, float] = {}
    events_per_post = -(-rate // 2 // POSTS_PER_SECOND_MAX) or 1
    waiting: list[tuple[str, dict[str, Any]]] = []
    with log.open("ab", buffering=0) as out, _posting(port, began) as posts:
        for number in _paced(rate, seconds):
            if number % 2:
                waiting.append((calls[number], logs.callback(calls[number], number)))
                if len(waiting) >= events_per_post or number >= len(calls) - 2:
                    posts.put(waiting)
                    waiting = []
                continue
            text = logs.line(calls[number].encode(), number)
            began[calls[number]] = time.time()
            out.write(text)
    return began


@contextmanager
def _posting(port: int, began: dict[str, float]) -> Iterator["queue.SimpleQueue[list[tuple[str, dict[str, Any]]]]"]:
    """Posts what is put into the queue, by a thread of its own: a write must not wait for an answer."""
    posts: queue.SimpleQueue[list[tuple[str, dict[str, Any]]]] = queue.SimpleQueue()

    def work() -> None:
        poster = Poster(port)
        while events := posts.get():
            began.update(dict.fromkeys((call_id for call_id, _ in events), time.time()))
            poster.post([event for _, event in events])
        poster.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield posts
    finally:
        posts.put([])
        thread.join()
