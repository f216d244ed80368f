"""A small share of `make torture` for every change; the table is printed at the end of the session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from billing_tailer.embedded import EmbeddedPostgres
from billing_tailer.ledger import migrate
from tests.support import database
from tests.support.follow import following
from tests.support.proof import rows
from tests.torture.__main__ import SMALL, Place, scenarios
from tests.torture.table import TALLIES, table
from tests.torture.world import World

NAMES = ("crash", "postgres", "commit", "model", "line", "hole", "backlog")


@pytest.fixture(scope="module")
def place(session_dir: Path) -> Iterator[Place]:
    """A Postgres for torture only, without fsync: a killed process loses nothing that it has handed to the kernel."""
    directory = session_dir / "torture"
    directory.mkdir(mode=0o755)
    with EmbeddedPostgres(directory / "postgres", None, ["-c", "fsync=off"]) as postgres:
        template = database.create(postgres.dsn, prefix="template")
        migrate(database.dsn_of(postgres.dsn, template))
        yield Place(postgres.dsn, template, directory)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_doubled_or_undeclared(name: str, place: Place) -> None:
    tallies = dict(scenarios(place, SMALL, seed=None))[name]()
    TALLIES.extend(tallies)
    assert all(tally.clean for tally in tallies), table(tallies)
    assert all(tally.runs for tally in tallies)


def test_every_scenario_is_run(tmp_path: Path) -> None:
    assert tuple(dict(scenarios(Place("", "", tmp_path), SMALL, seed=None))) == NAMES


def test_half_a_line_in_a_copy_is_not_destroyed(dsn: str, tmp_path: Path) -> None:
    """The oracle, not the tailer: as long as a copy holds it and a generation follows that, it can still be read."""
    world = World(tmp_path)
    try:
        with following(dsn, tmp_path) as rig:
            world.append(0, 0)
            world.half(0, 0)
            rig.turn()
            world.looked(rig.follower.positions.values())
            world.copytruncate(0, 0)
            rig.turn()
            assert world.judge(dsn, rig.health.reasons()).words == []
            (copy,) = [name for name in world.nodes if name != "audit.jsonl"]
            world._drop(copy)
            rig.turn()
        with following(dsn, tmp_path) as rig:
            assert world.judge(dsn, rig.health.reasons()).words == []
            rows(dsn, "update tail_files set state = 'rotated' where state = 'missing' returning 1")
            assert world.judge(dsn, rig.health.reasons()).undeclared == 1
    finally:
        world.close()
