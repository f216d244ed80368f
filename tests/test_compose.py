"""What compose.yml, deploy/k8s, the Dockerfiles and their scripts promise, held to the program and to each other.

tests/e2e/test_container.py runs the image with these flags; here is what can be seen without running it.
"""

import json
import re
import subprocess
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import yaml

from billing_tailer.app import EXIT_SECONDS
from billing_tailer.settings import load
from tests.support.compose import compose, podman_options, seconds, service
from tests.support.daemon import ROOT

UID: Final = "65532:65532"
PREFIX: Final = "BILLING_TAILER_"
SERVICES: Final = {
    "billing_tailer",
    "grafana",
    "grants",
    "litellm",
    "migrate",
    "nginx",
    "postgres",
    "prometheus",
}
SECRET_WORD: Final = re.compile(r"PASSWORD|TOKEN|SECRET|_KEY|DATABASE_URL|HEADERS")


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def settings_accept(environment: dict[str, str], secrets: Path) -> None:
    """`load()` takes these variables, with the secrets in a directory instead of /run/secrets. Raises ConfigError."""
    load({name: value.replace("/run/secrets", str(secrets)) for name, value in environment.items()})


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make secrets` makes."""
    directory = tmp_path_factory.mktemp("made") / "secrets"
    subprocess.run(["sh", str(ROOT / "deploy/secrets.sh"), str(directory)], check=True, capture_output=True)
    return directory


# --- compose.yml --------------------------------------------------------------------------------------------------


def test_it_is_what_compose_reads() -> None:
    schema = json.loads(
        files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text("utf-8")
    )
    jsonschema.validate(compose(), schema)


def test_all_services_are_there_and_none_has_the_socket_of_docker() -> None:
    assert {*compose()["services"]} == SERVICES
    for name in ("compose.yml", *(str(path.relative_to(ROOT)) for path in (ROOT / "deploy/k8s").glob("*.yaml"))):
        assert "docker.sock" not in text_of(name)
        assert not re.search(r"privileged: *true|hostPath|network_mode|pid: *host", text_of(name))


@pytest.mark.parametrize("name", ["billing_tailer", "migrate"])
def test_the_tailer_is_confined(name: str) -> None:
    tailer = service(name)
    assert tailer["read_only"] is True
    assert tailer["cap_drop"] == ["ALL"]
    assert "cap_add" not in tailer
    assert tailer["security_opt"] == ["no-new-privileges:true"]
    assert tailer["user"] == UID


def test_the_daemon_has_limits_time_to_stop_and_a_healthcheck() -> None:
    tailer = service("billing_tailer")
    assert tailer["tmpfs"] == ["/tmp:size=16m"]
    assert tailer["mem_limit"] == "256m"
    assert seconds(tailer["stop_grace_period"]) > 2 * EXIT_SECONDS
    assert tailer["healthcheck"]["test"] == ["CMD", "billing-tailer", "healthcheck"]
    assert tailer["restart"] == "unless-stopped"


def test_the_log_is_shared_and_only_nginx_writes_it() -> None:
    mounts = {
        name: [mount for mount in one.get("volumes", []) if mount.startswith("billing:")]
        for name, one in compose()["services"].items()
    }
    assert {name: found for name, found in mounts.items() if found} == {
        "nginx": ["billing:/billing"],
        "billing_tailer": ["billing:/billing:ro"],
    }
    spools = [name for name, one in compose()["services"].items() if "spool:" in str(one.get("volumes"))]
    assert spools == ["billing_tailer"]
    spool_dir = re.search(r"BILLING_TAILER_SPOOL_DIR=(\S+)", text_of("deploy/Dockerfile"))
    assert spool_dir is not None
    assert f"spool:{spool_dir[1]}" in service("billing_tailer")["volumes"]
    named = {mount.partition(":")[0] for one in compose()["services"].values() for mount in one.get("volumes", [])} - {
        "./"
    }
    assert {name for name in named if not name.startswith(".")} == {*compose()["volumes"]}


def test_what_is_mounted_from_the_repository_is_read_only_and_there() -> None:
    for one in compose()["services"].values():
        for mount in one.get("volumes", []):
            if mount.startswith("."):
                source, _, mode = mount.split(":")
                assert mode == "ro"
                assert (ROOT / source).exists(), source


def test_every_variable_of_ours_is_known_and_every_secret_is_a_file(secrets: Path) -> None:
    for name in ("billing_tailer", "migrate"):
        environment = {key: str(value) for key, value in service(name)["environment"].items()}
        assert all(key.startswith(PREFIX) for key in environment)
        settings_accept(environment, secrets)
    for name, one in compose()["services"].items():
        for variable, value in one.get("environment", {}).items():
            if SECRET_WORD.search(variable):
                assert variable.endswith("_FILE"), f"{name}: {variable}"
                assert value.removeprefix("/run/secrets/") in one["secrets"], f"{name}: {variable}"


def test_the_daemon_does_not_have_the_owners_password() -> None:
    assert "migrate_database_url" not in service("billing_tailer")["secrets"]
    assert service("migrate")["secrets"] == service("grants")["secrets"] == ["migrate_database_url"]
    after = service("billing_tailer")["depends_on"]["grants"], service("grants")["depends_on"]["migrate"]
    assert [one["condition"] for one in after] == ["service_completed_successfully"] * 2


def test_litellm_is_reached_through_nginx_alone() -> None:
    services = compose()["services"]
    assert "ports" not in services["litellm"]
    assert [name for name, one in services.items() if "agents" in one["networks"]] == ["nginx"]
    assert services["nginx"]["environment"]["LITELLM"] == "litellm:4000"
    assert "--port 4000" in text_of("deploy/litellm/start.sh")
    inside = {name for name, one in services.items() if {"llm", "data"} & {*one["networks"]}}
    assert inside == {"nginx", "litellm", "billing_tailer", "migrate", "grants", "postgres"}


def test_ports_are_published_on_loopback_alone() -> None:
    ports = [port for one in compose()["services"].values() for port in one.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_secret_is_made_and_used(secrets: Path) -> None:
    declared = {name: one["file"] for name, one in compose()["secrets"].items()}
    used = {name for one in compose()["services"].values() for name in one.get("secrets", [])}
    assert declared == {name: f"./secrets/{name}" for name in used}
    assert {path.name for path in secrets.iterdir()} == used
    ignored = text_of(".gitignore").splitlines()
    assert "/secrets/" in ignored
    assert text_of(".dockerignore").startswith("*\n")
    assert "!secrets" not in text_of(".dockerignore")


def test_a_flag_that_is_not_known_is_no_flag_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.compose.service", lambda _: {"cap_add": ["SYS_ADMIN"]})
    with pytest.raises(LookupError, match="cap_add"):
        podman_options("billing_tailer", {}, Path())


def mounts_of(name: str) -> dict[str, Path]:
    """Where in the container -> what of the repository lies there."""
    split = [mount.split(":") for mount in service(name)["volumes"] if mount.startswith(".")]
    return {target: ROOT / source for source, target, _ in split}


def in_the_repository(name: str, path: str) -> Path:
    """The file or directory of the repository that a service sees under that path."""
    target, source = next((target, source) for target, source in mounts_of(name).items() if path.startswith(target))
    return source / Path(path).relative_to(target)


def test_prometheus_loads_our_rules_and_scrapes_the_tailer() -> None:
    (given,) = [one.partition("=")[2] for one in service("prometheus")["command"] if one.startswith("--config.file=")]
    file = in_the_repository("prometheus", given)
    config = yaml.safe_load(file.read_text("utf-8"))
    loaded = {path.name for glob in config["rule_files"] for path in file.parent.glob(glob)}
    assert loaded == {"alerts.yml", "recording.yml"}
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "billing_tailer"  # which the rules name
    port = service("billing_tailer")["ports"][0].rpartition(":")[2]
    assert job["static_configs"] == [{"targets": [f"billing_tailer:{port}"]}]
    assert {*service("prometheus")["networks"]} & {*service("billing_tailer")["networks"]}


def test_grafana_finds_its_dashboard_and_prometheus() -> None:
    provisioning = in_the_repository("grafana", "/etc/grafana/provisioning")
    (provider,) = yaml.safe_load((provisioning / "dashboards/billing_tailer.yml").read_text("utf-8"))["providers"]
    dashboards = in_the_repository("grafana", provider["options"]["path"])
    assert [path.name for path in dashboards.glob("*.json")] == ["billing_tailer.json"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text("utf-8"))["datasources"]
    port = service("prometheus")["ports"][0].rpartition(":")[2]
    assert source["url"] == f"http://prometheus:{port}"
    assert {*service("grafana")["networks"]} & {*service("prometheus")["networks"]}


def test_migrations_wait_for_postgres_and_give_up_in_the_end() -> None:
    """Podman's compose does not wait for health; and one that is tried for ever is an `up` that never ends."""
    (job,) = pod("Job", "billing-migrate")["containers"]
    for command in (service("migrate")["command"], job["args"]):
        assert command[:2] == ["migrate", "--wait-seconds"]
        assert int(command[2]) >= 60
    assert service("migrate")["restart"] == service("grants")["restart"] == "on-failure:3"
    assert service("migrate")["image"] == service("billing_tailer")["image"]
    assert service("migrate")["pull_policy"] == "never"


# --- secrets ------------------------------------------------------------------------------------------------------


def test_secrets_are_closed_by_their_directory_and_readable_inside(secrets: Path) -> None:
    assert secrets.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in secrets.iterdir()} == {0o644}
    made = {path.name: path.read_text("utf-8").strip() for path in secrets.iterdir()}
    random = re.compile(r"[0-9a-f]{64}")
    found = [random.findall(text) for name, text in made.items() if name != "litellm_env"]
    assert all(len(one) == 1 for one in found)
    assert len({one[0] for one in found}) == len(found) == 9
    assert made["litellm_master_key"].startswith("sk-")


def test_secrets_stay_unless_they_are_rotated(secrets: Path, tmp_path: Path) -> None:
    script, directory = str(ROOT / "deploy/secrets.sh"), tmp_path / "kept"
    subprocess.run(["sh", script, str(directory)], check=True, capture_output=True)
    before = {path.name: (path.read_text("utf-8"), path.stat().st_ino) for path in directory.iterdir()}
    subprocess.run(["sh", script, str(directory)], check=True, capture_output=True)
    subprocess.run(["sh", script, "--rotate", "api_token", str(directory)], check=True, capture_output=True)
    after = {path.name: (path.read_text("utf-8"), path.stat().st_ino) for path in directory.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"api_token"}
    assert after["api_token"][1] == before["api_token"][1], "a running container still sees the old file"
    (directory / "database_url").chmod(0o600)  # a value of one's own, written with another umask
    subprocess.run(["sh", script, str(directory)], check=True, capture_output=True)
    assert (directory / "database_url").stat().st_mode & 0o777 == 0o644
    wrong = subprocess.run(["sh", script, "--rotate", "apitoken", str(directory)], capture_output=True, check=False)
    assert wrong.returncode == 2
    assert not (directory / "apitoken").exists()


def test_roles_have_the_same_names_everywhere(secrets: Path) -> None:
    script = text_of("deploy/postgres/init.sh")
    named = dict(re.findall(r"\b(owner|daemon|readonly|litellm)=(\w+)", script))
    logins = re.findall(r'^login "\$(\w+)" (\w+)$', script, re.MULTILINE)
    assert {role for role, _ in logins} == {*named}
    for role, secret in logins:
        assert (secrets / secret).read_text("utf-8").startswith(f"postgresql://{named[role]}:")
        assert secret in service("postgres")["secrets"]


# --- locks and images ---------------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Package -> version and hashes."""
    found = re.findall(r"^([\w-]+)==(\S+)[^\n]*\\\n((?:    --hash=\S+(?: \\)?\n)+)", text_of(name), re.MULTILINE)
    return {package: (version, frozenset(re.findall(r"sha256:\w+", hashes))) for package, version, hashes in found}


def test_the_lock_of_the_image_agrees_with_the_other_one() -> None:
    everything, image = pins("requirements.lock"), pins("requirements.runtime.lock")
    assert {package: everything[package] for package in image} == image
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    wanted = {re.split(r"[\[>=]", one)[0] for one in project["dependencies"]}
    assert wanted < {*image}
    extras = {re.split(r"[\[>=]", one)[0] for more in project["optional-dependencies"].values() for one in more}
    assert extras & {*image} == {"setuptools"}


def test_dockerfiles_name_no_index_and_keep_their_order() -> None:
    for name in ("deploy/Dockerfile", "deploy/nginx/Dockerfile"):
        assert not re.search(r"://|--(extra-)?index-url|--trusted-host", text_of(name))
    instructions = re.findall(r"^([A-Z]+) (.*)$", text_of("deploy/Dockerfile"), re.MULTILINE)
    final = instructions[max(number for number, (word, _) in enumerate(instructions) if word == "FROM") :]
    words = [word for word, _ in final]
    assert words.index("USER") < len(words) - 1 - words[::-1].index("RUN"), "the smoke test runs as the user"
    assert ("USER", UID) in final
    assert ("STOPSIGNAL", "SIGTERM") in final
    assert ("ENTRYPOINT", '["billing-tailer"]') in final


def test_nginx_is_made_of_the_templates_and_runs_without_root() -> None:
    dockerfile, start = text_of("deploy/nginx/Dockerfile"), text_of("deploy/nginx/start.sh")
    assert "audit.conf.template logrotate.conf" in dockerfile
    assert "log_format" not in start
    placeholders = {
        *re.findall(
            r"@([A-Z_]+)@", text_of("deploy/nginx/audit.conf.template") + text_of("deploy/nginx/logrotate.conf")
        )
    }
    assert placeholders == {*re.findall(r"@([A-Z_]+)@", start)}
    assert service("nginx")["cap_drop"] == ["ALL"]
    assert "USER 101:101" in dockerfile


def test_litellm_is_told_to_post_costs_and_no_texts() -> None:
    config: dict[str, Any] = yaml.safe_load(text_of("deploy/litellm/config.yaml"))
    assert config["litellm_settings"]["callbacks"] == ["generic_api"]
    assert config["litellm_settings"]["turn_off_message_logging"] is True
    assert config["general_settings"]["store_prompts_in_spend_logs"] is False
    environment = service("litellm")["environment"]
    port = service("billing_tailer")["ports"][0].rpartition(":")[2]
    assert environment["GENERIC_LOGGER_ENDPOINT"] == f"http://billing_tailer:{port}/v1/callbacks/litellm"
    read = {*re.findall(r"/run/secrets/(\w+)", text_of("deploy/litellm/start.sh"))}
    assert read == {*service("litellm")["secrets"]}


# --- deploy/k8s ---------------------------------------------------------------------------------------------------


def kubernetes() -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, name) -> object, of all files."""
    objects = [
        one for path in (ROOT / "deploy/k8s").glob("*.yaml") for one in yaml.safe_load_all(path.read_text("utf-8"))
    ]
    found = {(one["kind"], one["metadata"]["name"]): one for one in objects}
    assert len(found) == len(objects)
    return found


def pod(kind: str, name: str) -> dict[str, Any]:
    """The pod's spec of a workload."""
    found: dict[str, Any] = kubernetes()[kind, name]["spec"]["template"]["spec"]
    return found


def containers_of(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in spec["containers"]}


def test_kubernetes_gives_the_daemon_what_it_knows(secrets: Path) -> None:
    objects = kubernetes()
    tailer = containers_of(pod("StatefulSet", "llm-proxy"))["billing-tailer"]
    assert tailer["envFrom"] == [{"configMapRef": {"name": "billing-tailer"}}]
    own = {one["name"]: "llm-proxy-0" for one in tailer["env"]}
    environment = objects["ConfigMap", "billing-tailer"]["data"] | own
    settings_accept(environment, secrets)
    (migrate,) = pod("Job", "billing-migrate")["containers"]
    settings_accept({one["name"]: one["value"] for one in migrate["env"]}, secrets)
    for name, variables in (
        ("billing-tailer", environment),
        ("billing-owner", {one["name"]: one["value"] for one in migrate["env"]}),
    ):
        files_named = {value.removeprefix("/run/secrets/") for key, value in variables.items() if key.endswith("_FILE")}
        assert files_named == {*objects["Secret", name]["stringData"]}
    composed = {key for key in service("billing_tailer")["environment"] if key.startswith(PREFIX)}
    assert {*environment} == composed | {"BILLING_TAILER_SOURCE_ID"}


def test_kubernetes_confines_as_compose_does() -> None:
    proxy, job = pod("StatefulSet", "llm-proxy"), pod("Job", "billing-migrate")
    for spec in (proxy, job):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["fsGroup"] == 65532
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
    users = {name: one["securityContext"]["runAsUser"] for name, one in containers_of(proxy).items()}
    assert users == {"nginx": 101, "billing-tailer": int(UID.partition(":")[0])}
    mounts = {one["mountPath"]: one for one in containers_of(proxy)["billing-tailer"]["volumeMounts"]}
    assert mounts["/billing"] == {"name": "billing", "mountPath": "/billing", "readOnly": True}
    claims = [
        one["metadata"]["name"] for one in kubernetes()["StatefulSet", "llm-proxy"]["spec"]["volumeClaimTemplates"]
    ]
    assert claims == ["billing", "spool"]
    writable = {one["mountPath"] for one in containers_of(proxy)["nginx"]["volumeMounts"]}
    assert writable == {"/billing", *service("nginx")["tmpfs"]}


def test_kubernetes_asks_for_life_and_never_takes_the_proxy_away() -> None:
    tailer = containers_of(pod("StatefulSet", "llm-proxy"))["billing-tailer"]
    assert tailer["ports"] == [{"name": "billing", "containerPort": 9108}]
    assert tailer["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "billing"}
    assert "readinessProbe" not in tailer
    assert "readinessProbe" in containers_of(pod("StatefulSet", "llm-proxy"))["nginx"]
    (endpoint,) = kubernetes()["ServiceMonitor", "billing-tailer"]["spec"]["endpoints"]
    (port,) = kubernetes()["Service", "billing-tailer"]["spec"]["ports"]
    assert endpoint["port"] == port["name"] == port["targetPort"] == "billing"
    labels = kubernetes()["ServiceMonitor", "billing-tailer"]["spec"]["selector"]["matchLabels"]
    assert labels == kubernetes()["Service", "billing-tailer"]["metadata"]["labels"]
