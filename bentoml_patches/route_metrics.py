"""BentoML's HTTP metrics: labels from the routes that exist, not from the paths that callers send.

BentoML labels its metrics with the requested path and keeps every label for ever: without this, any caller
could create series.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml._internal.server.http import instruments
from starlette.routing import Mount, Route

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starlette.types import ASGIApp, Receive, Scope, Send

OTHER = "other"
"""The label of every path that is no route."""
_ORIGINAL = "sam3.original"


def patch(paths: Callable[[], Iterable[str]]) -> None:
    """Make BentoML's metrics know only its own routes and `paths`, and count the rest as `other`.

    Call it before the service is served.

    Args:
        paths: of the mounted application's routes; called once, at the first request. One that ends with
            a slash stands for all paths below it.
    """

    class RouteMetrics(instruments.RunnerTrafficMetricsMiddleware):
        """BentoML's middleware, which gets the route in place of the path."""

        def __init__(self, app: ASGIApp, **options: Any) -> None:
            super().__init__(_with_original_scope(app), **options)
            self._route_of: Callable[[str], str] | None = None

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            """Count one request, and pass it on unchanged."""
            if scope["type"] == "lifespan":
                await self.app({_ORIGINAL: scope}, receive, send)
                return
            if self._route_of is None:
                self._route_of = _routes_of(scope["app"].routes, paths())
            counted = {"type": scope["type"], "path": self._route_of(scope["path"]), _ORIGINAL: scope}
            await super().__call__(counted, receive, send)

    instruments.RunnerTrafficMetricsMiddleware = RouteMetrics  # type: ignore[misc, assignment]


def _with_original_scope(app: ASGIApp) -> ASGIApp:
    async def call(counted: Scope, receive: Receive, send: Send) -> None:
        await app(counted[_ORIGINAL], receive, send)

    return call


def _routes_of(routes: Iterable[object], paths: Iterable[str]) -> Callable[[str], str]:
    """The label of a path. A route with parameters is `other`: none of ours has any."""
    ours = [*paths]
    known = {*ours, *(route.path for route in routes if isinstance(route, Route))}
    mounted = (f"{route.path}/" for route in routes if isinstance(route, Mount) and route.path)
    folders = (*(path for path in ours if path.endswith("/") and path != "/"), *mounted)

    def route_of(path: str) -> str:
        if path in known:
            return path
        return next((folder for folder in folders if path.startswith(folder)), OTHER)

    return route_of
