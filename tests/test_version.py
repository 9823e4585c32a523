"""The version stands in version.py alone; all that speak of it say the same."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from setuptools.config.pyprojecttoml import read_configuration

from version import VERSION

if TYPE_CHECKING:
    from commands.local_server import LocalServer

ROOT = Path(__file__).parent.parent


def test_package_has_the_version() -> None:
    """What an installer reads from pyproject.toml is version.py's, and no second one stands there."""
    pyproject = ROOT / "pyproject.toml"
    assert read_configuration(pyproject)["project"]["version"] == VERSION
    assert "version" not in tomllib.loads(pyproject.read_text())["project"]


@pytest.mark.server
def test_server_has_the_version(server: LocalServer) -> None:
    """Callers see it in the description of the routes and beside the model."""
    key = {"X-API-Key": server.api_key}
    assert httpx.get(f"{server.url}/docs.json").json()["info"]["version"] == VERSION
    info = httpx.get(f"{server.url}/api/v1/model/info", headers=key)
    assert info.json()["model_version"] == VERSION
