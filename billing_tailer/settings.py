"""The only room that reads the environment: `load()` turns `BILLING_TAILER_*` into one frozen `Settings`.

Invariant MISCONFIGURATION_IS_A_HARD_ERROR: an unknown name, a value out of range, a missing or empty file behind a
`_FILE` variable, a reset without its id: one ConfigError (exit 2) lists them all, each with name, value and remedy
(tests/test_settings.py::test_a_bad_value_names_variable_value_and_remedy, ::test_every_problem_is_reported_at_once,
::test_a_typo_is_refused_with_the_closest_name).

Secrets never leave here in clear text, in no message and no log: values of secret variables and of unknown names are
not shown, and of a DSN only what is known to be harmless (test_settings.py::test_secrets_are_never_shown).

How values are read:

- `NAME_FILE` may replace any `NAME`: the absolute path of a file that holds the value (UTF-8, trailing newlines are
  dropped). Giving both is an error.
- Empty means unset where nothing is the default (docker compose passes empty strings); elsewhere empty is an error.
- Lists are separated by commas or newlines.
- `BILLING_TAILER_TEST_*` belongs to the tests and is ignored, and so are the service links that Kubernetes sets for a
  Service called `billing-tailer`.
- Without DATABASE_URL, one of PGHOST, PGHOSTADDR, PGSERVICE, PGDATABASE means: libpq's own `PG*` variables say where
  the database is, and `database_url` is "". The other `PG*` (PGUSER, PGPORT, ...) do not say that there is a database.
"""

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from billing_tailer.errors import ConfigError

PREFIX = "BILLING_TAILER_"
TEST_PREFIX = "BILLING_TAILER_TEST_"
LIBPQ_NAMES = ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE")

HEADER_LIMITS = (
    "calls are charged by the header x-litellm-response-cost: streams, cache hits, failures and answers without a cost "
    "in it are not charged and become overdue, what failed attempts and second requests under one call id cost is not "
    "seen, tokens are not known, nothing is corrected later, and LiteLLM's callbacks and spend logs are not used"
)
"""What COST_SOURCE=header gets wrong, for whoever asks for it."""
OFFSET_MAX = 2**63 - 1  # Postgres bigint
FILE_BYTES_MAX = 65536  # a value behind a _FILE variable
SHOWN_CHARACTERS_MAX = 120

LLM_ROUTES = (
    "chat/completions",
    "completions",
    "embeddings",
    "messages",
    "responses",
    "images/*",
    "audio/*",
    "rerank",
)


_RESET_NAMES: dict[str, Literal["beginning", "end"]] = {"beginning": "beginning", "end": "end"}


@dataclass(frozen=True, slots=True)
class OffsetReset:
    """A rewind or skip asked for by the operator: `<path>=beginning|end|<byte>`."""

    path: str
    target: Literal["beginning", "end"] | int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Split at the last `=`, since a path may contain one. ValueError says what is wrong."""
        path, equals, target = text.rpartition("=")
        if not equals or not path.startswith("/"):
            raise ValueError("must be <absolute path>=beginning, =end or =<byte>, e.g. /billing/audit.jsonl=0")
        if named := _RESET_NAMES.get(target):
            return cls(path, named)
        if not re.fullmatch(r"[0-9]{1,19}", target) or int(target) > OFFSET_MAX:
            raise ValueError(f"must end in =beginning, =end or a byte offset from 0 to {OFFSET_MAX}, not ={target}")
        return cls(path, int(target))

    def __str__(self) -> str:
        return f"{self.path}={self.target}"


# --- secrets: what may be shown -----------------------------------------------------------------------------------

# What may be shown of a DSN. Everything else in it is masked: new libpq keywords must not leak by default.
_DSN_SHOWN = frozenset(
    {
        "application_name",
        "connect_timeout",
        "dbname",
        "host",
        "hostaddr",
        "port",
        "service",
        "sslmode",
        "target_session_attrs",
        "user",
    }
)
_DSN_HOST = r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s:,;=@/?#\[\]]*)(?::[0-9]{1,5})?"
_DSN_URL = re.compile(
    rf"""(?P<scheme>postgres(?:ql)?)://
    (?:(?P<user>[^\s:;=@/?\#]*)(?P<password>:[^\s@/]*)?@)?
    (?P<hosts>{_DSN_HOST}(?:,{_DSN_HOST})*)
    (?:/(?P<dbname>[^\s@/?\#=]*))?
    (?:\?(?P<query>[^\s@?\#]*))?""",
    re.VERBOSE,
)
_DSN_PAIR = re.compile(r"\s*(?P<key>[A-Za-z_]+)\s*=\s*(?P<value>'(?:[^'\\]|\\.)*'|(?!')(?:[^\s\\]|\\.)*)(?=\s|$)\s*")
_PASSWORD_LIKE = re.compile(r"(?<=://)\S*@|(?<=password=)\S+|(?<=pwd=)\S+", re.IGNORECASE)


def mask_dsn(dsn: str) -> str | None:
    """The DSN with everything but host, port, user, database and the like masked; None if it is not one.

    Stricter than libpq where a password could pass for something else (an unescaped `@` or `/` in it): such a DSN is
    no DSN, so that half a password is never shown as a host name.
    """
    if match := _DSN_URL.fullmatch(dsn):
        user = "" if match["user"] is None else f"{match['user']}{':***' if match['password'] else ''}@"
        dbname = "" if match["dbname"] is None else f"/{match['dbname']}"
        base = f"{match['scheme']}://{user}{match['hosts']}{dbname}"
        if match["query"] is None:
            return base
        query = _masked_pairs([tuple(pair.split("=", 1)) for pair in match["query"].split("&")])
        return None if query is None else f"{base}?{'&'.join(query)}"
    pairs: list[tuple[str, ...]] = []
    end = 0
    while end < len(dsn):
        match = _DSN_PAIR.match(dsn, end)
        if match is None:
            return None
        pairs.append((match["key"], match["value"]))
        end = match.end()
    shown = _masked_pairs(pairs)
    return " ".join(shown) if shown else None


def _masked_pairs(pairs: list[tuple[str, ...]]) -> list[str] | None:
    """DSN parameters as they may be shown; None where one looks like several (`host=a;password=b`) or has no value."""
    shown: list[str] = []
    for key, *rest in pairs:
        if not rest:
            return None
        if key in _DSN_SHOWN and re.search(r"[=;]|://|:[^@]*@", rest[0]):
            return None
        shown.append(f"{key}={rest[0]}" if key in _DSN_SHOWN else f"{'password' if key == 'password' else '***'}=***")
    return shown


def _quoted(value: str) -> str:
    """A value for a message: escaped, so that it stays on its line, and bounded."""
    if len(value) > SHOWN_CHARACTERS_MAX:
        return f"{value[:SHOWN_CHARACTERS_MAX]!r}... ({len(value)} characters)"
    return repr(value)


def _shown(value: str) -> str:
    """A value that is no secret, for a message; passwords that strayed into it are masked."""
    return _quoted(_PASSWORD_LIKE.sub("***", value))


# --- values: text in, typed value or ValueError with the remedy out -----------------------------------------------


def _items(value: object) -> object:
    """Split a list at commas and newlines; drop blanks and repetitions, keep the order."""
    if not isinstance(value, str):
        return value
    items = tuple(dict.fromkeys(item.strip() for item in re.split(r"[,\n]", value) if item.strip()))
    if not items:
        raise ValueError("must name at least one; separate several with commas or newlines")
    return items


def _audit_globs(globs: tuple[str, ...]) -> tuple[str, ...]:
    for glob in globs:
        if not glob.startswith("/"):
            raise ValueError(f"must be absolute paths, but {_shown(glob)} is not: write it from / on (commas separate)")
        if glob.endswith("/"):
            raise ValueError(f"must match files, but {_shown(glob)} ends in /: add a pattern such as audit*.jsonl*")
        if "**" in glob:
            raise ValueError(f"must not search whole trees, but {_shown(glob)} has **: name each level, e.g. /*/")
    return globs


def _llm_routes(routes: tuple[str, ...]) -> tuple[str, ...]:
    for route in routes:
        if route.startswith(("/", "v1/")) or not re.fullmatch(r"[A-Za-z0-9._~:*-]+(/[A-Za-z0-9._~:*-]+)*", route):
            raise ValueError(
                f"must be routes without /v1/, leading / and query, but {_shown(route)} is not one: "
                "write e.g. chat/completions or images/*"
            )
    return routes


def _source_id(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value):
        raise ValueError("must be 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    return value


def _db_schema(value: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", value) or value.startswith("pg_") or value == "information_schema":
        raise ValueError("must be a plain lower-case SQL name (a-z 0-9 _, at most 63, not Postgres's own pg_...)")
    return value


def _absolute_path(value: object) -> object:
    if isinstance(value, str) and not value.startswith("/"):
        raise ValueError("must be an absolute path: write it from / on (~ and variables are not expanded)")
    return value


def _dsn(value: SecretStr) -> SecretStr:
    dsn = value.get_secret_value()
    if dsn and mask_dsn(dsn) is None:  # "" is libpq's own PG* variables; from the environment it cannot come
        raise ValueError(
            "must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE or libpq's 'host=... dbname=... user=...' "
            "(in a URL write @ : / ? # % of a password as %40 %3A %2F %3F %23 %25; no driver name as in postgresql+x://)"
        )
    return value


def _api_token(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]{16,1024}", value.get_secret_value()):
        raise ValueError(
            "must be 16 to 1024 printable ASCII characters without spaces: make one with `openssl rand -hex 32`"
        )
    return value


def _http_host(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        if not re.fullmatch(r"(?=.*[A-Za-z])[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", value):
            raise ValueError(
                "must be an IP address without brackets and port, or a host name, e.g. 127.0.0.1, 0.0.0.0, ::1"
            ) from None
    return value


def _http_url(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", value):
        raise ValueError("must be http://HOST:PORT or https://HOST, without user, query and fragment")
    return value.rstrip("/")


def _decimal(value: object) -> object:
    """A plain decimal: a float would bring its noise into money."""
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,12})?", value):
        raise ValueError("must be a plain decimal such as 1.2, with at most 12 decimals")
    return Decimal(value)


def _markup(value: Decimal) -> Decimal:
    if value > 1000:
        raise ValueError("must be from 0 to 1000; 1 charges what the provider costs")
    return value


def _cost_max(value: Decimal) -> Decimal:
    if value <= 0:
        raise ValueError("must be above 0")
    return value


def _offset_reset(value: object) -> object:
    return OffsetReset.parse(value) if isinstance(value, str) else value


def _offset_reset_id(value: str) -> str:
    if not re.fullmatch(r"[!-~]{1,128}", value):
        raise ValueError("must be 1 to 128 printable ASCII characters without spaces, e.g. a date or a ticket number")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Dsn = Annotated[SecretStr, AfterValidator(_dsn)]
DirectoryPath = Annotated[Path, BeforeValidator(_absolute_path)]
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """Everything the daemon can be told. Made by `load()`; `Settings(...)` itself never looks at the environment.

    `description` is the meaning column of README's environment table, so it is one line, with the unit.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    # --- what to read
    audit_globs: Annotated[tuple[str, ...], BeforeValidator(_items), AfterValidator(_audit_globs)] = Field(
        default=("/billing/audit*.jsonl*",),
        description="audit logs to follow: absolute globs, separated by commas; rotated names must match too",
    )
    source_id: Annotated[str, AfterValidator(_source_id)] = Field(
        default="default", description="which proxy's log volume this is; one tailer writes per id"
    )
    llm_routes: Annotated[tuple[str, ...], BeforeValidator(_items), AfterValidator(_llm_routes)] = Field(
        default=LLM_ROUTES,
        description="routes whose POSTs are billable calls: globs, separated by commas, without the optional /v1/",
    )
    start_at: Literal["beginning", "end"] = Field(
        default="beginning",
        description="where to begin while the source id has no files yet: beginning or end",
    )
    offset_reset: Annotated[OffsetReset | None, BeforeValidator(_offset_reset)] = Field(
        default=None,
        description="move one file's offset: PATH=beginning, PATH=end or PATH=BYTE; applied once per OFFSET_RESET_ID",
    )
    offset_reset_id: Annotated[str, AfterValidator(_offset_reset_id)] | None = Field(
        default=None, description="name of the reset, new for each one; required with OFFSET_RESET"
    )

    # --- where to write
    database_url: Dsn | None = Field(
        default=None,
        description="Postgres DSN of the daemon's role; unset: libpq's PG* variables, else the embedded Postgres",
    )
    migrate_database_url: Dsn | None = Field(
        default=None, description="Postgres DSN of the owner of the schema, to apply migrations"
    )
    db_schema: Annotated[str, AfterValidator(_db_schema)] = Field(
        default="billing", description="schema that holds the tables: a plain lower-case name"
    )
    data_dir: DirectoryPath | None = Field(
        default=None,
        description="directory of the embedded Postgres; unset: /var/lib/billing-tailer as root, else the state home",
    )
    postgres_bin: DirectoryPath | None = Field(
        default=None,
        description="directory with initdb and postgres for the embedded Postgres; unset: searched for",
    )

    # --- LiteLLM and money
    cost_source: Literal["litellm", "header"] = Field(
        default="litellm",
        description="who says what a call costs: litellm, by callbacks and spend logs, or, where there are neither, "
        "header: the line's cost header, which knows neither streams nor cache hits nor failures",
    )
    spool_dir: DirectoryPath | None = Field(
        default=None,
        description="where callbacks wait for Postgres, on a disk that persists; unset: spool/ in the data directory",
    )
    spool_bytes_max: int = Field(
        default=1_073_741_824,
        ge=1_048_576,
        le=1_099_511_627_776,
        description="most bytes of spool files; beyond it callbacks are answered 503",
    )
    callback_token: Annotated[SecretStr, AfterValidator(_api_token)] | None = Field(
        default=None,
        description="bearer token of LiteLLM's callbacks; unset: none are taken, or with SPOOL_DIR from loopback only",
    )
    callback_bytes_max: int = Field(
        default=536_870_912,
        ge=65_536,
        le=17_179_869_184,
        description="longest callback body in bytes; it is read as a stream",
    )
    litellm_url: Annotated[str, AfterValidator(_http_url)] | None = Field(
        default=None, description="LiteLLM's base URL, to ask its spend logs; unset: callbacks alone settle calls"
    )
    litellm_api_key: SecretStr | None = Field(
        default=None, description="LiteLLM's admin key; required with LITELLM_URL"
    )
    markup_factor: Annotated[Decimal, BeforeValidator(_decimal), AfterValidator(_markup)] = Field(
        default=Decimal(1), description="what users pay per provider dollar, a decimal from 0 to 1000"
    )
    free_models: Annotated[tuple[str, ...], BeforeValidator(_items)] = Field(
        default=(),
        description="models that may cost 0 (globs on model group or model, separated by commas); others are held",
    )
    settle_deadline_seconds: int = Field(
        default=900,
        ge=1,
        le=604_800,
        description="seconds that a call may wait for its spend record before it is overdue",
    )
    failure_quiet_seconds: int = Field(
        default=10,
        ge=0,
        le=3600,
        description="seconds of silence after which a call with failed attempts only is decided",
    )
    corrections: Literal["apply", "report"] = Field(
        default="apply", description="later differences: apply as adjustments, or only report as exceptions"
    )
    trust_litellm_end_user: bool = Field(
        default=False,
        description="whether LiteLLM's end user is the account where the line has none (a client can set it)",
    )
    cost_max_usd: Annotated[Decimal, BeforeValidator(_decimal), AfterValidator(_cost_max)] = Field(
        default=Decimal(1000), description="a single record above this many dollars is held"
    )

    # --- how much at once
    poll_interval_seconds: float = Field(
        default=0.25,
        ge=0.01,
        le=60,
        description="longest wait between two looks at the files, in seconds; file events wake it earlier",
    )
    batch_lines_max: int = Field(
        default=10_000, ge=1, le=1_000_000, description="most lines in one transaction; whichever limit comes first"
    )
    batch_bytes_max: int = Field(
        default=4_194_304,
        ge=65_536,
        le=67_108_864,
        description="most bytes of log in one transaction; in memory, what comes of two of them takes no more",
    )
    line_bytes_max: int = Field(
        default=1_048_576,
        ge=1024,
        le=67_108_864,
        description="longest line in bytes; a longer one becomes a dead letter",
    )
    open_files_max: int = Field(default=256, ge=1, le=65_536, description="most log files held open at once")

    # --- what it shows
    http_host: Annotated[str, AfterValidator(_http_host)] = Field(
        default="127.0.0.1", description="address to serve health, metrics and pages on"
    )
    http_port: int = Field(default=9108, ge=0, le=65_535, description="port to serve on; 0: the system chooses one")
    api_token: Annotated[SecretStr, AfterValidator(_api_token)] | None = Field(
        default=None,
        description="bearer token for all but health and metrics, at least 16 characters; unset: loopback only",
    )
    log_level: Annotated[LogLevel, BeforeValidator(_lower)] = Field(
        default="info", description="least severe log lines to write: debug, info, warning or error"
    )
    log_format: Annotated[Literal["json", "console"], BeforeValidator(_lower)] = Field(
        default="json", description="form of log lines: json, one object each, or console, for people"
    )

    @property
    def uses_embedded_postgres(self) -> bool:
        """No DSN of any kind is given. Compare DSNs with None: "" is one too (libpq's `PG*` variables), but falsy.

        With MIGRATE_DATABASE_URL alone (a job that only migrates) this is False and `database_url` is None: a daemon
        must refuse that, since an embedded database beside a configured one would be a quiet mistake.
        """
        return self.database_url is None and self.migrate_database_url is None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """`EnvironSource` by way of `load()` is the only road: the usual sources know no `_FILE` and no typos."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


# --- from the environment -----------------------------------------------------------------------------------------


def env_name(field_name: str) -> str:
    """The variable of a field of Settings."""
    return PREFIX + field_name.upper()


def _is_secret(field: FieldInfo) -> bool:
    return "SecretStr" in str(field.annotation)  # as text, since it sits inside a union with None


def _is_dsn(field_name: str) -> bool:
    return field_name.endswith("database_url")


@dataclass(frozen=True, slots=True)
class _Given:
    """A value and the variable it came from; `path` is the file behind a `_FILE` variable."""

    name: str
    text: str
    path: str | None = None

    def label(self, field_name: str) -> str:
        """`NAME = value`, as far as the value may be shown."""
        if _is_dsn(field_name) and (masked := mask_dsn(self.text)):
            value = _quoted(masked)
        elif _is_secret(Settings.model_fields[field_name]):
            value = "(secret, not shown)"
        else:
            value = _shown(self.text)
        return f"{self.name} = {value}" if self.path is None else f"{self.name} = {_shown(self.path)}, holding {value}"


_SERVICE_LINK = re.compile(
    r"""(?P<service>\w+?)_(?:
    SERVICE_HOST | SERVICE_PORT(?:_\w+)?
    | (?P<url>PORT(?:_[0-9]+_(?:TCP|UDP|SCTP))?) | PORT_[0-9]+_(?:TCP|UDP|SCTP)_(?:PROTO|PORT|ADDR)
    )""",
    re.VERBOSE,
)


class EnvironSource(PydanticBaseSettingsSource):
    """Reads NAME or NAME_FILE of each field from a mapping, and collects what is wrong with names and files."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(Settings)
        self.environ = environ
        self.given: dict[str, _Given] = {}
        self.problems: dict[str, str] = {}  # field name or variable -> message

    def __call__(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for field_name, field in Settings.model_fields.items():
            try:
                value, _, _ = self.get_field_value(field, field_name)
            except ValueError as error:
                self.problems[field_name] = str(error)
            else:
                if value is not None:
                    values[field_name] = value
        if "database_url" not in {*values, *self.problems} and any(self.environ.get(name) for name in LIBPQ_NAMES):
            values["database_url"] = ""
        self._check_pairs({*values, *self.problems})
        self._check_names()
        return values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The text of one field, None if unset. ValueError: the message for the operator."""
        name = env_name(field_name)
        file_name = f"{name}_FILE"
        text, path = self.environ.get(name), self.environ.get(file_name)
        if field.default is None:  # docker compose passes empty strings for what is not set
            text, path = text or None, path or None
        if text is not None and path is not None:
            raise ValueError(f"{name} and {file_name} are both set: remove one of them")
        if text is None and path is None:
            return None, name, False
        given = _Given(name, text) if text is not None else _Given(file_name, _read(file_name, path or "", field), path)
        if not given.text:
            raise ValueError(f"{name} = '': must not be empty: remove the variable to get the default")
        if not _is_text(given.text):
            raise ValueError(f"{given.label(field_name)}: must be UTF-8 text without NUL: write it again in UTF-8")
        self.given[field_name] = given
        return given.text, given.name, False

    def _check_pairs(self, present: set[str]) -> None:
        reset, reset_id = env_name("offset_reset"), env_name("offset_reset_id")
        if "offset_reset" in present and "offset_reset_id" not in present:
            self.problems["offset_reset_id"] = (
                f"{reset_id} is not set, but {reset} is: give the reset a new id, under which it is applied once"
            )
        url, key = env_name("litellm_url"), env_name("litellm_api_key")
        if "litellm_url" in present and "litellm_api_key" not in present:
            self.problems["litellm_api_key"] = f"{key} is not set, but {url} is: set LiteLLM's admin key"
        if "litellm_api_key" in present and "litellm_url" not in present:
            self.problems["litellm_url"] = f"{url} is not set, but {key} is: set LiteLLM's base URL"
        if "offset_reset_id" in present and "offset_reset" not in present:
            self.problems["offset_reset"] = f"{reset} is not set, but {reset_id} is: set the reset, or remove its id"

    def _check_names(self) -> None:
        """Refuse names nobody reads: a typo must not turn into a default."""
        fields = {env_name(field_name) for field_name in Settings.model_fields}
        known = fields | {f"{name}_FILE" for name in fields}
        for name in sorted(self.environ):
            if not name.upper().startswith(PREFIX) or name in known or name.upper().startswith(TEST_PREFIX):
                continue
            if self._is_service_link(name):
                continue
            # Without the prefix, which all have in common and which would make everything look alike.
            suffixes = sorted(candidate.removeprefix(PREFIX) for candidate in known)
            closest = difflib.get_close_matches(name.upper()[len(PREFIX) :], suffixes, n=1)
            remedy = f"did you mean {PREFIX}{closest[0]}?" if closest else "remove it"
            shown = name if name.isprintable() else ascii(name)
            self.problems[name] = f"{shown} is not a variable of this program (value not shown): {remedy}"

    def _is_service_link(self, name: str) -> bool:
        """Kubernetes puts these into every container of a namespace that has a Service called billing-tailer[-...].

        They count as such only beside their own SERVICE_HOST, so that a hand-written BILLING_TAILER_PORT=9108 is
        refused and not ignored.
        """
        match = _SERVICE_LINK.fullmatch(name)
        if match is None or f"{match['service']}_SERVICE_HOST" not in self.environ:
            return False
        return match["url"] is None or "://" in self.environ[name]


def _is_text(value: str) -> bool:
    """Bytes of the environment that are no UTF-8 arrive as lone surrogates."""
    return not re.search("[\ud800-\udfff\0]", value)


def _read(name: str, path: str, field: FieldInfo) -> str:
    """The value behind a `_FILE` variable. ValueError names the variable, the path and what to do."""
    if not path.startswith("/"):
        # Someone may have put the secret itself here.
        value = "(not shown: it may be the secret itself)" if _is_secret(field) else _shown(path)
        raise ValueError(f"{name} = {value}: must be the absolute path of a file that holds the value")
    label = f"{name} = {_shown(path)}"
    file = Path(path)
    try:
        if file.exists() and not file.is_file():  # a FIFO would block, a device never end
            raise ValueError(f"{label}: is not a regular file: name the file that holds the value")
        with file.open("rb") as stream:
            content = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ValueError(f"{label}: cannot be read ({error.strerror}): mount the file or correct the path") from None
    if len(content) > FILE_BYTES_MAX:
        raise ValueError(f"{label}: is longer than {FILE_BYTES_MAX} bytes: is it the right file?")
    text = content.decode(errors="surrogateescape").rstrip("\r\n")
    if not text:
        raise ValueError(f"{label}: is empty: write the value into the file, or remove the variable")
    return text


def _wanted(field: FieldInfo) -> str:
    """What a number or a choice must be, from the field's own limits."""
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    if choices:
        return f"must be {' or '.join(choices)}"
    if field.annotation is bool:
        return "must be true or false"
    if field.annotation in {int, float}:
        low = next(limit.ge for limit in field.metadata if hasattr(limit, "ge"))
        high = next(limit.le for limit in field.metadata if hasattr(limit, "le"))
        return f"must be a {'whole ' if field.annotation is int else ''}number from {low} to {high}"
    return "cannot be understood"


def _explain(error: ValidationError, given: Mapping[str, _Given]) -> dict[str, str]:
    """One message per bad field, in our words."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_input=False):
        field_name = str(detail["loc"][0])
        field = Settings.model_fields[field_name]
        cause = detail.get("ctx", {}).get("error")
        wanted = f"{_wanted(field)}; the default is {_text(field.default)}" if cause is None else str(cause)
        problems.setdefault(field_name, f"{given[field_name].label(field_name)}: {wanted}")
    return problems


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read `environ` (default: the process's environment). All problems together are one ConfigError."""
    source = EnvironSource(os.environ if environ is None else environ)
    values = source()
    problems = dict(source.problems)
    settings = None
    try:
        settings = Settings(**values)
    except ValidationError as error:
        problems |= _explain(error, source.given)
    # Raised out here and not in the except block: the exception must not carry pydantic's along, in which values are.
    if settings is None or problems:
        order = [*Settings.model_fields, *source.problems]
        lines = [problems[key] for key in sorted(problems, key=order.index)]
        count = "1 setting is" if len(lines) == 1 else f"{len(lines)} settings are"
        raise ConfigError(
            "\n".join([f"{count} wrong:", *(f"  {line}" for line in lines)]),
            hint="correct the environment and start again; README.md lists every variable with default and meaning",
        )
    return settings


# --- to the log and the README ------------------------------------------------------------------------------------


class Variable(NamedTuple):
    """A row of README's environment table; `default` is "" where there is none."""

    name: str
    default: str
    meaning: str


def _text(value: object) -> str:
    if value is None:
        return ""
    return ",".join(str(item) for item in value) if isinstance(value, tuple) else str(value)


def describe() -> list[Variable]:
    """Every variable with default and meaning, in the order of the fields. Each also exists as `<name>_FILE`."""
    return [
        Variable(env_name(field_name), _text(field.default), field.description or "")
        for field_name, field in Settings.model_fields.items()
    ]


def effective(settings: Settings) -> dict[str, str]:
    """Field name -> value as text, for the log: secrets masked, of a DSN host, user and database shown."""
    shown: dict[str, str] = {}
    for field_name in Settings.model_fields:
        value = getattr(settings, field_name)
        if isinstance(value, SecretStr):
            shown[field_name] = (_is_dsn(field_name) and mask_dsn(value.get_secret_value())) or "***"
        else:
            shown[field_name] = "(unset)" if value is None else _text(value)
    if settings.uses_embedded_postgres:
        shown["database_url"] = "(embedded Postgres)"
    elif settings.database_url == SecretStr(""):
        shown["database_url"] = "(libpq's PG* variables)"
    return shown
