"""Real files: scans, verdicts, verified reads, and descriptors that are kept."""

import errno
import hashlib
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from billing_tailer import files as files_module
from billing_tailer.errors import ConfigError
from billing_tailer.files import Chunk, LogFiles, escape_path, unescape_path
from billing_tailer.model import FileState, Position, SeenFile, Verdict
from tests.support.logfiles import append, overwrite
from tests.support.unprivileged import unprivileged

LINE = 50
"""Bytes of a line of `fixed_width`."""
OWN_DESCRIPTORS = Path("/proc/self/fd")


def fixed_width(start: int, count: int, first: bytes = b"") -> bytes:
    """Lines of one width, each with its number; `first` stands at the beginning, in place of what was there."""
    content = b"".join(b"%049d\n" % number for number in range(start, start + count))
    return first + content[len(first) :]


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[LogFiles]:
    with following(f"{tmp_path}/audit*") as logs:
        yield logs


@contextmanager
def following(*globs: str, open_files_max: int = 16) -> Iterator[LogFiles]:
    logs = LogFiles(globs, open_files_max)
    try:
        yield logs
    finally:
        logs.close()


def names(logs: LogFiles, wanted: set[tuple[int, int]] | None = None) -> list[str]:
    return [Path(file.path).name for file in logs.scan(wanted or set()).files]


def seen_at(logs: LogFiles, path: Path) -> SeenFile:
    (file,) = [file for file in logs.scan().files if file.path == str(path)]
    return file


def position_of(logs: LogFiles, file: SeenFile, offset: int, *, size_seen: int | None = None) -> Position:
    place = logs.place_at(file, offset)
    return Position(
        file_id=1,
        path=file.path,
        device=file.device,
        inode=file.inode,
        generation=1,
        previous_file_id=None,
        head=place.head,
        committed_offset=place.offset,
        frontier_sha256=place.frontier_sha256,
        frontier_bytes=place.frontier_bytes,
        size_seen=file.size if size_seen is None else size_seen,
        state=FileState.LIVE,
    )


def followed(logs: LogFiles, path: Path, content: bytes, offset: int) -> tuple[Position, SeenFile]:
    path.write_bytes(content)
    file = seen_at(logs, path)
    return position_of(logs, file, offset), file


def open_descriptors(directory: Path) -> int:
    """How many descriptors of this process point below a directory."""
    return sum(_link(fd).startswith(f"{directory}/") for fd in OWN_DESCRIPTORS.iterdir())


def _link(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:  # the one that lists the directory itself
        return ""


def remember_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts of files that have just been written are remembered too."""
    monkeypatch.setattr(files_module, "SETTLED_SECONDS", -1.0)


# --- names -----------------------------------------------------------------------------------------------------------


@given(st.binary())
@example(b"/billing/audit.jsonl")
@example(b"\\n")
@example(b"a\nb\xff\\xff")
@example("/b/é \u2028\u00a0\U0001f600\x7f".encode())
@example(b"\xed\xa0\x80\xf5")
def test_escaped_path(path: bytes) -> None:
    text = escape_path(path)
    assert unescape_path(text) == path
    assert text.isprintable()
    text.encode()


def test_plain_paths_stay_as_they_are() -> None:
    assert escape_path("/billing/audit é.jsonl".encode()) == "/billing/audit é.jsonl"
    assert escape_path(b"/a\nb\xff\\") == "/a\\nb\\udcff\\\\"


@pytest.mark.parametrize("name", [b"audit\n.jsonl", b"audit\xff\xfe", b"audit\\n", "audit é".encode(), b"audit "])
def test_odd_names_are_followed(logs: LogFiles, tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    Path(os.fsdecode(path)).write_bytes(b"line\n")
    (file,) = logs.scan().files
    assert unescape_path(file.path) == path
    chunk = logs.read(position_of(logs, file, 0), file, 100)
    assert chunk == Chunk(b"", b"line\n", 5)


# --- scans -----------------------------------------------------------------------------------------------------------


def test_names_that_go_on_from_one_that_matches(tmp_path: Path) -> None:
    """Rotations that the glob forgets, also of another inode; a second name of a followed file is none."""
    log = tmp_path / "audit.jsonl"
    log.write_bytes(b"1\n")
    (tmp_path / "audit.jsonl.9").hardlink_to(log)
    for name in ("audit.jsonl.1", "audit.jsonl.1.gz", "audit.jsonl-20261122", "audit.json", "audit.jsonl2", "other.1"):
        (tmp_path / name).write_bytes(b"2\n")
    (tmp_path / "audit.jsonl.d").mkdir()
    with following(f"{log}") as logs:
        scan = logs.scan()
        assert [Path(path).name for path in scan.lookalikes] == [
            "audit.jsonl-20261122",
            "audit.jsonl.1",
            "audit.jsonl.1.gz",
        ]
        assert (len(scan.files), scan.complete) == (1, True)
    with following(f"{log}*") as logs:
        assert logs.scan().lookalikes == ()


def test_scan(logs: LogFiles, tmp_path: Path) -> None:
    for name in ("audit.jsonl", "audit.jsonl.1", "other", ".audit"):
        (tmp_path / name).write_bytes(name.encode())
    scan = logs.scan()
    assert [(Path(file.path).name, file.size, file.listed) for file in scan.files] == [
        ("audit.jsonl", 11, True),
        ("audit.jsonl.1", 13, True),
    ]
    status = (tmp_path / "audit.jsonl").stat()
    assert scan.files[0].locator == (status.st_dev, status.st_ino)
    assert (scan.files[0].mtime_ns, scan.files[0].ctime_ns) == (status.st_mtime_ns, status.st_ctime_ns)
    assert (scan.complete, scan.problems, scan.strays) == (True, (), ())


def test_empty_directory_is_a_complete_scan(logs: LogFiles) -> None:
    scan = logs.scan()
    assert (scan.files, scan.complete, scan.problems) == ((), True, ())


def test_one_file_is_seen_once(tmp_path: Path) -> None:
    """Through two globs, a hard link, a symlink and another spelling of the directory."""
    log = tmp_path / "audit.jsonl"
    log.write_bytes(b"x\n")
    os.link(log, tmp_path / "audit.link")
    (tmp_path / "audit.sym").symlink_to(log)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "audit.too").symlink_to(log)
    globs = (f"{tmp_path}/audit*", f"{tmp_path}/*.jsonl", f"{tmp_path}/./audit*", f"{tmp_path}/sub/audit*")
    with following(*globs) as logs:
        scan = logs.scan()
        assert len(scan.files) == 1
        assert (scan.strays, scan.complete) == ((), True)


def test_symlink_to_a_log_elsewhere(logs: LogFiles, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"x\n")
    (tmp_path / "audit.jsonl").symlink_to(elsewhere)
    (file,) = logs.scan().files
    assert file.locator == (elsewhere.stat().st_dev, elsewhere.stat().st_ino)
    assert logs.read(position_of(logs, file, 0), file, 100) == Chunk(b"", b"x\n", 2)


def test_a_link_out_of_the_volume_is_not_followed(tmp_path: Path) -> None:
    """Who writes the log must not choose what else we read; a directory that a glob names is no way out."""
    secret = tmp_path / "secrets" / "token"
    secret.parent.mkdir()
    secret.write_bytes(b"a secret\n")
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "audit.jsonl").symlink_to(secret)
    (volume / "audit.by-way").symlink_to(volume / "audit.jsonl")
    (volume / "audit.dots").symlink_to("../secrets/token")
    (volume / "log").write_bytes(b"x\n")
    (volume / "audit.log").symlink_to("log")
    (tmp_path / "mount").symlink_to(volume)
    with following(f"{tmp_path}/mount/audit*") as logs:
        scan = logs.scan()
        assert [file.path for file in scan.files] == [f"{tmp_path}/mount/audit.log"]
        assert scan.complete, "nobody can stop the others from being read by it"
        assert len(scan.broken) == 3
        assert "audit.jsonl: a symbolic link out of the directories of AUDIT_GLOBS" in " ".join(scan.broken)
    with following(f"{volume}/audit*", f"{secret.parent}/*") as logs:
        assert [file.path for file in logs.scan().files if "token" in file.path or "audit.jsonl" in file.path]
        assert logs.scan().broken == ()


def test_a_link_that_changes_under_our_eyes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secrets" / "token"
    secret.parent.mkdir()
    secret.write_bytes(b"a secret\n")
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "log").write_bytes(b"x\n")
    link = volume / "audit.jsonl"
    link.symlink_to("log")
    real = os.path.realpath

    def swapped(path: bytes) -> bytes:
        found = real(path)
        if path.endswith(b"audit.jsonl"):
            link.unlink()
            link.symlink_to(secret)
        return found

    monkeypatch.setattr(os.path, "realpath", swapped)
    with following(f"{volume}/audit*") as logs:
        assert logs.scan().files == ()


def test_what_is_no_log(logs: LogFiles, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "audit.fifo")
    (tmp_path / "audit.directory").mkdir()
    (tmp_path / "audit.null").symlink_to("/dev/null")
    (tmp_path / "audit.dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "audit.loop").symlink_to(tmp_path / "audit.loop")
    scan = logs.scan()
    assert (scan.files, scan.complete, scan.problems) == ((), True, ())


def test_files_of_other_names_are_found_if_wanted(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    log.write_bytes(b"x\n")
    with following(str(log)) as logs:
        locator = seen_at(logs, log).locator
        log.rename(tmp_path / "audit.jsonl.1")
        (tmp_path / "unrelated").write_bytes(b"y")
        log.write_bytes(b"new\n")
        assert names(logs) == ["audit.jsonl"]
        scan = logs.scan({locator})
        assert [Path(file.path).name for file in scan.files] == ["audit.jsonl", "audit.jsonl.1"]
        assert scan.strays == (f"{log}.1",)
        assert names(logs, {(locator[0] + 1, locator[1])}) == ["audit.jsonl"]  # that inode, on another device


@pytest.mark.parametrize("other", ["a-before", "z-after"])
def test_a_second_name_is_no_stray(tmp_path: Path, other: str) -> None:
    log = tmp_path / "audit.jsonl"
    log.write_bytes(b"x\n")
    os.link(log, tmp_path / other)
    with following(str(log)) as logs:
        scan = logs.scan({seen_at(logs, log).locator})
        assert ([file.path for file in scan.files], scan.strays) == ([str(log)], ())


def test_missing_directory_is_no_empty_one(tmp_path: Path) -> None:
    """CANNOT_SEE_IS_NOT_GONE."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "audit").write_bytes(b"x\n")
    with following(f"{tmp_path}/there/audit*", f"{tmp_path}/gone/audit*") as logs:
        scan = logs.scan()
        assert len(scan.files) == 1
        assert not scan.complete
        assert scan.problems == (f"cannot list {tmp_path}/gone: No such file or directory",)
        (tmp_path / "gone").mkdir()
        assert logs.scan().complete
        (tmp_path / "there" / "audit").unlink()
        (tmp_path / "there").rmdir()
        assert not logs.scan().complete


def test_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with following(f"{tmp_path}/file/audit*") as logs:
        scan = logs.scan()
        assert not scan.complete
        assert "Not a directory" in scan.problems[0]


def test_magic_directory(tmp_path: Path) -> None:
    for proxy in ("proxy1", "proxy2"):
        (tmp_path / proxy).mkdir()
        (tmp_path / proxy / "audit.jsonl").write_bytes(b"x\n")
    (tmp_path / "proxy3").write_bytes(b"a file")
    with following(f"{tmp_path}/proxy*/audit*", f"{tmp_path}/proxy1/*") as logs:
        assert logs.directories() == [f"{tmp_path}/proxy1", f"{tmp_path}/proxy2"]
        assert [file.path for file in logs.scan().files] == [
            f"{tmp_path}/proxy1/audit.jsonl",
            f"{tmp_path}/proxy2/audit.jsonl",
        ]
        (tmp_path / "proxy4").mkdir()
        assert f"{tmp_path}/proxy4" in logs.directories()
        assert logs.scan().complete


def test_magic_directory_without_a_match(tmp_path: Path) -> None:
    with following(f"{tmp_path}/proxy*/audit*") as logs:
        scan = logs.scan()
        assert (scan.files, scan.complete, scan.problems) == ((), False, (f"no directory matches {tmp_path}/proxy*",))
        assert logs.directories() == []


class Listing:
    """What `os.scandir` returns: entries, after something has happened to the directory."""

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries

    def __enter__(self) -> list[Any]:
        return self.entries

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def test_renamed_between_listing_and_look(logs: LogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("audit.1", "audit.2", "audit.3"):
        (tmp_path / name).write_bytes(b"x\n")
    entries = list(os.scandir(os.fsencode(tmp_path)))
    (tmp_path / "audit.2").rename(tmp_path / "audit.4")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda _: Listing(entries))
        scan = logs.scan()
    assert [Path(file.path).name for file in scan.files] == ["audit.1", "audit.3"]
    assert scan.complete


@pytest.mark.parametrize("trouble", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_cannot_be_looked_at_is_not_gone(
    logs: LogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: int
) -> None:
    class Entry:
        name, path = b"audit.broken", b"/mnt/audit.broken"

        def is_symlink(self) -> bool:
            return False

        def inode(self) -> int:
            return 1

        def stat(self) -> os.stat_result:
            raise OSError(trouble, os.strerror(trouble))

    (tmp_path / "audit.fine").write_bytes(b"x\n")
    entries = [Entry(), *os.scandir(os.fsencode(tmp_path))]
    monkeypatch.setattr(os, "scandir", lambda _: Listing(entries))
    scan = logs.scan()
    assert [Path(file.path).name for file in scan.files] == ["audit.fine"]
    assert not scan.complete
    assert scan.problems == (f"cannot look at /mnt/audit.broken: {os.strerror(trouble)}",)


def test_unreadable_directory(open_dir: Path) -> None:
    closed = open_dir / "closed"
    closed.mkdir(mode=0o000)
    with following(f"{closed}/audit*") as logs, unprivileged():
        assert not logs.scan().complete
        with pytest.raises(ConfigError, match="Permission denied"):
            logs.require_mounts()


def test_unreadable_file_later_readable(open_dir: Path) -> None:
    log = open_dir / "audit.jsonl"
    log.write_bytes(b"x\n")
    log.chmod(0o000)
    with following(f"{open_dir}/audit*") as logs:
        file = seen_at(logs, log)
        position = replace(position_of(logs, file, 2), size_seen=2)
        logs.close()
        with unprivileged():
            assert logs.scan().complete  # it is there, and may be looked at
            assert logs.judge(position, file) is Verdict.UNREADABLE
            assert logs.read(position, file, 100) is Verdict.UNREADABLE
            assert not logs.still_agrees(position, file)
        log.chmod(0o444)
        with unprivileged():
            assert logs.judge(position, seen_at(logs, log)) is Verdict.AGREES


# --- require_mounts --------------------------------------------------------------------------------------------------


def test_mounts_are_required(tmp_path: Path) -> None:
    with following(f"{tmp_path}/audit*", f"{tmp_path}/[ab]*/*/audit*") as logs:
        logs.require_mounts()
    for pattern in (f"{tmp_path}/gone/audit*", f"{tmp_path}/gone/x*/audit*", f"{tmp_path}/gone/x*/y/audit*"):
        with following(f"{tmp_path}/audit*", pattern) as logs:
            with pytest.raises(ConfigError) as caught:
                logs.require_mounts()
            assert f"BILLING_TAILER_AUDIT_GLOBS={pattern}: cannot list {tmp_path}/gone" in caught.value.message
            assert f"mount the proxy's log volume at {tmp_path}/gone" in caught.value.hint
            assert caught.value.exit_code == 2


# --- verdicts --------------------------------------------------------------------------------------------------------

OFFSET = 300 * LINE
CONTENT = fixed_width(0, 400)


def truncated_and(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)  # of the same inode


CHANGES: list[tuple[str, Callable[[Path], object], Verdict]] = [
    ("nothing", lambda path: None, Verdict.AGREES),
    ("append", lambda path: append(path, b"more"), Verdict.AGREES),
    ("rest rewritten", lambda path: overwrite(path, OFFSET, b"other"), Verdict.AGREES),
    ("rest cut off", lambda path: os.truncate(path, OFFSET), Verdict.CUT),
    ("renamed", lambda path: path.rename(f"{path}.1"), Verdict.AGREES),
    ("to 0", lambda path: os.truncate(path, 0), Verdict.SHRUNK),
    ("to the middle", lambda path: os.truncate(path, OFFSET - 1), Verdict.PAST_END),
    ("to the middle of the head", lambda path: os.truncate(path, 10), Verdict.PAST_END),
    ("to 0 and half a line", truncated_and(b"0000000001"), Verdict.SHRUNK),
    ("to 0 and a few lines", truncated_and(fixed_width(400, 5)), Verdict.SHRUNK),
    ("to 0 and regrown to the offset", truncated_and(fixed_width(400, 300)), Verdict.DIFFERS),
    ("to 0 and regrown past it", truncated_and(fixed_width(400, 900)), Verdict.DIFFERS),
    # the first 20 lines, and with them the head, are the same; lines have the same width
    ("regrown with an equal head", truncated_and(fixed_width(0, 21) + fixed_width(500, 600)), Verdict.DIFFERS),
    ("regrown with an equal frontier", truncated_and(fixed_width(0, 400, b"another head")), Verdict.DIFFERS),
    ("last byte but one", lambda path: overwrite(path, OFFSET - 2, b"x"), Verdict.DIFFERS),
    ("a byte of the last 4 KiB", lambda path: overwrite(path, OFFSET - 4096, b"x"), Verdict.DIFFERS),
    ("first byte", lambda path: overwrite(path, 0, b"x"), Verdict.DIFFERS),
    ("a byte of the head", lambda path: overwrite(path, 1023, b"x"), Verdict.DIFFERS),
    # the limit of what is looked at
    ("between head and frontier", lambda path: overwrite(path, 1024, b"x"), Verdict.AGREES),
    ("just before the frontier", lambda path: overwrite(path, OFFSET - 4097, b"x"), Verdict.AGREES),
]


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize(("change", "expected"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_verdict(
    logs: LogFiles, tmp_path: Path, held: bool, change: Callable[[Path], object], expected: Verdict
) -> None:
    position, file = followed(logs, tmp_path / "audit", CONTENT, OFFSET)
    if not held:
        logs.close()
    change(tmp_path / "audit")
    (now,) = logs.scan().files
    assert now.locator == file.locator
    assert logs.judge(position, now) is expected
    # a read looks at the last 4 KiB only, and leaves the head to the scans
    frontier, rest = (Path(now.path).read_bytes()[part] for part in (slice(OFFSET - 4096, OFFSET), slice(OFFSET, None)))
    if frontier == CONTENT[OFFSET - 4096 : OFFSET] and expected is not Verdict.CUT:
        assert logs.read(position, now, 100) == Chunk(frontier, rest[:100], now.size)
    else:
        assert logs.read(position, now, 100) is expected


@pytest.mark.parametrize(
    ("offset", "size_seen", "content", "expected"),
    [
        (0, 0, b"", Verdict.AGREES),
        (0, 0, b"abc", Verdict.AGREES),
        (0, 3, b"abc", Verdict.AGREES),
        (0, 3, b"ab", Verdict.SHRUNK),
        (0, 3, b"", Verdict.SHRUNK),
        (3, 3, b"abc", Verdict.AGREES),
        (3, 4, b"abcd", Verdict.AGREES),
        (3, 9, b"abc", Verdict.CUT),
        (3, 9, b"abcd", Verdict.CUT),
        (3, 9, b"", Verdict.SHRUNK),
        (3, 9, b"x", Verdict.SHRUNK),
        (3, 9, b"a", Verdict.PAST_END),
        (3, 9, b"ab", Verdict.PAST_END),
        (3, 9, b"abx", Verdict.DIFFERS),
        (3, 9, b"xbcd", Verdict.DIFFERS),
    ],
)
def test_verdict_on_small_files(
    logs: LogFiles, tmp_path: Path, offset: int, size_seen: int, content: bytes, expected: Verdict
) -> None:
    position, _ = followed(logs, tmp_path / "audit", b"abcdefghi", offset)
    (tmp_path / "audit").write_bytes(content)
    assert logs.judge(replace(position, size_seen=size_seen), seen_at(logs, tmp_path / "audit")) is expected


def test_verdict_on_another_file(logs: LogFiles, tmp_path: Path) -> None:
    """A copy agrees; what took the name, or nothing at all, cannot be read."""
    position, _ = followed(logs, tmp_path / "audit", CONTENT, OFFSET)
    (tmp_path / "audit.copy").write_bytes(CONTENT)
    assert logs.judge(position, seen_at(logs, tmp_path / "audit.copy")) is Verdict.AGREES
    (tmp_path / "audit.half").write_bytes(CONTENT[: OFFSET - 1])
    assert logs.judge(position, seen_at(logs, tmp_path / "audit.half")) is Verdict.PAST_END


def test_rewrite_that_hides_itself(logs: LogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same size, and the time of modification set back: the verdict of before is not believed."""
    remember_everything(monkeypatch)
    log = tmp_path / "audit"
    position, file = followed(logs, log, CONTENT, OFFSET)
    assert logs.judge(position, file) is Verdict.AGREES
    time.sleep(0.02)  # the clock that the file system writes down has ticks
    overwrite(log, OFFSET - 10, b"x")
    os.utime(log, ns=(file.mtime_ns, file.mtime_ns))
    now = seen_at(logs, log)
    assert (now.size, now.mtime_ns) == (file.size, file.mtime_ns)
    assert logs.judge(position, now) is Verdict.DIFFERS


def test_fresh_verdicts_are_not_remembered(logs: LogFiles, tmp_path: Path) -> None:
    """Two rewrites within one tick of the clock have the same times, also where an old time was set."""
    log = tmp_path / "audit"
    position, _ = followed(logs, log, CONTENT, OFFSET)
    for _ in range(100):
        for byte, expected in ((b"x", Verdict.DIFFERS), (CONTENT[OFFSET - 10 : OFFSET - 9], Verdict.AGREES)):
            overwrite(log, OFFSET - 10, byte)
            os.utime(log, ns=(0, 0))
            assert logs.judge(position, seen_at(logs, log)) is expected


def test_verdict_within_a_tick_of_the_clock(logs: LogFiles, tmp_path: Path) -> None:
    """The same, where the tick is so long that the scan shows the times of before."""
    log = tmp_path / "audit"
    position, _ = followed(logs, log, CONTENT, OFFSET)
    os.utime(log, ns=(0, 0))
    file = seen_at(logs, log)
    assert logs.judge(position, file) is Verdict.AGREES
    overwrite(log, OFFSET - 10, b"x")
    assert logs.judge(position, file) is Verdict.DIFFERS


def test_verdict_on_a_file_that_changed_since_the_scan(
    logs: LogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is about other content than the scan saw, and is not remembered as if it were not."""
    remember_everything(monkeypatch)
    log = tmp_path / "audit"
    position, file = followed(logs, log, CONTENT, OFFSET)
    append(log, b"x")
    overwrite(log, OFFSET - 10, b"x")
    assert logs.judge(position, file) is Verdict.DIFFERS
    log.write_bytes(CONTENT)
    assert logs.judge(position, file) is Verdict.AGREES


def test_settled_verdicts_are_remembered(logs: LogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember_everything(monkeypatch)
    position, file = followed(logs, tmp_path / "audit", CONTENT, OFFSET)
    assert logs.judge(position, file) is Verdict.AGREES
    logs.close()
    (tmp_path / "audit").unlink()
    assert logs.judge(position, file) is Verdict.AGREES
    assert logs.judge(position, replace(file, size=file.size + 1)) is Verdict.UNREADABLE
    assert logs.judge(replace(position, committed_offset=1), file) is Verdict.UNREADABLE


def test_each_generation_has_its_own_verdict(logs: LogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was remembered of the old generation of a file must not end the new one, over and over."""
    remember_everything(monkeypatch)
    log = tmp_path / "audit"
    old, _ = followed(logs, log, b"half a line", 0)
    log.write_bytes(b"half")
    file = seen_at(logs, log)
    assert logs.judge(old, file) is Verdict.SHRUNK
    assert logs.judge(replace(old, size_seen=file.size), file) is Verdict.AGREES


def test_each_head_has_its_own_verdict(logs: LogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal frontiers, as of lines that repeat themselves, but other heads."""
    remember_everything(monkeypatch)
    one, file = followed(logs, tmp_path / "audit.1", b"one\n" + b"same\n" * 1000, 5004)
    other, _ = followed(logs, tmp_path / "audit.2", b"two\n" + b"same\n" * 1000, 5004)
    assert one.frontier_sha256 == other.frontier_sha256
    assert logs.judge(one, file) is Verdict.AGREES
    assert logs.judge(replace(other, file_id=2), file) is Verdict.DIFFERS


# --- reads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, LINE, 81 * LINE, 82 * LINE, OFFSET, len(CONTENT)])
@pytest.mark.parametrize("bytes_max", [1, 100, 1_000_000])
def test_read(logs: LogFiles, tmp_path: Path, offset: int, bytes_max: int) -> None:
    position, file = followed(logs, tmp_path / "audit", CONTENT, offset)
    expected = CONTENT[max(0, offset - 4096) : offset], CONTENT[offset : offset + bytes_max], len(CONTENT)
    assert logs.read(position, file, bytes_max) == Chunk(*expected)
    assert logs.read_at(file, offset, bytes_max) == expected[1]


def test_read_sees_what_was_appended(logs: LogFiles, tmp_path: Path) -> None:
    position, file = followed(logs, tmp_path / "audit", b"one\n", 4)
    assert logs.read(position, file, 100) == Chunk(b"one\n", b"", 4)
    append(tmp_path / "audit", b"two\n")
    assert logs.read(position, file, 100) == Chunk(b"one\n", b"two\n", 8)
    assert (logs.size(file), logs.held_size(file.locator)) == (8, 8)


def test_read_while_the_file_grows(logs: LogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read never lies beyond the size that is reported with it."""
    position, file = followed(logs, tmp_path / "audit", b"one\n", 4)
    preadv = os.preadv

    def growing(fd: int, buffers: Sequence[bytearray], offset: int) -> int:
        append(tmp_path / "audit", b"two\n")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", growing)
    assert logs.read(position, file, 100) == Chunk(b"one\n", b"", 4)
    assert logs.read(position, file, 100) == Chunk(b"one\n", b"two\n", 8)


def test_a_read_takes_no_more_memory_than_there_is_to_read(logs: LogFiles, tmp_path: Path) -> None:
    """It is made for each new line: a buffer for a whole batch would take a millisecond to clear."""
    position, file = followed(logs, tmp_path / "audit", b"one\ntwo\n", 4)
    tracemalloc.start()
    try:
        assert logs.read(position, file, 64 << 20) == Chunk(b"one\n", b"two\n", 8)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_read_is_verified_on_its_own_descriptor(logs: LogFiles, tmp_path: Path) -> None:
    """After a rotation the name leads to another file; the one that was seen is read."""
    log = tmp_path / "audit"
    position, file = followed(logs, log, b"one\n", 4)
    log.rename(tmp_path / "audit.1")
    log.write_bytes(b"xyz\nnew\n")
    append(tmp_path / "audit.1", b"two\n")
    assert logs.read(position, file, 100) == Chunk(b"one\n", b"two\n", 8)
    assert logs.still_agrees(position, file, position_of(logs, file, 8))


@pytest.mark.parametrize("instead", ["file", "nothing", "fifo", "directory"])
def test_renamed_between_scan_and_open(logs: LogFiles, tmp_path: Path, instead: str) -> None:
    log = tmp_path / "audit"
    position, file = followed(logs, log, b"one\n", 4)
    logs.close()
    log.rename(tmp_path / "audit.1")
    if instead == "file":
        log.write_bytes(b"one\nnew\n")
    elif instead == "fifo":
        os.mkfifo(log)
    elif instead == "directory":
        log.mkdir()
    assert logs.read(position, file, 100) is Verdict.UNREADABLE
    assert logs.judge(position, file) is Verdict.UNREADABLE
    assert not logs.still_agrees(position, file)
    for raises in (lambda: logs.size(file), lambda: logs.read_at(file, 0, 1), lambda: logs.place_at(file, 0)):
        with pytest.raises(OSError, match=r"name|No such|taken"):
            raises()
    assert open_descriptors(tmp_path) == 0


def test_still_agrees(logs: LogFiles, tmp_path: Path) -> None:
    log = tmp_path / "audit"
    position, file = followed(logs, log, CONTENT, OFFSET)
    end = OFFSET + 2 * LINE
    after = position_of(logs, file, end)
    assert logs.still_agrees(position, file, after)
    append(log, b"more\n")
    assert logs.still_agrees(position, file, after)
    os.truncate(log, end)
    assert logs.still_agrees(position, file, after)
    os.truncate(log, end - 1)
    assert not logs.still_agrees(position, file, after)
    os.truncate(log, end)  # the last byte is another one now
    assert logs.still_agrees(position, file)
    assert not logs.still_agrees(position, file, after)


@pytest.mark.parametrize("content", [b"", fixed_width(400, 900), fixed_width(0, 21) + fixed_width(500, 600)])
def test_truncated_between_read_and_commit(logs: LogFiles, tmp_path: Path, content: bytes) -> None:
    position, file = followed(logs, tmp_path / "audit", CONTENT, OFFSET)
    after = position_of(logs, file, OFFSET + 2 * LINE)
    (tmp_path / "audit").write_bytes(content)
    assert not logs.still_agrees(position, file, after)


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 1023, 1024, 1025, 4095, 4096, 4097, len(CONTENT)])
def test_place_at(logs: LogFiles, tmp_path: Path, offset: int) -> None:
    (tmp_path / "audit").write_bytes(CONTENT)
    place = logs.place_at(seen_at(logs, tmp_path / "audit"), offset)
    frontier = CONTENT[max(0, offset - 4096) : offset]
    assert (place.offset, place.head, place.frontier_bytes) == (offset, CONTENT[: min(1024, offset)], len(frontier))
    assert place.frontier_sha256 == hashlib.sha256(frontier).digest()


@pytest.mark.parametrize("size", [0, 10, 999])
def test_no_place_behind_the_end(logs: LogFiles, tmp_path: Path, size: int) -> None:
    (tmp_path / "audit").write_bytes(b"x" * size)
    file = seen_at(logs, tmp_path / "audit")
    for offset in (size + 1, size + 5000):
        with pytest.raises(OSError, match="ends before byte"):
            logs.place_at(file, offset)


@given(st.lists(st.sampled_from([b"\n", b"x", b"xxxxx", b"\0"]), max_size=30).map(b"".join))
@example(b"x" * 8 + b"\n" + b"x" * 7)
@example(b"x" * 7 + b"\n" + b"x" * 8)
@example(b"\n" + b"x" * 16)
def test_after_last_newline(content: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch, following("/nowhere/audit*") as logs:
        patch.setattr(files_module, "TAIL_BYTES", 8)
        patch.setattr(logs, "size", lambda _: len(content))
        patch.setattr(logs, "read_at", lambda _, offset, length: content[offset : offset + length])
        assert logs.after_last_newline(SeenFile("x", 1, 1, 0)) == content.rfind(b"\n") + 1


def test_after_last_newline_of_a_file(logs: LogFiles, tmp_path: Path) -> None:
    log = tmp_path / "audit"
    for content in (b"", b"half", b"one\n", b"one\nhalf", b"one\n" + b"x" * 200_000):
        log.write_bytes(content)
        assert logs.after_last_newline(seen_at(logs, log)) == content.rfind(b"\n") + 1


# --- descriptors -----------------------------------------------------------------------------------------------------


def test_deleted_file_stays_readable(logs: LogFiles, tmp_path: Path) -> None:
    log = tmp_path / "audit"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"one\n")
        file = seen_at(logs, log)
        position = position_of(logs, file, 4)
        log.unlink()
        writer.write(b"two\n")
        (held,) = logs.scan().files
        assert (held.locator, held.path, held.size, held.listed) == (file.locator, str(log), 8, False)
        assert logs.judge(position, held) is Verdict.AGREES
        assert logs.read(position, held, 100) == Chunk(b"one\n", b"two\n", 8)
        assert logs.still_agrees(position, held, position_of(logs, held, 8))
    logs.release(file.locator)
    assert logs.scan().files == ()
    assert logs.held_size(file.locator) is None
    assert logs.read(position, file, 100) is Verdict.UNREADABLE


def test_held_beside_what_took_its_name(logs: LogFiles, tmp_path: Path) -> None:
    log = tmp_path / "audit"
    position, file = followed(logs, log, b"one\n", 4)
    log.unlink()
    log.write_bytes(b"new\n")
    assert {(seen.size, seen.listed) for seen in logs.scan().files} == {(4, True), (4, False)}
    assert isinstance(logs.read(position, file, 100), Chunk)


def test_held_outside_of_all_directories(logs: LogFiles, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    position, file = followed(logs, tmp_path / "audit", b"one\n", 4)
    (tmp_path / "audit").rename(tmp_path / "away" / "audit")
    append(tmp_path / "away" / "audit", b"two\n")
    (held,) = logs.scan().files
    assert (held.locator, held.size) == (file.locator, 8)
    assert logs.read(position, held, 100) == Chunk(b"one\n", b"two\n", 8)


def test_descriptors_are_bounded(tmp_path: Path) -> None:
    with following(f"{tmp_path}/audit*", open_files_max=3) as logs:
        for number in range(10):
            (tmp_path / f"audit.{number}").write_bytes(b"%d\n" % number)
        for _ in range(2):
            for number, file in enumerate(logs.scan().files):
                assert logs.read_at(file, 0, 10) == b"%d\n" % number
                assert open_descriptors(tmp_path) <= 3
        assert open_descriptors(tmp_path) == 3
        logs.close()
        assert open_descriptors(tmp_path) == 0


def test_longest_unused_descriptor_is_closed(tmp_path: Path) -> None:
    with following(f"{tmp_path}/audit*", open_files_max=2) as logs:
        for number in range(3):
            (tmp_path / f"audit.{number}").write_bytes(b"x")
        one, two, three = logs.scan().files
        for file in (one, two, one, three):
            logs.read_at(file, 0, 1)
        assert [logs.held_size(file.locator) for file in (one, two, three)] == [1, None, 1]


def test_file_without_a_name_is_never_closed(tmp_path: Path) -> None:
    """Reaching the bound stops opening others; nothing that could not be opened again is let go."""
    with following(f"{tmp_path}/audit*", open_files_max=2) as logs:
        kept = []
        for number in range(2):
            kept.append(followed(logs, tmp_path / f"audit.{number}", b"one\ntwo\n", 4))
            (tmp_path / f"audit.{number}").unlink()
        (tmp_path / "audit.new").write_bytes(b"new\n")
        new = seen_at(logs, tmp_path / "audit.new")
        with pytest.raises(OSError, match="2 descriptors") as caught:
            logs.read_at(new, 0, 1)
        assert caught.value.errno == errno.EMFILE
        assert logs.judge(kept[0][0], new) is Verdict.UNREADABLE
        for position, file in kept:
            assert logs.read(position, file, 100) == Chunk(b"one\n", b"two\n", 8)
        logs.release(kept[0][1].locator)
        assert logs.read_at(new, 0, 10) == b"new\n"


def test_file_out_of_sight_is_never_closed(tmp_path: Path) -> None:
    """Moved to where no glob looks, it has a name that we do not know: closed, its unread bytes would be gone."""
    (tmp_path / "away").mkdir()
    log, other = tmp_path / "audit", tmp_path / "audit.2"
    with following(f"{tmp_path}/audit*", open_files_max=1) as logs:
        position, file = followed(logs, log, b"one\ntwo\n", 4)
        other.write_bytes(b"other\n")
        log.rename(tmp_path / "away" / "audit")
        for _ in range(2):
            with pytest.raises(OSError, match="1 descriptors"):
                logs.read_at(seen_at(logs, other), 0, 1)
            log.write_bytes(b"what took the name\n")
        assert logs.read(position, file, 100) == Chunk(b"one\n", b"two\n", 8)


def test_renamed_file_is_closed_and_opened_again(tmp_path: Path) -> None:
    log, other = tmp_path / "audit", tmp_path / "audit.2"
    with following(f"{tmp_path}/audit*", open_files_max=1) as logs:
        position, file = followed(logs, log, b"one\ntwo\n", 4)
        log.rename(tmp_path / "audit.1")
        other.write_bytes(b"other\n")
        assert logs.read_at(seen_at(logs, other), 0, 10) == b"other\n"
        (again,) = [seen for seen in logs.scan().files if seen.locator == file.locator]
        assert logs.read(position, again, 100) == Chunk(b"one\n", b"two\n", 8)
        assert open_descriptors(tmp_path) == 1


def test_nothing_is_written(logs: LogFiles, tmp_path: Path) -> None:
    """The volume can be mounted read-only: every descriptor is."""
    (tmp_path / "audit").write_bytes(b"x\n")
    file = seen_at(logs, tmp_path / "audit")
    logs.read_at(file, 0, 1)
    (fd,) = [int(fd.name) for fd in OWN_DESCRIPTORS.iterdir() if _link(fd) == file.path]
    assert os.get_inheritable(fd) is False
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
