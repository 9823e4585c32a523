"""The alerts and the dashboard query metrics that the server exports; a real Prometheus scrapes it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from itertools import count
from typing import TYPE_CHECKING

import httpx
import pytest

from commands.local_server import ROOT, LocalServer, local_server, reserved_ports
from tests import new_connection
from tests.drawn import scene
from tests.edge import WAIT_S, Edge, png_bytes
from tests.services.prometheus import Prometheus, missing, prometheus
from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytestmark = pytest.mark.server

FOLDER = ROOT / "deploy" / "observability"
ALERTS = FOLDER / "alerts.yaml"
GUIDE = ROOT / "docs" / "observability.md"
KEY = "k" * 32
BOTH = {"API_SECRET_KEY": KEY, "METRICS_AND_DOCS": "key", "API_WORKERS": "1"}
THRESHOLD = re.compile(r"(.+) (?:==|<|>) [\d.]+", re.DOTALL)
GROUPED = re.compile(r"by \(([^)]*)\)")
WITHOUT_GPU = "Sam3GpuMemoryFull"
"""Without a GPU its ratio is 0/0, which is not a number."""


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A healthy server."""
    with local_server(tmp_path_factory.mktemp("healthy"), BOTH) as server:
        yield server


@pytest.fixture(scope="module")
def scraper(tmp_path_factory: pytest.TempPathFactory, healthy: LocalServer) -> Iterator[Prometheus]:
    """Prometheus for that server and one whose R2 is unreachable, with a task that waits for it."""
    need(missing())
    unreachable = {"R2_ACCESS_KEY_ID": "a-key-id", "R2_SECRET_ACCESS_KEY": "a-secret"}
    with (
        reserved_ports(1) as [closed],
        local_server(
            tmp_path_factory.mktemp("unreachable"),
            BOTH | unreachable | {"R2_ENDPOINT": f"http://127.0.0.1:{closed}"},
        ) as fails,
        Edge(fails) as edge,
        prometheus(tmp_path_factory.mktemp("prometheus"), [healthy, fails], KEY, ALERTS) as running,
    ):
        body = edge.body("uploads/user-1/any", "circle")
        edge.insert_row(body)
        assert edge.send(body).status_code == httpx.codes.BAD_GATEWAY
        yield running


def unanswered(scraper: Prometheus, healthy: LocalServer, queries: Mapping[str, str]) -> dict[str, str]:
    """Send requests and evaluate the queries; returns those without a number.

    Checks that each result has the labels that its query groups by.
    """
    left = dict(queries)

    def evaluate() -> dict[str, str]:
        edge.answer(image, ["circle", f"number {next(numbers)}"])
        for name, query in list(left.items()):
            labels = {label.strip() for group in GROUPED.findall(query) for label in group.split(",")}
            found = scraper.query(query)
            values = [float(series["value"][1]) for series in found]
            if (name == WITHOUT_GPU and found) or not all(map(math.isnan, values)):
                assert all(labels - {"le"} <= series["metric"].keys() for series in found), query
                del left[name]
        return left

    image, numbers = png_bytes(scene(100).image), count()
    until_s = time.monotonic() + WAIT_S
    with Edge(healthy) as edge:
        while evaluate() and time.monotonic() < until_s:
            pass
    return left


def test_every_alert_queries_an_existing_metric(scraper: Prometheus, healthy: LocalServer) -> None:
    """The expression that each alert compares with its threshold has a value."""
    rules = scraper.rules()
    values = {rule["name"]: THRESHOLD.fullmatch(rule["query"]) for rule in rules}
    assert len(values) == len(rules) > 10
    assert unanswered(scraper, healthy, {name: match[1] for name, match in values.items() if match}) == {}
    assert all(values.values())


def test_every_panel_has_data(scraper: Prometheus, healthy: LocalServer) -> None:
    """Each query of the dashboard has a result."""
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    queries = {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$__rate_interval", "1m")
        .replace("$instance", ".*")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }
    assert len(queries) > 20
    assert unanswered(scraper, healthy, queries) == {}


def test_every_alert_is_documented(scraper: Prometheus) -> None:
    """Each alert has a summary, a description and a section of the guide as runbook."""
    headings = re.findall(r"^### (.+)$", GUIDE.read_text(), re.MULTILINE)
    sections = {f"docs/observability.md#{heading.lower()}" for heading in headings}
    for rule in scraper.rules():
        annotations = rule["annotations"]
        assert {"summary", "description", "runbook"} <= annotations.keys(), rule["name"]
        assert annotations["runbook"] in sections, rule["name"]


def test_every_metric_is_documented(healthy: LocalServer) -> None:
    """The guide names each of the server's own metrics."""
    with Edge(healthy) as edge:
        edge.answer(png_bytes(scene(100).image), "circle")
    scraped = new_connection.get(f"{healthy.url}/metrics", headers=healthy.headers, timeout=60).text
    ours = set(re.findall(r"^# TYPE (sam3_\w+)", scraped, re.MULTILINE))
    assert len(ours) > 10
    assert ours <= set(re.findall(r"`(sam3_\w+)", GUIDE.read_text()))


@pytest.mark.parametrize(
    "command",
    ["check rules alerts.yaml", "test rules alerts_test.yaml", "check config --syntax-only prometheus.yaml"],
)
def test_promtool_accepts_the_files(command: str) -> None:
    """The rules and the example configuration are valid, and the alerts fire when they must."""
    need(missing())
    ended = subprocess.run(
        ["promtool", *command.split()],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
