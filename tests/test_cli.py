"""Every verb: what people read, the JSON that programs read, exit codes; with a given Postgres and the embedded one."""

import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from billing_tailer import __version__
from billing_tailer.ledger import migrations
from tests.support.daemon import Daemon
from tests.support.follow import following
from tests.support.loglines import line, lines
from tests.support.proof import count, outcomes, rows
from tests.support.spendlines import payload, spool_line
from tests.support.verbs import Verb, answer_of, run_verb

FILE_KEYS = {
    "file_id",
    "path",
    "generation",
    "state",
    "blocked_reason",
    "committed_offset",
    "size",
    "lag_bytes",
    "last_commit_at",
    "first_seen_at",
    "previous_file_id",
    "decide",
    "gaps",
}
POISON = b"\x1b[31mnot json\xff\n"


def follow(dsn: str, log: Path, content: bytes, **changes: Any) -> None:
    with log.open("ab") as out:
        out.write(content)
    with following(dsn, log.parent, **changes):
        pass


# --- usage -----------------------------------------------------------------------------------------------------------


def test_version(verb: Verb) -> None:
    assert verb("version") == f"{__version__}\n"
    assert verb.json("version") == {"version": __version__}


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-verb"],
        ["status", "--no-such-option"],
        ["offsets", "reset", "/a=0"],
        ["dead-letters", "show", "x"],
        ["dead-letters", "list", "--limit", "0"],
    ],
)
def test_wrong_usage(verb: Verb, arguments: list[str]) -> None:
    verb(*arguments, code=2)


def test_wrong_configuration(verb: Verb) -> None:
    verb.environment(HTTP_PORT="x", LOG_LEVELS="info")
    for arguments in (["status"], ["files"], ["check"], ["migrate"], ["offsets", "list"], ["dead-letters", "list"]):
        verb(*arguments, code=2)
        assert "BILLING_TAILER_HTTP_PORT" in verb.stderr
        assert "did you mean BILLING_TAILER_LOG_LEVEL" in verb.stderr


def test_postgres_is_away(verb: Verb, log: Path) -> None:
    """A failure, not a misconfiguration; and no traceback."""
    environment = {
        "BILLING_TAILER_DATABASE_URL": "host=127.0.0.1 port=1",
        "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*",
    }
    for arguments in (["status"], ["migrate"], ["offsets", "reset", f"{log}=0", "--reason", "r"]):
        found = run_verb(environment, *arguments)
        assert (found.returncode, found.stdout) == (1, "")
        assert found.stderr.startswith("billing-tailer: ")
        assert "refused" in found.stderr
        assert "Traceback" not in found.stderr


# --- migrate ---------------------------------------------------------------------------------------------------------


def test_migrate(verb: Verb, empty_dsn: str) -> None:
    verb.environment(DATABASE_URL=empty_dsn)
    verb("status", code=2)
    assert "billing-tailer migrate" in verb.stderr
    applied = [migration.name for migration in migrations()]
    assert verb.json("migrate", "--dry-run") == {"schema": "billing", "applied": [], "missing": applied}
    verb("status", code=2)
    assert verb.json("migrate") == {"schema": "billing", "applied": applied, "missing": []}
    assert verb.json("migrate") == {"schema": "billing", "applied": [], "missing": []}
    assert verb("migrate") == "schema billing: nothing to do\n"


def test_migrate_as_the_owner(verb: Verb, dsn: str, empty_dsn: str) -> None:
    verb.environment(MIGRATE_DATABASE_URL=empty_dsn, DB_SCHEMA="other")
    assert verb("migrate").startswith("schema other: 0001_positions_and_facts")
    assert count(empty_dsn, "other.tail_files") == 0
    assert rows(dsn, "select to_regnamespace('other') as schema") == [{"schema": None}]


def test_migrate_without_a_dsn(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BILLING_TAILER_DATABASE_URL")
    verb("migrate", code=2)
    assert "BILLING_TAILER_MIGRATE_DATABASE_URL is not set" in verb.stderr


@pytest.fixture
def unhide(empty_dsn: str, admin_dsn: str) -> Callable[[], None]:
    """The test's database is renamed away, so that Postgres lets nobody in; brings it back."""
    name = str(conninfo_to_dict(empty_dsn)["dbname"])
    away = f"{name}_away"

    def rename(old: str, new: str) -> None:
        with psycopg.connect(admin_dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("alter database {} rename to {}").format(*map(sql.Identifier, (old, new))))

    rename(name, away)
    return lambda: rename(away, name)


def test_migrate_waits_if_it_is_told_to(verb: Verb, empty_dsn: str, unhide: Callable[[], None]) -> None:
    verb.environment(DATABASE_URL=empty_dsn)
    started = time.monotonic()
    assert verb.outcome("migrate")[0] == 1
    assert verb.outcome("migrate", "--wait-seconds", "1")[0] == 1
    assert "waiting for Postgres: " in verb.stderr
    assert 0.5 <= time.monotonic() - started < 10
    back = threading.Timer(0.7, unhide)
    back.start()
    code, applied = verb.outcome("migrate", "--wait-seconds", "60", "--json")
    back.join()
    assert (code, len(applied["applied"])) == (0, len(migrations()))
    assert verb.stderr.count("waiting for Postgres: ") == 1


def test_migrate_does_not_wait_for_what_will_not_mend_itself(verb: Verb, empty_dsn: str) -> None:
    verb.environment(DATABASE_URL=empty_dsn, DB_SCHEMA="pg_mine")  # Postgres keeps that prefix to itself
    started = time.monotonic()
    assert verb.outcome("migrate", "--wait-seconds", "60")[0] != 0
    assert time.monotonic() - started < 30


# --- status, files, offsets ------------------------------------------------------------------------------------------

STATUS_OF_NOTHING = {
    "source_id": "default",
    "active": False,
    "lag_bytes": 0,
    "last_commit_at": None,
    "files": 0,
    "blocked": [],
    "facts": 0,
    "conflicts": 0,
    "dead_letters_open": 0,
    "gaps": 0,
    "gap_bytes": 0,
    "pending_calls": 0,
    "receipts": 0,
    "exceptions_open": {},
    "capture_ratio": None,
    "unhealthy": [],
}


def test_status_of_nothing(verb: Verb) -> None:
    assert verb.json("status") == STATUS_OF_NOTHING
    printed = verb("status")
    assert [text.split()[0] for text in printed.splitlines()] == list(STATUS_OF_NOTHING)


def test_status(verb: Verb, dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 10))
    with following(dsn, log.parent):
        with log.open("ab") as out:
            out.write(line(10))
        status = verb.json("status")
        assert datetime.fromisoformat(status.pop("last_commit_at")).tzinfo is not None
        assert status == {
            **{key: value for key, value in STATUS_OF_NOTHING.items() if key != "last_commit_at"},
            "active": True,
            "lag_bytes": len(line(10)),
            "files": 1,
            "facts": 10,
            "pending_calls": 10,
        }
    assert verb.json("status")["active"] is False
    log.parent.rename(log.parent.parent / "unmounted")
    assert verb.json("status")["facts"] == 10


def test_status_is_unhealthy_with_an_open_dead_letter(verb: Verb, dsn: str, log: Path) -> None:
    follow(dsn, log, lines(0, 10) + POISON)
    assert verb.json("status", code=1)["dead_letters_open"] == 1
    verb("status", code=1)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("update billing.dead_letters set resolved_at = now(), resolution = 'seen'")
    assert verb.json("status")["dead_letters_open"] == 0


def test_status_is_unhealthy_with_a_blocked_file(verb: Verb, dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 10))
    with following(dsn, log.parent) as rig:
        log.write_bytes(lines(0, 5)[:-1])
        rig.turn()
    assert verb.json("status", code=1)["blocked"] == [str(log)]
    (file,) = verb.json("files")
    assert (file["state"], file["blocked_reason"]) == ("blocked", "offset_past_end")


def test_status_is_unhealthy_with_a_missing_file(verb: Verb, dsn: str, log: Path) -> None:
    follow(dsn, log, lines(0, 10))
    log.rename(log.parent.parent / "elsewhere")
    follow(dsn, log.parent / "audit-2.jsonl", lines(10, 1))
    (one,) = verb.json("status", code=1)["unhealthy"]
    assert one["reason"].startswith(f"{log} (file_id 1) is missing")


def test_status_is_unhealthy_with_a_call_that_is_not_charged(verb: Verb, dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 2))
    (log.parent / "callbacks-test-1.jsonl").write_bytes(spool_line(payload(0, 0)) + spool_line(payload(1)))
    with following(dsn, log.parent) as rig:
        rig.turn()
    assert verb.json("status", code=1)["unhealthy"] == [
        {
            "reason": "1 call is held_zero_cost",
            "next": "`billing-tailer exceptions list --kind held_zero_cost`, then `billing-tailer explain CALL_ID`",
        }
    ]


def test_status_is_about_one_source(verb: Verb, dsn: str, log: Path) -> None:
    follow(dsn, log, lines(0, 10) + POISON, source_id="other")
    assert verb.json("dead-letters", "list") == []
    assert verb.json("status") == STATUS_OF_NOTHING


@pytest.mark.parametrize("arguments", [["files"], ["offsets", "list"]])
def test_files(verb: Verb, dsn: str, log: Path, arguments: list[str]) -> None:
    assert verb.json(*arguments) == []
    assert verb(*arguments) == "none\n"
    follow(dsn, log, lines(0, 10))
    log.rename(log.with_name("audit.jsonl." + "x" * 100))
    follow(dsn, log, lines(10, 10))
    found = verb.json(*arguments)
    assert [set(row) for row in found] == [FILE_KEYS, FILE_KEYS]
    old, new = found
    assert (old["path"], old["state"]) == (f"{log}.{'x' * 100}", "rotated")
    assert (new["path"], new["state"], new["generation"], new["previous_file_id"]) == (str(log), "live", 2, 1)
    assert new["committed_offset"] == new["size"] == log.stat().st_size
    assert new["lag_bytes"] == 0
    printed = verb(*arguments).splitlines()
    assert printed[0].split()[:2] == ["file_id", "path"]
    assert [text.split()[1] for text in printed[1:]] == [old["path"], new["path"]], "a path is never cut"


def test_offsets_reset(verb: Verb, dsn: str, log: Path) -> None:
    follow(dsn, log, lines(0, 10))
    planned = verb.json("offsets", "reset", f"{log}=beginning", "--reason", "ticket 7", "--dry-run")
    assert planned == {
        "reset_id": None,
        "applied": False,
        "path": str(log),
        "file_id": 1,
        "old_offset": 7100,
        "new_offset": 0,
    }
    assert count(dsn, "offset_resets") == 0
    done = verb.json("offsets", "reset", f"{log}=beginning", "--reason", "ticket 7")
    assert done == {**planned, "applied": True, "reset_id": done["reset_id"]}
    (row,) = rows(dsn, "select reset_id, source, reason, requested, source_id from offset_resets")
    assert row == {
        "reset_id": done["reset_id"],
        "source": "cli",
        "reason": "ticket 7",
        "requested": f"{log}=beginning",
        "source_id": "default",
    }
    assert verb("offsets", "reset", f"{log}=end", "--reason", "no").splitlines()[-1] == "new_offset  7100"
    follow(dsn, log, line(10))
    assert outcomes(dsn) == {"fact": 1}


@pytest.mark.parametrize(
    ("request_text", "reason", "words"),
    [
        ("{log}=5", "r", "in the middle of a line"),
        ("{log}=7101", "r", "the file has 7100 bytes"),
        ("{log}=-1", "r", "byte offset"),
        ("{log}=middle", "r", "byte offset"),
        ("audit.jsonl=0", "r", "absolute path"),
        ("{log}.1=0", "r", "nothing is known of"),
        ("{log}=0", " ", "--reason is empty"),
    ],
)
def test_offsets_reset_refused(verb: Verb, dsn: str, log: Path, request_text: str, reason: str, words: str) -> None:
    follow(dsn, log, lines(0, 10))
    verb("offsets", "reset", request_text.format(log=log), "--reason", reason, code=2)
    assert words in verb.stderr
    assert "\n  -> " in verb.stderr
    assert count(dsn, "offset_resets") == 0


# --- dead letters ----------------------------------------------------------------------------------------------------


def test_dead_letters(verb: Verb, dsn: str, log: Path) -> None:
    assert verb("dead-letters", "list") == "none\n"
    follow(dsn, log, POISON + line(0) + line(1, status="\x1b]0;owned\x07") + b"[]\n")
    found = verb.json("dead-letters", "list")
    assert [row["reason"] for row in found] == ["not_an_object", "bad_value", "invalid_json"], "the newest first"
    assert set(found[0]) == {
        "dead_letter_id",
        "file_id",
        "path",
        "start_offset",
        "end_offset",
        "reason",
        "detail",
        "created_at",
        "resolved_at",
        "resolution",
        "resolved_by",
        "resolved_reason",
    }
    assert [row["dead_letter_id"] for row in verb.json("dead-letters", "list", "--limit", "1")] == [3]
    shown = verb.json("dead-letters", "show", "1")
    assert set(shown) == {*found[0], "raw", "sha256"}
    assert shown["raw"] == "\x1b[31mnot json\\xff\n"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "update billing.dead_letters set resolved_at = now(), resolution = 'x' where dead_letter_id = 1"
        )
    assert len(verb.json("dead-letters", "list")) == 2
    assert len(verb.json("dead-letters", "list", "--all")) == 3


def test_strangers_do_not_write_to_the_terminal(verb: Verb, dsn: str, log: Path) -> None:
    """Escape sequences in a log line are shown, not obeyed."""
    follow(dsn, log, POISON + line(1, status="\x1b]0;owned\x07"))
    for arguments in (["list"], ["show", "1"], ["show", "2"]):
        printed = verb("dead-letters", *arguments)
        assert all(c.isprintable() for c in printed.replace("\n", ""))
    assert r"raw              \x1b[31mnot json\xff\n" in verb("dead-letters", "show", "1").replace("\\\\", "\\")


@pytest.mark.parametrize("number", ["9", "99999999999999999999999"])
def test_no_such_dead_letter(verb: Verb, number: str) -> None:
    verb("dead-letters", "show", number, code=2)
    assert f"there is no dead letter {number}" in verb.stderr


# --- the embedded Postgres -------------------------------------------------------------------------------------------


def test_verbs_with_the_embedded_postgres(log: Path, open_dir: Path, tmp_path: Path) -> None:
    """They ask the running daemon's server; without a daemon they start it for themselves."""
    environment = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*.jsonl*",
        "BILLING_TAILER_DATA_DIR": str(open_dir / "data"),
        "BILLING_TAILER_CALLBACK_TOKEN": "t" * 32,
    }
    assert answer_of(run_verb(environment, "status", "--json")) == STATUS_OF_NOTHING
    log.write_bytes(lines(0, 10))
    with Daemon(environment, tmp_path / "log") as daemon:
        daemon.wait_for_event("batch.committed")
        running = answer_of(run_verb(environment, "status", "--json"))
        assert (running["active"], running["facts"]) == (True, 10)
        found = answer_of(run_verb(environment, "offsets", "reset", f"{log}=0", "--reason", "r", "--json"))
        assert found["applied"] is True
        daemon.wait_until(lambda: daemon.metric("billing_tailer_lines_total", '{outcome="replayed"}') == 10)
        assert daemon.terminate() == 0
    stopped = answer_of(run_verb(environment, "status", "--json"))
    assert stopped == {**running, "active": False, "last_commit_at": stopped["last_commit_at"]}
    found = run_verb(environment, "check")
    assert (found.returncode, "FAIL" in found.stdout, "warn receipts" in found.stdout) == (0, False, True)
