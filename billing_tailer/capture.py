"""What settlement has captured, for the metrics: the capture ratio, and spend records without an audit line.

Once a minute the loop asks (`turn`), on the connections of the API, and goes on; the answers are counted in their
threads. A question that takes longer than the reads' statement time-out has no answer: the ratio is NaN then.

Each unaudited record is counted once, by one process, when its time of grace is over: the spans of time that are looked
at are claimed in Postgres, one after the other (tests/test_capture.py::test_unaudited_records_are_counted_once). A span
whose process dies before it was counted is not counted by another one: the counter may show too few, never too many.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from billing_tailer.errors import TailerError
from billing_tailer.events import Events
from billing_tailer.ledger import Ledger, Reads, Unaudited
from billing_tailer.reconcile import SWEEP_SECONDS_MAX, rate

VISIBLE_SECONDS_MAX = 15
"""A record is received when its transaction begins, and can be seen when it is committed."""
SPAN_MIN = timedelta(seconds=1)
SPANS_AT_ONCE = 4

T = TypeVar("T")


class Capture:
    """Asks for the process that holds the source's lock."""

    def __init__(self, ledger: Ledger, reads: Reads, events: Events, deadline_seconds: int) -> None:
        self._ledger = ledger
        self._reads = reads
        self._events = events
        self._deadline_seconds = deadline_seconds
        self._asking = False
        self._lock = threading.Lock()  # of the next one
        self._spans: list[tuple[datetime, datetime]] = []

    def turn(self) -> None:
        """Ask for what there is to know by now. Costs the loop two short statements."""
        span = self._ledger.claim_unaudited(self._deadline_seconds + VISIBLE_SECONDS_MAX)
        with self._lock:
            spans = [*self._spans, *([] if span is None else [span])]
            self._spans, spans = spans[SPANS_AT_ONCE:], spans[:SPANS_AT_ONCE]
        for one in spans:
            self._when_done(self._reads.unaudited(*one), self._found, partial(self._again, one))
        if not self._asking:
            self._asking = True
            counts = self._reads.closed_window(self._deadline_seconds + SWEEP_SECONDS_MAX)
            self._when_done(counts, self._captured, self._unknown)

    def _found(self, unaudited: Unaudited) -> None:
        self._events.unaudited(unaudited.records, unaudited.with_line, unaudited.call_ids)

    def _captured(self, counts: dict[str, Any]) -> None:
        self._asking = False
        self._events.captured(rate(counts["settled"] + counts["not_charged"], counts["billable"]))

    def _unknown(self, error: TailerError) -> None:
        self._asking = False
        self._events.captured(None)
        self._events.warning("capture.unknown", message=error.message)

    def _again(self, span: tuple[datetime, datetime], error: TailerError) -> None:
        """Not counted: later, in halves, since it may have been too much for one statement."""
        self._events.warning("unaudited.later", message=error.message)
        after, to = span
        middle = after + (to - after) / 2
        with self._lock:
            self._spans += [(after, middle), (middle, to)] if to - after > SPAN_MIN else [span]

    @staticmethod
    def _when_done(answer: Future[T], take: Callable[[T], None], fail: Callable[[TailerError], None]) -> None:
        def done(answer: Future[T]) -> None:
            error = answer.exception()
            if error is None:
                take(answer.result())
            elif isinstance(error, TailerError):
                fail(error)
            else:
                raise error

        answer.add_done_callback(done)
