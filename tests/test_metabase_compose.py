"""The compose file: what it opens, what it is given, and that .env.example explains all that is asked for."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from dotenv import dotenv_values

from metabase.api import DEFAULT_URL, version_warning

FOLDER = Path(__file__).parents[1] / "metabase"
COMPOSE = FOLDER / "docker-compose.yml"
EXAMPLE = FOLDER / ".env.example"


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert list(services) == ["metabase"]
    return dict(services["metabase"])


def defaults() -> dict[str, str]:
    """`${NAME:-value}` of the compose file, by name."""
    return dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE.read_text()))


def test_every_variable_is_explained_and_every_explained_one_is_used() -> None:
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    used |= set(re.findall(r"_(?:secret|needed)\(settings, \"(\w+)\"\)", (FOLDER / "provision.py").read_text()))
    assert used == set(dotenv_values(EXAMPLE))


def test_defaults_are_those_of_the_example_and_secrets_have_none() -> None:
    example = dotenv_values(EXAMPLE)
    assert {name: example[name] for name in defaults()} == defaults()
    assert not [name for name in defaults() if "PASSWORD" in name or "SECRET" in name]
    secrets = [name for name in example if "PASSWORD" in name or "SECRET" in name]
    assert [example[name] for name in secrets] == [""] * 4


def test_image_is_pinned_inside_the_tested_range(service: dict[str, Any]) -> None:
    image, _, tag = service["image"].replace("${METABASE_IMAGE_TAG:-", "").rstrip("}").partition(":")
    assert image == "metabase/metabase"  # the edition without a licence
    assert re.fullmatch(r"v0\.\d+\.\d+\.\d+", tag)
    assert version_warning(tag) is None


def test_only_this_machine_reaches_it_where_provisioning_looks(service: dict[str, Any]) -> None:
    environment = service["environment"]
    assert service["network_mode"] == "host"
    assert "ports" not in service
    assert environment["MB_JETTY_HOST"] == "127.0.0.1" == urlsplit(DEFAULT_URL).hostname
    assert int(environment["MB_JETTY_PORT"]) == urlsplit(DEFAULT_URL).port
    assert service["healthcheck"]["test"][-1] == f"{DEFAULT_URL}/api/health"
    assert urlsplit(environment["MB_SITE_URL"]).port == urlsplit(DEFAULT_URL).port


def test_its_own_database_is_ours_and_nothing_is_sent_home(service: dict[str, Any]) -> None:
    environment = service["environment"]
    assert environment["MB_DB_TYPE"] == "postgres"
    assert (environment["MB_DB_DBNAME"], environment["MB_DB_USER"]) == ("metabase", "metabase")
    for name in ("MB_ANON_TRACKING_ENABLED", "MB_CHECK_FOR_UPDATES", "MB_LOAD_SAMPLE_CONTENT"):
        assert environment[name] == "false"  # a text: as a boolean of YAML, older clients refuse it
    assert all(isinstance(value, str) for value in environment.values())
    assert "MB_SETUP_TOKEN" not in environment  # newer servers do not read it


def test_it_comes_back_and_cannot_eat_the_machine(service: dict[str, Any]) -> None:
    assert service["restart"] == "unless-stopped"
    heap, limit = re.search(r"-Xmx(\d+)g", service["environment"]["JAVA_OPTS"]), service["mem_limit"]
    assert heap is not None
    assert int(heap[1]) * 2 <= int(limit.removesuffix("g"))  # the JVM needs about as much beside its heap


def has_compose() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_compose(), reason="no docker client with the compose plug-in")
def test_docker_compose_accepts_it(tmp_path: Path) -> None:
    values = {name: value or "secret2024secret2024" for name, value in dotenv_values(EXAMPLE).items()}
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    command = ["docker", "compose", "--env-file", str(tmp_path / "env"), "--file", str(COMPOSE), "config"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["services"]["metabase"]["network_mode"] == "host"
