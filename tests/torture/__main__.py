"""`make torture`: everything in this package at length, and one table. Exit 1 if anything is lost, doubled, undeclared.

TORTURE_RUNS: deaths of the daemon (default 10000; about a quarter of a second each on two cores), of which a tenth at
random moments; the other scenarios grow with it. TORTURE_SEED: which ones (default: another every time; it is printed).
TORTURE_ONLY: scenarios by a part of their name, separated by commas.
"""

import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from billing_tailer.embedded import EmbeddedPostgres
from billing_tailer.ledger import migrate
from tests.support import database
from tests.torture import crash, memory, model, outage
from tests.torture.memory import GIB
from tests.torture.table import Tally, table


@dataclass(frozen=True, slots=True)
class Place:
    """Where scenarios run: a superuser's DSN, a database with the schema to be cloned, an empty directory."""

    admin_dsn: str
    template: str
    directory: Path


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of everything. kills, random_kills: deaths of the daemon; backlog: bytes."""

    kills: int
    random_kills: int
    postgres_kills: int
    cuts: int
    examples: int
    backlog: int
    calls_per_gib: int
    shrink: bool


SMALL = Amounts(250, 50, 10, 30, 110, 300 << 20, 1_800_000, shrink=False)
"""For every change: three minutes on two cores."""


def long_run(runs: int) -> Amounts:
    """For `make torture`. The lines of its backlog are longer, or Postgres would need half an hour for them."""
    amounts = Amounts(runs * 9 // 10, runs // 10, runs // 50, runs // 20, runs // 4, 5 * GIB, 250_000, shrink=True)
    return amounts if runs >= 100 else SMALL


def scenarios(place: Place, amounts: Amounts, seed: int | None) -> Iterator[tuple[str, Callable[[], Sequence[Tally]]]]:
    """All of them by name; a call runs one. seed: None: the same every time."""
    admin, template, directory = place.admin_dsn, place.template, place.directory
    number = seed or 0

    def crashes() -> Sequence[Tally]:
        every_step, at_random, _ = crash.matrix(
            admin,
            template,
            directory,
            runs=amounts.kills,
            random_runs=amounts.random_kills,
            lanes=max(1, min(8, os.cpu_count() or 1)),
            seed=number,
        )
        return every_step, at_random

    def files() -> Sequence[Tally]:
        with database.temporary(admin, template) as dsn:
            return [model.model(dsn, directory, examples=amounts.examples, seed_number=seed, shrink=amounts.shrink)]

    yield "crash", crashes
    yield "postgres", lambda: [outage.postgres_killed(directory, kills=amounts.postgres_kills, seed=number)]
    yield "commit", lambda: [outage.commit_cut(admin, template, directory, cuts=amounts.cuts, seed=number)]
    yield "model", files
    yield "line", lambda: [memory.long_line(admin, template, directory, size=GIB)]
    yield "hole", lambda: [memory.hole(admin, template, directory, size=2 * GIB)]
    yield (
        "backlog",
        lambda: [memory.backlog(admin, template, directory, size=amounts.backlog, calls_per_gib=amounts.calls_per_gib)],
    )


def main() -> int:
    """Runs them on a Postgres of their own; returns the exit code."""
    runs = int(os.environ.get("TORTURE_RUNS", "10000"))
    seed = int(os.environ.get("TORTURE_SEED", random.SystemRandom().randrange(1 << 30)))
    only = [word for word in os.environ.get("TORTURE_ONLY", "").split(",") if word]
    directory = Path(tempfile.mkdtemp(prefix="billing-tailer-torture-"))
    directory.chmod(0o755)  # root runs Postgres as nobody
    tallies: list[Tally] = []
    print(f"TORTURE_SEED={seed} TORTURE_RUNS={runs}", flush=True)
    try:
        # a killed process loses nothing that it has handed to the kernel: fsync would prove nothing here
        with EmbeddedPostgres(directory / "postgres", None, ["-c", "fsync=off"]) as postgres:
            place = Place(postgres.dsn, database.create(postgres.dsn, prefix="template"), directory)
            migrate(database.dsn_of(postgres.dsn, place.template))
            for name, run in scenarios(place, long_run(runs), seed):
                if only and not any(word in name for word in only):
                    continue
                started = time.monotonic()
                found = _tallies(name, run)
                tallies += found
                # an hour's work must not be lost with the rest of it
                print(f"{name}: {time.monotonic() - started:.0f} s\n{table(found)}\n", flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(table(tallies))
    return 0 if all(tally.clean for tally in tallies) else 1


def _tallies(name: str, run: Callable[[], Sequence[Tally]]) -> Sequence[Tally]:
    """What a scenario came to; where it broke off, that."""
    try:
        return run()
    except Exception:  # noqa: BLE001 - it is told in the table, and the other scenarios go on
        return [Tally(name, problems=[traceback.format_exc()])]


if __name__ == "__main__":
    sys.exit(main())
