"""`files --safe-to-delete`: what may go, and each reason why a file must stay."""

import gzip
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from billing_tailer import cli
from tests.support.loglines import line, lines
from tests.support.spendlines import payload, spool_line
from tests.support.verbs import Verb
from tests.test_money_cli import settle
from tests.test_verify import execute


def at_rest(*paths: Path | str) -> None:
    for path in paths:
        os.utime(path, (time.time() - 1000, time.time() - 1000))


Ask = Callable[..., tuple[list[str], str]]


@pytest.fixture
def ask(dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Asks for the paths that may go, and what is said about the others."""
    Verb(monkeypatch, capsys).environment(
        DATABASE_URL=dsn, AUDIT_GLOBS=f"{log.parent}/audit*.jsonl*", CALLBACK_TOKEN="t" * 32
    )
    monkeypatch.setattr(sys, "argv", ["billing-tailer", "files", "--safe-to-delete"])

    def ask(code: int = 0) -> tuple[list[str], str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == code, printed
        return printed.out.splitlines(), printed.err

    return ask


@pytest.fixture
def rotated(dsn: str, log: Path) -> Path:
    """A rotated file that is committed and at rest, beside the live one."""
    settle(dsn, log, lines(0, 10))
    old = log.rename(f"{log}.1")
    settle(dsn, log, lines(10, 10))
    at_rest(log, old)
    return old


def test_a_rotated_file_may_go(dsn: str, log: Path, rotated: Path, ask: Ask) -> None:
    spool = log.parent / f"callbacks-{'0' * 32}-000000.jsonl"
    spool.write_bytes(spool_line(payload(0)))
    settle(dsn, log, b"")
    at_rest(log, spool)
    paths, others = ask()
    assert paths == [str(rotated)]
    assert f"{log}: is live\n" in others
    assert "the daemon removes files of the spool itself" in others
    assert rotated.exists()
    packed = Path(f"{log}.2.gz")
    packed.write_bytes(gzip.compress(rotated.read_bytes()))
    rotated.unlink()
    at_rest(packed)
    assert ask()[0] == [str(packed)]


def test_reasons_to_stay(dsn: str, rotated: Path, ask: Ask) -> None:
    sound = rotated.read_bytes()
    os.utime(rotated)
    assert (ask()[0], "within the last 300 seconds" in ask()[1]) == ([], True)
    with rotated.open("ab") as out:
        out.write(line(99)[:-1])
    at_rest(rotated)
    assert (ask()[0], "has bytes that are not committed" in ask()[1]) == ([], True)
    rotated.write_bytes(sound.replace(b"account-1", b"account-2", 1))
    at_rest(rotated)
    paths, others = ask(1)
    assert (paths, "is not what was committed" in others) == ([], True)
    rotated.write_bytes(sound)
    at_rest(rotated)
    assert ask()[0] == [str(rotated)]
    execute(dsn, "update tail_files set state = 'blocked', blocked_reason = 'ambiguous' where file_id = 1")
    assert "is blocked: ambiguous" in ask()[1]


def test_open_dead_letters_need_their_file(dsn: str, log: Path, ask: Ask) -> None:
    settle(dsn, log, lines(0, 3) + b"not json\n")
    old = log.rename(f"{log}.1")
    settle(dsn, log, lines(10, 3))
    at_rest(old)
    assert "has open dead letters (1)" in ask()[1]
    execute(dsn, "update dead_letters set resolved_at = now(), resolution = 'discarded'")
    assert ask()[0] == [str(old)]
