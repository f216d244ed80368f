"""All verbs by one table: the shape of their JSON, their help, wrong usage, and what their writes leave."""

import gzip
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from billing_tailer import files
from tests import docs_tables
from tests.support.follow import following
from tests.support.loglines import line, lines
from tests.support.proof import rows
from tests.support.spendlines import payload, spool_line
from tests.support.verbs import Verb, run_verb
from tests.test_letters import long_line
from tests.test_money_cli import call, settle

WHY = ("--reason", "ticket 7", "--by", "ann")
RECEIPT = "call_id applied receipt adjustment opened closed"
GENERATION = (
    "file_id path generation state blocked_reason committed_offset size lag_bytes last_commit_at first_seen_at "
)
GENERATION += "previous_file_id decide gaps"
RULING = "reset_id applied file_id path path_was state state_was blocked_reason_was committed_offset gap ended_file_ids"
DECIDED = "dead_letter_id file_id path start_offset end_offset applied resolution why"


class Case(NamedTuple):
    """A verb that works in `world`. keys: of its JSON, or of that's first row. leaves: the table in which a write
    leaves a row, and how many rows that is; None for a read. wrong: arguments that are refused, with the exit code."""

    arguments: tuple[str, ...]
    keys: str
    leaves: tuple[str, int] | None = None
    wrong: tuple[tuple[int, tuple[str, ...]], ...] = ()


def cases(volume: Path) -> dict[str, Case]:
    """By verb. Writes are in an order in which each finds what it needs."""
    log = volume / "audit.jsonl"
    no_reason = ("--reason", " ")
    return {
        "version": Case((), "version"),
        "healthcheck": Case((), "alive url seconds_since_tick reason"),
        "check": Case((), "ok topic message hint warning"),
        "status": Case(
            (),
            "source_id active lag_bytes last_commit_at files blocked facts conflicts dead_letters_open gaps gap_bytes "
            "pending_calls receipts exceptions_open capture_ratio unhealthy",
        ),
        "files": Case((), GENERATION),
        "offsets list": Case((), GENERATION),
        "verify": Case(
            (),
            "ok generations differences differences_not_shown bytes_read not_on_disk problems",
            wrong=((2, ("--file", "/nowhere")), (2, ("--file", "/x", "--settlement"))),
        ),
        "dead-letters list": Case(
            (),
            "dead_letter_id file_id path start_offset end_offset reason detail created_at resolved_at resolution "
            "resolved_by resolved_reason",
            wrong=((2, ("--limit", "0")), (2, ("--limit", "x"))),
        ),
        "dead-letters show": Case(
            ("1",),
            "dead_letter_id file_id path start_offset end_offset reason detail created_at resolved_at resolution "
            "resolved_by resolved_reason raw sha256",
            wrong=((2, ("999",)), (2, ("x",)), (2, ())),
        ),
        "explain": Case(
            (call(1),),
            "call_id standing line fact spend_records pricing receipt details adjustments total_credits exceptions "
            "conflicts",
            wrong=((1, ("call-unknown",)), (2, ())),
        ),
        "receipts": Case(
            (),
            "call_id billing_account_id run_id attempt charged_credits provider_cost_usd user_cost_usd markup_factor "
            "provenance spend_source record_ids occurred_at created_at model provider_model tokens_in tokens_out "
            "cache_hit adjusted_credits adjusted_cost_usd total_credits",
            wrong=((2, ("--since", "yesterday")), (2, ("--limit", "0"))),
        ),
        "exceptions list": Case(
            (),
            "call_id kind seq opened_at closed_at closed_by reason run_id billing_account_id occurred_at detail",
            wrong=((2, ("--kind", "odd")),),
        ),
        "reconcile": Case(
            ("--from", "2026-11-22T00:00:00Z", "--to", "2026-11-22T00:39:00Z"),
            "windows total",
            wrong=((2, ("--from", "x")), (2, ("--from", "2026-11-22", "--to", "2026-11-21"))),
        ),
        # --- writes
        "migrate": Case((), "schema applied missing"),
        "exceptions release": Case(
            (call(3), "--cost-usd", "0.5", *WHY),
            RECEIPT,
            ("charge_receipts", 1),
            (
                (1, ("call-unknown", *WHY)),
                (2, (call(3), "--cost-usd", "x", *WHY)),
                (2, (call(3), "--cost-usd", "-1", *WHY)),
                (2, (call(3), *no_reason)),
                (2, (call(3), "--cost-usd", "1")),
            ),
        ),
        "exceptions close": Case(
            (call(4), "held_zero_cost", *WHY),
            RECEIPT,
            ("call_exceptions where closed_by = 'ann' and reason = 'ticket 7'", 1),
            ((1, (call(4), "overdue", *WHY)), (2, (call(4), "odd", *WHY)), (2, (call(4), "overdue", *no_reason))),
        ),
        "adjust": Case(
            (call(0), "--credits", "-10", *WHY),
            RECEIPT,
            ("charge_adjustments where created_by = 'ann'", 1),
            (
                (1, ("call-unknown", "--credits", "1", *WHY)),
                (2, (call(0), *WHY)),
                (2, (call(0), "--credits", "1.5", *WHY)),
                (2, (call(0), "--credits", "1", *no_reason)),
            ),
        ),
        "dead-letters retry": Case(
            ("1", *WHY),
            DECIDED,
            ("dead_letters where resolved_by = 'ann' and resolved_reason = 'ticket 7'", 1),
            ((2, ("999", *WHY)), (2, ("x", *WHY)), (2, ("1", *no_reason)), (2, ("1",))),
        ),
        "dead-letters discard": Case(
            ("2", *WHY), DECIDED, ("dead_letters where resolved_by = 'ann'", 1), ((2, ("999", *WHY)), (2, ("2",)))
        ),
        "prune": Case(
            WHY,
            "applied prune_id received_before calls records cost_usd",
            ("prunes where pruned_by = 'ann' and reason = 'ticket 7'", 1),
            ((2, ()), (2, no_reason)),
        ),
        "backfill": Case(
            (f"{volume}/archive/old.gz", *WHY),
            "file_id path from_offset to_offset applied outcomes seconds lines_per_second",
            ("backfills where started_by = 'ann' and reason = 'ticket 7'", 1),
            ((2, ("/nowhere.gz", *WHY)), (2, (str(log), *WHY)), (2, (f"{volume}/archive/old.gz",))),
        ),
        "offsets accept-gap": Case(
            ("1", *WHY),
            RULING,
            ("offset_resets where applied_by = 'ann' and reason = 'ticket 7'", 1),
            ((2, ("999", *WHY)), (2, ("x", *WHY)), (2, ("1", *no_reason))),
        ),
        "offsets adopt": Case(
            ("2", f"{volume}/audit-kept.jsonl", *WHY),
            RULING,
            ("offset_resets where reason = 'ticket 7'", 1),
            ((2, ("999", "/x", *WHY)), (2, ("2",)), (2, ("2", "/nowhere", *WHY))),
        ),
        "offsets reset": Case(
            (f"{log}=beginning", *WHY),
            "reset_id applied path file_id old_offset new_offset",
            ("offset_resets where source = 'cli'", 1),
            ((2, (f"{log}=middle", *WHY)), (2, ("/nowhere=0", *WHY)), (2, (f"{log}=1", *WHY)), (2, (f"{log}=0",))),
        ),
    }


@pytest.fixture
def world(verb: Verb, dsn: str, log: Path, tmp_path: Path) -> Verb:
    """Settled calls, held ones, dead letters, old records without a line, two missing files, an archive."""
    volume = log.parent
    for name, first in (("audit-1.jsonl", 20), ("audit-2.jsonl", 30)):
        (volume / name).write_bytes(lines(first, 5))
        with following(dsn, volume):
            pass
    (volume / "audit-1.jsonl").rename(tmp_path / "gone")
    (volume / "audit-2.jsonl").rename(tmp_path / "kept")
    log.write_bytes(lines(0, 3) + long_line(5) + b"not json\n")
    settle(dsn, log, lines(3, 2), *map(payload, range(3)), payload(3, 0), payload(4, 0), payload(50))
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("update billing.spend_records set received_at = received_at - interval '31 days'")
    (tmp_path / "kept").rename(volume / "audit-kept.jsonl")
    (volume / "archive").mkdir()
    (volume / "archive/old.gz").write_bytes(gzip.compress(lines(40, 3)))
    verb.environment(MIGRATE_DATABASE_URL=dsn)  # for `migrate` and `prune`
    return verb


def dump(dsn: str) -> dict[str, str]:
    """A hash of the rows of every table."""
    tables = "select relname from pg_class where relnamespace = 'billing'::regnamespace and relkind = 'r'"
    hashed = "select md5(coalesce(string_agg(t::text, '|' order by t::text), '')) from billing.{} t"
    with psycopg.connect(dsn) as connection:
        names = [name for (name,) in connection.execute(tables.encode()).fetchall()]
        return {name: connection.execute(hashed.format(name).encode()).fetchall()[0][0] for name in names}


def keys_of(answer: Any) -> set[str]:
    return set(answer[0] if isinstance(answer, list) else answer)


def test_every_verb_is_here(tmp_path: Path) -> None:
    """But for the daemon, and `export`, whose JSON has a line for each row (tests/test_export.py)."""
    assert {name for name, _ in docs_tables.commands()} == {*cases(tmp_path), "run", "export"}


def test_reads_and_writes(world: Verb, dsn: str, log: Path) -> None:
    """The keys of each verb's JSON are pinned here; a dry run changes nothing, a write leaves its row."""
    for name, case in cases(log.parent).items():
        words = (*name.split(), *case.arguments)
        before = dump(dsn)
        if case.leaves is None:
            code, printed = world.outcome(*words, "--json")
            assert code in (0, 1), name
            assert keys_of(printed) == set(case.keys.split()), name
            assert dump(dsn) == before, f"{name} is a read"
            continue
        table, wanted = f"select count(*) as n from {case.leaves[0]}", case.leaves[1]
        n = rows(dsn, table)[0]["n"]
        planned = world.json(*words, "--dry-run")
        assert keys_of(planned) == set(case.keys.split()), name
        assert dump(dsn) == before, f"{name} --dry-run"
        done = world.json(*words)
        assert keys_of(done) == keys_of(planned), name
        assert rows(dsn, table)[0]["n"] == n + wanted, name


def test_wrong_usage(world: Verb, dsn: str, log: Path) -> None:
    """Refused with the exit code that says why, in words, and without any change."""
    before = dump(dsn)
    for name, case in cases(log.parent).items():
        for code, arguments in (*case.wrong, (2, (*case.arguments, "--no-such-option"))):
            found, _ = world.outcome(*name.split(), *arguments)
            assert found == code, (name, arguments, world.stderr)
            assert world.stderr.strip(), (name, arguments)
            assert "Traceback" not in world.stderr
    assert dump(dsn) == before


def test_help(verb: Verb) -> None:
    for name, command in docs_tables.commands():
        code, printed = verb.outcome(*name.split(), "--help")
        assert (code, verb.stderr) == (0, ""), name
        assert " ".join(command.help.split())[:30] in " ".join(printed.split()), name
    for arguments in ((), ("offsets",), ("dead-letters",), ("exceptions",)):
        code, printed = verb.outcome(*arguments)
        assert code in (0, 2), arguments
        assert "Usage: " in printed + verb.stderr


def test_a_dead_letter_of_another_source(verb: Verb, dsn: str, log: Path) -> None:
    """It names the source: the letter's file is on another volume."""
    log.write_bytes(b"not json\n")
    with following(dsn, log.parent, source_id="other"):
        pass
    for words in (("show", "1"), ("retry", "1", *WHY), ("discard", "1", *WHY)):
        assert verb.outcome("dead-letters", *words)[0] == 2
        assert "dead letter 1 is of source other, and SOURCE_ID is default" in verb.stderr
    assert rows(dsn, "select resolution from dead_letters") == [{"resolution": None}]
    verb.environment(SOURCE_ID="other")
    assert verb.json("dead-letters", "show", "1")["raw"] == "not json\n"


def test_sizes_of_the_spool_and_of_archives(
    verb: Verb, dsn: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gzip files that of their content, also where it is not committed to its end."""
    monkeypatch.setattr(files, "ARCHIVE_SETTLED_SECONDS", 0.0)
    verb.environment(SPOOL_DIR=str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    spool = tmp_path / f"spool/callbacks-{'0' * 32}-000000.jsonl"
    spool.write_bytes(spool_line(payload(0)))
    archive = log.with_name("audit.jsonl.1.gz")
    archive.write_bytes(gzip.compress(lines(0, 3)))
    log.write_bytes(lines(3, 1))
    with following(dsn, log.parent, globs=(f"{log.parent}/audit*", f"{tmp_path}/spool/callbacks-*")):
        pass
    content, expected = 3 * len(line(0)), {str(log): (len(line(3)), 0), str(spool): (spool.stat().st_size, 0)}

    def sizes() -> dict[str, tuple[int, int]]:
        return {row["path"]: (row["size"], row["lag_bytes"]) for row in verb.json("files")}

    assert sizes() == {**expected, str(archive): (content, 0)}
    one = len(line(0))
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(
            f"update billing.tail_files set committed_offset = {one}, frontier_bytes = {one}, state = 'rotated', "
            f"head = substr(head, 1, {one}) where path like '%.gz'".encode()
        )
    assert sizes() == {**expected, str(archive): (content, content - one)}
    assert verb.json("status")["lag_bytes"] == content - one


def test_status_says_what_to_do(verb: Verb, dsn: str, log: Path) -> None:
    settle(dsn, log, lines(0, 2) + b"not json\n", payload(0))
    answer = verb.json("status", code=1)
    (one,) = answer["unhealthy"]
    assert one["reason"] == "1 dead letter is open"
    assert "`billing-tailer dead-letters list`" in one["next"]
    printed = verb("status", code=1)
    assert f"FAIL {one['reason']}\n     -> {one['next']}\n" in printed
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("update billing.usage_facts set occurred_at = now() - interval '20 minutes'")
        owner.execute("update billing.charge_receipts set occurred_at = now() - interval '20 minutes'")
    assert verb.json("status", code=1)["capture_ratio"] == "0.500000"


def test_who_may_prune(verb: Verb, dsn: str, daemon_dsn: str) -> None:
    """It names the role, the DSN that it comes from, and whose DSN is wanted."""
    verb.environment(DATABASE_URL=daemon_dsn)
    role = rows(daemon_dsn, "select current_user::text as role")[0]["role"]
    owner = rows(dsn, "select current_user::text as role")[0]["role"]
    assert verb.outcome("prune", *WHY)[0] == 2
    assert f"role {role} of BILLING_TAILER_DATABASE_URL may not remove spend records" in verb.stderr
    assert f"set BILLING_TAILER_MIGRATE_DATABASE_URL to a DSN of {owner}, who owns them" in verb.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("receipts", "--since", "0001-01-01T00:00:00+14:00"),
        ("receipts", "--since", "1969-12-31"),
        ("reconcile", "--from", "9999-12-31T23:59:59-14:00"),
        ("reconcile", "--to", "tomorrow"),
    ],
)
def test_wrong_times(verb: Verb, arguments: tuple[str, ...]) -> None:
    verb(*arguments, code=2)
    assert f"{arguments[1]} {arguments[2]!r} is no time\n  -> it must be a time from 1970 on" in verb.stderr


def test_words_that_are_not_utf_8(verb: Verb) -> None:
    """As Python hands them to a program where they are none: no traceback, and nothing is repeated."""
    for arguments in (("explain", "call-\udcff"), ("receipts", "--account", "M\udcfcller")):
        verb(*arguments, code=2)
        assert verb.stderr.startswith("billing-tailer: an argument or a variable is not UTF-8\n")
        assert "ller" not in verb.stderr


def test_an_output_that_is_not_utf_8(verb: Verb, dsn: str, log: Path) -> None:
    """Words are escaped; an export is UTF-8 wherever it goes."""
    log.write_bytes(line(1, end_user="Müller", litellm_call_id="call-é"))
    (log.parent / "callbacks-test.jsonl").write_bytes(spool_line(payload(1, litellm_call_id="call-é")))
    with following(dsn, log.parent):
        pass
    variables = {"BILLING_TAILER_DATABASE_URL": dsn, "PYTHONIOENCODING": "ascii"}
    told = run_verb(variables, "explain", "call-é")
    assert (told.returncode, told.stderr) == (0, "")
    assert "call-\\xe9" in told.stdout
    exported = run_verb({**variables, "PYTHONIOENCODING": "latin-1"}, "export")
    assert ",Müller," in exported.stdout
    assert "call-é," in exported.stdout
