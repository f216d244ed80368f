"""Metrics that alerts rest on: what they say of gaps, of bytes that wait, and of files that nobody misses."""

import json
import re
from pathlib import Path

import pytest

from billing_tailer.events import Events, configure_logging
from billing_tailer.resets import OrderedReset, plan_reset
from billing_tailer.settings import OffsetReset
from tests.support.follow import Rig, following
from tests.support.loglines import line, lines
from tests.support.proof import rows


def value(rig: Rig, series: str) -> float:
    found = re.search(rf"^billing_tailer_{re.escape(series)} (\S+)$", rig.events.exposition().decode(), re.MULTILINE)
    assert found is not None, series
    return float(found[1])


def gaps(rig: Rig, reason: str) -> tuple[float, float]:
    """Declared since this process began to commit, and standing in Postgres."""
    label = f'{{reason="{reason}"}}'
    return value(rig, f"gaps_total{label}"), value(rig, f"gaps_recorded{label}")


def test_gaps_of_operators_are_counted(dsn: str, log: Path) -> None:
    """The daemon does not make them, so it counts what it finds. Once: not again at a start, nor at a withdrawal."""
    log.write_bytes(lines(0, 10))
    with following(dsn, log.parent) as rig:
        size = log.stat().st_size
        (position,) = rig.follower.positions.values()
        log.write_bytes(lines(0, 20))
        end = OffsetReset(str(log), "end")
        rig.ledger.reset(
            plan_reset(end, position, rig.files, rig.ledger.range_start, reset_id="1", source="cli", reason="tests")
        )
        assert gaps(rig, "skipped") == (0, 0)
        rig.tailer._look_what_operators_did()
        assert gaps(rig, "skipped") == (1, 1)
        assert value(rig, "gap_bytes_total") == log.stat().st_size - size
        rig.tailer._look_what_operators_did()
        assert gaps(rig, "skipped") == (1, 1)
    with following(dsn, log.parent) as rig:
        assert gaps(rig, "skipped") == (0, 1)
        (position,) = rig.follower.positions.values()
        back = OffsetReset(str(log), "beginning")
        rig.ledger.reset(
            plan_reset(back, position, rig.files, rig.ledger.range_start, reset_id="2", source="cli", reason="tests")
        )
        rig.tailer._look_what_operators_did()
        assert gaps(rig, "skipped") == (0, 0)


def test_a_reset_at_the_start_is_counted(dsn: str, log: Path) -> None:
    """OFFSET_RESET is applied between the two times that a new owner reads the positions."""
    log.write_bytes(lines(0, 10))
    with following(dsn, log.parent) as rig:
        log.write_bytes(lines(0, 20))
        rig.events._gaps_known = None  # as it is in a new process
        rig.tailer._load()
        OrderedReset(OffsetReset(str(log), "end"), "1", rig.ledger, rig.files, rig.events, rig.health).apply()
        rig.tailer._load()
        assert gaps(rig, "skipped") == (1, 1)


def test_a_start_at_the_end_is_counted(dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 10))
    with following(dsn, log.parent, start_at_end=True) as rig:
        rig.tailer._look_what_operators_did()
        assert gaps(rig, "start_at") == (1, 1)
        assert value(rig, "gap_bytes_total") == log.stat().st_size


def test_gaps_of_the_daemon_are_counted_once(dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 10))
    with following(dsn, log.parent) as rig:
        log.write_bytes(b"")
        rig.turn()
        rig.tailer._look_what_operators_did()
        assert gaps(rig, "truncated") == (1, 1)
    with following(dsn, log.parent) as rig:
        assert gaps(rig, "truncated") == (0, 1)


def test_bytes_of_a_log_that_never_rests_are_not_old(dsn: str, log: Path) -> None:
    """There is always something unread in it; what counts is for how long."""
    log.write_bytes(lines(0, 10) + line(10)[:50])
    with following(dsn, log.parent) as rig:
        first = value(rig, "oldest_uncommitted_timestamp_seconds")
        with log.open("ab") as out:
            out.write(line(10)[50:] + line(11)[:50])
        rig.turn()
        second = value(rig, "oldest_uncommitted_timestamp_seconds")
        assert second > first
        for _ in range(2):
            rig.follower.show(second + 300, waiting=False)
            assert value(rig, "oldest_uncommitted_timestamp_seconds") == second
        with log.open("ab") as out:
            out.write(line(11)[50:])
        rig.turn()
        assert str(value(rig, "oldest_uncommitted_timestamp_seconds")) == "nan"


@pytest.mark.parametrize(
    ("name", "state"), [("audit.jsonl", "missing"), (f"callbacks-{'0' * 32}-000000.jsonl", "final")]
)
def test_an_empty_spool_file_is_not_missed(dsn: str, tmp_path: Path, name: str, state: str) -> None:
    """A daemon that ends removes its own if nobody posted; an empty log may have been written to before it went."""
    file = tmp_path / name
    file.touch()
    with following(dsn, tmp_path):
        pass
    file.unlink()
    with following(dsn, tmp_path) as rig:
        assert [one["state"] for one in rows(dsn, "select state from tail_files")] == [state]
        rig.follower.show(0, waiting=False)
        assert value(rig, 'files{state="missing"}') == (state == "missing")


def test_refused_callbacks_are_said_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """LiteLLM itself says nothing of the kind."""
    configure_logging("info", "json")
    events = Events()
    for code in (200, 401, 401, 413):
        events.callback(code)
    (said,) = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert (said["event"], said["code"]) == ("callback.refused", 401)
