"""A server that answers every request at once with one constant document: what the load client alone reaches.

python -m benchmarks.trivial_server PORT
"""

from __future__ import annotations

import sys

from aiohttp import web

ANSWER = {
    "labels": ["red circle"],
    "inference_time_ms": 0.0,
    "instances": [{"label": "red circle", "score": 0.9961, "box": [923.74, 364.3, 1075.15, 504.79]}] * 5,
}


async def answer(request: web.Request) -> web.Response:
    """Read the body, and answer."""
    await request.read()
    return web.json_response(ANSWER)


def main() -> None:
    """Serve until the process is ended."""
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)


if __name__ == "__main__":
    main()
