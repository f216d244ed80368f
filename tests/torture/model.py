"""A hypothesis state machine over file actions, turns of the loop, deaths and database failures, against an oracle.

The loop is turned by hand in this process, so that a file action can be placed between any two file calls of a turn,
and a failure before or after any round trip to Postgres.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Final

import psycopg
from hypothesis import HealthCheck, Phase, event, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from billing_tailer import files, follower, holes
from billing_tailer.errors import TailerError
from billing_tailer.ledger import LedgerState
from tests.support.follow import Rig, following
from tests.torture.scenario import State
from tests.torture.steps import Steps
from tests.torture.table import Tally
from tests.torture.world import Judgement, World, actions

SCENARIO: Final = "model: files against an oracle"
ACTIONS: Final = tuple(actions())
CUTS: Final = ("truncate", "truncate_to_the_middle", "regrow", "recreate", "replace", "delete")
PICKS: Final = st.integers(0, 15)
SIZES: Final = st.integers(0, 2000)
STEPS_PER_EXAMPLE: Final = 30
OPEN_FILES_MAX: Final = STEPS_PER_EXAMPLE + 5
"""More than an example can leave deleted files with half a line, which are never let go of."""


class _Killed(BaseException):
    """kill -9, as far as one process can do it to itself: nothing of the tailer runs after this."""


class Files(RuleBasedStateMachine):
    """One example: a directory, an empty database, a tailer now and then."""

    dsn: ClassVar[str]
    state: ClassVar[State]
    directory: ClassVar[Path]
    examples: ClassVar[int]
    judgement: ClassVar[Judgement]
    """Of the last example."""

    def __init__(self) -> None:
        super().__init__()
        self.state.empty()
        self._volume = Path(tempfile.mkdtemp(prefix="model-", dir=self.directory))
        self.world = World(self._volume)
        self._stack = ExitStack()
        self._rig: Rig | None = None
        type(self).examples += 1

    def teardown(self) -> None:
        """The last word: a sound tailer reads through, and the oracle judges."""
        try:
            self._stop()
            self._wait_for_its_end()
            with following(self.dsn, self._volume) as rig:
                rig.turn()
                rig.tailer._read_ahead.shutdown()
                self.world.read_through(rig.follower.positions.values())
                type(self).judgement = judgement = self.world.judge(self.dsn, rig.health.reasons())
            for word in judgement.words:
                event(word.split(" ", 1)[0])
            assert judgement.clean, "\n".join(judgement.words)
        finally:
            self._stop()
            self.world.close()
            shutil.rmtree(self._volume)

    # --- files

    @rule(action=st.sampled_from(ACTIONS), pick=PICKS, size=SIZES)
    def act(self, action: str, pick: int, size: int) -> None:
        """Something happens to the files between two turns."""
        getattr(self.world, action)(pick, size)

    @rule(pick=PICKS, size=SIZES)
    def append(self, pick: int, size: int) -> None:
        """What happens most."""
        self.world.append(pick, size)

    @rule(cut=st.sampled_from(CUTS), pick=PICKS, size=SIZES)
    def cut_with_bytes_unread(self, cut: str, pick: int, size: int) -> None:
        """Half a line stands where a tailer has seen it, and is destroyed."""
        self.world.half(pick, size)
        self.read_through()
        getattr(self.world, cut)(pick, size)

    @rule(actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=4), pick=PICKS, size=SIZES)
    def act_while_nobody_looks(self, actions: list[str], pick: int, size: int) -> None:
        """Several things happen to the files while no tailer runs, so that no descriptor is held."""
        self._stop()
        for action in actions:
            getattr(self.world, action)(pick, size)

    # --- the tailer

    @rule(batch_lines_max=st.sampled_from((3, 20, 1000)))
    def start_again(self, batch_lines_max: int) -> None:
        """With another limit."""
        self._stop()
        self._start(batch_lines_max)

    def _start(self, batch_lines_max: int = 20) -> Rig:
        """It starts, and reads through."""
        self._wait_for_its_end()
        self._rig = rig = self._stack.enter_context(
            following(self.dsn, self._volume, batch_lines_max=batch_lines_max, open_files_max=OPEN_FILES_MAX)
        )
        self.world.read_through(rig.follower.positions.values())
        return rig

    @property
    def _running(self) -> Rig:
        """No rule depends on whether it runs: hypothesis must draw the same whatever a race does."""
        return self._rig or self._start()

    @rule()
    def kill(self) -> None:
        """Between two turns."""
        self._stop()

    @rule(turns=st.integers(1, 4), scan=st.booleans())
    def turn(self, turns: int, scan: bool) -> None:
        """Some turns of the loop, undisturbed. scan: it is time to look at the directories."""
        rig = self._running
        for _ in range(turns):
            if scan:
                rig.follower.scan_soon()
            rig.tailer._turn()
        if scan:
            self.world.looked(rig.follower.positions.values())

    @rule()
    def read_through(self) -> None:
        """Until there is nothing more to do."""
        rig = self._running
        while rig.ledger.state is not LedgerState.ACTIVE:
            rig.tailer._turn()
        rig.turn()
        self.world.read_through(rig.follower.positions.values())

    @rule(at=st.integers(0, 60), action=st.sampled_from(ACTIONS), pick=PICKS, size=SIZES, turns=st.integers(1, 3))
    def turn_with_action(self, at: int, action: str, pick: int, size: int, turns: int) -> None:
        """Something happens to the files between two file calls of the loop."""
        self._disturbed(turns, at, lambda: getattr(self.world, action)(pick, size), sql=False, before=True)

    @rule(at=st.integers(0, 30), arrives=st.booleans())
    def turn_with_failure(self, at: int, arrives: bool) -> None:
        """The database fails: before a request reaches it, or after it was carried out, with the answer lost."""

        def fail() -> None:
            raise psycopg.OperationalError("the connection is lost")

        self._disturbed(2, at, fail, sql=True, before=not arrives)

    @rule(at=st.integers(0, 60), sql=st.booleans())
    def turn_with_kill(self, at: int, sql: bool) -> None:
        """It dies within a turn."""

        def die() -> None:
            raise _Killed

        self._disturbed(2, at, die, sql=sql, before=True)

    def _disturbed(self, turns: int, at: int, disturb: Callable[[], None], *, sql: bool, before: bool) -> None:
        rig = self._running
        steps = 0

        def hook(step: str, done: bool) -> None:
            nonlocal steps
            if done is before:
                return  # while another thread reads ahead, this one makes no file call: their order is always the same
            steps += 1
            if steps == at + 1:
                disturb()

        with Steps(hook, sql=sql, files=not sql):
            try:
                for _ in range(turns):
                    rig.follower.scan_soon()
                    rig.tailer._turn()
            except _Killed:
                self._stop()

    def _stop(self) -> None:
        """Its connection ends, whatever it was doing; nothing is written any more."""
        rig, self._rig = self._rig, None
        if rig is not None:
            rig.tailer._read_ahead.shutdown()
        self._stack.close()

    def _wait_for_its_end(self) -> None:
        """Postgres takes a moment to see that a session is gone; a successor would stand by for it."""
        while self.state.sessions():
            os.sched_yield()


def model(dsn: str, directory: Path, *, examples: int, seed_number: int | None, shrink: bool) -> Tally:
    """So many examples at least, in one database. seed_number: None: the same ones every time. shrink: look for the
    shortest example that fails, which takes minutes."""
    tally = Tally(SCENARIO)
    Files.dsn, Files.directory, Files.examples, Files.judgement = dsn, directory, 0, Judgement()
    Files.state = State(dsn)
    profile = settings(
        max_examples=examples,
        stateful_step_count=STEPS_PER_EXAMPLE,
        deadline=None,
        database=None,
        derandomize=seed_number is None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        report_multiple_bugs=False,
        print_blob=False,
    )
    # what is silent or finished is believed to be at once: an example takes a second
    before = follower.SILENT_SECONDS, files.ARCHIVE_SETTLED_SECONDS, holes.HOLE_SECONDS
    follower.SILENT_SECONDS = files.ARCHIVE_SETTLED_SECONDS = holes.HOLE_SECONDS = 0.0
    machine: Any = Files if seed_number is None else seed(seed_number)(Files)
    try:
        run_state_machine_as_test(machine, settings=profile)
    except (AssertionError, TailerError, psycopg.Error) as error:
        found = Files.judgement
        tally.lost, tally.doubled, tally.undeclared = found.lost, found.doubled, found.undeclared
        tally.problems.append("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))
    finally:
        follower.SILENT_SECONDS, files.ARCHIVE_SETTLED_SECONDS, holes.HOLE_SECONDS = before
        Files.state.close()
    tally.runs = Files.examples
    return tally
