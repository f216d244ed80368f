"""The daemon helper, and the rule that a skipped end-to-end test fails where CI asks for them all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import ROOT, Daemon, clean_environment


def test_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLING_TAILER_LOG_LEVEL", "debug")
    monkeypatch.setenv("PGHOST", "elsewhere")
    monkeypatch.setenv("OTHER", "kept")
    environment = clean_environment({"BILLING_TAILER_SOURCE_ID": "one"})
    assert environment["BILLING_TAILER_SOURCE_ID"] == "one"
    assert environment["OTHER"] == "kept"
    assert "BILLING_TAILER_LOG_LEVEL" not in environment
    assert "PGHOST" not in environment


def test_a_daemon_that_ends_is_noticed(tmp_path: Path) -> None:
    with Daemon({}, tmp_path / "log", arguments=("no-such-verb",)) as daemon:
        with pytest.raises(AssertionError, match=r"(?s)the daemon ended before .*code"):
            daemon.wait_until(lambda: False, timeout=30)
        assert daemon.returncode not in (0, None)
        assert daemon.log()


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 skipped"), ("1", "1 failed")])
def test_skipped_e2e_test(tmp_path: Path, required: str, outcome: str) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("import pytest\n@pytest.mark.e2e\ndef test_it():\n    pytest.skip('no nginx')\n", "ascii")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml"), str(test)]
    found = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "BILLING_TAILER_TEST_REQUIRE_E2E": required, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in found.stdout
    assert "no nginx" in found.stdout
