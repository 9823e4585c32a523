r"""Compare the simulation (fleet.py) with the real server: loads, refusals, a killed process of the model.

    python -m benchmarks.fleet_check --record          # about four minutes on two cores, with the demo
    python -m benchmarks.fleet_check --scenarios h100  # no server: the loops of an H100 host in serve.csv

The service times come from closed loops, one with a lone caller and one that loads the server. The
simulation then predicts what it was not fitted to: open loops at --shares of the measured throughput, with a
deadline that the server must refuse at the highest, and a load in whose middle the model's process gets
SIGKILL. Each measured row is followed by the simulated one.

Scenarios:
    h100   loops in serve.csv, of random weights on an H100 host; nothing is measured again
    loads  open loops on the demo server, on this machine
    kill   the same, with the model's process killed once; the time of its restart is the measured one
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np

from benchmarks.fleet import KEPT, RESULTS, Fleet, fleets, medians, row_of, shown
from benchmarks.fleet import figures as figures_of_fleet
from benchmarks.fleet_plan import Caller, Plan
from benchmarks.fleet_times import h100_rows, h100_times, times_of
from benchmarks.load_client import Kind, Measurement, run_plan
from benchmarks.load_client import Plan as Load
from benchmarks.load_figures import figures, read_metrics
from benchmarks.serve import DRAWINGS, RAMP_SHARE, Pictures
from benchmarks.table import machine_name, record
from commands.local_server import LocalServer, local_server
from storage import LocalFolder
from tests.server_processes import runner_of
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.fleet_plan import ServiceTimes

CPU_PASS_SHARE = 0.0
"""On a CPU a pass takes the time of its images, and no constant time."""
LOADED_CLIENTS = 8
KILL_LOAD = 1.3
"""So that tasks are at the model and wait for it when it is killed."""
KILL_AT_S = 8.0
RUNS = 20
"""Simulations of each load, of which the medians count."""
DEADLINE_S = 25.0
SCENARIOS = ("h100", "loads", "kill")
SHOWN = (
    *("scenario", "source", "load", "rate_per_s", "clients", "tasks", "p50_s", "p99_s", "done_per_s"),
    *("refused_calls", *KEPT),
)


@dataclass
class Check:
    """Measures, simulates, prints and records rows.

    Attributes:
        record_to: the CSV file; None: none.
    """

    record_to: Path | None

    def compare(self, scenario: str, hardware: str, plan: Plan, measured: Mapping[str, object]) -> None:
        """Add the row of what was measured, and the row of the simulation of `plan`."""
        simulated = medians(
            [figures_of_fleet(fleet, plan, 0.0) | _kept(fleet, plan) for fleet in fleets(plan, RUNS)]
        )
        row = row_of(scenario, plan, RUNS, simulated) | {"hardware": hardware}
        figures_of_server = {
            name: shown(value) if isinstance(value, float) else value for name, value in measured.items()
        }
        empty = dict.fromkeys(simulated, "")
        of_server = row | empty | {"source": "measured", "runs": 1} | figures_of_server
        for each in (of_server, row):
            sys.stdout.write("  ".join(f"{each[name]!s:>{len(name)}}" for name in SHOWN) + "\n")
            sys.stdout.flush()
            if self.record_to is not None:
                record(self.record_to, [each])


def _kept(fleet: Fleet, plan: Plan) -> dict[str, float]:
    """How many tasks the server had to do after its model's process had died, and when after the kill."""
    if plan.runner_killed_s is None:
        return dict.fromkeys(KEPT, np.nan)
    return _kept_figures(
        [task.ended_s - plan.runner_killed_s for task in fleet.tasks if task.kept is not None]
    )


def _kept_figures(ended_s: list[float]) -> dict[str, float]:
    median_s = float(np.median(ended_s)) if ended_s else np.nan
    return dict(zip(KEPT, (len(ended_s), median_s, max(ended_s, default=np.nan)), strict=True))


def check_h100(check: Check) -> None:
    """The loops of an H100 host in serve.csv: the times are of two of them, the open loops are predicted."""
    times = h100_times()
    for row in h100_rows():
        seconds = float(row["seconds"])
        plan = _plan(times, seconds, float(row["rate_per_s"] or 0), int(row["clients"] or 0), DEADLINE_S)
        measured = {
            "measured": row["measured"],
            "tasks": int(row["n"]),
            "p50_s": float(row["p50_ms"]) / 1000,
            "p99_s": float(row["p99_ms"]) / 1000,
            "max_s": float(row["max_ms"]) / 1000,
            "done_per_s": float(row["throughput_per_s"]),
            "utilization": float(row["device_share"]),
            "refused_calls": 0.0,
        }
        check.compare("check h100", row["hardware"], plan, measured)


def _plan(times: ServiceTimes, seconds: float, rate_per_s: float, clients: int, deadline_s: float) -> Plan:
    ramp_s = seconds * RAMP_SHARE
    return Plan(
        hosts=1,
        times=times,
        rate_per_s=rate_per_s,
        seconds=ramp_s + seconds,
        caller=Caller("once", deadline_s),
        clients=clients,
        exact_count=True,
        warm_up_s=ramp_s,
    )


@dataclass(frozen=True, slots=True)
class Demo:
    """A running demo server with uploaded pictures."""

    server: LocalServer
    pictures: Pictures
    files: list[str]
    keys: list[str]

    def send(
        self, seconds: float, *, clients: int = 0, rate_per_s: float = 0.0, deadline_s: float = DEADLINE_S
    ) -> Measurement:
        """Send one load; returns when all answers are there."""
        load = Load(
            url=self.server.url,
            headers=self.server.headers | {"X-Deadline-Ms": str(round(deadline_s * 1000))},
            pictures=self.files,
            keys=self.keys,
            kinds=[Kind("one prompt", [[prompts[:1]] for prompts in self.pictures.objects])],
            seconds=seconds,
            ramp_s=seconds * RAMP_SHARE,
            clients=clients,
            rate_per_s=rate_per_s,
        )
        return run_plan(load)

    def closed(self, clients: int, seconds: float) -> dict[str, object]:
        """A closed loop, with the columns of serve.csv."""
        before = read_metrics(self.server.url, self.server.headers)
        measured = self.send(seconds, clients=clients)
        after = read_metrics(self.server.url, self.server.headers)
        stages = after.since(before, seconds * (1 + RAMP_SHARE))
        means_ms: dict[str, float] = stages.pop("stage_means_ms")  # type: ignore[assignment]
        texts = " ".join(f"{stage}={ms:.2f}" for stage, ms in means_ms.items())
        return figures([measured.outcomes], seconds) | stages | {"stage_means_ms": texts}


@contextmanager
def demo_server() -> Iterator[Demo]:
    """The demo, after a few requests that are not measured."""
    pictures = Pictures.draw(DRAWINGS)
    with tempfile.TemporaryDirectory(prefix="fleet-") as name, local_server(Path(name) / "data") as server:
        storage = server.data_dir / "storage"
        demo = Demo(server, pictures, *pictures.write(LocalFolder(storage), storage))
        demo.send(3.0, clients=LOADED_CLIENTS)
        yield demo


def check_demo(check: Check, options: argparse.Namespace) -> None:
    """The real server on this machine; a loaded loop comes before each load, since its speed may change."""
    seconds = options.seconds
    with demo_server() as demo:
        lone = demo.closed(1, seconds)
        for share in options.shares if "loads" in options.scenarios else ():
            times = _loaded_times(check, demo, lone, seconds)
            rate_per_s = share * times.capacity_per_s
            measured = demo.send(seconds, rate_per_s=rate_per_s, deadline_s=options.deadline_s)
            plan = _plan(times, seconds, rate_per_s, 0, options.deadline_s)
            row = figures([measured.outcomes], seconds)
            check.compare("check demo", machine_name(), plan, _in_seconds(row))
        if "kill" in options.scenarios:
            _check_kill(check, demo, _loaded_times(check, demo, lone, seconds), seconds)


def _loaded_times(check: Check, demo: Demo, lone: Mapping[str, object], seconds: float) -> ServiceTimes:
    """The service times of now."""
    loaded = demo.closed(LOADED_CLIENTS, seconds)
    times = times_of(lone, loaded, pass_share=CPU_PASS_SHARE)
    plan = _plan(times, seconds, 0.0, LOADED_CLIENTS, DEADLINE_S)
    check.compare("check demo", machine_name(), plan, _in_seconds(loaded))
    return times


def _in_seconds(row: Mapping[str, object]) -> dict[str, object]:
    """Figures of load_figures.py under the names of fleet.py."""
    times_s = {f"{name}_s": float(str(row[f"{name}_ms"])) / 1000 for name in ("p50", "p99", "max")}
    by_status = dict(text.split("=") for text in str(row["errors"]).split())
    tasks = int(str(row["n"]))
    return {
        "tasks": tasks,
        **times_s,
        "done_per_s": row["throughput_per_s"],
        "utilization": row.get("device_share", ""),
        "refused_calls": round(int(by_status.get("429", 0)) / tasks, 4),
        "undone": sum(map(int, by_status.values())),
    }


def _check_kill(check: Check, demo: Demo, times: ServiceTimes, seconds: float) -> None:
    """SIGKILL to the model's process in the middle of a load."""
    rate_per_s = KILL_LOAD * times.capacity_per_s
    killed: list[tuple[datetime, float]] = []

    def kill() -> None:
        time.sleep(KILL_AT_S)  # a part of the load, not a wait for something
        runner = runner_of(demo.server)
        killed.append((datetime.now().astimezone(), time.monotonic()))
        os.kill(runner.pid, signal.SIGKILL)
        wait_until(lambda: not _is_ready(demo.server))
        wait_until(lambda: _is_ready(demo.server))
        killed.append((datetime.now().astimezone(), time.monotonic()))

    killer = threading.Thread(target=kill)
    killer.start()
    measured = demo.send(seconds, rate_per_s=rate_per_s)
    killer.join()
    wait_until(lambda: not _unfinished(demo.server))
    (killed_at, killed_s), (_, ready_s) = killed
    ended_s = _ends_after(demo.server, killed_at)
    plan = replace(
        _plan(times, seconds, rate_per_s, 0, DEADLINE_S),
        runner_killed_s=KILL_AT_S,
        runner_restart_s=ready_s - killed_s,
    )
    row = _in_seconds(figures([measured.outcomes], seconds))
    scenario = f"check kill, restart {ready_s - killed_s:.1f} s"
    check.compare(scenario, machine_name(), plan, row | _kept_figures(ended_s))


def _is_ready(server: LocalServer) -> bool:
    health: dict[str, object] = httpx.get(f"{server.url}/health", timeout=10).json()
    return health["status"] == "ok"


def _rows(server: LocalServer, sql: str, *values: object) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(server.data_dir / "results.sqlite")) as connection:
        return connection.execute(sql, values).fetchall()


def _unfinished(server: LocalServer) -> bool:
    return bool(_rows(server, "SELECT 1 FROM segmentation_results WHERE status NOT IN ('done', 'error')"))


def _ends_after(server: LocalServer, killed_at: datetime) -> list[float]:
    """When the tasks that were begun before the kill, and that the retry has done, ended after it."""
    rows = _rows(server, "SELECT created_at, updated_at FROM segmentation_results WHERE status = 'done'")
    times = [[datetime.fromisoformat(text) for text in row] for row in rows]
    ends_s = [(ended - killed_at).total_seconds() for began, ended in times if began < killed_at]
    # Masks that were being stored at the kill are no retry.
    return [end_s for end_s in ends_s if end_s > 1.0]


def main() -> None:
    """Run the scenarios."""
    options = _parse()
    check = Check(options.record)
    sys.stdout.write("  ".join(SHOWN) + "\n")
    if "h100" in options.scenarios:
        check_h100(check)
    if {"loads", "kill"} & set(options.scenarios):
        check_demo(check, options)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seconds", type=float, default=20.0, help="measured time of each load")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8, 0.95, 1.3])
    parser.add_argument("--deadline-s", type=float, default=3.0, help="of the open loops")
    parser.add_argument("--record", type=Path, nargs="?", const=RESULTS, help=f"append to {RESULTS.name}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
