"""A tailer in the test's own process, turned by hand: every scenario without the cost of a subprocess."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from billing_tailer import audit, fastlane
from billing_tailer.events import Events
from billing_tailer.files import LogFiles
from billing_tailer.follower import Follower
from billing_tailer.health import Health
from billing_tailer.ledger import Ledger
from billing_tailer.plan import Parse
from billing_tailer.reader import Limits, Reader
from billing_tailer.resets import OrderedReset
from billing_tailer.settings import LLM_ROUTES
from billing_tailer.settle import Rules
from billing_tailer.settler import Settler, Timing
from billing_tailer.spend import parse_spool_line
from billing_tailer.tailer import Tailer
from billing_tailer.wake import Wake


@dataclass
class Rig:
    """A tailer and its parts."""

    tailer: Tailer
    files: LogFiles
    ledger: Ledger
    follower: Follower
    health: Health
    events: Events

    def turn(self, rounds_max: int = 1000) -> None:
        """Turn the loop until it has nothing to do: a full scan finds nothing new, twice."""
        idle = 0
        for _ in range(rounds_max):
            self.follower.scan_soon()
            idle = 0 if self.tailer._round() else idle + 1
            if idle == 2:
                return
        raise AssertionError(f"still busy after {rounds_max} rounds")


@contextmanager
def following(
    dsn: str, directory: Path, *, globs: tuple[str, ...] = (), start_at_end: bool = False, **changes: Any
) -> Iterator[Rig]:
    """A tailer that owns the source and has read `directory`. changes: to Limits, source_id, open_files_max."""
    limits = Limits(batch_lines_max=1000, batch_bytes_max=1 << 20, line_bytes_max=1 << 16)
    limits = replace(limits, **{key: value for key, value in changes.items() if key in _LIMITS})
    stop = threading.Event()
    events, health = Events(), Health()
    globs = globs or (f"{directory}/audit*.jsonl*", f"{directory}/callbacks-*.jsonl")
    files = LogFiles(globs, changes.get("open_files_max", 256))
    wake = Wake(files.concerns)
    ledger = Ledger(dsn, schema="billing", source_id=changes.get("source_id", "default"), stop=stop)

    def is_spool(path: str) -> bool:
        return "/callbacks-" in path

    follower = Follower(files, ledger, events, health, start_at_end=start_at_end, is_spool=is_spool)
    audit_line = fastlane.AuditLines(audit.routes(LLM_ROUTES))
    spool_line = partial(parse_spool_line, cost_max=Decimal(1000))

    def parser_of(path: str) -> Parse:
        return spool_line if is_spool(path) else audit_line

    rules = changes.get("rules", Rules())
    timing = Timing(changes.get("deadline_seconds", 900), changes.get("quiet_seconds", 10))
    settler = Settler(
        ledger,
        rules,
        timing,
        events,
        health,
        poller=None,
        spool_is_behind=follower.spool_is_behind,
        notify=changes.get("notify", lambda _: None),
    )
    tailer = Tailer(
        files=files,
        ledger=ledger,
        follower=follower,
        reader=Reader(files, parser_of, limits),
        wake=wake,
        events=events,
        health=health,
        stop=stop,
        poll_interval_seconds=0.05,
        reset=OrderedReset(None, None, ledger, files, events, health),
        settler=settler,
    )
    assert tailer._become_owner()
    rig = Rig(tailer, files, ledger, follower, health, events)
    try:
        rig.turn()
        yield rig
    finally:
        ledger.close()
        files.close()
        wake.stop()


_LIMITS = ("batch_lines_max", "batch_bytes_max", "line_bytes_max")
