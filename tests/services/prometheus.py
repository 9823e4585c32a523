"""A real Prometheus that scrapes local servers, and promtool."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx

from commands.local_server import reserved_ports
from tests import new_connection
from tests.services.processes import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from commands.local_server import LocalServer

SCRAPE_INTERVAL_S = 1


def missing() -> str | None:
    """Why Prometheus cannot run here; None if it can."""
    found = shutil.which("prometheus") and shutil.which("promtool")
    return None if found else "no Prometheus on PATH (apt-get install prometheus)"


class Prometheus:
    """A client of a running Prometheus.

    Args:
        url: without a trailing slash.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query, each with `metric` and `value`; fails if the query is invalid."""
        response = new_connection.get(f"{self.url}/api/v1/query", params={"query": expression})
        answer = response.json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """The alerting rules, each with `name`, `query`, `annotations`."""
        groups = new_connection.get(f"{self.url}/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@contextmanager
def prometheus(folder: Path, servers: Sequence[LocalServer], key: str, rules: Path) -> Iterator[Prometheus]:
    """Run Prometheus until the end of the block: its job `sam3` scrapes these servers with a Bearer key."""
    targets = [server.url.removeprefix("http://") for server in servers]
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "prometheus.json"  # JSON is YAML
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": f"{SCRAPE_INTERVAL_S}s"},
                "rule_files": [str(rules)],
                "scrape_configs": [
                    {
                        "job_name": "sam3",
                        "authorization": {"type": "Bearer", "credentials": key},
                        "static_configs": [{"targets": targets}],
                    }
                ],
            }
        )
    )
    with reserved_ports(1) as [port]:
        url = f"http://127.0.0.1:{port}"
        process = ServerProcess(
            [
                *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"),
                *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
            ],
            folder / "prometheus.log",
            lambda: _is_ready(url),
            stop_signal=signal.SIGTERM,
        )
        process.start()
        try:
            yield Prometheus(url)
        finally:
            process.stop()


def _is_ready(url: str) -> bool:
    try:
        return new_connection.get(f"{url}/-/ready").status_code == httpx.codes.OK
    except httpx.TransportError as error:
        raise OSError from error
