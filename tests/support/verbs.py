"""Verbs as processes and in this process: exit code, standard output and standard error apart."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from billing_tailer import cli
from tests.support.daemon import ROOT, clean_environment, program


def run_verb(
    variables: Mapping[str, str], *arguments: str, script: str = "", timeout: float = 30
) -> subprocess.CompletedProcess[str]:
    """`python -m billing_tailer <arguments>` with exactly these variables. script: see `program`."""
    return subprocess.run(
        [sys.executable, *program(script), *arguments],
        env=clean_environment(variables),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def answer_of(found: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    """What a verb printed as JSON, after the look at its exit code and that it complained about nothing."""
    assert (found.returncode, found.stderr) == (code, ""), f"{found.args}\n{found.stdout}\n{found.stderr}"
    return json.loads(found.stdout)


class Verb:
    """Runs verbs in this process: `main()` with an environment and arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.stderr = ""
        for name in {*os.environ} - {*clean_environment({})}:
            monkeypatch.delenv(name)

    def environment(self, **variables: str) -> None:
        for name, value in variables.items():
            self._monkeypatch.setenv(f"BILLING_TAILER_{name}", value)

    def _ended(self, *arguments: str) -> tuple[int, str]:
        self._monkeypatch.setattr(sys, "argv", ["billing-tailer", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = self._capsys.readouterr()
        self.stderr = printed.err
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """What it printed; with code 0 or 1 it must not complain, with another it must."""
        found, printed = self._ended(*arguments)
        assert found == code, f"{printed}\n{self.stderr}"
        assert bool(self.stderr) == (code >= 2), self.stderr
        return printed

    def outcome(self, *arguments: str) -> tuple[int, Any]:
        """Its exit code, and what it printed: with --json as a value."""
        code, printed = self._ended(*arguments)
        return code, json.loads(printed) if "--json" in arguments else printed

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code))
