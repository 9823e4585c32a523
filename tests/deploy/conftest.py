"""A server that answers and has no model, as one whose weights are still to come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from tests.edge import wait_for
from tests.server_processes import started_server
from tests.services.hub import TOKEN
from tests.services.processes import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from commands.local_server import LocalServer


@pytest.fixture(scope="session")
def server_without_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """It waits for a hub that is away."""
    folder = tmp_path_factory.mktemp("without-model")
    [nobody] = free_ports(1)
    settings = {
        "SAM3_WEIGHTS_PATH": str(folder / "weights" / "sam3.pt"),
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": f"http://127.0.0.1:{nobody}",
        "API_WORKERS": "1",
    }
    with started_server(folder / "data", settings) as (server, _):
        wait_for(lambda: answers(server), bool)
        yield server


def answers(server: LocalServer) -> bool:
    try:
        return httpx.get(f"{server.url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
