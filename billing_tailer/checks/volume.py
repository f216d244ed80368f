"""The log volume: is it mounted, may this user read it, do the globs match what is there."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from billing_tailer.checks.finding import Finding, failed, fine
from billing_tailer.files import LogFiles, LogStream, escape_path, unescape_path
from billing_tailer.model import SeenFile
from billing_tailer.settings import Settings

NAMED_MAX = 10
"""So many unreadable files are named; the others are counted."""
_MOUNT = "mount the proxy's log volume there (read-only is enough), or correct BILLING_TAILER_AUDIT_GLOBS"


def check_volume(settings: Settings) -> Iterator[Finding]:
    """Directories, then files."""
    files = LogFiles(settings.audit_globs, settings.open_files_max)
    closed = []
    for directory in sorted({*files.roots(), *files.directories()}):
        finding = _check_directory(Path(directory))
        if finding is not None:
            closed.append(escape_path(os.fsencode(directory)))
            yield finding
    try:
        scan = files.scan()
    finally:
        files.close()
    for problem in (*scan.problems, *scan.broken):
        if not any(directory in problem for directory in closed):
            yield failed("log volume", problem, f"make it readable for {who()}, or repair it")
    for path in scan.lookalikes:
        yield failed(
            "log files",
            f"{path} looks like a rotated log, but no glob matches it",
            "widen BILLING_TAILER_AUDIT_GLOBS, or move what is no log out of the directory",
        )
    if not scan.files and not scan.archives_unknown:
        globs = ", ".join(settings.audit_globs)
        yield failed("log files", f"no file matches {globs}", "send a request through the proxy; see AUDIT_GLOBS")
        return
    yield fine("log files", f"{len(scan.files) + scan.archives_unknown} match")
    yield from _check_readable(scan.files)


def _check_directory(directory: Path) -> Finding | None:
    try:
        is_empty = next(directory.iterdir(), None) is None
        (directory / ".").stat()  # may be entered, too
    except PermissionError:
        what = f"{who()} may not list or enter {_shown(directory)}, which is {_mode(directory)}"
        return failed("log volume", what, f"let that user in: chmod o+rx {_shown(directory)}, or another user or group")
    except OSError as error:
        return failed("log volume", f"cannot list {_shown(directory)}: {error.strerror}", _MOUNT)
    if is_empty and directory.stat().st_dev == Path("/").stat().st_dev:
        what = f"{_shown(directory)} is empty, and on the root file system: nothing is mounted there"
        return failed("log volume", what, _MOUNT)
    return None


def _check_readable(files: tuple[SeenFile, ...]) -> Iterator[Finding]:
    closed = []
    for file in files:
        try:
            with LogStream(file.path) as stream:
                stream.read(1)
        except OSError as error:
            closed.append((file.path, error.strerror))
    for path, why in closed[:NAMED_MAX]:
        what = f"{who()} cannot read {path}, which is {_mode(Path(os.fsdecode(unescape_path(path))))}: {why}"
        yield failed("log files", what, "let that user read it: nginx's log group, a umask, or logrotate's `create`")
    if len(closed) > NAMED_MAX:
        yield failed("log files", f"and {len(closed) - NAMED_MAX} more cannot be read", "they want the same")


def who() -> str:
    """As whom this process reads and writes."""
    groups = sorted({os.getegid(), *os.getgroups()})
    return f"uid {os.geteuid()} (gid {', '.join(map(str, groups))})"


def _mode(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        return f"not to be looked at ({error.strerror})"
    return f"{stat.filemode(status.st_mode)} of uid {status.st_uid}, gid {status.st_gid}"


def _shown(path: Path) -> str:
    return escape_path(os.fsencode(path))
