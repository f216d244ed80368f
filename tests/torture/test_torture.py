"""A small share of `make torture` for every change; the table is printed at the end of the session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from billing_tailer.embedded import EmbeddedPostgres
from billing_tailer.ledger import migrate
from tests.support import database
from tests.torture.__main__ import SMALL, Place, scenarios
from tests.torture.table import TALLIES, table

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
