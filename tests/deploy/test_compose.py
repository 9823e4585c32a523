"""The compose file: what the Compose specification says of it, what it closes, and its health check."""

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


def test_follows_the_specification() -> None:
    """The schema of the Compose specification, which refuses names that it does not know."""
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
def test_is_closed(name: str) -> None:
    """No service writes to its root, gains rights or is reached from outside; images are given by digest."""
    service: dict[str, Any] = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["image"].startswith("${"), "an image that is named here would be one by tag"
    assert ":?" in service["image"], "without it compose stops and says what to set"


def test_holds_no_secret() -> None:
    """Secrets come from files outside of the repository."""
    for service in SERVICES.values():
        assert service["env_file"].partition(":-")[2].startswith("/etc/sam3/")
        assert set(service.get("environment", {})) <= {"DATA_DIR", "SAM3_WEIGHTS_PATH"}


def health_check(port: int) -> int:
    """Run the container's health check against `port` of this machine; its exit status."""
    kind, *command = SERVICES["sam3"]["healthcheck"]["test"]
    assert kind == "CMD"
    # Compose writes a dollar sign as two.
    words = [word.replace("$$", "$").replace("/127.0.0.1/3000", f"/127.0.0.1/{port}") for word in command]
    return subprocess.run(words, capture_output=True, timeout=30, check=False).returncode


@pytest.mark.server
def test_health_check_of_a_ready_server(server: LocalServer) -> None:
    """A server that is ready is healthy."""
    assert health_check(int(server.url.rpartition(":")[2])) == 0


@pytest.mark.server
def test_health_check_of_a_server_that_is_not_ready(server_without_model: LocalServer) -> None:
    """The check fails without a server, and for a server without a model."""
    with reserved_ports(1) as [closed]:
        assert health_check(closed) != 0
    assert health_check(int(server_without_model.url.rpartition(":")[2])) != 0
