"""`deploy/demo/run.py` in this environment: what it shows, and that everything it started ends with it."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.program import Program, processes_of, wait, wait_until_none_is_left
from tests.support.daemon import ROOT, clean_environment

RUN = [sys.executable, str(ROOT / "deploy/demo/run.py")]
FIRST_FACTS = re.compile(r"first facts committed: [1-9][0-9]* calls, see (http://127\.0\.0\.1:[0-9]+/metrics)\b.*")

pytestmark = pytest.mark.e2e


@pytest.fixture
def directory(open_dir: Path) -> Iterator[Path]:
    """A directory whose processes, if a test leaves some, are ended one by one."""
    yield open_dir
    for pid in processes_of(open_dir):
        os.kill(pid, signal.SIGKILL)


def start(directory: Path, **variables: str) -> Program:
    settings = {"DATA_DIR": str(directory / "data"), "HTTP_PORT": "0"} | variables
    environment = clean_environment({f"BILLING_TAILER_{name}": value for name, value in settings.items()})
    environment.pop("MAKELEVEL", None)  # `make test` is not its parent
    return Program(RUN, ROOT, environment, directory / "output.log")


def test_it_shows_the_first_facts_and_where_to_look(directory: Path) -> None:
    with start(directory) as demo:
        line = demo.wait_for("first facts committed", 30)
        match = FIRST_FACTS.fullmatch(line)
        assert match, line
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(match[1], timeout=10) as response:
            assert b"billing_tailer_lines_total" in response.read()
        shown = demo.wait_for("  status   ", 1).removeprefix("  status   ")
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        status = subprocess.run(
            ["/usr/bin/env", *shlex.split(shown), "--json"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert status.returncode == 0, status.stderr
        assert '"active": true' in status.stdout
        with opener.open(demo.wait_for("  page     ", 1).removeprefix("  page     "), timeout=10) as response:
            assert b"<title>Activity" in response.read()
        # before the start, and again when there is something to see
        assert demo.output.count("  metrics  http://127.0.0.1:") == 2
        assert demo.output.count(f"  data     {directory / 'data'}") == 2
        assert (directory / "data/demo/billing/audit.jsonl").stat().st_size > 0
        demo.send(signal.SIGTERM)
        assert demo.wait(5) == 0
    assert not processes_of(directory)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything_cleanly(directory: Path, number: signal.Signals, times: int) -> None:
    """Twice at once is how SIGTERM to the group of a make arrives: it is no demand to drop everything."""
    with start(directory) as demo:
        demo.wait_for("first facts committed", 30)
        for _ in range(times):
            demo.send_to_group(number)
        assert demo.wait(5) == 0
        assert '"event": "stopped"' in demo.output
        assert "Traceback" not in demo.output
    assert not processes_of(directory)


def test_a_second_start_goes_on_where_the_first_ended(directory: Path) -> None:
    for _ in range(2):
        with start(directory) as demo:
            demo.wait_for("first facts committed", 30)
            demo.send(signal.SIGINT)
            assert demo.wait(5) == 0
            assert '"level": "error"' not in demo.output
            assert '"dead_letter"' not in demo.output


def test_a_signal_while_it_starts(directory: Path) -> None:
    with start(directory) as demo:
        demo.wait_for("  data", 10)
        demo.send(signal.SIGINT)
        assert demo.wait(5) == 0
        assert "Traceback" not in demo.output
    wait_until_none_is_left(directory, 5)


def test_nothing_outlives_a_killed_run(directory: Path) -> None:
    with start(directory) as demo:
        demo.wait_for("first facts committed", 30)
        assert len(processes_of(directory)) > 2, "feeder, daemon and Postgres should be seen here"
        demo.send(signal.SIGKILL)
        demo.wait(5)
        wait_until_none_is_left(directory, 10)
        wait(lambda: '"event": "stopped"' in demo.output, 1, lambda: demo.output)


def test_a_lost_feeder_ends_it_with_an_error(directory: Path) -> None:
    with start(directory) as demo:
        demo.wait_for("first facts committed", 30)
        feeder = next(pid for pid, command in processes_of(directory).items() if "feed.py" in command)
        os.kill(feeder, signal.SIGKILL)
        assert demo.wait(10) == 1
        demo.wait_for("the feeder has ended with code -9: stopping", 1)
    assert not processes_of(directory)


def test_with_a_log_named_it_is_only_the_daemon(directory: Path, dsn: str) -> None:
    log = directory / "audit.jsonl"
    log.write_bytes((ROOT / "tests/data/audit.jsonl").read_bytes())
    with start(directory, AUDIT_GLOBS=f"{directory}/audit*.jsonl*", DATABASE_URL=dsn) as run:
        wait(lambda: '"event": "batch.committed"' in run.output, 30, lambda: run.output)
        run.send_to_group(signal.SIGTERM)
        assert run.wait(5) == 0
        assert "first facts" not in run.output
    assert not (directory / "data").exists()
    assert log.read_bytes() == (ROOT / "tests/data/audit.jsonl").read_bytes()


def test_a_port_in_use_is_the_daemons_own_error(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with start(directory, HTTP_PORT=port) as demo:
            assert demo.wait(20) == 2
            assert f"BILLING_TAILER_HTTP_PORT={port}" in demo.output
            assert "first facts" not in demo.output
    assert not processes_of(directory)


@pytest.mark.parametrize(
    ("name", "value"), [("HTTP_PORT", "many"), ("DATA_DIR", "relative"), ("AUDIT_GLOB", "/x/audit*")]
)
def test_a_wrong_setting_is_named(directory: Path, name: str, value: str) -> None:
    with start(directory, **{name: value}) as demo:
        assert demo.wait(20) == 2
        assert f"BILLING_TAILER_{name}" in demo.output
        assert "Traceback" not in demo.output
