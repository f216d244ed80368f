"""Turns facts and spend records into receipts, in the loop's own thread and session.

After each commit the calls it touched are decided at once; a sweep every few seconds finds what a crash left between
two transactions, and what only time decides (quiet failures, the deadline). Holds ORDER_DOES_NOT_MATTER and
ONE_RECEIPT_PER_CALL together with `settle` and `ledger` (tests/test_settler.py).
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime

from billing_tailer.events import Events
from billing_tailer.health import Health
from billing_tailer.ledger import Ledger, Waiting
from billing_tailer.poller import Poll, Poller
from billing_tailer.settle import Decision, Rules, decide

SWEEP_SECONDS = 5.0
SWEEP_CALLS_MAX = 2000
BATCH_CALLS_MAX = 1000
POLL_SECONDS = 2.0
"""How long after one poll of the spend logs the next one begins, while calls wait."""
STRAGGLERS_MAX = 10
POLLS_REMEMBERED = 200


@dataclass(frozen=True, slots=True)
class Timing:
    """SETTLE_DEADLINE_SECONDS and FAILURE_QUIET_SECONDS."""

    deadline_seconds: int
    quiet_seconds: int


class Settler:
    """Decides calls for the process that holds the source's lock."""

    def __init__(
        self,
        ledger: Ledger,
        rules: Rules,
        timing: Timing,
        events: Events,
        health: Health,
        *,
        poller: Poller | None,
        spool_is_behind: Callable[[], bool],
        notify: Callable[[Collection[str]], None] = lambda _: None,
    ) -> None:
        """spool_is_behind: whether callbacks wait in the spool uncommitted; no deadline passes while they do. notify:
        told, after the commit, the ids of the runs about whose calls something was decided."""
        self._ledger = ledger
        self._rules = rules
        self._by_header = rules.header_cost_max_usd is not None
        self._timing = timing
        self._events = events
        self._health = health
        self._poller = poller
        self._spool_is_behind = spool_is_behind
        self._notify = notify
        self._next_sweep = 0.0
        self._next_poll = 0.0
        self._poll_from: datetime | None = None
        self._polls: list[tuple[datetime, datetime, datetime]] = []

    def begin(self) -> None:
        """This process has become the owner: settings may be others than when exceptions were opened."""
        self._next_sweep = 0.0
        for batch in _batches(self._ledger.doubtful_calls(), BATCH_CALLS_MAX):
            self._settle(batch)

    def decidable(self, call_ids: Collection[str]) -> list[str]:
        """Those of the calls of a plan that was committed just now of whose cost anything is known."""
        if call_ids and not self._by_header:
            return self._ledger.with_records(call_ids)
        return list(call_ids)

    def after_commit(self, call_ids: Collection[str]) -> None:
        """Decide calls that are decidable."""
        for batch in _batches(sorted(call_ids), BATCH_CALLS_MAX):
            self._settle(batch)

    def turn(self) -> bool:
        """What time brings: polls and sweeps. True if there may be more to do at once."""
        more = False
        if self._poller is not None:
            more = self._poll(self._poller)
        if time.monotonic() >= self._next_sweep:
            due = self._ledger.due_calls(SWEEP_CALLS_MAX, self._timing.deadline_seconds, by_header=self._by_header)
            for batch in _batches(due, BATCH_CALLS_MAX):
                self._settle(batch)
            self._next_sweep = time.monotonic() + SWEEP_SECONDS
            self._events.settlement(self._ledger.settle_counts())
        return more

    def _settle(self, call_ids: Collection[str]) -> None:
        with self._ledger.deciding():
            self._ledger.take_calls(call_ids)
            calls = self._ledger.load_calls(
                call_ids,
                deadline_seconds=self._timing.deadline_seconds,
                quiet_seconds=self._timing.quiet_seconds,
                is_over=self._nobody_left_to_ask,
            )
            decisions: dict[str, Decision] = {call.fact.call_id: decide(call, self._rules) for call in calls}
            self._ledger.write_decisions(decisions)
        run_ids = {call.fact.run_id for call in calls if _has_changed(decisions[call.fact.call_id])}
        self._notify({run_id for run_id in run_ids if run_id is not None})
        self._events.settled(list(decisions.values()))

    def _nobody_left_to_ask(self, waiting: Waiting) -> bool:
        """Both sources had their chance: the spool is empty, and a poll that began after the commit has covered it."""
        if self._spool_is_behind():
            return False
        return self._poller is None or any(
            asked_at > waiting.committed_at and started_from <= waiting.started_at <= started_to
            for asked_at, started_from, started_to in self._polls
        )

    def _poll(self, poller: Poller) -> bool:
        poll = poller.answer()
        if poll is not None:
            self._take(poll)
        if poller.busy or time.monotonic() < self._next_poll:
            return poll is not None
        window = self._ledger.poll_window(self._poll_from, STRAGGLERS_MAX)
        if window is None and self._poll_from is not None:
            self._poll_from = None  # the end is reached: from the oldest again
            window = self._ledger.poll_window(None, STRAGGLERS_MAX)
        self._next_poll = time.monotonic() + POLL_SECONDS
        if window is not None:
            poller.ask(window)
        return poll is not None

    def _take(self, poll: Poll) -> None:
        """Write what LiteLLM said, decide the calls, and remember what was covered."""
        new = self._ledger.add_records(poll.records)
        self._events.polled(len(poll.records), new, poll.rejected, poll.failure)
        self._health.say("spend_logs", [] if poll.failure is None else [poll.failure])
        if new:
            self.after_commit(self.decidable({record.call_id for record in poll.records}))
        self._next_poll = time.monotonic() + POLL_SECONDS
        if not poll.complete:
            return
        window = poll.window
        self._polls.append((window.asked_at, window.started_from, window.started_to))
        del self._polls[:-POLLS_REMEMBERED]
        self._poll_from = window.started_to


def _has_changed(decision: Decision) -> bool:
    return bool(decision.receipt or decision.adjustment or decision.opened or decision.closed)


def _batches(call_ids: Collection[str], size: int) -> list[list[str]]:
    ids = list(call_ids)
    return [ids[start : start + size] for start in range(0, len(ids), size)]
