"""Files that come into sight: however many, however odd, however alike."""

import os
import stat
import time
from pathlib import Path

import pytest

from billing_tailer.files import unescape_path
from tests.scenarios.outcome import assert_exactly, states
from tests.support.daemon import Daemon
from tests.support.follow import following
from tests.support.logfiles import append
from tests.support.loglines import line, lines
from tests.support.proof import count, rows
from tests.support.unprivileged import unprivileged


def test_an_empty_directory_then_a_first_file(dsn: str, tmp_path: Path) -> None:
    with following(dsn, tmp_path) as rig:
        assert not rig.health.reasons()
        assert count(dsn, "tail_files") == 0
        (tmp_path / "audit.jsonl").write_bytes(lines(0, 3))
        rig.turn()
        assert not rig.health.reasons()
    assert_exactly(dsn, range(3), contents={1: lines(0, 3)})


def _facts(dsn: str) -> int:
    time.sleep(0.3)  # counting needs the machine whose speed is needed elsewhere
    return count(dsn, "usage_facts")


@pytest.mark.slow
def test_ten_thousand_files(dsn: str, tmp_path: Path) -> None:
    """Each with one line; after a restart every one is found again, and some have a second line."""
    volume = tmp_path / "billing"
    volume.mkdir()
    paths = [volume / f"audit-{number:05d}.jsonl" for number in range(10_000)]
    contents = [line(number) for number in range(10_000)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    variables = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{volume}/audit*.jsonl*",
        "BILLING_TAILER_DATABASE_URL": dsn,
    }
    with Daemon(variables, tmp_path / "daemon.log") as daemon:
        daemon.wait_until(lambda: _facts(dsn) == 10_000, timeout=60)
        daemon.kill()
        for number in range(0, 10_000, 100):
            append(paths[number], line(10_000 + number))
            contents[number] += line(10_000 + number)
        daemon.start()
        daemon.wait_until(lambda: _facts(dsn) == 10_100, timeout=60)
        assert daemon.get("/readyz").json()["reasons"] == {}
        assert len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())) < 400
        assert daemon.terminate() == 0
    by_path = {row["path"]: row["file_id"] for row in rows(dsn, "select path, file_id from tail_files")}
    assert_exactly(
        dsn,
        [*range(10_000), *range(10_000, 20_000, 100)],
        contents={by_path[str(path)]: content for path, content in zip(paths, contents, strict=True)},
    )


@pytest.mark.parametrize("together", [True, False], ids=["together", "one after the other"])
def test_two_files_with_the_same_first_4_kib(dsn: str, tmp_path: Path, together: bool) -> None:
    """Head and the first frontier are alike. They grow, they swap their names while nobody looks, and grow again."""
    same = b"".join(line(number, uri="/health") for number in range(10))
    assert len(same) > 4096
    one, other, between = tmp_path / "audit-a.jsonl", tmp_path / "audit-b.jsonl", tmp_path / "c"
    one.write_bytes(same)
    if together:
        append(one, lines(0, 5))
        other.write_bytes(same + lines(100, 5))
    with following(dsn, tmp_path) as rig:
        if not together:
            other.write_bytes(same)  # a copy, as long as it says nothing of its own
            rig.turn()
            append(one, lines(0, 5))
            append(other, lines(100, 5))
            rig.turn()
    append(one, lines(5, 5))
    append(other, lines(105, 5))
    one.rename(between)
    other.rename(one)
    between.rename(other)
    with following(dsn, tmp_path) as rig:
        append(other, lines(10, 5))
        rig.turn()
        assert not rig.health.reasons()
    assert_exactly(
        dsn,
        [*range(15), *range(100, 110)],
        contents={1: same + lines(0, 15), 2: same + lines(100, 10)},
        not_llm_route=20,
    )


def test_zero_bytes_then_one_line(dsn: str, tmp_path: Path) -> None:
    """An empty file has nothing to be known by; two of them are two."""
    log, twin = tmp_path / "audit.jsonl", tmp_path / "audit-twin.jsonl"
    log.touch()
    twin.touch()
    with following(dsn, tmp_path) as rig:
        assert count(dsn, "tail_files") == 2
    with following(dsn, tmp_path) as rig:
        append(log, line(0))
        rig.turn()
        assert not rig.health.reasons()
    by_path = {row["path"]: row["file_id"] for row in rows(dsn, "select path, file_id from tail_files")}
    assert_exactly(dsn, [0], contents={by_path[str(log)]: line(0), by_path[str(twin)]: b""})


def test_the_same_inode_through_two_globs_a_hard_link_and_a_symlink(dsn: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    log = first / "audit.jsonl"
    log.write_bytes(lines(0, 5))
    (second / "audit-hard.jsonl").hardlink_to(log)
    (second / "audit-soft.jsonl").symlink_to(log)
    globs = (f"{first}/audit*", f"{first}/*.jsonl", f"{second}/audit*", f"{tmp_path}/*/audit*")
    with following(dsn, tmp_path, globs=globs) as rig:
        append(second / "audit-hard.jsonl", line(5))
        append(second / "audit-soft.jsonl", line(6))
        rig.turn()
        log.unlink()  # the other name stays; the symlink leads nowhere
        append(second / "audit-hard.jsonl", line(7))
        rig.turn()
        assert not rig.health.reasons()
    assert states(dsn) == [("audit-hard.jsonl", "rotated", None)]
    assert_exactly(dsn, range(8), contents={1: lines(0, 8)})


@pytest.mark.timeout(20)
def test_a_fifo_a_directory_and_a_device_named_like_a_log(dsn: str, tmp_path: Path) -> None:
    """Nobody hangs, nobody reads them, nobody complains; the log beside them is followed."""
    os.mkfifo(tmp_path / "audit-fifo.jsonl")
    (tmp_path / "audit-directory.jsonl").mkdir()
    (tmp_path / "audit-directory.jsonl" / "audit.jsonl").write_bytes(lines(50, 1))
    (tmp_path / "audit-device.jsonl").symlink_to("/dev/zero")
    (tmp_path / "audit-loop.jsonl").symlink_to(tmp_path / "audit-loop.jsonl")
    (tmp_path / "audit-nowhere.jsonl").symlink_to(tmp_path / "nowhere")
    os.mknod(tmp_path / "audit-socket.jsonl", stat.S_IFSOCK | 0o600)
    (tmp_path / "audit.jsonl").write_bytes(lines(0, 3))
    with following(dsn, tmp_path) as rig:
        append(tmp_path / "audit.jsonl", line(3))
        rig.turn()
        assert not rig.health.reasons()
    assert_exactly(dsn, range(4), contents={1: lines(0, 4)})


def test_unreadable_later_readable(dsn: str, open_dir: Path) -> None:
    """/readyz names it; the file beside it is read; nothing of it is lost, nor doubled, once it may be read."""
    log, beside = open_dir / "audit.jsonl", open_dir / "audit-beside.jsonl"
    log.write_bytes(lines(0, 5))
    with following(dsn, open_dir) as rig:
        rig.files.close()  # a descriptor that is held goes on reading whatever the mode is
        log.chmod(0o000)
        append(log, lines(5, 5))
        new = open_dir / "audit-new.jsonl"
        new.write_bytes(lines(200, 5))
        new.chmod(0o000)
        beside.write_bytes(lines(100, 5))
        with unprivileged():
            rig.turn()
            assert f"{log}: cannot be read" in str(rig.health.reasons())
            assert str(new) in str(rig.health.reasons())
        assert_exactly(dsn, [*range(5), *range(100, 105)], contents={1: lines(0, 5), 2: lines(100, 5)})
        log.chmod(0o444)
        new.chmod(0o444)
        with unprivileged():
            rig.turn()
            assert not rig.health.reasons()
    assert_exactly(
        dsn,
        [*range(10), *range(100, 105), *range(200, 205)],
        contents={1: lines(0, 10), 2: lines(100, 5), 3: lines(200, 5)},
    )


@pytest.mark.parametrize("name", [b"audit\n.jsonl", b"audit\xff\xfe.jsonl", b"audit\\n\t\x1b[31m.jsonl"], ids=repr)
def test_file_names_with_newline_and_non_utf8_bytes(dsn: str, tmp_path: Path, name: bytes) -> None:
    """Followed, rotated and found again after a restart under exactly that name."""
    path = os.fsencode(tmp_path) + b"/" + name
    Path(os.fsdecode(path)).write_bytes(lines(0, 5))
    with following(dsn, tmp_path):
        pass
    append(Path(os.fsdecode(path)), lines(5, 5))
    os.rename(path, path + b".1")  # noqa: PTH104 - pathlib takes no bytes
    Path(os.fsdecode(path)).write_bytes(lines(10, 5))
    with following(dsn, tmp_path) as rig:
        assert not rig.health.reasons()
    found = [row["path"] for row in rows(dsn, "select path from tail_files order by file_id")]
    assert [unescape_path(text) for text in found] == [path + b".1", path]
    assert all(text.isprintable() for text in found)
    assert_exactly(dsn, range(15), contents={1: lines(0, 10), 2: lines(10, 5)})
