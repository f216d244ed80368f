"""Clients that wait for a run, woken by the commit that touched it.

`notify` is called by the loop after its commits, and by the thread that hears of operators' verbs, and costs them a
look into a dictionary. All else happens on the event loop: a run that was touched is asked for once, for all that wait
for it, and a run that was touched meanwhile once more. A waiting client is a future and nothing else: no thread, no
query while nothing happens.

A look answers those alone who waited before it began, so that nobody is told of a moment before his question. Commits
of the tailers of other volumes are not announced here, and a verb's may be missed: each run that is waited for is
looked at again after `recheck_seconds` (tests/test_runs.py).
"""

import asyncio
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from billing_tailer.errors import LedgerUnavailable
from billing_tailer.ledger import RunStatus

WAITING_MAX: Final = 800
"""Below the connections that the server takes (uvicorn's limit_concurrency), so that health checks are still heard."""
RECHECK_SECONDS: Final = 5.0

Look = Callable[[str, Collection[str]], Future[RunStatus]]
"""(run id, call ids) -> the run's status, with which of these calls are settled."""


class TooManyWaiting(Exception):
    """More clients wait than WAITING_MAX."""


@dataclass(eq=False, slots=True)
class _Waiter:
    named: frozenset[str]
    enough: Callable[[RunStatus], bool]
    answer: asyncio.Future[RunStatus]
    last: RunStatus | None = None


@dataclass(eq=False, slots=True)
class _Run:
    run_id: str
    waiters: set[_Waiter] = field(default_factory=set)
    touched: bool = False
    looking: asyncio.Task[None] | None = None
    recheck: asyncio.TimerHandle | None = None


class Waiters:
    """Who waits for which run."""

    def __init__(self, look: Look, *, waiting_max: int = WAITING_MAX, recheck_seconds: float = RECHECK_SECONDS) -> None:
        self._look = look
        self._waiting_max = waiting_max
        self._recheck_seconds = recheck_seconds
        self._lock = threading.Lock()  # of the next three
        self._runs: dict[str, _Run] = {}
        self._touched: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = 0
        self._closed = False

    # --- from any thread

    def notify(self, run_ids: Collection[str]) -> None:
        """Something about these runs is committed."""
        with self._lock:
            awaited = self._runs.keys() & run_ids
            if not awaited or self._loop is None:
                return
            announced = bool(self._touched)
            self._touched |= awaited
            if not announced:
                self._call(self._look_at_touched)

    def close(self) -> None:
        """Answer all who wait with what is known: the process ends."""
        with self._lock:
            self._closed = True
            self._call(self._let_go)

    def _call(self, function: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the event loop has ended, and nobody waits any more
                self._loop.call_soon_threadsafe(function)

    # --- on the event loop

    async def wait(
        self, run_id: str, named: Collection[str], enough: Callable[[RunStatus], bool], seconds: float
    ) -> RunStatus:
        """The first status that is enough, or the one when `seconds` are over. Raises LedgerUnavailable,
        TooManyWaiting."""
        if self._closed:
            raise LedgerUnavailable("the process ends", "try again in a second")
        if self._waiting >= self._waiting_max:
            raise TooManyWaiting
        loop = asyncio.get_running_loop()
        waiter = _Waiter(frozenset(named), enough, loop.create_future())
        with self._lock:
            self._loop = loop
            run = self._runs.setdefault(run_id, _Run(run_id))
        run.waiters.add(waiter)
        self._waiting += 1
        try:
            self._touch(run)
            await asyncio.wait([waiter.answer], timeout=seconds)
            if not waiter.answer.done():
                waiter.enough = _anything
                self._touch(run)
            return await waiter.answer
        finally:
            self._waiting -= 1
            waiter.answer.cancel()
            self._leave(run, waiter)

    def _leave(self, run: _Run, waiter: _Waiter) -> None:
        run.waiters.discard(waiter)
        if run.waiters:
            return
        if run.recheck is not None:
            run.recheck.cancel()
        with self._lock:
            if self._runs.get(run.run_id) is run:
                del self._runs[run.run_id]

    def _look_at_touched(self) -> None:
        with self._lock:
            runs = [self._runs[run_id] for run_id in self._touched if run_id in self._runs]
            self._touched.clear()
        for run in runs:
            self._touch(run)

    def _touch(self, run: _Run) -> None:
        run.touched = True
        if run.looking is None:
            run.looking = asyncio.create_task(self._look_at(run))

    async def _look_at(self, run: _Run) -> None:
        """One look after the other, as long as there is something new."""
        try:
            while run.touched and run.waiters:
                run.touched = False
                present = [waiter for waiter in run.waiters if not waiter.answer.done()]
                if not present:
                    break
                named: set[str] = set().union(*(waiter.named for waiter in present))
                try:
                    status = await asyncio.wrap_future(self._look(run.run_id, named))
                except Exception as error:  # noqa: BLE001  # those who asked are told
                    _refuse(present, error)
                else:
                    _tell(present, status)
        finally:
            run.looking = None
        if run.waiters:
            if run.recheck is not None:
                run.recheck.cancel()
            loop = asyncio.get_running_loop()
            run.recheck = loop.call_later(self._recheck_seconds, self._touch, run)

    def _let_go(self) -> None:
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            for waiter in run.waiters:
                if waiter.last is not None and not waiter.answer.done():
                    waiter.answer.set_result(waiter.last)
            _refuse(list(run.waiters), LedgerUnavailable("the process ends", "try again in a second"))


def _tell(waiters: Collection[_Waiter], status: RunStatus) -> None:
    for waiter in waiters:
        waiter.last = status
        if not waiter.answer.done() and waiter.enough(status):
            waiter.answer.set_result(status)


def _refuse(waiters: Collection[_Waiter], error: Exception) -> None:
    for waiter in waiters:
        if not waiter.answer.done():
            waiter.answer.set_exception(error)


def _anything(_: RunStatus) -> bool:
    return True
