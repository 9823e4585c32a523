"""Metrics of the API workers, and what BentoML's own count by: the routes that there are.

BentoML's metrics name the path that was asked for, and keep every one for ever: strangers could make series
of their own. sam3_runner/metrics.py has those of the model's side, results/outbox.py those of the outbox.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml._internal.server.http import instruments
from prometheus_client import Counter, Gauge
from starlette.routing import Mount, Route

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, MutableMapping

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

TASKS = Counter(
    "sam3_tasks",
    "Runs of tasks by how they ended: done, replayed, error, kept, given_up, or refused before they began; "
    "code is the error's",
    ["outcome", "code"],
)
TASKS_IN_FLIGHT = Gauge("sam3_tasks_in_flight", "Tasks that are worked on", multiprocess_mode="livesum")
PROCESS_STARTS = Counter("sam3_process_starts", "Starts of the server's processes", ["process"])

# What alerts look at begins at 0, so that the first of its kind is seen.
for _outcome in ("done", "replayed"):
    TASKS.labels(_outcome, "")
for _code in (
    *("INFERENCE_FAILED", "INTERNAL_ERROR", "DEADLINE_EXCEEDED"),
    *("STORAGE_UNAVAILABLE", "RESULTS_UNAVAILABLE"),
):
    TASKS.labels("error", _code)
TASKS.labels("refused", "OVERLOADED")

OTHER = "other"
_ASKED = "sam3.asked"


def count_by_route(paths: Callable[[], Iterable[str]]) -> None:
    """Make BentoML's metrics know only its own routes and `paths`, and count the rest as `other`.

    Call it before the service is served (a private name of the pinned bentoml 1.4.40).

    Args:
        paths: of the mounted application's routes; asked for once, at the first request.
    """

    class RouteMetrics(instruments.RunnerTrafficMetricsMiddleware):
        """BentoML's middleware, which is shown a route where it looks for the path."""

        def __init__(self, app: App, **options: Any) -> None:
            super().__init__(_as_asked(app), **options)
            self._route_of: Callable[[str], str] | None = None

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            """Count one request, and hand it on as it came."""
            if scope["type"] == "lifespan":
                await self.app({_ASKED: scope}, receive, send)
                return
            if self._route_of is None:
                self._route_of = _routes_of(scope["app"].routes, paths())
            shown = {"type": scope["type"], "path": self._route_of(scope["path"]), _ASKED: scope}
            await super().__call__(shown, receive, send)

    instruments.RunnerTrafficMetricsMiddleware = RouteMetrics  # type: ignore[misc, assignment]


def _as_asked(app: App) -> App:
    async def call(shown: Scope, receive: Receive, send: Send) -> None:
        await app(shown[_ASKED], receive, send)

    return call


def _routes_of(routes: Iterable[object], paths: Iterable[str]) -> Callable[[str], str]:
    """The label of a path. A route with parameters is `other`: none of ours has any."""
    known = {*paths, *(route.path for route in routes if isinstance(route, Route))}
    folders = tuple(f"{route.path}/" for route in routes if isinstance(route, Mount) and route.path)

    def route_of(path: str) -> str:
        if path in known:
            return path
        return next((folder for folder in folders if path.startswith(folder)), OTHER)

    return route_of
