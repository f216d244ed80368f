"""Stands in for Prisma's query engine, whose binaries only Prisma's own server hands out: `query_engine.py -p PORT`.

LiteLLM's database client talks to a process beside it over HTTP, GraphQL in, JSON out. This one answers the part of
that protocol that LiteLLM uses while it serves calls, as SQL on a real Postgres; what it cannot, it refuses and writes
down in ENGINE_LOG. Relations come back empty. It runs in LiteLLM's venv. A few UndefinedTable lines in the log are
LiteLLM looking for views before it makes them.

Environment: ENGINE_DSN, ENGINE_SCHEMA (the schema.prisma that the client was generated from), ENGINE_LOG.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

Row = dict[str, Any]
Db = psycopg.Connection[Row]

SCALARS = {"String", "Int", "Float", "Boolean", "DateTime", "Json", "BigInt", "Decimal", "Bytes"}
NOW = "(now() at time zone 'UTC')"  # LiteLLM's columns are timestamps without a zone, in UTC
COMPARE = {"gte": ">=", "lte": "<=", "gt": ">", "lt": "<"}
ARITHMETIC = {"increment": "+", "decrement": "-", "multiply": "*"}


# --- the schema ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a model; `kind` is Prisma's type, or the model that a relation leads to."""

    kind: str
    is_list: bool
    column: str
    updated_at: bool

    @property
    def scalar(self) -> bool:
        """False for a relation."""
        return self.kind in SCALARS

    @property
    def name(self) -> str:
        """The column, quoted."""
        return f'"{self.column}"'

    @property
    def slot(self) -> str:
        """The place of a value in a statement."""
        casts = {"Json": "%s::jsonb", "DateTime": "(%s::timestamptz at time zone 'UTC')"}
        return casts.get(self.kind, "%s")

    def adapted(self, value: Any) -> Any:
        """A value as the statement takes it."""
        return json.dumps(value) if self.kind == "Json" and value is not None and not isinstance(value, str) else value


@dataclass(slots=True)
class Model:
    """A table; `uuids` are the fields that get a random id."""

    table: str
    fields: dict[str, Field] = field(default_factory=dict)
    uuids: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The table, quoted."""
        return f'"{self.table}"'

    def scalar(self, name: str) -> Field | None:
        """The field of that name, if it is a column."""
        found = self.fields.get(name)
        return found if found is not None and found.scalar else None


def models_of(schema: str) -> dict[str, Model]:
    """The models of a schema.prisma."""
    models: dict[str, Model] = {}
    model: Model | None = None
    for line in map(str.strip, schema.splitlines()):
        if begin := re.match(r"model (\w+) \{", line):
            model = models[begin[1]] = Model(begin[1])
        elif line == "}":
            model = None
        elif model is None or not line or line.startswith("//"):
            continue
        elif mapped := re.match(r'@@map\("([^"]+)"\)', line):
            model.table = mapped[1]
        elif declared := re.match(r"(\w+)\s+(\w+)(\[\])?\??(.*)", line):
            name, kind, is_list, rest = declared.groups()
            column = re.search(r'@map\("([^"]+)"\)', rest)
            model.fields[name] = Field(kind, bool(is_list), column[1] if column else name, "@updatedAt" in rest)
            if "uuid()" in rest:
                model.uuids.append(name)
    return models


# --- GraphQL ------------------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"[\s,]*(?:(?P<mark>[{}()\[\]:])|(?P<text>\"(?:\\.|[^\"\\])*\")|(?P<word>[A-Za-z_]\w*)"
    r"|(?P<number>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?))",
    re.DOTALL,
)
WORDS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class Selected:
    """A field asked for, with its arguments and what is asked for below it."""

    name: str
    arguments: dict[str, Any]
    below: dict[str, "Selected"]


class Parser:
    """Reads `query { result: findManyX(where: {...}) { id name } }`."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while text[at:].strip(" \t\r\n,"):
            match = TOKEN.match(text, at)
            if match is None or match.lastgroup is None:
                raise ValueError(f"cannot read the query at {text[at : at + 80]!r}")
            self._tokens.append((match.lastgroup, match[match.lastgroup]))
            at = match.end()
        self._at = 0

    def parse(self) -> dict[str, Selected]:
        """The whole query."""
        kind = self._next()[1]
        if kind not in ("query", "mutation"):
            raise ValueError(f"{kind!r} is neither query nor mutation")
        return self._selection()

    def _next(self) -> tuple[str, str]:
        self._at += 1
        return self._tokens[self._at - 1]

    def _skip(self, mark: str) -> bool:
        found = self._tokens[self._at : self._at + 1] == [("mark", mark)]
        self._at += found
        return found

    def _selection(self) -> dict[str, Selected]:
        selection: dict[str, Selected] = {}
        if not self._skip("{"):
            return selection
        while not self._skip("}"):
            alias = name = self._next()[1]
            if self._skip(":"):
                name = self._next()[1]
            arguments = self._pairs(")") if self._skip("(") else {}
            selection[alias] = Selected(name, arguments, self._selection())
        return selection

    def _pairs(self, end: str) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while not self._skip(end):
            name = self._next()[1]
            if not self._skip(":"):
                raise ValueError(f"no value for {name}")
            pairs[name] = self._value()
        return pairs

    def _value(self) -> Any:
        if self._skip("{"):
            return self._pairs("}")
        if self._skip("["):
            values = []
            while not self._skip("]"):
                values.append(self._value())
            return values
        kind, text = self._next()
        if kind == "text":
            return json.loads(text, strict=False)
        if kind == "number":
            return json.loads(text)
        return WORDS.get(text, text)


# --- conditions and values ----------------------------------------------------------------------------------------


def condition(column: Field, value: Any, params: list[Any]) -> str:
    """What a `where` says of one column."""
    terms = []
    for op, wanted in (value if isinstance(value, dict) else {"equals": value}).items():
        if op in ("equals", "not") and wanted is None:
            terms.append(f"{column.name} is {'not ' if op == 'not' else ''}null")
        elif op == "not":
            terms.append(f"not ({condition(column, wanted, params)})")
        elif op == "equals" or op in COMPARE:
            params.append(column.adapted(wanted))
            terms.append(f"{column.name} {COMPARE.get(op, '=')} {column.slot}")
        elif op in ("in", "notIn", "not_in"):
            params.append(list(wanted))
            terms.append(f"{'' if op == 'in' else 'not '}{column.name} = any(%s)")
        elif op == "contains":
            params.append(f"%{wanted}%")
            terms.append(f"{column.name} like %s")
        elif op == "has":
            params.append(wanted)
            terms.append(f"%s = any({column.name})")
        elif op == "isEmpty":
            terms.append(f"{'' if wanted else 'not '}cardinality({column.name}) = 0")
        else:
            raise ValueError(f"condition not supported: {op}")
    return " and ".join(terms) or "true"


def where(model: Model, clause: Any, params: list[Any]) -> str:
    """A condition for a `where`."""
    if isinstance(clause, list):
        return " and ".join(f"({where(model, part, params)})" for part in clause) or "true"
    terms = []
    for key, value in (clause or {}).items():
        column = model.scalar(key)
        if column is not None:
            terms.append(condition(column, value, params))
        elif key == "OR":
            terms.append("(" + (" or ".join(f"({where(model, part, params)})" for part in value) or "false") + ")")
        elif key == "NOT":
            terms.append(f"not ({where(model, value, params)})")
        elif isinstance(value, dict | list):  # AND, and the name of a compound key
            terms.append(where(model, value, params))
        else:
            raise ValueError(f"condition not supported: {key}")
    return " and ".join(terms) or "true"


def assignments(model: Model, data: Mapping[str, Any], params: list[Any]) -> str:
    """The `set` list of an update."""
    terms = []
    for key, value in data.items():
        column = model.scalar(key)
        if column is None:
            continue
        op = next(iter(value), "") if isinstance(value, dict) and column.kind != "Json" else ""
        if op in ARITHMETIC:
            params.append(value[op])
            terms.append(f"{column.name} = {model.name}.{column.name} {ARITHMETIC[op]} %s")
        else:
            params.append(column.adapted(value[op] if op == "set" else value))
            terms.append(f"{column.name} = {column.slot}")
    terms += [f"{column.name} = {NOW}" for key, column in model.fields.items() if column.updated_at and key not in data]
    return ", ".join(terms)


def insertion(model: Model, data: Mapping[str, Any], params: list[Any]) -> str:
    """An insert statement."""
    columns, values = [], []
    for key, value in {**{name: str(uuid.uuid4()) for name in model.uuids}, **data}.items():
        column = model.scalar(key)
        if column is None:
            continue
        given = value["set"] if isinstance(value, dict) and column.kind != "Json" and "set" in value else value
        columns.append(column.name)
        params.append(column.adapted(given))
        values.append(column.slot)
    for key, column in model.fields.items():
        if column.updated_at and key not in data:
            columns.append(column.name)
            values.append(NOW)
    return f"insert into {model.name} ({', '.join(columns)}) values ({', '.join(values)})"


# --- operations ---------------------------------------------------------------------------------------------------


def shaped(model: Model, row: Row | None, selection: Mapping[str, Selected]) -> Row | None:
    """A row as the client wants it."""
    if row is None:
        return None
    return {alias: _shaped_value(model.fields[selected.name], row) for alias, selected in selection.items()}


def _shaped_value(asked: Field, row: Row) -> Any:
    if not asked.scalar:
        return [] if asked.is_list else None
    value = row[asked.column]
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds") + "Z"
    if asked.kind == "Json" and value is not None:
        return json.dumps(value)
    return float(value) if isinstance(value, Decimal) else value


def find(db: Db, model: Model, args: Mapping[str, Any], selection: Mapping[str, Selected], limit: int | None) -> Any:
    """findMany, and findFirst and findUnique with a limit of 1."""
    params: list[Any] = []
    sql = f"select * from {model.name} where {where(model, args.get('where'), params)}"
    order = args.get("orderBy") or []
    pairs = [pair for part in (order if isinstance(order, list) else [order]) for pair in part.items()]
    if pairs:
        sql += " order by " + ", ".join(f"{model.fields[key].name} {direction}" for key, direction in pairs)
    sql += f" limit {int(limit or args.get('take') or 2**31)} offset {int(args.get('skip') or 0)}"
    return [shaped(model, row, selection) for row in db.execute(sql, params).fetchall()]


def create(db: Db, model: Model, args: Mapping[str, Any]) -> list[Row]:
    """The rows that were inserted."""
    made = []
    for data in args["data"] if isinstance(args["data"], list) else [args["data"]]:
        params: list[Any] = []
        sql = insertion(model, data, params) + (" on conflict do nothing" if args.get("skipDuplicates") else "")
        made += db.execute(sql + " returning *", params).fetchall()
    return made


def update(db: Db, model: Model, data: Mapping[str, Any], clause: Any) -> list[Row]:
    """The rows that were changed; those that an empty change would have changed."""
    params: list[Any] = []
    sets = assignments(model, data, params)
    if not sets:
        return db.execute(f"select * from {model.name} where {where(model, clause, params)}", params).fetchall()
    sql = f"update {model.name} set {sets} where {where(model, clause, params)} returning *"
    return db.execute(sql, params).fetchall()


def raw(db: Db, args: Mapping[str, Any]) -> psycopg.Cursor[Row]:
    """SQL with $1, $2, ..."""
    given = json.loads(args.get("parameters") or "[]")
    order: list[int] = []

    def place(match: re.Match[str]) -> str:
        order.append(int(match[1]) - 1)
        return "%s"

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return value["prisma__value"] if "prisma__value" in value else json.dumps(value)
        return value

    sql = re.sub(r"\$(\d+)", place, args["query"].replace("%", "%%"))
    return db.execute(sql, [plain(given[number]) for number in order])


RAW_TYPES = dict.fromkeys(("json", "jsonb"), "json") | dict.fromkeys(("timestamp", "timestamptz"), "datetime")
RAW_TYPES |= {
    "int2": "int",
    "int4": "int",
    "int8": "bigint",
    "float4": "float",
    "float8": "double",
    "numeric": "decimal",
}
RAW_TYPES |= {"text": "string", "varchar": "string", "bool": "bool", "date": "date", "uuid": "uuid"}


def raw_rows(cursor: psycopg.Cursor[Row]) -> dict[str, Any]:
    """The answer to a raw query: values with their types."""
    columns = cursor.description or []
    known = [psycopg.postgres.types.get(column.type_code) for column in columns]
    types = [RAW_TYPES.get(found.name if found else "text", "string") for found in known]

    def cell(value: Any, kind: str) -> Any:
        if isinstance(value, datetime | date):
            return value.isoformat()
        return (
            str(value) if isinstance(value, Decimal | uuid.UUID) or (kind == "bigint" and value is not None) else value
        )

    rows = (
        [[cell(value, kind) for value, kind in zip(row.values(), types, strict=True)] for row in cursor]
        if types
        else []
    )
    return {"columns": [column.name for column in columns], "types": types, "rows": rows}


def run(db: Db, asked: Selected) -> Any:
    """One operation."""
    args, selection = asked.arguments, asked.below
    if asked.name == "executeRaw":
        return raw(db, args).rowcount
    if asked.name == "queryRaw":
        return raw_rows(raw(db, args))
    match = re.match(
        r"(find(?:Many|First|Unique)|create(?:One|Many)|update(?:One|Many)|upsertOne|aggregate)(\w+)", asked.name
    )
    if match is None:
        raise ValueError(f"operation not supported: {asked.name}")
    kind, model = match[1], MODELS[match[2].removesuffix("OrThrow")]
    if kind == "findMany":
        return find(db, model, args, selection, None)
    if kind.startswith("find"):
        return next(iter(find(db, model, args, selection, 1)), None)
    if kind == "aggregate":
        params: list[Any] = []
        row = db.execute(f"select count(*) from {model.name} where {where(model, args.get('where'), params)}", params)
        count = (row.fetchone() or {})["count"]
        return {alias: dict.fromkeys(part.below, count) for alias, part in selection.items()}
    if kind == "upsertOne":
        rows = update(db, model, args["update"], args["where"]) or create(db, model, {"data": args["create"]})
    else:
        rows = create(db, model, args) if kind.startswith("create") else update(db, model, args["data"], args["where"])
    return {"count": len(rows)} if kind.endswith("Many") else shaped(model, next(iter(rows), None), selection)


# --- HTTP ---------------------------------------------------------------------------------------------------------

transactions: dict[str, Db] = {}


def connect(*, autocommit: bool) -> Db:
    """A connection to LiteLLM's database."""
    return psycopg.connect(DSN, autocommit=autocommit, options="-c timezone=UTC", row_factory=dict_row)


def answer(db: Db, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one query."""
    return {"data": {alias: run(db, asked) for alias, asked in Parser(body["query"]).parse().items()}}


def failure(error: Exception, code: str) -> dict[str, Any]:
    """An error as Prisma's client reads it."""
    shown = {"is_panic": False, "message": str(error)[:300], "meta": {}, "error_code": code}
    return {"errors": [{"error": str(error), "user_facing_error": shown}]}


class Handler(BaseHTTPRequestHandler):
    """A connection of the client, with one of its own to the database."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        self._db: Db | None = None
        super().setup()

    def finish(self) -> None:
        super().finish()
        if self._db is not None:
            self._db.close()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        """Says nothing."""

    def do_GET(self) -> None:
        self._reply({"status": "ok"})

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            self._reply(self._answer(text))
        except Exception as error:  # noqa: BLE001 - whatever it is, LiteLLM must hear of it
            say(f"{error!r:.300}: {text[:1500]!r}")
            codes = {psycopg.OperationalError: "P1001", psycopg.errors.UniqueViolation: "P2002"}
            self._reply(
                failure(error, next((code for kind, code in codes.items() if isinstance(error, kind)), "P2010"))
            )

    def _answer(self, text: bytes) -> dict[str, Any]:
        if self.path == "/transaction/start":
            name = uuid.uuid4().hex
            transactions[name] = connect(autocommit=False)
            return {"id": name}
        if match := re.match(r"/transaction/(\w+)/(commit|rollback)", self.path):
            with contextlib.closing(transactions.pop(match[1])) as db:
                db.commit() if match[2] == "commit" else db.rollback()
            return {}
        body = json.loads(text)
        db = self._connection()
        if "batch" in body:
            return {"batchResult": [answer(db, part) for part in body["batch"]]}
        return answer(db, body)

    def _connection(self) -> Db:
        transaction = self.headers.get("X-transaction-id")
        if transaction:
            return transactions[transaction]
        if self._db is None or self._db.closed or self._db.broken:
            self._db = connect(autocommit=True)
        return self._db

    def _reply(self, data: Mapping[str, Any]) -> None:
        content = json.dumps(data, default=str).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def say(text: str) -> None:
    """One line of the log."""
    with LOG.open("a", encoding="utf-8") as log:
        log.write(text + "\n")


def end_with(parent: int) -> None:
    """Ends the process when LiteLLM has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def main(arguments: Sequence[str]) -> None:
    """Serves until LiteLLM ends."""
    port = int(arguments[arguments.index("-p") + 1])
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))  # how Prisma's client stops its engine
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    if "--version" in sys.argv:
        print("query-engine stand-in")
    else:
        DSN = os.environ["ENGINE_DSN"]
        LOG = Path(os.environ["ENGINE_LOG"])
        MODELS = models_of(Path(os.environ["ENGINE_SCHEMA"]).read_text("utf-8"))
        main(sys.argv)
