"""The Compose file: conforms to the specification, restricts its services, and has a health check."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from commands.local_server import reserved_ports
from tests.tiers import need

if TYPE_CHECKING:
    from commands.local_server import LocalServer

FILE = Path(__file__).parent.parent.parent / "deploy" / "compose.yaml"
SERVICES = yaml.safe_load(FILE.read_text())["services"]


def test_file_conforms_to_the_specification() -> None:
    """The file is valid under the schema of the Compose specification, which refuses unknown names."""
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("check-jsonschema", path=search)
    need(None if program else "no check-jsonschema (pip install check-jsonschema)")
    checked = subprocess.run(
        [str(program), "--builtin-schema", "vendor.compose-spec", str(FILE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_restricted(name: str) -> None:
    """No service can write to its root, gain rights or be reached from outside; images come by digest."""
    service: dict[str, Any] = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["image"].startswith("${"), "a name in this file could only have a tag"
    assert ":?" in service["image"], "compose must stop with a message if it is not set"


def test_file_contains_no_secret() -> None:
    """Secrets come from files outside the repository."""
    for service in SERVICES.values():
        assert service["env_file"].partition(":-")[2].startswith("/etc/sam3/")
        assert set(service.get("environment", {})) <= {"DATA_DIR", "SAM3_WEIGHTS_PATH"}


def health_check(port: int) -> int:
    """Run the container's health check against a local port; returns its exit status."""
    kind, *command = SERVICES["sam3"]["healthcheck"]["test"]
    assert kind == "CMD"
    # In a Compose file two dollar signs stand for one.
    words = [word.replace("$$", "$").replace("/127.0.0.1/3000", f"/127.0.0.1/{port}") for word in command]
    return subprocess.run(words, capture_output=True, timeout=30, check=False).returncode


@pytest.mark.server
def test_ready_server_is_healthy(server: LocalServer) -> None:
    """The check succeeds for a ready server."""
    assert health_check(int(server.url.rpartition(":")[2])) == 0


@pytest.mark.server
def test_server_without_model_is_unhealthy(server_without_model: LocalServer) -> None:
    """The check fails without a server, and for a server without a model."""
    with reserved_ports(1) as [closed]:
        assert health_check(closed) != 0
    assert health_check(int(server_without_model.url.rpartition(":")[2])) != 0
