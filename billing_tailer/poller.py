"""The side task that asks LiteLLM's spend logs. It only asks and parses; what it finds is written by the loop.

The loop orders one window at a time (`ask`) and takes the answers (`answers`); a poll that fails is an answer too, so
that the loop never waits. If the thread dies, the process ends.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from billing_tailer.errors import TailerError
from billing_tailer.ledger import Window
from billing_tailer.litellm import LiteLLMStopped, SpendLogs
from billing_tailer.model import Rejected, SpendRecord

MARGIN = timedelta(seconds=120)
"""LiteLLM's clock and ours, and the time between the proxy's start of a request and LiteLLM's."""


@dataclass(frozen=True, slots=True)
class Poll:
    """The answer to one window. covered: its span of time was read to the end, whatever became of the calls that were
    asked for by name; complete: all of it; failure: why not. rejected: rows that are no records."""

    window: Window
    records: tuple[SpendRecord, ...]
    rejected: int
    covered: bool
    failure: str | None = None

    @property
    def complete(self) -> bool:
        """Whether everything was read."""
        return self.failure is None


class Poller:
    """One thread, one question at a time."""

    def __init__(
        self, logs: SpendLogs, parse_row: Callable[[object], SpendRecord | Rejected], wake: Callable[[], None]
    ) -> None:
        self._logs = logs
        self._parse_row = parse_row
        self._wake = wake
        self._asked: queue.SimpleQueue[Window | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Poll] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="poller", daemon=True)
        self.busy = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread; the client's own stop event ends a question that is under way."""
        self._asked.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def ask(self, window: Window) -> None:
        """Order a poll; only while not `busy`."""
        self.busy = True
        self._asked.put(window)

    def answer(self) -> Poll | None:
        """The finished poll, if there is one."""
        try:
            poll = self._answers.get_nowait()
        except queue.Empty:
            return None
        self.busy = False
        return poll

    def _work(self) -> None:
        while (window := self._asked.get()) is not None:
            try:
                self._answers.put(self._poll(window))
            except LiteLLMStopped:
                return
            self._wake()

    def _poll(self, window: Window) -> Poll:
        records: dict[tuple[str, str], SpendRecord] = {}
        rejected = 0
        covered, failure = False, None
        try:
            if window.span is not None:
                started_from, _, ended_to = window.span
                for rows in self._logs.window(started_from - MARGIN, ended_to + MARGIN):
                    rejected += self._take(rows, records)
                covered = True
            for call_id in (*window.late, *window.given_up):
                rejected += self._take(self._logs.by_call_id(call_id), records)
        except LiteLLMStopped:
            raise
        except TailerError as error:
            failure = str(error)
        return Poll(window, tuple(records.values()), rejected, covered, failure)

    def _take(self, rows: list[dict[str, object]], records: dict[tuple[str, str], SpendRecord]) -> int:
        rejected = 0
        for row in rows:
            outcome = self._parse_row(row)
            if isinstance(outcome, SpendRecord):
                records[outcome.call_id, outcome.record_id] = outcome
            else:
                rejected += 1
        return rejected
