"""One verb as a process: exit code, standard output and standard error apart."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.support.daemon import ROOT, clean_environment


def run_verb(
    variables: Mapping[str, str], *arguments: str, script: str = "", timeout: float = 30
) -> subprocess.CompletedProcess[str]:
    """`python -m billing_tailer <arguments>` with exactly these variables. script: Python to run instead of the module,
    for tests that must break something inside the process."""
    program = ["-c", script] if script else ["-m", "billing_tailer"]
    return subprocess.run(
        [sys.executable, *program, *arguments],
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
