"""Turns facts and spend records into receipts, in the loop's own thread and session.

After each commit the calls it touched are decided at once; a sweep every few seconds finds what a crash left between
two transactions, and what only time decides (quiet failures, the deadline). It goes through the calls that wait page by
page, at once where it finds something to do, and spends a fifth of the loop's time at most where it does not. Calls
that an exception stops are not among them: a record touches them, LiteLLM is asked for them by name, ever more seldom,
and a process that becomes the owner goes through them once, since its settings may decide them, or nothing stop them
any more (tests/test_stopped.py).

Holds ORDER_DOES_NOT_MATTER and ONE_RECEIPT_PER_CALL together with `settle` and `ledger` (tests/test_settler.py).
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime

from billing_tailer.events import Events
from billing_tailer.health import Health
from billing_tailer.ledger import Ledger, Waiting
from billing_tailer.model import Plan
from billing_tailer.poller import Poll, Poller
from billing_tailer.settle import Decision, Rules, decide

SWEEP_SECONDS = 5.0
PAGE_CALLS = 2000
"""So many calls are looked through at a time."""
PAUSE_FACTOR = 4
"""A page in which there was nothing to do is followed by a pause so many times as long."""
COUNT_PAUSE_FACTOR = 20
BATCH_CALLS_MAX = 1000
LIST_SECONDS_MAX = 60.0
"""After so long the calls of large batches get their entries in the work list even while there is more to read."""
LISTED_AT_A_TIME = 2
"""So many batches then. One is committed meanwhile: the others become fewer."""
POLL_SECONDS = 2.0
"""How long after one poll of the spend logs the next one begins, while calls wait."""
ASKED_BY_NAME_MAX = 10
"""In one poll."""
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
        self._unlisted_since: float | None = None
        self._swept_to: tuple[datetime, str] | None = None
        self._next_review = 0.0
        self._reviewed_to: tuple[str, str] | None = None
        self._reviewed = False
        self._resumed_to: str | None = ""
        self._next_count = 0.0
        self._next_poll = 0.0
        self._poll_from: datetime | None = None
        self._late_from: tuple[datetime, str] | None = None
        self._polls: list[tuple[datetime, tuple[datetime, datetime, datetime]]] = []

    def begin(self) -> None:
        """This process has become the owner: settings may be others than when exceptions were opened."""
        self._next_sweep = self._next_review = 0.0
        self._swept_to = self._reviewed_to = None
        self._reviewed = False
        self._resumed_to = ""

    def decidable(self, plan: Plan) -> list[str]:
        """Those of the calls of a plan that was committed just now of whose cost anything is known."""
        told = {placed.record.call_id for placed in plan.records}
        others = plan.fact_calls - told
        return [*told, *(others if self._by_header else self._ledger.with_records(others))]

    def after_commit(self, call_ids: Collection[str]) -> None:
        """Decide calls that are decidable."""
        self._settle_all(sorted(call_ids))

    def note_unlisted(self) -> None:
        """There may be facts that are not on the work list."""
        if self._unlisted_since is None:
            self._unlisted_since = time.monotonic()

    def turn(self, *, busy: bool = False) -> bool:
        """What time brings: polls, lists and sweeps. busy: there is something to read, and what can wait waits. True if
        there may be more to do at once."""
        more = self._list(busy=busy)
        if self._poller is not None:
            more = self._poll(self._poller) or more
        if not self._reviewed and time.monotonic() >= self._next_review:
            more = self._review() or more
        if self._reviewed and self._resumed_to is not None and time.monotonic() >= self._next_review:
            self._resume(self._resumed_to)
        if time.monotonic() >= self._next_sweep:
            more = self._sweep() or more
        return more

    def _list(self, *, busy: bool) -> bool:
        """Put facts of large batches on the work list; True if there may be more of them."""
        if self._unlisted_since is None or (busy and time.monotonic() < self._unlisted_since + LIST_SECONDS_MAX):
            return False
        if all(self._ledger.list_facts() for _ in range(LISTED_AT_A_TIME)):
            return True
        self._unlisted_since = None
        return False

    def _sweep(self) -> bool:
        """The touched calls, and a page of those that wait; True if there is more to do at once."""
        began = time.monotonic()
        self.note_unlisted()  # a backfill may have left some, or another source's daemon
        touched = self._ledger.touched_calls(PAGE_CALLS)
        page = self._ledger.waiting_calls(self._swept_to, PAGE_CALLS, self._timing.deadline_seconds)
        due = self._ledger.due_calls(page.calls, by_header=self._by_header, is_over=self._nobody_left_to_ask)
        changed = self._settle_all(sorted({*touched, *due}))
        self._swept_to = page.end
        at_once = len(touched) == PAGE_CALLS or (page.end is not None and changed)
        self._next_sweep = _next(began, at_once=at_once, more=page.end is not None)
        if time.monotonic() >= self._next_count:
            counting = time.monotonic()
            self._events.settlement(self._ledger.settle_counts())
            self._next_count = time.monotonic() + COUNT_PAUSE_FACTOR * (time.monotonic() - counting)
        return at_once

    def _review(self) -> bool:
        """A page of the calls that were stopped under the settings of then; True if there is more to do at once."""
        began = time.monotonic()
        page = self._ledger.open_exceptions(self._reviewed_to, PAGE_CALLS)
        changed = self._settle_all(self._ledger.doubtful_calls(page, by_header=self._by_header))
        self._reviewed_to, self._reviewed = page.end, page.end is None
        at_once = not self._reviewed and changed
        self._next_review = _next(began, at_once=at_once, more=True)
        return at_once

    def _resume(self, after_call: str) -> None:
        """A page of the calls that are out of the sweep's way: nothing may stop them any more."""
        began = time.monotonic()
        self._resumed_to = self._ledger.resume_calls(after_call, PAGE_CALLS)
        self._next_review = _next(began, at_once=False, more=True)

    def _settle_all(self, call_ids: Collection[str]) -> bool:
        """Decide calls in batches; whether anything was decided."""
        return sum(self._settle(batch) for batch in _batches(call_ids, BATCH_CALLS_MAX)) > 0

    def _settle(self, call_ids: Collection[str]) -> int:
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
        changed = [call for call in calls if not decisions[call.fact.call_id].is_empty]
        self._notify({call.fact.run_id for call in changed if call.fact.run_id is not None})
        self._events.settled(list(decisions.values()))
        return len(changed)

    def _nobody_left_to_ask(self, waiting: Waiting) -> bool:
        """Both sources had their chance: the spool is empty, and a poll that began after the commit has covered it, up
        to its end: of calls that were not on the work list then, it did not know how long they took."""
        if self._spool_is_behind():
            return False
        return self._poller is None or any(
            asked_at > waiting.committed_at
            and started_from <= waiting.started_at <= started_to
            and (waiting.ended_at is None or waiting.ended_at <= ended_to)
            for asked_at, (started_from, started_to, ended_to) in self._polls
        )

    def _poll(self, poller: Poller) -> bool:
        poll = poller.answer()
        if poll is not None:
            self._take(poll)
        if poller.busy or time.monotonic() < self._next_poll:
            return poll is not None
        window = self._ledger.poll_window(self._poll_from, self._late_from, ASKED_BY_NAME_MAX)
        if window.span is None and self._poll_from is not None:
            # the end is reached: from the oldest again
            window = self._ledger.poll_window(None, self._late_from, ASKED_BY_NAME_MAX)
            self._poll_from = None
        self._late_from = max(((start, call_id) for call_id, start in window.late.items()), default=None)
        self._next_poll = time.monotonic() + POLL_SECONDS
        if window.span is not None or window.late or window.given_up:
            poller.ask(window)
        return poll is not None

    def _take(self, poll: Poll) -> None:
        """Write what LiteLLM said, decide the calls, and remember what was covered."""
        new = self._ledger.add_records(poll.records)
        self._events.polled(len(poll.records), new, poll.rejected, poll.failure)
        self._health.say("spend_logs", [] if poll.failure is None else [poll.failure])
        if new:
            self.after_commit({record.call_id for record in poll.records})
        self._next_poll = time.monotonic() + POLL_SECONDS
        self._ledger.asked(poll.window, answered=poll.complete)
        if not poll.covered or poll.window.span is None:
            return
        self._polls.append((poll.window.asked_at, poll.window.span))
        del self._polls[:-POLLS_REMEMBERED]
        _, self._poll_from, _ = poll.window.span


def _next(began: float, *, at_once: bool, more: bool) -> float:
    """When to go on: at once, after a pause that follows from how long this took, or in SWEEP_SECONDS."""
    now = time.monotonic()
    if at_once:
        return now
    return now + (PAUSE_FACTOR * (now - began) if more else SWEEP_SECONDS)


def _batches(call_ids: Collection[str], size: int) -> list[list[str]]:
    ids = list(call_ids)
    return [ids[start : start + size] for start in range(0, len(ids), size)]
