"""Appends recorded lines of nginx's audit log to a log file, with fresh ids and times, and rotates it now and then.

    feed.py RECORDED DIRECTORY

Stands in for the proxy in `make run`. It writes as nginx does: one write per line to a descriptor opened with O_APPEND,
rotation by rename, a last line into the renamed file before the name is opened again. One feeder per directory: a
second one waits for the first to end. It runs until it is killed; tests/test_demo_feed.py holds what its lines look
like.
"""

import argparse
import fcntl
import itertools
import json
import os
import re
import secrets
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

LOG_NAME = "audit.jsonl"
LINES_PER_SECOND = 4.0
BURST_LINES = 10
"""Written at once at the start, so that there is something to see."""
ROTATE_LINES = 2000
KEEP_FILES = 3

_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def fresh(line: str, now: float) -> str:
    """A recorded line as if it had been written at `now` (seconds of the epoch) for a new request.

    Byte for byte the same but for ids and times: nginx writes compact JSON, which the round trip keeps. An absent call
    id stays absent, and one that was nginx's own request id is the new request's id.
    """
    fields = json.loads(line)
    recorded_request_id = fields["nginx_request_id"]
    request_id = secrets.token_hex(16)
    fields["msec"] = f"{now:.3f}"
    fields["time"] = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    fields["nginx_request_id"] = request_id
    for name in ("call_id", "litellm_call_id"):
        recorded = fields.get(name)
        if not recorded:
            continue
        if recorded == recorded_request_id:
            fields[name] = request_id
        elif _UUID.fullmatch(recorded):
            fields[name] = str(uuid.uuid4())
        else:  # chosen by a client, twice the same: recognisable, but a call of its own
            fields[name] = f"{recorded}-{secrets.token_hex(4)}"
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


class RotatingLog:
    """The log file of one directory, rotated by rename."""

    def __init__(self, directory: Path, rotate_lines: int = ROTATE_LINES, keep_files: int = KEEP_FILES) -> None:
        self.path = directory / LOG_NAME
        self._rotate_lines = rotate_lines
        self._keep_files = keep_files
        self._renamed = False
        self._lines = 0
        self._fd = self._open()

    def append(self, line: str) -> None:
        """Write one line; then rotate if the file is full: as with nginx, one more line follows under the new name."""
        self._write(line)
        self._lines += 1
        if self._renamed:
            self.close()
            self._fd = self._open()
            self._remove_old()
        elif self._lines >= self._rotate_lines:
            self.path.rename(f"{self.path}-{time.time_ns() // 1_000_000}")  # names that sort by age
            self._renamed = True

    def _remove_old(self) -> None:
        for old in sorted(self.path.parent.glob(f"{LOG_NAME}-*"))[: -self._keep_files]:
            old.unlink()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def _open(self) -> int:
        content = self.path.read_bytes() if self.path.exists() else b""
        self._renamed = False
        self._lines = content.count(b"\n")
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if content and not content.endswith(b"\n"):
            os.write(fd, b"\n")  # an earlier feeder ended in mid-line: do not glue the next one to it
        return fd

    def _write(self, line: str) -> None:
        data = f"{line}\n".encode()
        written = os.write(self._fd, data)
        if written < len(data):
            raise OSError(f"{self.path}: only {written} of {len(data)} bytes were written: is the disk full?")


def feed(recorded: Sequence[str], log: RotatingLog, lines_per_second: float) -> None:
    """Append recorded lines for ever, over and over: a burst, then so many a second."""
    for index, line in enumerate(itertools.cycle(recorded)):
        if index >= BURST_LINES:
            time.sleep(1 / lines_per_second)
        log.append(fresh(line, time.time()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Append recorded audit lines to DIRECTORY/audit.jsonl, for ever.")
    parser.add_argument("recorded", type=Path, help="file of recorded lines")
    parser.add_argument("directory", type=Path, help="directory of the log, which must exist")
    parser.add_argument("--lines-per-second", type=float, default=LINES_PER_SECOND)
    parser.add_argument("--rotate-lines", type=int, default=ROTATE_LINES)
    arguments = parser.parse_args()
    recorded = arguments.recorded.read_text("utf-8").removesuffix("\n").split("\n")
    with (arguments.directory / ".feeder.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        feed(recorded, RotatingLog(arguments.directory, arguments.rotate_lines), arguments.lines_per_second)


if __name__ == "__main__":
    main()
