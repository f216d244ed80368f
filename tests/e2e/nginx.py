"""A real nginx with the configuration that `deploy/nginx` hands out, in a directory of its own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

from tests.support.daemon import ROOT

TEMPLATE: Final = ROOT / "deploy/nginx/audit.conf.template"
SYSTEM_PATH: Final = "/usr/sbin:/usr/local/sbin"  # not in every user's PATH

# `user root` matters only where the tests run as root: the workers must be able to enter the directory.
MAIN_CONFIG: Final = """\
daemon off;
worker_processes 2;
@USER@
pid @DIR@/nginx.pid;
error_log @DIR@/error.log notice;
events { worker_connections 512; }
http {
  client_body_temp_path @DIR@/body;
  proxy_temp_path @DIR@/proxy;
  fastcgi_temp_path @DIR@/fastcgi;
  uwsgi_temp_path @DIR@/uwsgi;
  scgi_temp_path @DIR@/scgi;
  include @DIR@/audit.conf;
}
"""


def program(name: str) -> str:
    """The path of a program of the system; skips the test where it is not installed."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}")
    if found is None:
        pytest.skip(f"{name} is not installed: apt-get install {name if name != 'nginx' else 'nginx-light'}")
    return found


def render(template: Path, values: dict[str, str]) -> str:
    """The text of a template with its @PLACEHOLDERS@ replaced, but for those in comments."""
    lines = template.read_text("utf-8").splitlines(keepends=True)
    for name, value in values.items():
        lines = [line if line.startswith("#") else line.replace(f"@{name}@", value) for line in lines]
    return "".join(lines)


class Nginx:
    """A context manager: entering starts nginx in front of `upstream` (host:port), leaving stops it."""

    def __init__(self, directory: Path, upstream: str) -> None:
        self.directory = directory
        self.log_dir = directory / "billing"
        self.log = self.log_dir / "audit.jsonl"
        self.pid_file = directory / "nginx.pid"
        self.port = _free_port()
        self._upstream = upstream
        self._process: subprocess.Popen[bytes] | None = None

    def configured(self) -> list[str]:
        """Writes the configuration; gives the command that reads it."""
        command = [program("nginx"), "-p", str(self.directory), "-e", str(self.directory / "error.log")]
        self.log_dir.mkdir()
        values = {"LISTEN": f"127.0.0.1:{self.port}", "LITELLM": self._upstream, "LOG_DIR": str(self.log_dir)}
        self.directory.joinpath("audit.conf").write_text(render(TEMPLATE, values), "utf-8")
        main = MAIN_CONFIG.replace("@DIR@", str(self.directory))
        main = main.replace("@USER@", "user root;" if os.geteuid() == 0 else "")
        self.directory.joinpath("nginx.conf").write_text(main, "utf-8")
        return [*command, "-c", str(self.directory / "nginx.conf")]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self.configured())
        self._wait_until_it_listens()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def reopen(self) -> None:
        """USR1: nginx opens its logs anew, by name."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)

    def _wait_until_it_listens(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 10
        while not _listens(self.port):
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                log = self.directory / "error.log"
                self.__exit__(None, None, None)
                raise AssertionError(f"nginx does not listen:\n{log.read_text() if log.exists() else 'no log'}")
            time.sleep(0.02)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
