"""The rotation that `deploy/nginx/logrotate.conf` hands out, run by logrotate itself."""

import gzip
import http.client
import json
import subprocess
import time
from functools import partial
from pathlib import Path

import psycopg
import pytest

from tests.e2e.nginx import Nginx, program, render
from tests.e2e.program import wait
from tests.e2e.upstream import Upstream
from tests.support.daemon import ROOT, Daemon

TEMPLATE = ROOT / "deploy/nginx/logrotate.conf"
CALLS = 20


@pytest.mark.e2e
def test_logrotate_renames_and_compresses_a_rotation_later(open_dir: Path, dsn: str) -> None:
    logrotate = program("logrotate")
    with Upstream() as upstream, Nginx(open_dir, upstream.address) as nginx:
        config = open_dir / "logrotate.conf"
        config.write_text(render(TEMPLATE, {"LOG_DIR": str(nginx.log_dir), "PID": str(nginx.pid_file)}), "utf-8")
        variables = {
            "BILLING_TAILER_DATABASE_URL": dsn,
            "BILLING_TAILER_AUDIT_GLOBS": f"{nginx.log_dir}/audit*.jsonl*",
        }
        with Daemon(variables, open_dir / "daemon.log") as daemon:
            inodes = []
            for rotations in range(3):
                if rotations:
                    time.sleep(1.1)  # names carry seconds
                    _rotate(logrotate, config)
                    wait(nginx.log.exists, 10, lambda: "nginx has not opened its log anew")
                _call(nginx.port, CALLS)
                daemon.wait_until(partial(_committed, daemon, (rotations + 1) * CALLS), what=f"round {rotations}")
                inodes.append(nginx.log.stat().st_ino)
            assert daemon.terminate() == 0
        compressed, renamed, live = sorted(nginx.log_dir.iterdir(), key=lambda path: (path == nginx.log, path.name))
    assert compressed.suffix == ".gz"
    # not so many each: nginx may write on to a renamed file until it has handled USR1
    contents = [gzip.decompress(compressed.read_bytes()), renamed.read_bytes(), live.read_bytes()]
    assert sum(content.count(b"\n") for content in contents) == 3 * CALLS
    assert all(contents)
    assert renamed.stat().st_ino == inodes[1], "the file was copied, not renamed"
    assert live == nginx.log
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select count(*) from billing.usage_facts").fetchone() == (3 * CALLS,)
        assert connection.execute("select count(*) from billing.tail_files").fetchone() == (3,)
        for table in ("dead_letters", "log_gaps", "call_conflicts"):
            assert connection.execute(f"select count(*) from billing.{table}").fetchone() == (0,)


def _rotate(logrotate: str, config: Path) -> None:
    command = [logrotate, "--force", "--state", str(config.with_suffix(".state")), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _call(port: int, times: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for number in range(times):
        headers = {"content-type": "application/json", "x-cogni-run-id": f"run-{number}"}
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "chat"}), headers)
        connection.getresponse().read()
    connection.close()


def _committed(daemon: Daemon, facts: int) -> bool:
    return daemon.metric("billing_tailer_lines_total", '{outcome="fact"}') == facts
