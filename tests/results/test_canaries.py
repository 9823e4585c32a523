"""Why results/supabase_rest.py never cancels a request, and has slots of its own."""

from __future__ import annotations

import asyncio

import httpcore
import pytest

pytestmark = pytest.mark.anyio

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(ANSWER)
    await writer.drain()
    writer.close()


async def test_httpcore_still_loses_connections() -> None:
    """A request that is cancelled just after it got its connection keeps it for ever.

    When this fails, httpcore is mended: the slots and the shield of `SupabaseRest` can go.
    """
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server, httpcore.AsyncConnectionPool(max_connections=1) as pool:
        first = await pool.handle_async_request(httpcore.Request("GET", url, headers={"Host": "db"}))
        second = asyncio.create_task(pool.request("GET", url, headers={"Host": "db"}))
        while "Requests: 1 active, 1 queued" not in repr(pool):  # noqa: ASYNC110 - the pool has no event
            await asyncio.sleep(0)
        await first.aread()
        await first.aclose()
        second.cancel()
        await asyncio.wait([second])
        with pytest.raises(httpcore.PoolTimeout):
            await pool.request("GET", url, headers={"Host": "db"}, extensions={"timeout": {"pool": 1.0}})
