"""The border to the environment: what is refused, what the message says, and that secrets stay secret."""

import re
import subprocess
import sys
import traceback
from dataclasses import FrozenInstanceError
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from billing_tailer.errors import ConfigError
from billing_tailer.settings import (
    FILE_BYTES_MAX,
    OFFSET_MAX,
    PREFIX,
    OffsetReset,
    Settings,
    describe,
    effective,
    env_name,
    load,
    mask_dsn,
)

PASSWORD = "hunter2-s3cret"
TOKEN = "token-0123456789abcdef"
DSN = f"postgresql://tailer:{PASSWORD}@db.internal:5433/billing?sslmode=require"


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(environ)
    return str(caught.value)


def of(**values: str) -> dict[str, str]:
    """Field names as keyword arguments to an environment."""
    return {PREFIX + name.upper(): value for name, value in values.items()}


# --- defaults and good values -------------------------------------------------------------------------------------


def test_defaults_are_the_contract() -> None:
    assert load({}).model_dump() == {
        "audit_globs": ("/billing/audit*.jsonl*",),
        "source_id": "default",
        "llm_routes": (
            "chat/completions",
            "completions",
            "embeddings",
            "messages",
            "responses",
            "images/*",
            "audio/*",
            "rerank",
        ),
        "start_at": "beginning",
        "offset_reset": None,
        "offset_reset_id": None,
        "database_url": None,
        "migrate_database_url": None,
        "db_schema": "billing",
        "data_dir": None,
        "postgres_bin": None,
        "cost_source": "litellm",
        "spool_dir": None,
        "spool_bytes_max": 1_073_741_824,
        "callback_token": None,
        "callback_bytes_max": 536_870_912,
        "litellm_url": None,
        "litellm_api_key": None,
        "markup_factor": Decimal(1),
        "free_models": (),
        "settle_deadline_seconds": 900,
        "failure_quiet_seconds": 10,
        "corrections": "apply",
        "trust_litellm_end_user": False,
        "cost_max_usd": Decimal(1000),
        "poll_interval_seconds": 0.25,
        "batch_lines_max": 10_000,
        "batch_bytes_max": 4_194_304,
        "line_bytes_max": 1_048_576,
        "open_files_max": 256,
        "http_host": "127.0.0.1",
        "http_port": 9108,
        "api_token": None,
        "log_level": "info",
        "log_format": "json",
    }


def test_defaults_pass_their_own_validation() -> None:
    """A default is not validated by itself: feed each back in as text."""
    defaults = {variable.name: variable.default for variable in describe() if variable.default}
    assert load(defaults) == load({})


def test_every_value_is_read() -> None:
    settings = load(
        of(
            audit_globs="/logs/a*.jsonl, /logs/b.jsonl\n/logs/a*.jsonl\n",
            source_id="eu-1.proxy_2",
            llm_routes="chat/completions,images/*",
            start_at="end",
            offset_reset="/logs/a=b.jsonl=42",
            offset_reset_id="OPS-17",
            database_url=DSN,
            migrate_database_url=f"host=/run/pg dbname=billing user=owner password={PASSWORD}",
            db_schema="billing_2",
            data_dir="/var/lib/bt",
            postgres_bin="/usr/lib/postgresql/15/bin",
            cost_source="header",
            spool_dir="/spool",
            spool_bytes_max="1048576",
            callback_token=TOKEN,
            callback_bytes_max="65536",
            litellm_url="http://litellm:4000/",
            litellm_api_key="sk-1",
            markup_factor="1.25",
            free_models="local/*, free-*",
            settle_deadline_seconds="60",
            failure_quiet_seconds="0",
            corrections="report",
            trust_litellm_end_user="true",
            cost_max_usd="50.5",
            poll_interval_seconds="1.5",
            batch_lines_max="1",
            batch_bytes_max="65536",
            line_bytes_max="67108864",
            open_files_max="8",
            http_host="::1",
            http_port="0",
            api_token=TOKEN,
            log_level="WARNING",
            log_format="console",
        )
    )
    assert settings.audit_globs == ("/logs/a*.jsonl", "/logs/b.jsonl")
    assert settings.source_id == "eu-1.proxy_2"
    assert settings.llm_routes == ("chat/completions", "images/*")
    assert settings.start_at == "end"
    assert settings.offset_reset == OffsetReset("/logs/a=b.jsonl", 42)
    assert settings.offset_reset_id == "OPS-17"
    assert settings.database_url == SecretStr(DSN)
    assert settings.migrate_database_url is not None
    assert settings.db_schema == "billing_2"
    assert settings.data_dir == Path("/var/lib/bt")
    assert settings.postgres_bin == Path("/usr/lib/postgresql/15/bin")
    assert (settings.spool_dir, settings.spool_bytes_max, settings.callback_bytes_max) == (
        Path("/spool"),
        1_048_576,
        65_536,
    )
    assert settings.callback_token == SecretStr(TOKEN)
    assert (settings.litellm_url, settings.litellm_api_key) == ("http://litellm:4000", SecretStr("sk-1"))
    assert (settings.markup_factor, settings.cost_max_usd) == (Decimal("1.25"), Decimal("50.5"))
    assert (settings.free_models, settings.corrections) == (("local/*", "free-*"), "report")
    assert (settings.settle_deadline_seconds, settings.failure_quiet_seconds) == (60, 0)
    assert settings.trust_litellm_end_user is True
    assert settings.poll_interval_seconds == 1.5
    assert (settings.batch_lines_max, settings.batch_bytes_max, settings.line_bytes_max) == (1, 65_536, 67_108_864)
    assert (settings.open_files_max, settings.http_host, settings.http_port) == (8, "::1", 0)
    assert settings.api_token == SecretStr(TOKEN)
    assert (settings.log_level, settings.log_format) == ("warning", "console")
    assert len(settings.model_fields_set) == len(Settings.model_fields), "a field is missing in this test"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load({}).http_port = 1  # type: ignore[misc]  # what mypy refuses, Python must too
    with pytest.raises(FrozenInstanceError):
        OffsetReset("/a", 0).path = "/b"  # type: ignore[misc]  # as above


def test_other_variables_are_nobodys_business() -> None:
    assert load({"PATH": "/bin", "BILLING_TAILER": "x", "BILLING_TAILER_TEST_DATABASE_URL": "x", "LANG": "C"}) == load(
        {}
    )


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLING_TAILER_SOURCE_ID", "from-process")
    assert load().source_id == "from-process"
    assert Settings().source_id == "default", "only load() reads the environment"


# --- bad values ---------------------------------------------------------------------------------------------------

BAD = [
    ("audit_globs", "audit*.jsonl", "absolute"),
    ("audit_globs", "/a/*.jsonl,b.jsonl", "absolute"),
    ("audit_globs", "/billing/", "ends in /"),
    ("audit_globs", "/billing/**/audit.jsonl", "name each level"),
    ("audit_globs", " , ", "at least one"),
    ("source_id", "eu/1", "1 to 64"),
    ("source_id", "x" * 65, "1 to 64"),
    ("llm_routes", "/v1/chat/completions", "without /v1/"),
    ("llm_routes", "v1/messages", "without /v1/"),
    ("llm_routes", "chat/completions?x=1", "query"),
    ("start_at", "now", "beginning or end; the default is beginning"),
    ("db_schema", "Billing", "lower-case"),
    ("db_schema", 'b"; drop', "lower-case"),
    ("db_schema", "pg_catalog", "pg_"),
    ("db_schema", "b" * 64, "63"),
    ("data_dir", "~/data", "absolute"),
    ("postgres_bin", "bin", "absolute"),
    ("poll_interval_seconds", "0", "number from 0.01 to 60; the default is 0.25"),
    ("poll_interval_seconds", "nan", "number from 0.01 to 60"),
    ("poll_interval_seconds", "inf", "number from 0.01 to 60"),
    ("poll_interval_seconds", "250ms", "number from 0.01 to 60"),
    ("batch_lines_max", "0", "whole number from 1 to 1000000; the default is 10000"),
    ("batch_lines_max", "1000001", "whole number from 1 to 1000000"),
    ("batch_lines_max", "1.5", "whole number"),
    ("batch_bytes_max", "65535", "whole number from 65536"),
    ("batch_bytes_max", "4MiB", "whole number from 65536"),
    ("line_bytes_max", "1023", "whole number from 1024 to 67108864"),
    ("line_bytes_max", "67108865", "whole number from 1024 to 67108864"),
    ("open_files_max", "0", "whole number from 1"),
    ("http_host", "[::1]", "without brackets"),
    ("http_host", "127.0.0.1:9108", "without brackets and port"),
    ("http_host", "300.0.0.1", "IP address"),
    ("http_port", "65536", "whole number from 0 to 65535; the default is 9108"),
    ("http_port", "-1", "whole number from 0 to 65535"),
    ("http_port", "9" * 5000, "whole number from 0 to 65535"),
    ("log_level", "verbose", "debug or info or warning or error; the default is info"),
    ("log_format", "text", "json or console; the default is json"),
    ("source_id", "caf\udce9", "UTF-8"),
]


@pytest.mark.parametrize(("field", "value", "remedy"), BAD)
def test_a_bad_value_names_variable_value_and_remedy(field: str, value: str, remedy: str) -> None:
    message = refusal(of(**{field: value}))
    assert message.startswith("1 setting is wrong:\n  " + env_name(field) + " = ")
    assert repr(value)[:40].rstrip("'\"") in message
    assert remedy in message
    assert len(message.splitlines()) == 3
    assert max(len(line) for line in message.splitlines()) < 500
    assert "pydantic" not in message
    assert "validation" not in message
    message.encode()  # it can be printed


@pytest.mark.parametrize(
    "value", ["/a", "a=end", "/a=", "/a=-1", "/a=END", "/a=1e3", f"/a={OFFSET_MAX + 1}", "/a=٣", "=0"]
)
def test_a_bad_reset_names_variable_value_and_remedy(value: str) -> None:
    message = refusal(of(offset_reset=value, offset_reset_id="r1"))
    assert message.startswith(f"1 setting is wrong:\n  BILLING_TAILER_OFFSET_RESET = {value!r}: must ")


def test_a_reset_needs_an_id_and_an_id_needs_a_reset() -> None:
    message = refusal(of(offset_reset="/billing/audit.jsonl=0"))
    assert "BILLING_TAILER_OFFSET_RESET_ID is not set, but BILLING_TAILER_OFFSET_RESET is" in message
    message = refusal(of(offset_reset_id="r1"))
    assert "BILLING_TAILER_OFFSET_RESET is not set, but BILLING_TAILER_OFFSET_RESET_ID is" in message
    message = refusal(of(offset_reset="nonsense", offset_reset_id="r1"))
    assert "is not set" not in message, "a bad reset is not an absent one"
    message = refusal({**of(offset_reset="/a=0"), "BILLING_TAILER_OFFSET_RESET_ID_FILE": "/nonexistent/id"})
    assert "is not set" not in message
    assert "must be 1 to 128" in refusal(of(offset_reset="/a=0", offset_reset_id="two words"))


def test_every_problem_is_reported_at_once() -> None:
    environ = {
        **of(
            http_port="http", db_schema="B", offset_reset="/a=0", htp_port="1", database_url="mysql://h/d", log_level=""
        ),
        "BILLING_TAILER_API_TOKEN_FILE": "/nonexistent/token",
    }
    lines = refusal(environ).splitlines()
    assert lines[0] == "7 settings are wrong:"
    names = [line.split()[0] for line in lines[1:-1]]
    assert names == [
        PREFIX + name
        for name in [
            "OFFSET_RESET_ID",
            "DATABASE_URL",
            "DB_SCHEMA",
            "HTTP_PORT",
            "API_TOKEN_FILE",
            "LOG_LEVEL",
            "HTP_PORT",
        ]
    ]
    assert lines[-1].startswith("  -> ")


def test_the_exit_code_is_2() -> None:
    assert ConfigError.exit_code == 2
    with pytest.raises(ConfigError) as caught:
        load(of(http_port="x"))
    assert caught.value.hint


@pytest.mark.parametrize("field", [name for name, field in Settings.model_fields.items() if field.default is None])
def test_empty_is_unset_where_nothing_is_the_default(field: str) -> None:
    assert load({env_name(field): "", f"{env_name(field)}_FILE": ""}) == load({})


@pytest.mark.parametrize("field", [name for name, field in Settings.model_fields.items() if field.default is not None])
def test_empty_is_refused_where_there_is_a_default(field: str) -> None:
    assert f"{env_name(field)} = '': must not be empty: remove the variable" in refusal({env_name(field): ""})


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("BILLING_TAILER_DATABSE_URL", "BILLING_TAILER_DATABASE_URL"),
        ("BILLING_TAILER_AUDIT_GLOB", "BILLING_TAILER_AUDIT_GLOBS"),
        ("BILLING_TAILER_API_TOKEN_FIL", "BILLING_TAILER_API_TOKEN_FILE"),
        ("BILLING_TAILER_PORT", "BILLING_TAILER_HTTP_PORT"),
        ("BILLING_TAILER_POLL_INTERVAL", "BILLING_TAILER_POLL_INTERVAL_SECONDS"),
        ("billing_tailer_http_port", "BILLING_TAILER_HTTP_PORT"),
    ],
)
def test_a_typo_is_refused_with_the_closest_name(typo: str, meant: str) -> None:
    message = refusal({typo: PASSWORD})
    assert f"  {typo} is not a variable" in message
    assert f"did you mean {meant}?" in message
    assert PASSWORD not in message


def test_a_name_like_no_other_is_refused_too() -> None:
    assert "BILLING_TAILER_XYZZY is not a variable" in refusal({"BILLING_TAILER_XYZZY": ""})
    assert "remove it" in refusal({"BILLING_TAILER_XYZZY": ""})
    assert "\x1b" not in refusal({"BILLING_TAILER_\x1b[2J": ""})


def test_kubernetes_service_links_are_ignored_but_a_hand_written_port_is_not() -> None:
    links = {
        "BILLING_TAILER_SERVICE_HOST": "10.0.0.1",
        "BILLING_TAILER_SERVICE_PORT": "9108",
        "BILLING_TAILER_SERVICE_PORT_HTTP": "9108",
        "BILLING_TAILER_PORT": "tcp://10.0.0.1:9108",
        "BILLING_TAILER_PORT_9108_TCP": "tcp://10.0.0.1:9108",
        "BILLING_TAILER_PORT_9108_TCP_PROTO": "tcp",
        "BILLING_TAILER_PORT_9108_TCP_PORT": "9108",
        "BILLING_TAILER_PORT_9108_TCP_ADDR": "10.0.0.1",
    }
    assert load(links) == load({})
    assert load({name.replace("TAILER_", "TAILER_WEB_", 1): value for name, value in links.items()}) == load({})
    assert "BILLING_TAILER_PORT is not" in refusal({**links, "BILLING_TAILER_PORT": "9109"})
    assert "BILLING_TAILER_SERVICE_PORT is not" in refusal({"BILLING_TAILER_SERVICE_PORT": "9109"})
    assert "BILLING_TAILER_SERVICE_HOSTS is not" in refusal({**links, "BILLING_TAILER_SERVICE_HOSTS": "x"})


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", describe(), ids=lambda variable: variable.name)
def test_every_variable_can_come_from_a_file(variable: tuple[str, str, str], tmp_path: Path) -> None:
    others = {"OFFSET_RESET": "/a=0", "OFFSET_RESET_ID": "r1", "DATABASE_URL": DSN, "MIGRATE_DATABASE_URL": DSN}
    others |= {"LITELLM_URL": "http://litellm:4000"}
    name, default, _ = variable
    value = default or others.get(name.removeprefix(PREFIX)) or ("/" + TOKEN)
    pair = of(offset_reset="/a=0", offset_reset_id="r1") if "OFFSET_RESET" in name else {}
    pair |= of(litellm_url="http://litellm:4000", litellm_api_key="sk-1") if "LITELLM_" in name else {}
    file = tmp_path / "value"
    file.write_text(f"{value}\n")
    pair.pop(name, None)
    assert load({**pair, f"{name}_FILE": str(file)}) == load({**pair, name: value})


def test_no_field_name_collides_with_a_file_variable() -> None:
    names = {env_name(name) for name in Settings.model_fields}
    assert not names & {f"{name}_FILE" for name in names}


@pytest.mark.parametrize(("ending", "kept"), [("", ""), ("\n", ""), ("\r\n", ""), ("\n\n", "")])
def test_trailing_newlines_of_a_file_are_dropped(ending: str, kept: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(f"{TOKEN}{ending}".encode())
    settings = load({"BILLING_TAILER_API_TOKEN_FILE": str(file)})
    assert settings.api_token == SecretStr(TOKEN + kept)


def test_a_name_and_its_file_together_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    both = {"BILLING_TAILER_API_TOKEN": TOKEN, "BILLING_TAILER_API_TOKEN_FILE": str(file)}
    message = refusal(both)
    assert "BILLING_TAILER_API_TOKEN and BILLING_TAILER_API_TOKEN_FILE are both set: remove one" in message
    assert load({**both, "BILLING_TAILER_API_TOKEN": ""}).api_token == SecretStr(TOKEN), "empty is unset"


def test_a_file_that_is_missing_empty_or_no_file_is_refused(tmp_path: Path) -> None:
    empty, large, binary, bad = (tmp_path / name for name in ("empty", "large", "binary", "bad"))
    empty.write_text("\n")
    large.write_text("x" * (FILE_BYTES_MAX + 1))
    binary.write_bytes(b"0123456789abcdef\xff")
    bad.write_text("short")
    for path, problem in [
        (tmp_path / "missing", "cannot be read (No such file or directory)"),
        (tmp_path, "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
        (empty, "is empty"),
        (large, "longer than 65536 bytes"),
        (binary, "must be UTF-8"),
        (bad, "must be 16 to 1024"),
    ]:
        message = refusal({"BILLING_TAILER_API_TOKEN_FILE": str(path)})
        assert message.startswith("1 setting is wrong:\n  BILLING_TAILER_API_TOKEN_FILE = ")
        assert repr(str(path)) in message
        assert problem in message
    message = refusal({"BILLING_TAILER_HTTP_PORT_FILE": str(bad)})
    assert f"BILLING_TAILER_HTTP_PORT_FILE = {str(bad)!r}, holding 'short': must be a whole number" in message
    assert "BILLING_TAILER_HTTP_PORT_FILE = '': must be" in refusal({"BILLING_TAILER_HTTP_PORT_FILE": ""})


def test_a_secret_in_place_of_its_file_is_not_shown() -> None:
    message = refusal({"BILLING_TAILER_API_TOKEN_FILE": TOKEN, "BILLING_TAILER_DATABASE_URL_FILE": DSN})
    assert TOKEN not in message
    assert PASSWORD not in message
    assert message.count("must be the absolute path of a file") == 2


# --- where the database is ----------------------------------------------------------------------------------------


def test_without_any_dsn_the_embedded_postgres_is_used() -> None:
    settings = load({"PGUSER": "me", "PGPORT": "5432", "PGPASSWORD": PASSWORD, "PGHOST": ""})
    assert settings.database_url is None
    assert settings.uses_embedded_postgres
    assert effective(settings)["database_url"] == "(embedded Postgres)"


@pytest.mark.parametrize("name", ["PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE"])
def test_libpqs_own_variables_are_honoured(name: str) -> None:
    settings = load({name: "x"})
    assert settings.database_url == SecretStr("")
    assert not settings.uses_embedded_postgres
    assert effective(settings)["database_url"] == "(libpq's PG* variables)"


def test_a_dsn_goes_before_libpqs_variables() -> None:
    settings = load({"PGHOST": "elsewhere", **of(database_url=DSN)})
    assert settings.database_url == SecretStr(DSN)
    assert not settings.uses_embedded_postgres


def test_a_dsn_for_migrations_alone_does_not_start_an_embedded_postgres() -> None:
    settings = load(of(migrate_database_url=DSN))
    assert settings.database_url is None
    assert not settings.uses_embedded_postgres


# --- secrets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dsn", "masked"),
    [
        ("postgresql://u:hunter2@h:5432/d", "postgresql://u:***@h:5432/d"),
        ("postgres://u@h/d", "postgres://u@h/d"),
        ("postgresql://", "postgresql://"),
        ("postgresql:///d?host=/run/pg&password=hunter2", "postgresql:///d?host=/run/pg&password=***"),
        (
            "postgresql://u:hun:ter2#?@h1:1,[::1]:2/d?sslmode=require",
            "postgresql://u:***@h1:1,[::1]:2/d?sslmode=require",
        ),
        ("postgresql://h/d?p%61ssword=hunter2", "postgresql://h/d?***=***"),
        ("host=h dbname=d user=u@srv password=hunter2", "host=h dbname=d user=u@srv password=***"),
        (r"user = u password = 'hun\'ter2 x' host=h", "user=u password=*** host=h"),
        (r"password=hun\ ter2 dbname='a b'", "password=*** dbname='a b'"),
        ("host=h sslpassword=hunter2 options='-c x=hunter2'", "host=h ***=*** ***=***"),
    ],
)
def test_a_dsn_is_shown_without_its_password(dsn: str, masked: str) -> None:
    assert mask_dsn(dsn) == masked
    assert effective(load(of(database_url=dsn, migrate_database_url=dsn)))["migrate_database_url"] == masked


NOT_DSNS = [
    "billing-hunter2",
    "mysql://u:hunter2@h/d",
    "postgresql+psycopg://u:hunter2@h/d",
    "postgresql://u:p@hunter2@h/d",
    "postgresql://u:p/hunter2@h/d",
    "postgresql://u:12/hunter2@h/d",
    "postgresql://u:hunter2",
    "postgresql://h;password=hunter2/d",
    "postgresql://h/password=hunter2",
    "postgresql://h/d?hunter2",
    "postgresql://h/d?application_name=a;password=hunter2",
    "postgresql://h/d hunter2",
    "postgresql://u:@?sslmode=hunter2@h/d",
    "postgresql://u:@?hunter2=@h/d",
    "host=h;password=hunter2",
    "host=h,password=hunter2",
    "host=u:hunter2@h dbname=d",
    "dbname=postgresql://u:hunter2@h/d",
    "host='h password=hunter2",
    "host='h'password=hunter2",
    "password=my hunter2 host=h",
    "host=h hunter2",
    " \t",
]


@pytest.mark.parametrize("dsn", NOT_DSNS)
def test_what_is_no_dsn_is_refused_and_not_shown(dsn: str) -> None:
    message = refusal(of(database_url=dsn))
    assert "  BILLING_TAILER_DATABASE_URL = (secret, not shown): must be postgresql://" in message
    assert "hunter2" not in message


@given(
    user=st.sampled_from(["", "u", "u:", "u:x"]),
    before=st.text("ab:@/?#= ;,'\\%&", max_size=6),
    after=st.text("ab:@/?#= ;,'\\%&", max_size=6),
)
def test_a_password_never_shows_wherever_its_odd_characters_cut_it(user: str, before: str, after: str) -> None:
    """The secret part follows `user:` in a URL, or `password=` in pairs, with anything around it."""
    secret = "HUNTER"
    for dsn in (
        f"postgresql://{user}:{before}{secret}{after}@host:5432/db?sslmode=require",
        f"host=h password='{before.replace(chr(92), '').replace(chr(39), '')}{secret}' user=u",
        f"host=h password={before.replace(' ', '').replace(chr(92), '').replace(chr(39), '')}{secret} user=u",
    ):
        assert secret not in (mask_dsn(dsn) or "")


def test_secrets_are_never_shown() -> None:
    dsn = f"host=h dbname=d user=u password={PASSWORD}"
    settings = load(of(database_url=DSN, migrate_database_url=dsn, api_token=TOKEN))
    shown = effective(settings)
    assert shown["database_url"] == "postgresql://tailer:***@db.internal:5433/billing?sslmode=require"
    assert shown["migrate_database_url"] == "host=h dbname=d user=u password=***"
    assert shown["api_token"] == "***"
    for text in (repr(settings), str(settings), str(shown), str(settings.model_dump()), settings.model_dump_json()):
        assert PASSWORD not in text
        assert TOKEN not in text


@pytest.mark.parametrize(
    "environ",
    [
        of(database_url=DSN, api_token=TOKEN, http_port="x"),
        of(database_url=f"x{DSN}", migrate_database_url=f"mysql://{PASSWORD}", api_token=f"{TOKEN} {TOKEN}"),
        of(api_token=TOKEN[:15]),
        of(api_token=f"{TOKEN}\udce9", database_url=f"{DSN}\udce9"),
        of(data_dir=DSN, db_schema=f"host=h password={PASSWORD}", audit_globs=DSN, source_id=DSN, http_host=DSN),
        of(offset_reset=DSN, offset_reset_id="r1", log_level=DSN, llm_routes=DSN),
    ],
)
def test_no_error_shows_a_secret_not_even_its_traceback(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ)
    assert caught.value.__context__ is None
    for text in (str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))):
        assert PASSWORD not in text
        assert TOKEN[:15] not in text
        text.encode()


def test_direct_construction_does_not_show_its_input_either() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"api_token": "short-s3cret"})
    assert "short-s3cret" not in str(caught.value)


# --- offset resets ------------------------------------------------------------------------------------------------


@given(
    path=st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map("/".__add__),
    target=st.sampled_from(["beginning", "end"]) | st.integers(0, OFFSET_MAX),
)
def test_a_reset_survives_its_own_text(path: str, target: str | int) -> None:
    reset = OffsetReset.parse(f"{path}={target}")
    assert (reset.path, reset.target) == (path, target)
    assert OffsetReset.parse(str(reset)) == reset


@given(st.text(max_size=40) | st.text("/=0123456789beginnd-+._ ", max_size=20))
def test_a_reset_is_exact_or_refused(text: str) -> None:
    try:
        reset = OffsetReset.parse(text)
    except ValueError as error:
        assert "must" in str(error)  # noqa: PT017  # either outcome is fine, but not another exception
    else:
        assert reset.path.startswith("/")
        assert reset.target in {"beginning", "end"} or 0 <= int(reset.target) <= OFFSET_MAX
        path, target = text.rsplit("=", 1)
        assert reset.path == path
        assert str(reset.target) == (target.lstrip("0") or "0" if target.isdecimal() else target)


# --- for log and README -------------------------------------------------------------------------------------------


def test_effective_shows_every_field_once() -> None:
    shown = effective(load(of(offset_reset="/a=7", offset_reset_id="r1")))
    assert list(shown) == list(Settings.model_fields)
    assert shown["audit_globs"] == "/billing/audit*.jsonl*"
    assert shown["offset_reset"] == "/a=7"
    assert shown["data_dir"] == "(unset)"
    assert shown["http_port"] == "9108"


def test_describe_makes_a_table() -> None:
    rows = describe()
    assert [row.name for row in rows] == [env_name(name) for name in Settings.model_fields]
    for name, default, meaning in rows:
        assert meaning, name
        assert not set("|\n") & set(default + meaning), name
        for suffix, unit in [("_SECONDS", "second"), ("_BYTES_MAX", "byte"), ("_LINES_MAX", "line")]:
            assert not name.endswith(suffix) or unit in meaning, name
    assert {row.name: row.default for row in rows}["BILLING_TAILER_API_TOKEN"] == ""


def test_nobody_else_reads_our_variables() -> None:
    """Others may look up PATH, HOME or XDG_STATE_HOME, and may name our variables in hints."""
    package = Path(__file__).parent.parent / "billing_tailer"
    lines = [(path.name, line) for path in package.rglob("*.py") for line in path.read_text("utf-8").splitlines()]
    assert lines
    assert not [line for line in lines if re.search(r"(environ|getenv)\W.*BILLING_TAILER_", line[1])]


def test_a_start_with_a_typo_shows_the_message_alone(tmp_path: Path) -> None:
    program = """
import sys
from billing_tailer import errors, settings
try:
    settings.load()
except errors.ConfigError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parent.parent), "BILLING_TAILER_HTTP_PROT": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "did you mean BILLING_TAILER_HTTP_PORT?" in done.stdout
    assert done.stderr == ""
