"""The alerts and the dashboard ask for what the server really says: a real Prometheus scrapes it."""

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
OF_NOTHING = "Sam3GpuMemoryFull"
"""A share of no memory is no number, where there is no GPU."""


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server that works."""
    with local_server(tmp_path_factory.mktemp("works"), BOTH) as server:
        yield server


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory, works: LocalServer) -> Iterator[Prometheus]:
    """Prometheus over that server and one whose R2 is away, with a task that waits for it."""
    need(missing())
    unreachable = {"R2_ACCESS_KEY_ID": "a-key-id", "R2_SECRET_ACCESS_KEY": "a-secret"}
    with (
        reserved_ports(1) as [closed],
        local_server(
            tmp_path_factory.mktemp("unreachable"),
            BOTH | unreachable | {"R2_ENDPOINT": f"http://127.0.0.1:{closed}"},
        ) as fails,
        Edge(fails) as edge,
        prometheus(tmp_path_factory.mktemp("prometheus"), [works, fails], KEY, ALERTS) as running,
    ):
        body = edge.body("uploads/user-1/any", "circle")
        edge.insert_row(body)
        assert edge.send(body).status_code == httpx.codes.BAD_GATEWAY
        yield running


def unanswered(watching: Prometheus, works: LocalServer, queries: Mapping[str, str]) -> dict[str, str]:
    """The queries that give no number, or not by the labels that they group by, while requests come."""
    left = dict(queries)

    def ask() -> dict[str, str]:
        edge.answer(image, ["circle", f"number {next(numbers)}"])
        for name, query in list(left.items()):
            labels = {label.strip() for group in GROUPED.findall(query) for label in group.split(",")}
            found = watching.query(query)
            values = [float(series["value"][1]) for series in found]
            if (name == OF_NOTHING and found) or not all(map(math.isnan, values)):
                assert all(labels - {"le"} <= series["metric"].keys() for series in found), query
                del left[name]
        return left

    image, numbers = png_bytes(scene(100).image), count()
    until_s = time.monotonic() + WAIT_S
    with Edge(works) as edge:
        while ask() and time.monotonic() < until_s:
            pass
    return left


def test_every_alert_looks_at_something(watching: Prometheus, works: LocalServer) -> None:
    """What each alert compares with its threshold is something that the server says."""
    rules = watching.rules()
    values = {rule["name"]: THRESHOLD.fullmatch(rule["query"]) for rule in rules}
    assert len(values) == len(rules) > 10
    assert unanswered(watching, works, {name: match[1] for name, match in values.items() if match}) == {}
    assert all(values.values())


def test_every_panel_shows_something(watching: Prometheus, works: LocalServer) -> None:
    """Each query of the dashboard has an answer."""
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    queries = {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$__rate_interval", "1m")
        .replace("$instance", ".*")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }
    assert len(queries) > 20
    assert unanswered(watching, works, queries) == {}


def test_every_alert_is_explained(watching: Prometheus) -> None:
    """Each alert has a summary, a description and a place in the guide that says what to do."""
    headings = re.findall(r"^### (.+)$", GUIDE.read_text(), re.MULTILINE)
    places = {f"docs/observability.md#{heading.lower()}" for heading in headings}
    for rule in watching.rules():
        annotations = rule["annotations"]
        assert {"summary", "description", "runbook"} <= annotations.keys(), rule["name"]
        assert annotations["runbook"] in places, rule["name"]


def test_every_metric_of_ours_is_documented(works: LocalServer) -> None:
    """The guide names each of the server's own metrics."""
    scraped = httpx.get(f"{works.url}/metrics", headers=works.headers, timeout=60).text
    ours = set(re.findall(r"^# TYPE (sam3_\w+)", scraped, re.MULTILINE))
    assert len(ours) > 10
    assert ours <= set(re.findall(r"`(sam3_\w+)", GUIDE.read_text()))


@pytest.mark.parametrize(
    "command",
    ["check rules alerts.yaml", "test rules alerts_test.yaml", "check config --syntax-only prometheus.yaml"],
)
def test_files_are_right(command: str) -> None:
    """The rules and the example of a configuration can be read, and alerts fire when they must."""
    need(missing())
    ended = subprocess.run(
        ["promtool", *command.split()],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
