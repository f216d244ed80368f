"""`make run` on a machine that has only python3, venv and make: sets itself up, shows first facts, leaves nothing."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.program import Program, processes_of, wait_until_none_is_left
from tests.support.daemon import ROOT

FIRST_FACTS_SECONDS_MAX = 120
STOP_SECONDS_MAX = 5
# How this machine reaches a package index is its own affair, and no part of what is tested.
MACHINE = re.compile(r"PIP_.*|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|(HTTPS?|ALL|NO)_PROXY", re.IGNORECASE)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def clone(session_dir: Path) -> Iterator[Path]:
    """What a clone of this checkout, with everything in it committed, would hold."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    listed = subprocess.run(
        [git, "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip(f"this is no git checkout: {listed.stderr.strip()}")
    directory = Path(tempfile.mkdtemp(prefix="clone-", dir=session_dir))
    directory.chmod(0o755)
    for name in listed.stdout.removesuffix("\0").split("\0"):
        if (ROOT / name).exists():
            directory.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def start(clone: Path, directory: Path) -> Program:
    (directory / "home").mkdir()
    python = Path(sys.base_prefix) / "bin"
    environment = {name: value for name, value in os.environ.items() if MACHINE.fullmatch(name)} | {
        "HOME": str(directory / "home"),
        "PATH": f"{python}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "BILLING_TAILER_DATA_DIR": str(directory / "data"),
        "BILLING_TAILER_HTTP_PORT": "0",
    }
    return Program(["make", "run"], clone, environment, directory / "output.log")


@pytest.mark.parametrize(
    ("number", "to_group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True)],
    ids=["ctrl-c", "terminate-make", "terminate-group"],
)
def test_make_run(clone: Path, open_dir: Path, number: signal.Signals, to_group: bool) -> None:
    with start(clone, open_dir) as make:
        make.wait_for("first facts committed: ", FIRST_FACTS_SECONDS_MAX)
        make.send_to_group(number) if to_group else make.send(number)
        # make ends by the signal, whatever its recipe makes of it; the daemon says that it ended as it should
        assert make.wait(STOP_SECONDS_MAX) in {0, -number, 2}
        assert '"event": "stopped"' in make.output
        assert "Traceback" not in make.output
    assert not processes_of(clone)
    assert not processes_of(open_dir)


def test_a_killed_make_leaves_nothing(clone: Path, open_dir: Path) -> None:
    with start(clone, open_dir) as make:
        make.wait_for("first facts committed: ", FIRST_FACTS_SECONDS_MAX)
        make.send(signal.SIGKILL)
        make.wait(STOP_SECONDS_MAX)
        wait_until_none_is_left(clone, STOP_SECONDS_MAX)
        wait_until_none_is_left(open_dir, STOP_SECONDS_MAX)
        assert '"event": "stopped"' in make.output
