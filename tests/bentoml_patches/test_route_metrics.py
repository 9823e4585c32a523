"""The patch of BentoML's HTTP metrics."""

from __future__ import annotations

from typing import Any

import pytest
from bentoml._internal.server.http import instruments as imported
from bentoml._internal.server.metrics.prometheus import PrometheusClient
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from bentoml_patches import route_metrics


@pytest.fixture(autouse=True)
def instruments(monkeypatch: pytest.MonkeyPatch, unpatched: Any) -> Any:
    """BentoML's own module of middlewares."""
    theirs = unpatched(imported)
    monkeypatch.setattr(route_metrics, "instruments", theirs)
    return theirs


def endpoints_counted(instruments: Any, namespace: str) -> set[str]:
    """The endpoints that the metrics name after calls of one known path and two unknown ones."""
    middleware: Any = instruments.RunnerTrafficMetricsMiddleware

    class Metrics(middleware):  # type: ignore[misc]
        def _setup(self) -> None:
            super()._setup(metrics_client=PrometheusClient(multiproc=False), duration_buckets=(1.0,))

    app = Starlette(routes=[Route("/known", lambda _: PlainTextResponse("ok"))])
    app.add_middleware(Metrics, namespace=namespace)
    with TestClient(app) as client:
        assert client.get("/known").status_code == 200
        for unknown in ("/nothing", "/nowhere", "/folder/one", "/folder/two", "/folder"):
            assert client.get(unknown).status_code == 404
    return {
        sample.labels["endpoint"]
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == f"{namespace}_request_total"
    }


def test_the_patch_is_needed(instruments: Any) -> None:
    """BentoML's own metrics get a series for each path that a caller sends."""
    assert {"/known", "/nothing", "/nowhere"} <= endpoints_counted(instruments, "unpatched")


def test_unknown_paths_share_one_series(instruments: Any) -> None:
    """After the patch the metrics name the routes, folders of the mounted application once, and `other`."""
    route_metrics.patch(lambda: ["/mounted", "/folder/"])
    assert endpoints_counted(instruments, "patched") - {"/schema.json"} == {"/known", "/folder/", "other"}
