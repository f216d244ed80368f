"""kill -9 at random moments, with a second tailer beside: every line once, whatever happens in between."""

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.loglines import line
from tests.support.proof import assert_sound, count, outcomes, rows

LINES = 20_000
KILLS = 50


def _daemons(stack: ExitStack, dsn: str, volume: Path, number: int) -> list[Daemon]:
    variables = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{volume}/audit*.jsonl*",
        "BILLING_TAILER_DATABASE_URL": dsn,
        "BILLING_TAILER_BATCH_LINES_MAX": "50",  # many commits, so that a kill lands in one
        "BILLING_TAILER_POLL_INTERVAL_SECONDS": "0.01",
    }
    return [stack.enter_context(Daemon(variables, volume / f"daemon-{index}.log")) for index in range(number)]


def _kill_at_random(daemons: list[Daemon], seconds: Callable[[], float]) -> None:
    """KILLS times: one of the daemons dies without warning and is started again."""
    for _ in range(KILLS):
        victim = random.choice(daemons)
        time.sleep(seconds())
        victim.kill()
        victim.start()


def _wait_for(dsn: str, lines: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while sum(outcomes(dsn).values()) < lines:
        assert time.monotonic() < deadline, f"{outcomes(dsn)} of {lines} lines after {timeout} s"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_fifty_kills_with_a_second_tailer_beside(dsn: str, tmp_path: Path) -> None:
    """20,000 lines are appended with a rotation now and then while two tailers die 50 times: facts equal lines."""
    log = tmp_path / "audit.jsonl"
    log.touch()
    done = threading.Event()

    def write() -> None:
        for number in range(LINES):
            with log.open("ab", buffering=0) as out:
                out.write(line(number))
            if number % 4000 == 3999:
                log.rename(tmp_path / f"audit.jsonl.{number}")
            if number % 20 == 0:
                time.sleep(0.02)  # about as long as the kills take
        done.set()

    with ExitStack() as stack:
        daemons = _daemons(stack, dsn, tmp_path, 2)
        writer = threading.Thread(target=write)
        writer.start()
        _kill_at_random(daemons, lambda: random.uniform(0.05, 0.9))
        writer.join()
        _wait_for(dsn, LINES)
    assert done.is_set()
    assert count(dsn, "usage_facts") == LINES
    assert outcomes(dsn) == {"fact": LINES}  # a kill never makes a line be read twice
    by_path = {Path(row["path"]): row["file_id"] for row in rows(dsn, "select path, file_id from tail_files")}
    assert_sound(dsn, {file_id: path.read_bytes() for path, file_id in by_path.items()})
    assert count(dsn, "log_gaps") == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_truncations_that_regrow_past_the_offset_under_kills(dsn: str, tmp_path: Path) -> None:
    """The log is cut to nothing and at once regrown past the committed offset, while it is read and while the tailer is
    dead. What was committed before each cut is nowhere doubled, and what came after it nowhere lost."""
    log = tmp_path / "audit.jsonl"
    contents: list[bytes] = []
    number = 0
    with ExitStack() as stack:
        (daemon,) = _daemons(stack, dsn, tmp_path, 1)
        for generation in range(25):
            size = 100 + 60 * generation
            first, rest = b"".join(line(number + n) for n in range(size // 2)), b""
            rest = b"".join(line(number + n) for n in range(size // 2, size))
            number += size
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.ftruncate(descriptor, 0)
            before = contents[-1] if contents else b""
            assert len(first + rest) > len(before)
            os.write(descriptor, first)  # the first half alone may be shorter than the offset, or longer
            if generation % 3 == 1:
                daemon.kill()
            os.write(descriptor, rest)
            os.close(descriptor)
            if not daemon.alive():
                daemon.start()
            contents.append(first + rest)
            _wait_for(dsn, number)
    assert count(dsn, "usage_facts") == number
    assert outcomes(dsn) == {"fact": number}
    ids = [row["file_id"] for row in rows(dsn, "select file_id from tail_files order by file_id")]
    assert len(ids) == len(contents)
    assert_sound(dsn, dict(zip(ids, contents, strict=True)))
    lost = rows(dsn, "select end_offset - start_offset as n from log_gaps where end_offset is not null")
    assert lost == []
