"""The patch of BentoML's client of the runner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from _bentoml_impl.client.proxy2 import SessionManager
from aiohttp import web

from bentoml_patches import runner_connections

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Proxy:
    """What the patch needs of BentoML's proxy, with BentoML's own session manager."""

    def __init__(self, socket: Path) -> None:
        self._session_manager = SessionManager(f"file://{socket}", timeout=10, headers={})
        self.to_async: Any = self


async def connections_of_two_calls(socket: Path, *, patched: bool) -> int:
    """How many connections a real server gets for two calls in a row."""

    async def answer(request: web.Request) -> web.Response:
        transports.append(request.transport)
        return web.Response(text="ok")

    transports: list[Any] = []
    server = web.Application()
    server.router.add_get("/", answer)
    runner = web.AppRunner(server)
    await runner.setup()
    await web.UnixSite(runner, str(socket)).start()
    proxy = Proxy(socket)
    if patched:
        runner_connections.patch(proxy)
    session = await proxy._session_manager.get_session()
    for _ in range(2):
        async with session.get("/") as response:
            assert await response.text() == "ok"
    await proxy._session_manager.close()
    await runner.cleanup()
    return len({id(transport) for transport in transports})


async def test_the_patch_is_needed(tmp_path: Path) -> None:
    """BentoML's own client uses one connection again, which the runner may be closing."""
    assert await connections_of_two_calls(tmp_path / "runner.sock", patched=False) == 1


async def test_each_call_has_its_own_connection(tmp_path: Path) -> None:
    """After the patch no call meets a connection of an earlier one."""
    assert await connections_of_two_calls(tmp_path / "runner.sock", patched=True) == 2
