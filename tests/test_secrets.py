"""No secret in anything that the program writes or shows: a daemon through all that goes wrong, every verb, children.

Each secret is a text of its own, which is looked for in all of it, also by its halves and as libpq or HTTP would write
it.
"""

import base64
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from billing_tailer import cli, state_cli
from tests import docs_tables
from tests.support.callbacks import PATH, dumps, event
from tests.support.daemon import Daemon
from tests.support.loglines import lines
from tests.support.proxy import PostgresProxy
from tests.support.verbs import run_verb

SECRETS = {
    "DATABASE_URL": "Pw1/k@8Zq:c5",
    "MIGRATE_DATABASE_URL": "Own2%xT4&vB6",
    "CALLBACK_TOKEN": "cb3-Vd7Kw9Rm2Hs5Yp8",
    "API_TOKEN": "ap4-Qf6Jt3Nx8Lz1Gc5",
    "LITELLM_API_KEY": "sk-Ek5Wb8Uy2Mr6Td9",
}
"""The password of each DSN, and the tokens."""


def shown_in(text: str) -> list[str]:
    """The names of the secrets of which a text shows something."""
    found = []
    for name, secret in SECRETS.items():
        half = len(secret) // 2
        forms = {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], secret[:half], secret[half:]}
        forms.add(base64.b64encode(secret.encode()).decode().rstrip("="))
        if any(form in text for form in forms):
            found.append(name)
    return found


class EchoingLiteLLM(BaseHTTPRequestHandler):
    """Refuses every key, and repeats it, as LiteLLM does."""

    def do_GET(self) -> None:
        content = json.dumps({"error": {"message": f"Received {self.headers['Authorization']}"}}).encode()
        self.send_response(401)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def litellm() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), EchoingLiteLLM)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    volume = tmp_path / "billing"
    volume.mkdir()
    (volume / "audit.jsonl").write_bytes(lines(0, 10) + b"no JSON\n")
    return volume


def environment(volume: Path, litellm: str, **changes: str | None) -> dict[str, str]:
    """Every secret set. changes: None leaves one out."""
    found = {
        "AUDIT_GLOBS": f"{volume}/audit*.jsonl*",
        "SPOOL_DIR": str(volume.parent / "spool"),
        "LITELLM_URL": litellm,
        "LOG_LEVEL": "debug",
        **{name: SECRETS[name] for name in ("CALLBACK_TOKEN", "API_TOKEN", "LITELLM_API_KEY")},
        **changes,
    }
    return {f"BILLING_TAILER_{name}": value for name, value in found.items() if value is not None}


def with_password(dsn: str, name: str = "DATABASE_URL") -> str:
    return make_conninfo(dsn, password=SECRETS[name])


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += (task / "children").read_text().split()
    return [pid, *(one for child in {*map(int, children)} for one in family(child))]


def visible(pid: int) -> str:
    """What other users see of a process (its command line), and the environment of its children."""
    seen = []
    for one in family(pid):
        seen.append(Path(f"/proc/{one}/cmdline").read_text())
        if one != pid:
            seen.append(Path(f"/proc/{one}/environ").read_text())
    return "\n".join(seen)


def asked(daemon: Daemon) -> Iterator[str]:
    """Everything that HTTP says, to friends and strangers."""
    tokens = ["", "wrong-guess-0123456789", SECRETS["API_TOKEN"], SECRETS["CALLBACK_TOKEN"]]
    with httpx.Client(base_url=daemon.url, trust_env=False, timeout=10) as client:
        for path in ("/", "/livez", "/readyz", "/metrics", "/v1/runs/r", "/v1/calls/call-00000001", "/v1/nothing"):
            for token in tokens:
                answer = client.get(path, headers={"Authorization": f"Bearer {token}"} if token else {})
                yield f"{answer.headers}\n{answer.text}"
        for token in tokens:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            for body in (b"no JSON", dumps([event("x")])):
                answer = client.post(PATH, content=body, headers=headers)
                yield f"{answer.headers}\n{answer.text}"


def test_the_daemon(dsn: str, volume: Path, litellm: str, tmp_path: Path) -> None:
    """Started, asked, LiteLLM refuses the key, Postgres goes and comes back, ended."""
    with PostgresProxy(dsn) as proxy:
        secret_dsns = {
            "DATABASE_URL": with_password(proxy.dsn),
            "MIGRATE_DATABASE_URL": with_password(proxy.dsn, "MIGRATE_DATABASE_URL"),
        }
        with Daemon(environment(volume, litellm, **secret_dsns), tmp_path / "daemon.log") as daemon:
            daemon.wait_for_event("batch.committed")
            daemon.wait_for_event("spend_logs.failed")
            told = [*asked(daemon), visible(daemon.pid)]
            proxy.cut()
            daemon.wait_until(lambda: "ledger" in daemon.get("/readyz").json()["reasons"])
            told += asked(daemon)
            proxy.forward()
            daemon.wait_until(lambda: "ledger" not in daemon.get("/readyz").json()["reasons"])
            assert daemon.terminate() == 0
            log = daemon.log()
    assert "401" in log, "LiteLLM has answered"
    assert '"level":"debug"' in log.replace(" ", "") or "debug" in log
    for text in (*told, log):
        assert shown_in(text) == [], text
    for path in (tmp_path / "spool").iterdir():
        assert shown_in(path.read_text()) == []
    with psycopg.connect(dsn) as connection:
        tables = connection.execute("select table_name from information_schema.tables where table_schema = 'billing'")
        for (table,) in tables.fetchall():
            stored = connection.execute(f"select t::text from billing.{table} t".encode()).fetchall()
            assert shown_in(str(stored)) == [], table


def test_the_embedded_postgres(volume: Path, litellm: str, open_dir: Path, tmp_path: Path) -> None:
    """Its processes get none of our environment, neither in their own nor as arguments."""
    variables = environment(volume, litellm, DATA_DIR=str(open_dir))
    with Daemon(variables, tmp_path / "daemon.log") as daemon:
        daemon.wait_for_event("batch.committed", timeout=60)
        assert len(family(daemon.pid)) > 3
        told = visible(daemon.pid)
        assert "postgres" in told
        daemon.terminate()
        assert shown_in(told + daemon.log()) == []
    for path in open_dir.rglob("*.log"):
        assert shown_in(path.read_text("utf-8", "replace")) == []


# --- refused at the start --------------------------------------------------------------------------------------------

PASSWORD = SECRETS["DATABASE_URL"]
REFUSED: dict[str, dict[str, str | None]] = {
    "another kind of DSN": {"DATABASE_URL": f"mysql://u:{PASSWORD}@db/x"},
    "a password that was not escaped": {"DATABASE_URL": f"postgresql://u:{PASSWORD}@db/x"},
    "a port in the password's place": {"DATABASE_URL": f"postgresql://u@db:{PASSWORD}/x"},
    "a word without a value": {"DATABASE_URL": f"host=db password = {PASSWORD} more"},
    "an unknown key": {"DATABASE_URL": f"host=db pasword={PASSWORD}"},
    "a quote that does not end": {"DATABASE_URL": f"host=db password='{PASSWORD}"},
    "what libpq refuses": {"DATABASE_URL": f"host=db password='{PASSWORD}' sslmode=perhaps"},
    "only the password": {"DATABASE_URL": PASSWORD},
    "the owner's DSN": {"DATABASE_URL": None, "MIGRATE_DATABASE_URL": f"mysql://u:{PASSWORD}@db/x"},
    "a short token": {"API_TOKEN": SECRETS["API_TOKEN"][:12]},
    "a token with a space": {"CALLBACK_TOKEN": f"{SECRETS['CALLBACK_TOKEN']} x"},
    "a key for no address": {"LITELLM_URL": None},
    "a key that cannot be sent": {"LITELLM_API_KEY": f"{SECRETS['LITELLM_API_KEY']}\nX: y"},
    "a secret as a file's name": {"API_TOKEN": None, "API_TOKEN_FILE": SECRETS["API_TOKEN"]},
    "a secret as a file's path": {"CALLBACK_TOKEN": None, "CALLBACK_TOKEN_FILE": SECRETS["CALLBACK_TOKEN"]},
    "both": {"API_TOKEN_FILE": "/run/secrets/api"},
    "a typo in the name": {"API_TOKENS": SECRETS["API_TOKEN"]},
    "a key inside the URL": {"LITELLM_URL": f"http://u:{SECRETS['LITELLM_API_KEY']}@litellm"},
}


Invoke = Callable[..., tuple[int, str]]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Invoke:
    """A verb in this process: its exit code, and all it wrote to both streams, with tracebacks as they would be."""
    for name in [name for name in os.environ if name.startswith(("BILLING_TAILER_", "PG"))]:
        monkeypatch.delenv(name)

    def run(variables: Mapping[str, str], *arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["billing-tailer", *arguments])
            try:
                cli.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
            except Exception:  # noqa: BLE001  # what the interpreter would print, by whatever hook is installed
                sys.excepthook(*sys.exc_info())
                code = 1
        printed = capfd.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_setting(invoke: Invoke, volume: Path, litellm: str, what: str) -> None:
    """A setting is told by its name; its value only where it cannot be a secret."""
    good = {"DATABASE_URL": f"host=127.0.0.1 port=1 password='{PASSWORD}'"}
    for verb in ("run", "check", "status", "migrate"):
        code, told = invoke(environment(volume, litellm, **{**good, **REFUSED[what]}), verb)
        assert code in (1, 2), told
        assert shown_in(told) == [], told


# --- every verb ------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, list[str]] = {
    "accept-gap": ["1", "--reason", "x"],
    "adjust": ["call-00000001", "--credits", "-1", "--reason", "x"],
    "adopt": ["1", "/nowhere", "--reason", "x"],
    "backfill": ["{volume}/audit.jsonl", "--reason", "x", "--dry-run"],
    "close": ["call-00000001", "overdue", "--reason", "x"],
    "discard": ["1", "--reason", "x"],
    "explain": ["call-00000001"],
    "prune": ["--reason", "x", "--dry-run"],
    "release": ["call-00000001", "--cost-usd", "1", "--reason", "x"],
    "reset": ["{volume}/audit.jsonl=end", "--reason", "x", "--dry-run"],
    "retry": ["1", "--reason", "x"],
    "show": ["1"],
}
"""What verbs need beside their name."""


TROUBLES: dict[str, dict[str, str]] = {
    "nothing": {},
    "nobody listens": {"host": "127.0.0.1", "port": "1"},
    "no such database": {"dbname": "no_such_database"},
}
CONNECTING = ("check", "migrate", "status", "verify", "prune")
"""Verbs that reach Postgres on different ways: tried in every trouble."""


@pytest.mark.parametrize("trouble", TROUBLES)
def test_every_verb(invoke: Invoke, dsn: str, volume: Path, litellm: str, trouble: str) -> None:
    """With the database well and in trouble; LiteLLM refuses the key, and repeats it."""
    broken = make_conninfo(with_password(dsn), **TROUBLES[trouble])
    owner = make_conninfo(with_password(dsn, "MIGRATE_DATABASE_URL"), **TROUBLES[trouble])
    variables = environment(volume, litellm, DATABASE_URL=broken, MIGRATE_DATABASE_URL=owner)
    tried = 0
    for words in (name.split() for name, _ in docs_tables.commands() if name != "run"):
        if trouble != "nothing" and words[-1] not in CONNECTING:
            continue
        arguments = [part.format(volume=volume) for part in ARGUMENTS.get(words[-1], [])]
        for more in ([], ["--json"]) if trouble == "nothing" else ([],):
            code, told = invoke(variables, *words, *arguments, *more)
            assert shown_in(told) == [], f"{words}: {told}"
            assert "Usage:" not in told or more, f"{words} needs other arguments: {told}"
            assert code in (0, 1, 2), told
            tried += 1
    assert tried >= (40 if trouble == "nothing" else len(CONNECTING))


def test_a_defect_of_ours(
    invoke: Invoke, dsn: str, volume: Path, litellm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback shows code, never the values of variables."""

    def defect(settings: Any) -> Any:
        key = settings.litellm_api_key.get_secret_value()
        raise RuntimeError("a defect") from ValueError(len(key))

    monkeypatch.setattr(state_cli, "run_checks", defect)
    code, told = invoke(environment(volume, litellm, DATABASE_URL=with_password(dsn)), "check")
    assert code == 1
    assert "a defect" in told
    assert shown_in(told) == [], told


def test_a_defect_in_the_daemon(dsn: str, volume: Path, litellm: str) -> None:
    script = (
        "from billing_tailer import app, cli\n"
        "def defect(*given, **named): raise RuntimeError('a defect')\n"
        "app.Tailer = defect\n"
        "cli.main()\n"
    )
    found = run_verb(environment(volume, litellm, DATABASE_URL=with_password(dsn)), "run", script=script)
    assert found.returncode == 1
    assert "a defect" in found.stderr
    assert shown_in(found.stdout + found.stderr) == []


def test_the_search_finds() -> None:
    """Else none of the others could fail."""
    for name, secret in SECRETS.items():
        for form in (secret, f"x{quote(secret, safe='')}", repr({"a": secret}), secret[:-3], secret[3:]):
            assert shown_in(f"text {form} text") == [name], form
    assert shown_in("nothing") == []
