"""A server that answers HTTP but has no model, because it waits for its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from commands.local_server import reserved_ports
from tests import new_connection
from tests.edge import wait_for
from tests.server_processes import started_server
from tests.services.hub import TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from commands.local_server import LocalServer


@pytest.fixture(scope="session")
def server_without_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """Its weights' hub is unreachable."""
    folder = tmp_path_factory.mktemp("without-model")
    settings = {
        "SAM3_WEIGHTS_PATH": str(folder / "weights" / "sam3.pt"),
        "HF_TOKEN": TOKEN,
        "API_WORKERS": "1",
    }
    with (
        reserved_ports(1) as [closed],
        started_server(folder / "data", settings | {"HF_ENDPOINT": f"http://127.0.0.1:{closed}"}) as (
            server,
            _,
        ),
    ):
        wait_for(lambda: answers(server), bool)
        yield server


def answers(server: LocalServer) -> bool:
    try:
        return new_connection.get(f"{server.url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
