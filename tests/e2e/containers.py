"""Containers without a registry and without Docker's daemon: podman on a base image of Debian's packages.

Everything lies in `/var/tmp/billing-tailer-containers-0`: podman's storage, apart from the machine's own, with the base
image under a name that changes with this recipe, and the wheels of requirements.runtime.lock. It may be removed at any
time; `podman --root DIR/storage system reset` does it. Building needs no network then: the wheels are mounted, with an
/etc/pip.conf that says so, and neither stays in the image.

What the base images are not: Python's and nginx's own. They have Debian's packages, and the Dockerfiles are told to
build on them.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e.nginx import SYSTEM_PATH, program
from tests.support.daemon import ROOT

CACHE: Final = Path("/var/tmp/billing-tailer-containers-0")
SUITE: Final = "bookworm"
PYTHON_VERSION: Final = "3.11"  # of that suite, and its glibc
GLIBC_MINOR: Final = 36
PACKAGES: Final = "ca-certificates,logrotate,nginx-light,python3,python3-pip,python3-venv"
NGINX_BASE: Final = """\
ARG BASE
FROM ${BASE}
RUN echo nginx:x:101: >>/etc/group && echo nginx:x:101:101::/nonexistent:/bin/false >>/etc/passwd \\
    && mkdir -p /docker-entrypoint.d \\
    && ln -sf /dev/stdout /var/log/nginx/access.log && ln -sf /dev/stderr /var/log/nginx/error.log \\
    && mkdir -p /var/cache/nginx && rm -rf /var/lib/nginx && ln -s /var/cache/nginx /var/lib/nginx \\
    && printf '%s\\n' 'user nginx;' 'pid /run/nginx.pid;' 'error_log /var/log/nginx/error.log notice;' 'events {}' \\
        'http { access_log /var/log/nginx/access.log; include /etc/nginx/conf.d/*.conf; }' >/etc/nginx/nginx.conf \\
    && printf '%s\\n' '#!/bin/sh' 'set -e' 'for one in /docker-entrypoint.d/*.sh; do "$one"; done' 'exec "$@"' \\
        >/docker-entrypoint.sh && chmod +x /docker-entrypoint.sh
ENTRYPOINT ["/docker-entrypoint.sh"]
CMD ["nginx", "-g", "daemon off;"]
STOPSIGNAL SIGQUIT
"""
"""What deploy/nginx/Dockerfile relies on of the official image of nginx."""
STEP_SECONDS_MAX: Final = 600
OUTPUT_CHARACTERS_MAX: Final = 4000
# crun fails where cgroups are mixed; without an own log of events podman asks for systemd's
CONTAINERS_CONF: Final = """\
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=8192:8192"]
"""


class Podman:
    """podman with a storage of the tests' own. Skips the test where a program is missing or we are not root."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root may build and run containers here without a user namespace set up for it")
        self._program = program("podman")
        program("runc")
        CACHE.mkdir(mode=0o700, exist_ok=True)
        assert CACHE.stat().st_uid == 0, f"{CACHE} belongs to somebody else"
        (CACHE / "containers.conf").write_text(CONTAINERS_CONF, "utf-8")

    def __call__(self, *arguments: str, code: int | None = 0, stdin: bytes | None = None) -> str:
        """Runs `podman ARGUMENTS`; standard output. code: what it must end with, None for anything."""
        places = [f"--root={CACHE / 'storage'}", f"--runroot={CACHE / 'run'}"]
        return run([self._program, *places, *arguments], code=code, stdin=stdin)

    def inspect(self, container: str) -> dict[str, Any]:
        """What podman knows of a container."""
        (found,) = json.loads(self("container", "inspect", container))
        return dict(found)


def run(command: Sequence[str], code: int | None = 0, stdin: bytes | None = None) -> str:
    """A step: its standard output; an assertion with all it said where it ends otherwise."""
    environment = {
        **os.environ,
        "CONTAINERS_CONF": str(CACHE / "containers.conf"),
        "PATH": f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}",
    }
    done = subprocess.run(
        command, env=environment, input=stdin, capture_output=True, timeout=STEP_SECONDS_MAX, check=False
    )
    said = (done.stdout + done.stderr).decode("utf-8", "replace")[-OUTPUT_CHARACTERS_MAX:]
    assert code in (None, done.returncode), f"{' '.join(command)}: {done.returncode}\n{said}"
    return done.stdout.decode("utf-8", "replace")


def image(podman: Podman) -> str:
    """The name of the image that deploy/Dockerfile makes of the working tree."""
    with _lock():
        base, wheels = _base_image(podman), _wheels()
        pip_conf = CACHE / "pip.conf"
        pip_conf.write_text("[global]\nno-index = true\nfind-links = /wheels\n", "utf-8")
        name = "localhost/billing-tailer"
        podman(
            "build",
            "--format=docker",  # the other one has no HEALTHCHECK
            "--network=none",
            f"--build-arg=PYTHON_IMAGE={base}",
            f"--volume={wheels}:/wheels:ro",
            f"--volume={pip_conf}:/etc/pip.conf:ro",
            f"--file={ROOT / 'deploy/Dockerfile'}",
            f"--tag={name}",
            str(ROOT),
        )
    return name


def nginx_image(podman: Podman) -> str:
    """The name of the image that deploy/nginx/Dockerfile makes, on a stand-in for nginx's own."""
    with _lock():
        stand_in, name = "localhost/billing-nginx-base", "localhost/billing-nginx"
        build = ("build", "--format=docker", "--network=none")
        base = f"--build-arg=BASE={_base_image(podman)}"
        podman(*build, base, f"--tag={stand_in}", "--file=-", stdin=NGINX_BASE.encode())
        podman(
            *build,
            f"--build-arg=NGINX_IMAGE={stand_in}",
            "--volume=/bin/true:/usr/bin/apt-get:ro",  # logrotate is in the base image, and there is no network
            f"--tag={name}",
            str(ROOT / "deploy/nginx"),
        )
    return name


def _base_image(podman: Podman) -> str:
    """Debian's smallest system with Python and nginx, made once."""
    recipe = hashlib.sha256(f"{SUITE} {PACKAGES}".encode()).hexdigest()[:12]
    name = f"localhost/billing-tailer-base:{recipe}"
    known = podman("images", "--format={{.Repository}}:{{.Tag}}").split()
    if name not in known:
        debootstrap = program("debootstrap")
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="base-") as root:
            run([debootstrap, "--variant=minbase", f"--include={PACKAGES}", SUITE, root])
            shutil.rmtree(Path(root, "var/cache/apt/archives"))
            archive = f"{root}.tar"
            try:
                run(["tar", "--numeric-owner", "-C", root, "-cf", archive, "."])
                podman("import", archive, name)
            finally:
                Path(archive).unlink(missing_ok=True)
    return name


def _wheels() -> Path:
    """A directory with the wheels of the runtime lock for the base image, downloaded once with the host's pip."""
    lock = ROOT / "requirements.runtime.lock"
    directory = CACHE / f"wheels-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    if not directory.exists():
        for old in CACHE.glob("wheels-*"):
            shutil.rmtree(old)
        making = Path(tempfile.mkdtemp(dir=CACHE, prefix="wheels-"))
        machine = os.uname().machine
        platforms = [f"manylinux2014_{machine}", *(f"manylinux_2_{n}_{machine}" for n in range(17, GLIBC_MINOR + 1))]
        run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
                *("--require-hashes", "--only-binary=:all:", f"--python-version={PYTHON_VERSION}"),
                *(f"--platform={platform}" for platform in platforms),
                *(f"--dest={making}", f"--requirement={lock}"),
            ]
        )
        making.rename(directory)
    return directory


@contextmanager
def _lock() -> Iterator[None]:
    """One test run at a time makes images."""
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
