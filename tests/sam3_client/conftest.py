"""One call to a server through either client, so that each test runs with both."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from sam3_client import AsyncClient, Client

if TYPE_CHECKING:
    from commands.local_server import LocalServer
    from sam3_client import Result


class Segment(Protocol):
    """`segment` of a new client; `client` holds arguments of the client itself."""

    def __call__(self, *args: Any, client: dict[str, Any] | None = None, **options: Any) -> Result:
        """Segment an image."""


@pytest.fixture(params=["sync", "async"])
def segment(request: pytest.FixtureRequest, server: LocalServer) -> Segment:
    """Calls `server`, unless `client` names another one."""

    def call(*args: Any, client: dict[str, Any] | None = None, **options: Any) -> Result:
        settings = {"url": server.url, "key": server.api_key, **(client or {})}
        if request.param == "sync":
            with Client(**settings) as caller:
                return caller.segment(*args, **options)
        return asyncio.run(_awaited(settings, args, options))

    return call


async def _awaited(settings: dict[str, Any], args: tuple[Any, ...], options: dict[str, Any]) -> Result:
    async with AsyncClient(**settings) as caller:
        return await caller.segment(*args, **options)
