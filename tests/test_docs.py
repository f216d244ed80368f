"""The documents say what the code does, and the code is documented.

Tables in README.md and docs/ are generated (tests/docs_tables.py); whatever else they name must exist: files, tests,
verbs, variables, metrics, tables, log events. SQL in them is run.
"""

import ast
import io
import re
import subprocess
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psycopg
import pytest
import typer.main

from billing_tailer.cli import cli
from billing_tailer.ledger import migrations, probing
from billing_tailer.resets import newest_at, plan_reset
from billing_tailer.settings import LIBPQ_NAMES, PREFIX, TEST_PREFIX, OffsetReset, describe
from billing_tailer.settle import Rules
from tests import docs_tables
from tests.docs_tables import FILES, PACKAGE, ROOT, trees
from tests.support.follow import following
from tests.support.loglines import line, lines
from tests.support.proof import outcomes, rows
from tests.support.spendlines import payload, spool_line

FUNCTION_LINES_MAX = 69
DOCUMENTS = [*FILES, "CHANGELOG.md", "SECURITY.md", "docs/performance.md", "docs/security.md"]
SUFFIXES = "py|md|sql|toml|conf|template|sh"
LITELLMS = frozenset(
    {
        "GENERIC_LOGGER_ENDPOINT",
        "GENERIC_LOGGER_HEADERS",
        "DEFAULT_FLUSH_INTERVAL_SECONDS",
        "DEFAULT_BATCH_SIZE",
    }
)
"""LiteLLM's own variables that the documents name."""
OURS = ("billing_tailer", "deploy", "docs", "tests")
"""Directories whose files may be named in documents and docstrings."""


def text_of(name: str) -> str:
    """A document's text."""
    return (ROOT / name).read_text("utf-8")


@cache
def committed_files() -> list[str]:
    """The files of the repository, by git or, in a copy without its history, by what stands around."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False) if (ROOT / ".git").exists() else None
    if listed is not None and listed.returncode == 0:
        return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())
    return sorted(
        str(path.relative_to(ROOT))
        for part in (".ci", *OURS, "*")
        for path in ((ROOT / part).rglob("*") if part != "*" else ROOT.glob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    )


@cache
def functions_by_file() -> dict[str, frozenset[str]]:
    """File -> names of its test functions."""
    return {
        name: frozenset(re.findall(r"^(?:async )?def (test_\w+)", text_of(name), re.MULTILINE))
        for name in committed_files()
        if re.fullmatch(r"tests/(?:\w+/)*test_\w+\.py", name)
    }


# --- generated tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_tables_are_what_the_code_says(name: str) -> None:
    text = text_of(name)
    assert docs_tables.rendered(text) == text, "run: .venv/bin/python -m tests.docs_tables --write"


def test_every_table_is_somewhere_once() -> None:
    found = [marker for name in FILES for marker in docs_tables.markers(text_of(name))]
    assert sorted(found) == sorted([*docs_tables.PARTS] * 2)


def test_a_wrong_table_is_noticed() -> None:
    text = text_of("README.md")
    for wrong in (
        text.replace("| `9108` |", "| `9109` |"),
        text.replace("| `blank_line` |", "| `blank` |"),
        text.replace("offsets reset PATH", "offsets move PATH"),
    ):
        assert wrong != text
        assert docs_tables.rendered(wrong) == text


# --- what documents and docstrings name ---------------------------------------------------------------------------


def comments_and_docstrings(name: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment and docstring of a module."""
    source = text_of(name)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def named_texts() -> Iterator[tuple[str, str]]:
    """Where a text stands, and the text: the documents, and comments and docstrings of all our modules."""
    for name in DOCUMENTS:
        yield name, text_of(name)
    for name in committed_files():
        if name.startswith(OURS) and name.endswith(".py"):
            for number, text in comments_and_docstrings(name):
                yield f"{name}:{number}", text
        elif name.startswith("deploy/"):
            yield name, text_of(name)


_NAMED = re.compile(rf"(?<![\w/.@-])(?P<path>(?:[\w.-]+/)*[\w-][\w.-]*\.(?:{SUFFIXES}))(?!\w)|::(?P<test>test_\w+)")
_DIRECTORY = re.compile(rf"(?<![\w/.-])((?:{'|'.join(OURS)})/(?:[\w-]+/)*)(?![\w.*<-])")
_BARE_TEST = re.compile(r"(?<![\w:./])test_\w+(?![\w/]|\.py)")


def missing_names(text: str) -> list[str]:
    """Files, directories and tests that a text names and that are not there."""
    files = committed_files()
    tests = functions_by_file()
    missing: list[str] = []
    path: str | None = None
    for match in _NAMED.finditer(text):
        if match["test"] is not None:
            if path is None or match["test"] not in tests.get(path, ()):
                missing.append(f"{path}::{match['test']}")
            continue
        wanted = match["path"].removeprefix("../")
        found = [name for name in files if name == wanted or name.endswith("/" + wanted)]
        path = found[0] if found else None
        if not found:
            missing.append(match["path"])
    directories = (name for name in _DIRECTORY.findall(text) if not (ROOT / name).is_dir())
    everywhere = frozenset[str]().union(*tests.values())
    bare = (name for name in _BARE_TEST.findall(text) if name not in everywhere)
    return [*missing, *directories, *bare]


def test_files_and_tests_that_are_named_exist() -> None:
    missing = {where: names for where, text in named_texts() if (names := missing_names(text))}
    assert missing == {}


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`tests/test_docs.py::test_functions_are_short`, `::test_every_link_leads_somewhere`", []),
        ("tests/test_docs.py and ::test_less", ["tests/test_docs.py::test_less"]),
        ("`test_nowhere` in deploy/nowhere/ and docs/no.md", ["docs/no.md", "deploy/nowhere/", "test_nowhere"]),
        ("test_docs.py::test_functions_are_short; /etc/nginx/conf.d/nowhere.conf is elsewhere", []),
    ],
)
def test_missing_names_are_noticed(text: str, missing: list[str]) -> None:
    assert missing_names(text) == missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text_of(name)) if not re.match(r"https?://", link)]
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


def code_of(text: str) -> Iterator[str]:
    """Code in markdown: spans, indented lines and fenced lines."""
    fenced = False
    for row in text.splitlines():
        if row.startswith("```"):
            fenced = not fenced
        elif fenced or row.startswith("    "):
            yield row.strip()
        else:
            yield from re.findall(r"`([^`]+)`", row)


def commands_named() -> Iterator[tuple[str, str]]:
    """Where, and what stands behind `billing-tailer`: in the documents' code, and in code spans of our messages."""
    for name in FILES:
        for code in code_of(text_of(name)):
            for command in re.findall(r"(?<![\w/.-])(?:\S*/)?billing-tailer (.+)", code):
                yield name, command
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for command in re.findall(r"`billing-tailer ([^`]+)`", node.value):
                    yield f"{path.name}:{node.lineno}", command


def test_commands_that_are_named_exist() -> None:
    known = dict(docs_tables.commands())
    of_the_program = {option for parameter in typer.main.get_command(cli).params for option in parameter.opts}
    wrong = []
    for where, command in commands_named():
        words = command.replace("|", " ").partition("#")[0].split()
        if words == ["..."] or words[0] in of_the_program:
            continue
        verb = next((name for name in (" ".join(words[:2]), words[0]) if name in known), None)
        options = {option for parameter in known[verb].params for option in parameter.opts} if verb else set()
        if verb is None or not {word for word in words if word.startswith("--")} <= options:
            wrong.append(f"{where}: billing-tailer {command}")
    assert wrong == []


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    named = {
        t for name in DOCUMENTS for code in code_of(text_of(name)) for t in re.findall(r"^(?:\$ )?make ([\w-]+)", code)
    }
    assert {"run", "test"} <= named <= targets


def test_variables_that_are_named_exist() -> None:
    """With or without the prefix: `BILLING_TAILER_OFFSET_RESET`, `OFFSET_RESET`."""
    known = {variable.name for variable in describe()}
    known |= {f"{name}_FILE" for name in known} | set(LIBPQ_NAMES) | LITELLMS | {"NO_COLOR"}
    known |= set(re.findall(r"TORTURE_[A-Z]+", text_of("tests/torture/__main__.py")))
    known |= set(re.findall(r"\$\{(\w+)", text_of("compose.yml")))
    wrong = {
        word
        for name in DOCUMENTS
        for word in re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", text_of(name))
        if word not in known and PREFIX + word not in known and not word.startswith(TEST_PREFIX)
    }
    assert (
        wrong - {verb_argument for _, command in docs_tables.commands() for verb_argument in _arguments(command)}
        == set()
    )


def _arguments(command: object) -> list[str]:
    return [parameter.name.upper() for parameter in getattr(command, "params", [])]


def test_metrics_that_are_named_exist() -> None:
    known = {name for name, *_ in docs_tables.metric_rows()}
    named = {word for name in DOCUMENTS for word in re.findall(r"\bbilling_tailer_[a-z_]+\b", text_of(name))}
    assert named <= known


def test_columns_and_log_events_that_are_named_exist() -> None:
    """A span `a.b` is a column of a table or an event of the log."""
    schema = "\n".join(migration.text for migration in migrations())
    columns = {
        f"{table}.{column}"
        for table, body in re.findall(r"^create table (\w+) \((.*?)^\);", schema, re.MULTILINE | re.DOTALL)
        for column in re.findall(r"^    (\w+) ", body, re.MULTILINE)
    }
    strings = {
        node.value
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    named = {
        code
        for name in DOCUMENTS
        for code in re.findall(r"`([a-z_]+\.[a-z_]+)`", text_of(name))
        if not re.search(rf"\.(?:{SUFFIXES}|ya?ml)$", code)
    }
    assert named - columns - strings == set()


def test_readyz_topics_are_explained() -> None:
    said = {"starting"} | {
        topic for path in trees() for topic in re.findall(r"health\.say\(\s*\"(\w+)\"", path.read_text("utf-8"))
    }
    section = text_of("docs/operating.md").partition("## What /readyz says")[2].partition("\n## ")[0]
    explained = {
        topic
        for cell in re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
        for topic in re.findall(r"`(\w+)`", cell)
    }
    assert explained == said


# --- SQL in the documents -----------------------------------------------------------------------------------------


def sql_blocks(name: str) -> list[str]:
    """The SQL of a document."""
    return re.findall(r"^```sql\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL)


def test_queries_run(dsn: str) -> None:
    queries = [block for name in FILES for block in sql_blocks(name) if block.startswith("select")]
    assert queries
    with psycopg.connect(dsn) as connection:
        for query in queries:
            connection.execute(query.encode())


def test_the_grants_are_enough(dsn: str, daemon_dsn: str, tmp_path: Path) -> None:
    """A role with the grants of deploy/postgres/grants.sql follows a log, with everything that can happen, moves an
    offset, settles a call, corrects it, and opens and closes an exception; it cannot change what was charged."""
    _follow_and_reset(daemon_dsn, tmp_path / "audit.jsonl")
    _settle_and_correct(daemon_dsn, tmp_path)
    _change_nothing(daemon_dsn)
    assert outcomes(dsn) == {"replayed": 12, "dead_letter": 1, "spend_record": 4}
    assert [row["reason"] for row in rows(dsn, "select reason from log_gaps")] == ["truncated"]
    charged = "select source_reference as id, charged_credits as credits, model from charge_receipts "
    assert rows(dsn, charged + "join llm_charge_details using (source_system, source_reference) order by 1") == [
        {"id": "call-00000002", "credits": 2250, "model": "up-gpt-4o-mini"},
        {"id": "call-00000003", "credits": 0, "model": "up-gpt-4o-mini"},
    ]
    assert rows(dsn, "select delta_credits, reason from charge_adjustments") == [
        {"delta_credits": 1000, "reason": "late_record"}
    ]
    assert rows(dsn, "select kind, closed_by from call_exceptions") == [
        {"kind": "held_zero_cost", "closed_by": "settler"}
    ]


def _follow_and_reset(dsn: str, log: Path) -> None:
    log.write_bytes(lines(0, 10) + line(0) + b"not json\n" + line(1, nginx_request_id="f" * 32))
    with following(dsn, log.parent) as rig:
        with probing(dsn, "billing") as probe:
            assert (probe.missing_grants(), probe.excess_grants()) == ([], [])
        (position,) = rig.follower.positions.values()
        assert newest_at(rig.ledger.positions(), str(log)) is not None
        request = OffsetReset(str(log), "beginning")
        rig.ledger.reset(
            plan_reset(request, position, rig.files, rig.ledger.range_start, reset_id="1", source="cli", reason="docs")
        )
        rig.tailer._look_what_operators_did()
        rig.turn()
        log.write_bytes(b"")
        rig.turn()


def _settle_and_correct(dsn: str, volume: Path) -> None:
    """Call 2 costs 2250 credits, by a late attempt 1000 more; call 3 is held until its model is known to be free."""
    spool = volume / f"callbacks-{'0' * 32}-000000.jsonl"
    spool.write_bytes(spool_line(payload(2)) + spool_line(payload(3, 0.0)))
    with following(dsn, volume):
        pass
    with spool.open("ab") as more:
        more.write(spool_line(payload(2, 0.0001, attempt=1)) + spool_line(payload(3, 0.0, attempt=1)))
    with following(dsn, volume, rules=Rules(free_models=("up-*",))):
        pass


def _change_nothing(dsn: str) -> None:
    """Receipts are append-only, and so is what they follow from."""
    append_only = ("charge_receipts", "llm_charge_details", "charge_adjustments", "spend_records", "usage_facts")
    with psycopg.connect(dsn, autocommit=True) as connection:
        for table in append_only:
            for statement in (f"delete from billing.{table}", f"update billing.{table} set created_at = now()"):
                column = {"spend_records": "received_at", "usage_facts": "committed_at"}.get(table, "created_at")
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement.replace("created_at", column).encode())


# --- the code -----------------------------------------------------------------------------------------------------


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a tree, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {lines_} lines"
        for path, tree in trees().items()
        for function in functions(tree)
        if (lines_ := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES_MAX
    ]
    assert long == []


def undocumented(tree: ast.Module, where: str) -> Iterator[str]:
    """Public modules, classes and functions without a docstring; stubs (`...`) need none."""

    def walk(node: ast.Module | ast.ClassDef) -> Iterator[str]:
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith(
                "_"
            ):
                continue
            last = child.body[-1]
            stub = isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) and last.value.value is ...
            overloaded = any("setter" in ast.unparse(decorator) for decorator in child.decorator_list)
            if not stub and not overloaded and ast.get_docstring(child) is None:
                yield f"{where}:{child.lineno} {child.name}"
            if isinstance(child, ast.ClassDef):
                yield from walk(child)

    if ast.get_docstring(tree) is None:
        yield where
    yield from walk(tree)


def test_everything_public_has_a_docstring() -> None:
    missing = [name for path, tree in trees().items() for name in undocumented(tree, str(path.relative_to(PACKAGE)))]
    assert missing == []


def test_an_undocumented_function_is_noticed() -> None:
    source = (
        '"""Module."""\nclass A:\n    """A."""\n    def b(self): pass\n    def _c(self): pass\ndef d():\n    """D."""\n'
    )
    assert list(undocumented(ast.parse(source), "x.py")) == ["x.py:4 b"]


def test_an_installed_package_has_its_data_files() -> None:
    """`pip install .`, as README has it: an editable install would not show what a wheel lacks."""
    globs = tomllib.loads(text_of("pyproject.toml"))["tool"]["setuptools"]["package-data"]
    packed = {
        path
        for package, patterns in globs.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = {ROOT / name for name in committed_files() if name.startswith("billing_tailer/") and name[-3:] != ".py"}
    assert files - packed == set()


# --- what must not be in the repository ---------------------------------------------------------------------------

# put together here, so that this file does not name what it looks for
_MACHINE = "work|root"
_HOSTS = "|".join(
    re.escape(".".join(parts))
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("golang", "org"),
        ("deb", "debian", "org"),
    )
)
_NOTES = "|".join(re.escape(f"{name}.md") for name in ("LITE" + "LLM", "DES" + "IGN", "TAIL" + "ING", "STY" + "LE"))
FORBIDDEN = re.compile(rf"(?<![\w.@}}/-])/(?:{_MACHINE})(?![\w-])|\b(?:{_HOSTS})\b|\.\./shared\b|\b(?:{_NOTES})\b")


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = [
        f"{name}:{number}: {row.strip()[:120]}"
        for name in committed_files()
        for number, row in enumerate((ROOT / name).read_text("utf-8", "replace").splitlines(), 1)
        if FORBIDDEN.search(row)
    ]
    assert found == []


@pytest.mark.parametrize("prefix", ["/" + "work/main", "see /" + "root", "https://" + "pypi" + ".org/simple"])
def test_a_machine_path_is_noticed(prefix: str) -> None:
    assert FORBIDDEN.search(prefix)
    assert not FORBIDDEN.search("/workers, /var/work, framework/, rooted")


def test_the_lock_has_hashes_and_no_addresses() -> None:
    text = text_of("requirements.lock")
    assert "://" not in text
    entries = [e for e in re.split(r"\n(?=\S)", re.sub(r"^ *#.*\n?", "", text, flags=re.MULTILINE).strip()) if e]
    assert len(entries) > 20
    shape = re.compile(r"[a-z0-9.-]+(?:\[[a-z,]+\])?==\S+(?: ; [^\\\n]+)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+")
    assert [entry.splitlines()[0] for entry in entries if not shape.fullmatch(entry.strip())] == []


def test_the_changelog_has_its_shape() -> None:
    headings = re.findall(r"^(#+ .+)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert headings[:2] == ["# Changelog", "## [Unreleased]"]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {heading[4:] for heading in headings if heading.startswith("### ")} <= kinds
    versions = [heading for heading in headings[2:] if heading.startswith("## ")]
    assert all(re.fullmatch(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions)
