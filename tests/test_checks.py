"""`check`: what it finds, in which words, that nothing hides anything else, and that it writes nothing."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from billing_tailer.checks.database import meaning
from billing_tailer.checks.finding import Finding, collected, fine
from billing_tailer.checks.logs import VARIABLES
from billing_tailer.ledger import Probe, migrations
from tests import docs_tables
from tests.support.follow import following
from tests.support.loglines import RECORDED, line, lines
from tests.support.proof import outcomes, rows
from tests.support.spendlines import payload, spool_line
from tests.support.spendlogs import row, spend_logs
from tests.support.unprivileged import unprivileged
from tests.support.verbs import Verb
from tests.test_cli import follow

TOKEN = "0123456789abcdef" * 2


def failing(findings: list[dict[str, Any]]) -> dict[str, str]:
    assert all(set(finding) == {"ok", "topic", "message", "hint", "warning"} for finding in findings)
    assert all(finding["hint"] for finding in findings if not finding["ok"])
    return {finding["topic"]: finding["message"] for finding in findings if not finding["ok"]}


def test_check(verb: Verb, daemon_dsn: str, log: Path) -> None:
    verb.environment(DATABASE_URL=daemon_dsn, CALLBACK_TOKEN=TOKEN)
    log.write_bytes(RECORDED.read_bytes() + b'{"half')
    assert failing(verb.json("check")) == {}
    printed = verb("check")
    fine = ("ok   ", "warn spend logs", "warn log format: ", "     -> ")
    assert [text for text in printed.splitlines() if not text.startswith(fine)] == []
    assert "the last 122 lines are understood" in printed


def test_check_says_everything_at_once(verb: Verb, log: Path, empty_dsn: str) -> None:
    verb.environment(DATABASE_URL=empty_dsn)
    found = failing(verb.json("check", code=1))
    found.pop("log volume", None)  # where it is on the root file system
    assert found == {
        "log files": f"no file matches {log.parent}/audit*.jsonl*",
        "schema": f"billing is at version 0, this program needs {migrations()[-1].version}: it is not there yet",
    }
    log.parent.rmdir()
    assert set(failing(verb.json("check", code=1))) == {"log volume", "log files", "schema"}
    printed = verb("check", code=1)
    assert "FAIL log volume" in printed
    assert "     -> " in printed


def test_check_of_globs_that_forget_rotated_names(verb: Verb, daemon_dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 1))
    Path(f"{log}.1.gz").write_bytes(b"")
    verb.environment(DATABASE_URL=daemon_dsn, AUDIT_GLOBS=str(log))
    (message,) = failing(verb.json("check", code=1)).values()
    assert message == f"{log}.1.gz looks like a rotated log, but no glob matches it"


def test_check_of_a_log_that_is_not_understood(verb: Verb, daemon_dsn: str, log: Path) -> None:
    """A line in nginx's default format, one without what bills it, and a carriage return, which ends no line."""
    verb.environment(DATABASE_URL=daemon_dsn)
    fields = json.loads(line(1))
    del fields["status"]
    log.write_bytes(b"127.0.0.1 - - GET\n" + line(0)[:-2] + b',"x":"\r"}\n' + json.dumps(fields).encode() + b"\n")
    (message,) = failing(verb.json("check", code=1)).values()
    assert f"{log}: 3 of the last 3 lines are not understood" in message
    assert "status" in message


def test_check_when_postgres_is_away(verb: Verb, log: Path) -> None:
    log.write_bytes(lines(0, 1))
    verb.environment(DATABASE_URL="host=127.0.0.1 port=1")
    assert "refused" in failing(verb.json("check", code=1))["database"]


@pytest.fixture
def poor_dsn(dsn: str) -> Iterator[Callable[[str], str]]:
    """Makes a role with the given grants on all tables of the schema; returns its DSN."""
    role = "billing_tailer_poor"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"create role {role} login password 'x'")

        def make(grants: str) -> str:
            connection.execute(f"grant usage on schema billing to {role}")
            connection.execute(f"grant {grants} on all tables in schema billing to {role}")
            return make_conninfo(dsn, user=role, password="x")

        yield make
        connection.execute(f"drop owned by {role}")
        connection.execute(f"drop role {role}")


def test_check_of_the_grants(verb: Verb, log: Path, poor_dsn: Callable[[str], str]) -> None:
    log.write_bytes(lines(0, 1))
    verb.environment(DATABASE_URL=poor_dsn("select"))
    message = failing(verb.json("check", code=1))["grants"]
    assert "INSERT on usage_facts" in message
    assert "UPDATE (path, " in message
    assert "SELECT" not in message


def test_what_check_finds_sufficient_is(verb: Verb, log: Path, poor_dsn: Callable[[str], str]) -> None:
    """The daemon's role needs no ownership; and a reset must not be the first to find out what is missing."""
    log.write_bytes(lines(0, 10))
    poor = poor_dsn("select, insert, update")
    verb.environment(DATABASE_URL=poor)
    follow(poor, log, lines(0, 5) + lines(10, 5))
    assert "DELETE on tail_batches" in failing(verb.json("check", code=1))["grants"]
    verb("offsets", "reset", f"{log}=beginning", "--reason", "r", code=2)
    assert "permission denied" in verb.stderr
    poor_dsn("delete")
    assert set(failing(verb.json("check", code=1))) == {"receipts"}
    verb("offsets", "reset", f"{log}=beginning", "--reason", "r")
    follow(poor, log, b"")
    assert outcomes(poor) == {"replayed": 20}


@pytest.mark.parametrize(
    "given",
    [
        "grant update on billing.charge_receipts to {role}",
        "grant update (charged_credits) on billing.charge_receipts to {role}",
        "grant delete on billing.charge_adjustments to {role}",
        "grant truncate on billing.llm_charge_details to {role}",
        (
            "alter table billing.charge_receipts owner to {role}; "
            "revoke update, delete, truncate on billing.charge_receipts from {role}"
        ),
    ],
)
def test_check_fails_where_receipts_may_be_changed(
    verb: Verb, dsn: str, daemon_dsn: str, log: Path, given: str
) -> None:
    log.write_bytes(lines(0, 1))
    verb.environment(DATABASE_URL=daemon_dsn)
    assert failing(verb.json("check")) == {}
    role = rows(daemon_dsn, "select current_user::text as role")[0]["role"]
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(given.format(role=role).encode())
    assert list(failing(verb.json("check", code=1))) == ["receipts"]
    assert "FAIL receipts" in verb("check", code=1)


# --- everything at once


def test_everything_is_broken_at_once(verb: Verb, log: Path, open_dir: Path) -> None:
    """Each is named, none hides another, and nothing is a traceback."""
    closed = open_dir / "closed"
    closed.mkdir()
    closed.chmod(0o700)
    (open_dir / "spool").mkdir()
    (open_dir / "spool").chmod(0o500)
    volume = open_dir / "billing"
    volume.mkdir()
    unreadable = volume / "audit.jsonl"
    unreadable.write_bytes(lines(0, 1))
    unreadable.chmod(0)
    (volume / "audit.jsonl.1").write_bytes(b"127.0.0.1 - - GET\n")
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        verb.environment(
            AUDIT_GLOBS=f"{open_dir}/missing/audit*,{closed}/audit*,{volume}/audit*",
            DATABASE_URL=f"host=127.0.0.1 port={port} user=tailer dbname=billing",
            LITELLM_URL=f"http://127.0.0.1:{port}",
            LITELLM_API_KEY="sk-secret-key",
            SPOOL_DIR=f"{open_dir}/spool/deeper",
            CALLBACK_TOKEN="a" * 32,
        )
        verb("check", code=1)  # what is imported must not have to be read by nobody
        "x".encode("idna")
        with unprivileged():
            findings = verb.json("check", code=1)
            printed = verb("check", code=1)
    uid = f"uid {65534 if os.geteuid() == 0 else os.geteuid()}"
    messages = [one["message"] for one in findings if not one["ok"]]
    for words in (
        f"cannot list {open_dir}/missing: No such file or directory",
        f"may not list or enter {closed}, which is drwx------ of uid {os.geteuid()}",
        f"cannot read {unreadable}, which is ----------",
        "audit.jsonl.1: 1 of the last 1 lines are not understood",
        "nothing listens there: ",
        f"may not write to {open_dir}/spool, where {open_dir}/spool/deeper is to be made",
        "cannot be reached",
    ):
        assert [text for text in messages if words in text], (words, messages)
    assert [text for text in messages if uid in text]
    assert "CALLBACK_TOKEN has few different characters" in printed
    assert "secret" not in printed
    assert failing(findings)


def test_a_check_that_breaks_off_hides_nothing() -> None:
    def broken() -> Iterator[Finding]:
        yield fine("one", "looked at")
        raise RuntimeError("oops")

    first, second = collected("topic", broken())
    assert (first.ok, second.ok, second.topic) == (True, False, "topic")
    assert "RuntimeError: oops" in second.message


def test_it_writes_nothing(verb: Verb, dsn: str, log: Path, tmp_path: Path) -> None:
    log.write_bytes(lines(0, 1))
    verb.environment(SPOOL_DIR=f"{tmp_path}/spool")
    verb("check")
    assert not (tmp_path / "spool").exists()
    assert sorted(path.name for path in log.parent.iterdir()) == ["audit.jsonl"]
    assert rows(dsn, "select count(*) as n from tail_files") == [{"n": 0}]


# --- the log


def warnings(findings: list[dict[str, Any]]) -> dict[str, str]:
    return {one["topic"]: f"{one['message']} -> {one['hint']}" for one in findings if one["warning"]}


def test_the_variables_are_those_of_the_template() -> None:
    assert dict(VARIABLES) == {name: docs_tables.nginx_variables()[name] for name in VARIABLES}


def without(content: bytes, *names: str) -> bytes:
    fields = {name: value for name, value in json.loads(content).items() if name not in names}
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def test_every_missing_field_is_named_at_once(verb: Verb, daemon_dsn: str, log: Path) -> None:
    """By the newest line: what was corrected since is no news."""
    verb.environment(DATABASE_URL=daemon_dsn, CALLBACK_TOKEN=TOKEN)
    log.write_bytes(line(0) + without(line(1), "upstream_status", "end_user", "call_id"))
    findings = verb.json("check", code=1)
    first = next(one for one in findings if not one["ok"])
    assert first["message"] == f"{log}: the newest line has no end_user, upstream_status"
    assert first["hint"].endswith(': "end_user":"$audit_end_user", "upstream_status":"$upstream_status"')
    assert "the newest line has no call_id: calls whose answer never came" in warnings(findings)["log format"]
    with log.open("ab") as out:
        out.write(line(2))
    assert "log format" in failing(verb.json("check", code=1)), "the line is still among the last ones"
    log.write_bytes(line(2))
    assert failing(verb.json("check")) == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'127.0.0.1 - - [22/Nov/2026] "POST /v1"\n', "names another log_format"),
        (line(0).replace(b"/v1/chat", rb"/v1/\x22chat"), "escape=json"),
        (line(0).replace(b'"upstream_status":"200"', b'"upstream_status":-'), "quote every value"),
        (line(0).replace(b'"upstream_status":"200"', b'"upstream_status":502, 200'), "quote every value"),
        (line(0).replace(b"account-1", b'acc"ount'), "escape=json"),
    ],
)
def test_why_a_line_is_no_json(verb: Verb, daemon_dsn: str, log: Path, content: bytes, words: str) -> None:
    verb.environment(DATABASE_URL=daemon_dsn, CALLBACK_TOKEN=TOKEN)
    log.write_bytes(content)
    (finding,) = (one for one in verb.json("check", code=1) if not one["ok"])
    assert finding["topic"] == "log format"
    assert words in finding["hint"]


def test_values_that_are_not_quoted(verb: Verb, daemon_dsn: str, log: Path) -> None:
    verb.environment(DATABASE_URL=daemon_dsn, CALLBACK_TOKEN=TOKEN)
    log.write_bytes(line(0).replace(b'"status":"200"', b'"status":200'))
    assert "not quoted in the newest line: status" in warnings(verb.json("check"))["log format"]


def now_line(seconds_ago: float) -> bytes:
    return line(0, msec=f"{time.time() - seconds_ago:.3f}")


@pytest.mark.parametrize(
    ("content", "silent_seconds", "words"),
    [
        (lambda: now_line(20), 0, "s after its newest line had ended: lines are held back"),
        (lambda: now_line(12) + b'{"half', 12, "ends within a line since 12 s"),
        (lambda: line(0) + b"x" * (4096 - len(line(0))), 0, "at a multiple of 4096 bytes (4096)"),
        (lambda: now_line(20), 20, ""),
        (lambda: line(0), 0, ""),  # long ago: copied or touched
    ],
)
def test_a_buffered_log(
    verb: Verb, daemon_dsn: str, log: Path, content: Callable[[], bytes], silent_seconds: float, words: str
) -> None:
    """nginx's buffer= holds whole lines back; a writer that knows no lines tears them."""
    verb.environment(DATABASE_URL=daemon_dsn, CALLBACK_TOKEN=TOKEN)
    log.write_bytes(content())
    moment = time.time() - silent_seconds
    os.utime(log, (moment, moment))
    found = warnings(verb.json("check")).get("buffering", "")
    assert words in found
    assert bool(found) == bool(words)


def test_a_line_from_the_future(verb: Verb, daemon_dsn: str, log: Path) -> None:
    verb.environment(DATABASE_URL=daemon_dsn, CALLBACK_TOKEN=TOKEN)
    log.write_bytes(now_line(-60))
    assert "s in the future" in failing(verb.json("check", code=1))["clock"]


# --- Postgres


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("failed to resolve host 'nohost': [Errno -2] Name or service not known", "the host's name"),
        ('connection to server at "10.0.0.1", port 5432 failed: timeout expired', "no answer"),
        ('failed: FATAL:  password authentication failed for user "tailer"', "the login is refused"),
        ('failed: FATAL:  no pg_hba.conf entry for host "10.0.0.9"', "the login is refused"),
        ("failed: FATAL:  sorry, too many clients already", "no connection is free"),
        ("failed: FATAL:  the database system is starting up", "not ready"),
        ("something else", None),
    ],
)
def test_what_postgres_says_and_what_it_means(message: str, words: str | None) -> None:
    found = meaning(message)
    assert (found and found[0].startswith(words or "")) or (found is None and words is None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dbname": "nowhere"}, "there is no such database: "),
        ({"user": "nobody_here"}, "there is no such role: "),
        ({"host": "/nonexistent"}, "no such socket: "),
    ],
)
def test_an_unreachable_database(verb: Verb, dsn: str, log: Path, change: dict[str, str], words: str) -> None:
    log.write_bytes(lines(0, 1))
    verb.environment(DATABASE_URL=make_conninfo(dsn, **change))
    found = failing(verb.json("check", code=1))
    assert set(found) == {"database"}
    assert found["database"].startswith(words)


def test_a_newer_schema(verb: Verb, dsn: str, daemon_dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 1))
    verb.environment(DATABASE_URL=daemon_dsn)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("insert into billing.schema_migrations values (99, 'later', 'x')")
        assert "newer than this program" in failing(verb.json("check", code=1))["schema"]
        owner.execute("delete from billing.schema_migrations where version >= 6")
        found = failing(verb.json("check", code=1))["schema"]
    assert f"is at version 5, this program needs {migrations()[-1].version}" in found


def test_more_grants_than_needed(verb: Verb, dsn: str, daemon_dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 1))
    verb.environment(DATABASE_URL=daemon_dsn)
    role = rows(daemon_dsn, "select current_user::text as role")[0]["role"]
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(f"grant delete on billing.usage_facts to {role}".encode())
    found = warnings(verb.json("check"))["grants"]
    assert found.startswith("more than the daemon needs: DELETE on usage_facts")


def test_a_pool_per_transaction(dsn: str) -> None:
    """What stands between gives each statement to another of Postgres' sessions."""

    class Pooled:
        def __init__(self, *connections: psycopg.Connection[Any]) -> None:
            self.connections = list(connections)

        def execute(self, statement: Any) -> Any:
            self.connections.reverse()
            return self.connections[0].execute(statement)

    with psycopg.connect(dsn, autocommit=True) as one, psycopg.connect(dsn, autocommit=True) as other:
        assert not Probe(dsn, "billing", one).shares_sessions()
        assert Probe(dsn, "billing", cast("Any", Pooled(one, other))).shares_sessions()


def test_a_source_id_of_another_volume(verb: Verb, dsn: str, daemon_dsn: str, log: Path, tmp_path: Path) -> None:
    verb.environment(DATABASE_URL=daemon_dsn, CALLBACK_TOKEN=TOKEN)
    follow(dsn, log, lines(0, 10))
    assert failing(verb.json("check")) == {}
    log.rename(log.with_name("audit.jsonl.1"))
    assert failing(verb.json("check")) == {}
    other = tmp_path / "other"
    other.mkdir()
    (other / "audit.jsonl").write_bytes(lines(50, 2))
    verb.environment(AUDIT_GLOBS=f"{other}/audit*.jsonl*")
    message = failing(verb.json("check", code=1))["SOURCE_ID"]
    assert message == f"default has 1 files recorded, such as {log}, and none is here"


# --- the sources of costs


def test_litellm(verb: Verb, dsn: str, daemon_dsn: str, log: Path) -> None:
    """Its version where it tells it; and that it stores rows, if callbacks say that there were calls."""
    verb.environment(DATABASE_URL=daemon_dsn, CALLBACK_TOKEN=TOKEN, LITELLM_API_KEY="sk-1")
    log.write_bytes(lines(0, 1))
    (log.parent / f"callbacks-{'0' * 32}-000000.jsonl").write_bytes(spool_line(payload(0)))
    with following(dsn, log.parent):
        pass
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("update billing.spend_records set received_at = %s", [an_hour_ago])
    with spend_logs([]) as url:
        verb.environment(LITELLM_URL=url)
        findings = verb.json("check", code=1)
    assert failing(findings) == {
        "spend logs": "LiteLLM has no row of the last day, though 1 callbacks came: it does not store spend logs"
    }
    (reached,) = (one["message"] for one in findings if one["topic"] == "spend logs" and one["ok"])
    assert reached == f"{url} answers, and takes the key, LiteLLM 1.106.2"
    event = payload(0, startTime=an_hour_ago.timestamp(), endTime=an_hour_ago.timestamp())
    with spend_logs([row(event)]) as url:
        verb.environment(LITELLM_URL=url)
        assert failing(verb.json("check")) == {}


def test_a_spool_that_does_not_persist(verb: Verb, daemon_dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 1))
    verb.environment(DATABASE_URL=daemon_dsn, CALLBACK_TOKEN=TOKEN)
    memory = next(
        (mount.split()[4] for mount in Path("/proc/self/mountinfo").read_text().splitlines() if " - tmpfs " in mount),
        None,
    )
    if memory is None or not os.access(memory, os.W_OK):
        pytest.skip("no tmpfs that may be written to: what is refused on one cannot be shown")
    verb.environment(SPOOL_DIR=f"{memory}/billing-tailer-spool")
    assert "is on tmpfs, memory: what was acknowledged is lost" in warnings(verb.json("check"))["spool"]
