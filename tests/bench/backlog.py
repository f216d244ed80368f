"""How fast a log that has long been there is read: to committed facts, and with its callbacks to receipts."""

from collections.abc import Sequence
from typing import Final

from tests.bench.following import Followed, follow
from tests.bench.readings import Goal, Reading, median, ratios
from tests.bench.reference import KEYS, copy_seconds
from tests.bench.world import World

GOAL: Final = Goal(at_least=0.8)


def facts(world: World) -> list[Reading]:
    """A log to committed facts, against raw COPY of the same facts, in turn."""
    count = world.amounts.lines
    log = world.log(count)
    ours: list[Followed] = []
    raw: list[float] = []
    for _ in range(world.amounts.rounds):
        with world.database() as dsn:
            ours.append(follow(world, dsn, {"audit.jsonl": log}, count))
            raw.append(count / copy_seconds(dsn, ["usage_facts"]))
    rates = [count / found.seconds for found in ours]
    return [
        median("ratio", "lines to facts, of raw COPY", "", ratios(rates, raw), goal=GOAL),
        median("lines_per_s", "lines to committed facts", "1/s", rates, note=f"{count:,} lines"),
        median("copy_rows_per_s", "raw COPY of the same rows", "1/s", raw),
        Reading("line_bytes", "a line", log.stat().st_size / count, "bytes"),
        *_profile(ours, count),
    ]


def receipts(world: World) -> list[Reading]:
    """A log and the callbacks of its calls to receipts, against raw COPY of all rows that come of them, in turn."""
    count = world.amounts.settled_calls
    log, spool = world.log(count), world.spool(count)
    ours: list[Followed] = []
    raw: list[float] = []
    for _ in range(world.amounts.rounds):
        with world.database() as dsn:
            ours.append(follow(world, dsn, {"audit.jsonl": log}, count, spool=spool))
            raw.append(count / copy_seconds(dsn, list(KEYS)))
    rates = [count / found.seconds for found in ours]
    return [
        median("ratio", "calls to receipts, of raw COPY", "", ratios(rates, raw)),
        median("calls_per_s", "calls to receipts", "1/s", rates, note=f"{count:,} lines and their callbacks"),
        median("copy_calls_per_s", "raw COPY of facts, records, receipts and details", "1/s", raw),
        *_profile(ours, count),
    ]


def _profile(ours: Sequence[Followed], count: int) -> list[Reading]:
    """Where the time goes: what takes nearly all of it is the limit."""
    wall = [found.seconds * 1e6 / count for found in ours]
    parts = {
        "daemon": ("CPU of the daemon", [found.daemon_cpu for found in ours]),
        "backends": ("CPU of its Postgres connections", [found.backends_cpu for found in ours]),
        "postgres": ("CPU of all of Postgres", [found.postgres_cpu for found in ours]),
    }
    return [
        median("wall_us", "time per call", "µs", wall),
        *(
            median(f"{key}_cpu_us", f"{words}, per call", "µs", [seconds * 1e6 / count for seconds in used])
            for key, (words, used) in parts.items()
        ),
        Reading("peak_mb", "the daemon's memory at most", max(found.peak_mb for found in ours), "MB"),
    ]
