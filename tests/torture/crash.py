"""kill -9 at every step of the loop, and at random moments: the scenario must come out exact.

As a program (`python -m tests.torture.crash`) it is one lane: it reads a job as JSON from standard input, does its runs
one after the other, forking the daemon from itself, and prints their tallies as JSON. Lanes run beside each other.
"""

import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice, zip_longest
from pathlib import Path
from typing import Any, Final

import psycopg

from tests.support import database
from tests.support.daemon import ROOT, clean_environment
from tests.torture.launch import Forked, Kill, Shared
from tests.torture.scenario import LIMITS, POISON_CHECK, TOKEN, Scenario, State, post
from tests.torture.table import Tally

EVERY_STEP: Final = "kill -9 at every step"
AT_RANDOM: Final = "kill -9 at random"
NOT_REACHED: Final = "not reached"
WHEN: Final = ("before", "after", "within")
RUN_SECONDS_MAX: Final = 20.0
FAILED_RUNS_MAX: Final = 3
"""Of a lane; then it stops: a run that does not come to its end takes as long as forty good ones."""
KILLS_MAX: Final = 3
"""Deaths of one run at random moments."""
KILL_AFTER_SECONDS_MAX: Final = 0.3
LOOK_SECONDS: Final = 0.002


class _Failed(Exception):
    """A run that does not come to its end."""


class Lane:
    """Runs of the scenario, one after the other, in one database and one directory."""

    def __init__(self, dsn: str, directory: Path) -> None:
        self._dsn = dsn
        self._directory = directory
        self._state = State(dsn)
        self._shared = Shared()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self._daemon: Forked | None = None
        self._deadline = 0.0
        self._kill_times: list[float] = []
        self._unanswered = 0
        self.died_at: Counter[str] = Counter()

    def close(self) -> None:
        """End the connection."""
        self._state.close()

    def run(self, kill: Kill | None = None, seed: int | None = None, trace: Path | None = None) -> Tally:
        """One run, in which the daemon dies at a step, or at random moments (seed), or not at all (trace)."""
        scenario = Scenario(*self._fresh(), self._post)
        name, what = (EVERY_STEP, str(kill)) if seed is None else (AT_RANDOM, f"seed {seed}")
        trouble = ""
        self._shared.begin()
        self._unanswered = 0
        self._deadline = time.monotonic() + RUN_SECONDS_MAX
        first, *others = scenario.phases
        try:
            first()
            self._daemon = self._start(kill, trace)
            self._plan_kills(seed)
            self._wait(lambda: self._state.reached(scenario.expected))
            for number, phase in enumerate(others, 1):
                self._shared.phase = number
                phase()
                self._wait(lambda: self._state.reached(scenario.expected))
        except _Failed as error:
            trouble = str(error)
            if self._daemon is not None:
                self._daemon.show_stacks()
        finally:
            if self._daemon is not None:
                self._daemon.kill()
        if kill is not None:
            self.died_at[f"{kill.when} {self._shared.died_at}" if self._shared.died_at else NOT_REACHED] += 1
            what = f"{what} ({self._shared.died_at or NOT_REACHED})"
        scenario.expected.unanswered = self._unanswered
        tally = self._state.judge(scenario.expected, name, what)
        if trouble:
            tally.problems.insert(0, f"{what}: {trouble}\n{self._log_tail()}")
        return tally

    def _fresh(self) -> tuple[Path, Path]:
        """An empty database and an empty directory: the volume of the log, and the spool in it."""
        self._state.empty()
        volume = self._directory / "volume"
        shutil.rmtree(volume, ignore_errors=True)
        spool = volume / "spool"
        spool.mkdir(parents=True)
        return volume, spool

    def _start(self, kill: Kill | None = None, trace: Path | None = None) -> Forked:
        volume = self._directory / "volume"
        variables = {
            "BILLING_TAILER_AUDIT_GLOBS": f"{volume}/audit*.jsonl*",
            "BILLING_TAILER_SPOOL_DIR": f"{volume}/spool",
            "BILLING_TAILER_DATABASE_URL": self._dsn,
            "BILLING_TAILER_CALLBACK_TOKEN": TOKEN,
            "BILLING_TAILER_HTTP_PORT": str(self._port),
            "BILLING_TAILER_POLL_INTERVAL_SECONDS": "0.02",
            **{f"BILLING_TAILER_{name.upper()}": str(value) for name, value in LIMITS.items()},
        }
        return Forked(variables, volume / "daemon.log", self._shared, kill, trace)

    def _plan_kills(self, seed: int | None) -> None:
        dice = random.Random(seed)
        kills = 0 if seed is None else dice.randint(1, KILLS_MAX)
        at = time.monotonic()
        self._kill_times = [at := at + dice.uniform(0, KILL_AFTER_SECONDS_MAX) for _ in range(kills)]

    def _wait(self, reached: Callable[[], bool]) -> None:
        """Until it is; the daemon is killed when its time has come, and one that died is followed by a sound one."""
        while not reached():
            self._look_after_the_daemon()
            if time.monotonic() > self._deadline:
                raise _Failed(f"not done after {RUN_SECONDS_MAX:.0f} s, in phase {self._shared.phase}")
            time.sleep(LOOK_SECONDS)

    def _look_after_the_daemon(self) -> None:
        assert self._daemon is not None
        if self._kill_times and time.monotonic() >= self._kill_times[0]:
            self._kill_times.pop(0)
            self._daemon.kill()
        code = self._daemon.code
        if code is None:
            return
        if code != -9:
            raise _Failed(f"the daemon ended with code {code}")
        while self._state.sessions():  # a successor would stand by for half a second
            time.sleep(LOOK_SECONDS / 2)
        self._daemon = self._start()

    def _post(self, events: list[dict[str, Any]]) -> None:
        def acknowledged() -> bool:
            answer = post(self._port, events)
            self._unanswered += len(events) if answer is None else 0
            return answer is True

        self._wait(acknowledged)

    def _log_tail(self) -> str:
        log = self._directory / "volume" / "daemon.log"
        return log.read_text("utf-8", "replace")[-8000:] if log.exists() else ""


# --- lanes beside each other -----------------------------------------------------------------------------------------


def matrix(
    admin_dsn: str, template: str, directory: Path, *, runs: int, random_runs: int, lanes: int, seed: int
) -> tuple[Tally, Tally, Counter[str]]:
    """`runs` deaths at steps and `random_runs` at random moments; the third: where the daemon died, how often.

    seed: which steps, where there are more of them than runs; and the random moments.
    """
    jobs: list[tuple[Path, dict[str, Any]]] = [(directory / "lane-0", {"trace": True})]
    (traced,) = _side_by_side(admin_dsn, template, jobs)
    kills = [asdict(kill) for kill in kill_points(traced["steps"], runs, seed)]
    seeds = range(seed, seed + random_runs)
    shares = [{"kills": kills[lane::lanes], "seeds": list(seeds[lane::lanes])} for lane in range(lanes)]
    jobs = [(directory / f"lane-{number}", share) for number, share in enumerate(shares)]
    every_step, at_random, died_at = Tally(EVERY_STEP), Tally(AT_RANDOM), Counter[str]()
    for answer in [traced, *_side_by_side(admin_dsn, template, jobs)]:
        for tally in answer["tallies"]:
            (every_step if tally["scenario"] == EVERY_STEP else at_random).add(Tally(**tally))
        died_at.update(answer["died_at"])
    every_step.note = f"{len(traced['steps'])} steps, {len(died_at)} kinds of death"
    return every_step, at_random, died_at


def kill_points(steps: Sequence[str], count: int, seed: int) -> list[Kill]:
    """`count` deaths: before, after and within the steps of a trace, every kind of step of every phase before any
    second of its kind, so that a small count dies everywhere too. All steps where count allows, then all over again."""
    kinds: dict[str, list[Kill]] = {}
    number: Counter[int] = Counter()
    for step in steps:
        phase = int(step.partition(" ")[0])
        kinds.setdefault(step, []).extend(Kill(phase, number[phase], when) for when in WHEN)
        number[phase] += 1
    dice = random.Random(seed)
    for kills in kinds.values():
        dice.shuffle(kills)
    by_round = [kill for kills in zip_longest(*kinds.values()) for kill in kills if kill is not None]
    return list(islice(cycle(by_round), count))


def _side_by_side(admin_dsn: str, template: str, jobs: Sequence[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One process per job; their answers."""
    lanes = []
    for directory, job in jobs:
        directory.mkdir(mode=0o755, exist_ok=True)
        lane = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.crash", admin_dsn, template, str(directory)],
            env=clean_environment({}),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert lane.stdin is not None
        lane.stdin.write(json.dumps(job).encode())
        lane.stdin.close()
        lane.stdin = None  # or communicate() would flush it
        lanes.append(lane)
    answers = []
    try:
        for lane in lanes:
            answer, _ = lane.communicate()
            assert lane.returncode == 0, f"a lane ended with code {lane.returncode}"
            answers.append(json.loads(answer))
    finally:
        for lane in lanes:
            assert lane.stdout is not None
            lane.stdout.close()
            lane.kill()
            lane.wait()
    return answers


def main(admin_dsn: str, template: str, directory: str) -> None:
    """A lane: a job from standard input, its answer to standard output."""
    job = json.load(sys.stdin)
    tallies: list[Tally] = []
    steps: list[str] = []
    with database.temporary(admin_dsn, template) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(POISON_CHECK)
        with closing(Lane(dsn, Path(directory))) as lane:
            if job.get("trace"):
                trace = Path(directory) / "trace"
                tallies.append(lane.run(trace=trace))
                steps = trace.read_text().splitlines()
            runs = [partial(lane.run, kill=Kill(**kill)) for kill in job.get("kills", ())]
            for run in [*runs, *(partial(lane.run, seed=seed) for seed in job.get("seeds", ()))]:
                tallies.append(run())
                if sum(not tally.clean for tally in tallies) >= FAILED_RUNS_MAX:
                    break
    answer = {"tallies": [asdict(tally) for tally in tallies], "steps": steps, "died_at": lane.died_at}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
