"""Files that are renamed, deleted and compressed, while they are written and while nobody looks."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.outcome import assert_exactly, states
from tests.support.follow import following
from tests.support.logfiles import append
from tests.support.loglines import line, lines
from tests.support.proof import rows


@pytest.mark.parametrize("restarts", [False, True], ids=["running", "restarted"])
def test_a_late_write_to_a_rotated_file(dsn: str, tmp_path: Path, restarts: bool) -> None:
    """The writer holds its old descriptor over two rotations, ends a line it had begun, and writes more."""
    log = tmp_path / "audit.jsonl"
    half = line(20)
    with log.open("ab", buffering=0) as late:
        late.write(lines(0, 5) + half[:100])
        with following(dsn, tmp_path) as rig:
            log.rename(tmp_path / "audit.jsonl.1")
            log.write_bytes(lines(100, 5))
            rig.turn()
            (tmp_path / "audit.jsonl.1").rename(tmp_path / "audit.jsonl.2")
            log.rename(tmp_path / "audit.jsonl.1")
            log.write_bytes(lines(200, 5))
            rig.turn()
            if not restarts:
                late.write(half[100:])
                rig.turn()
                late.write(lines(21, 5))
                rig.turn()
        late.write(lines(30, 5) if not restarts else half[100:] + lines(21, 14))
        with following(dsn, tmp_path) as rig:
            assert not rig.health.reasons()
    assert states(dsn) == [
        ("audit.jsonl.2", "rotated", None),
        ("audit.jsonl.1", "rotated", None),
        ("audit.jsonl", "live", None),
    ]
    old = (tmp_path / "audit.jsonl.2").read_bytes()
    numbers = [*range(5), 20, *range(21, 26), *range(30, 35)] if not restarts else [*range(5), *range(20, 35)]
    assert_exactly(
        dsn,
        [*numbers, *range(100, 105), *range(200, 205)],
        contents={1: old, 2: lines(100, 5), 3: lines(200, 5)},
    )


ROTATIONS = 3
LINES = 200
"""Of each file between two of its rotations."""


def test_three_files_rotated_three_times_at_millisecond_intervals(dsn: str, tmp_path: Path) -> None:
    """Each rotation shifts every older name, as logrotate does it; the writer's last lines come after the rename."""
    done = threading.Event()

    def write_and_rotate() -> None:
        try:
            for rotation in range(ROTATIONS + 1):
                for file in range(3):
                    log = tmp_path / f"audit-{file}.jsonl"
                    first = 10_000 * file + LINES * rotation
                    with log.open("ab", buffering=0) as out:
                        out.write(lines(first, LINES - 2) + line(first + LINES - 2)[:50])
                        time.sleep(0.001)
                        if rotation < ROTATIONS:
                            for number in range(rotation, 0, -1):
                                Path(f"{log}.{number}").rename(f"{log}.{number + 1}")
                            log.rename(f"{log}.1")
                        out.write(line(first + LINES - 2)[50:] + line(first + LINES - 1))
                    time.sleep(0.001)
        finally:
            done.set()

    with following(dsn, tmp_path) as rig:
        writer = threading.Thread(target=write_and_rotate)
        writer.start()
        while not done.is_set():
            rig.follower.scan_soon()
            rig.tailer._turn()
        writer.join()
        rig.turn()
        assert not rig.health.reasons()
    found = rows(dsn, "select file_id, path from tail_files")
    assert len(found) == 3 * (ROTATIONS + 1)
    assert_exactly(
        dsn,
        [10_000 * file + number for file in range(3) for number in range(LINES * (ROTATIONS + 1))],
        contents={row["file_id"]: Path(row["path"]).read_bytes() for row in found},
    )


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_renamed_between_stat_and_open(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """What the name leads to when it is opened is another file than the one that was looked at."""
    log, rotated = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    log.write_bytes(lines(0, 5))
    if known:
        with following(dsn, tmp_path):
            pass
        append(log, lines(5, 5))
    renamed: list[str] = []
    real = os.open

    def rename_and_open(path: Any, *arguments: Any, **named: Any) -> int:
        if not renamed and os.fsdecode(path) == str(log):
            renamed.append(str(path))
            log.rename(rotated)
            log.write_bytes(lines(100, 5))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", rename_and_open)
    with following(dsn, tmp_path) as rig:
        assert not rig.health.reasons()
    assert renamed
    by_path = {row["path"]: row["file_id"] for row in rows(dsn, "select path, file_id from tail_files")}
    old = lines(0, 10 if known else 5)
    assert_exactly(
        dsn,
        [*range(10 if known else 5), *range(100, 105)],
        contents={by_path[str(rotated)]: old, by_path[str(log)]: lines(100, 5)},
    )
