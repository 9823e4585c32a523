"""The version is defined in version.py, and reported everywhere; the Python client has the same."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from setuptools.config.pyprojecttoml import read_configuration

import sam3_client
from tests import new_connection
from version import VERSION

if TYPE_CHECKING:
    from commands.local_server import LocalServer

ROOT = Path(__file__).parent.parent


def test_package_has_the_version() -> None:
    """The package's version is that of version.py; pyproject.toml has no other."""
    pyproject = ROOT / "pyproject.toml"
    assert read_configuration(pyproject)["project"]["version"] == VERSION
    assert "version" not in tomllib.loads(pyproject.read_text())["project"]


def test_client_has_the_version() -> None:
    """The Python client is released with the server, under the same version."""
    assert sam3_client.__version__ == VERSION


@pytest.mark.server
def test_server_reports_the_version(server: LocalServer) -> None:
    """The API description and model/info have the version."""
    key = {"X-API-Key": server.api_key}
    assert new_connection.get(f"{server.url}/docs.json").json()["info"]["version"] == VERSION
    info = new_connection.get(f"{server.url}/api/v1/model/info", headers=key)
    assert info.json()["model_version"] == VERSION
