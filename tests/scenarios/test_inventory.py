"""The list of scenarios names tests that exist, and every test of this package is in it."""

import re
from pathlib import Path

import pytest

from tests.scenarios.inventory import HERE, SCENARIOS, nodes
from tests.support.daemon import ROOT
from tests.torture.test_torture import NAMES

NODE = re.compile(r"(?P<file>tests/(?:\w+/)*test_\w+\.py)::(?P<test>test_\w+)(?:\[(?P<case>\w+)\])?")


def functions_of(file: str) -> list[str]:
    """The tests of a file."""
    return re.findall(r"^def (test_\w+)\(", (ROOT / file).read_text("utf-8"), re.MULTILINE)


def missing(node: str) -> bool:
    """Whether pytest would not find a node."""
    found = NODE.fullmatch(node)
    if found is None or not (ROOT / found["file"]).is_file() or found["test"] not in functions_of(found["file"]):
        return True
    return found["case"] is not None and not ("torture" in found["file"] and found["case"] in NAMES)


def test_every_scenario_has_tests_that_exist() -> None:
    assert all(tests for scenarios in SCENARIOS.values() for tests in scenarios.values())
    assert [node for node in nodes() if missing(node)] == []


@pytest.mark.parametrize(
    "node",
    [
        "tests/test_tailer.py::test_nothing",
        "tests/test_nowhere.py::test_rotation_by_rename",
        "tests/test_tailer.py",
        "tests/torture/test_torture.py::test_nothing_is_lost_doubled_or_undeclared[nothing]",
    ],
)
def test_a_test_that_is_gone_is_noticed(node: str) -> None:
    assert missing(node)


def test_every_test_here_is_in_the_list() -> None:
    here = {
        f"{HERE}{path.name}::{test}"
        for path in (ROOT / HERE).glob("test_*.py")
        if path != Path(__file__)
        for test in functions_of(f"{HERE}{path.name}")
    }
    assert here - set(nodes()) == set()
