r"""Simulate the online system: an Edge and its queue, GPU hosts that may be lost, and the rows of the tasks.

    python -m benchmarks.fleet --hosts 2 4 --loads 0.5 0.7 --losses 0 0.17          # one line a combination
    python -m benchmarks.fleet --hosts 4 --loads 0.7 --lose-at-s 600 --seconds 6000 # one loss, and its cost

    callers --calls--> tunnel --a host--> admission, slots --> passes of the model --> row settled
       ^   '-- 429, 503, 409, no connection: again after a delay, from the queue where there is one

What is simulated is what the server, the Edge and the table do (docs/architecture.md,
docs/decisions/tasks.md, examples/edge): a call is refused where its deadline cannot be met; up to 8 images
share a pass, the earliest deadline first; a claimed row belongs to its host until its lease is over, also
when the host is lost. Times are constants from measurements; arrivals, losses and the choice of a host are
random.

Not simulated: contention for CPUs, the network's time, users who wait for each other, failures of R2, of the
table and of the queue, and more than one image or prompt a task. docs/scale.md compares it with the real
server (fleet_check.py).
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import simpy

from benchmarks.fleet_host import NO_CONNECTION, Answer, Host, StoreCalls, Task
from benchmarks.fleet_plan import CALLERS, NOTICED_S, Losses, Plan
from benchmarks.fleet_times import h100_times
from benchmarks.table import record
from recovery import STALE_POLL_S

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    Events = Generator[simpy.Event, object, None]

RESULTS = Path(__file__).parent / "fleet.csv"

KEPT = ("kept", "kept_p50_s", "kept_max_s")
"""Columns of fleet_check.py, where the model's process is killed."""
IN_TIME_S = 30.0
"""A Worker's waitUntil lives for so long after its answer."""
QUEUE_BATCH_S = 1.0
"""The longest that a message waits for others of its batch: `max_batch_timeout` of the example Edge."""
CONNECTION_RETRY_S = 1.0
"""From a direct call without an answer to the next; assumed."""


class Fleet:
    """Callers, their queue and the hosts of one plan.

    Args:
        plan: what to simulate.
        seed: of everything that is random.

    Attributes:
        tasks: in the order of their arrival.
        stores: what they were asked for.
        losses: of hosts.
        ready_s, busy_s, charged_s: of all hosts until the arrivals end: time with a model that is ready,
            time of passes, and time that is paid for, which begins with the container.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.tasks: list[Task] = []
        self.losses = 0
        self.ready_s = self.busy_s = self.charged_s = 0.0
        self._env = simpy.Environment()
        self.stores = StoreCalls(self._env)
        self._plan = plan
        self._rng = random.Random(seed)  # noqa: S311 - not a secret
        self._called: list[Host] = []
        """The hosts that calls go to: lost ones too, until that is noticed."""
        self._alive: dict[Host, tuple[float, float]] = {}
        """When the container of each was started, and when its model was ready."""
        self._unfinished = 0
        """Tasks that have not ended, and sources of more."""
        self._all_ended = self._env.event()

    def run(self) -> None:
        """Simulate until every task has ended."""
        plan = self._plan
        for number in range(plan.hosts):
            self._env.process(self._serve(number))
        for source in [self._closed_loop() for _ in range(plan.clients)] or [self._arrivals()]:
            self._env.process(self._counted(source))
        self._env.process(self._close_accounts())
        if plan.runner_killed_s is not None:
            self._env.process(self._kill_runner(plan.runner_killed_s))
        self._env.run(until=self._all_ended)

    def _counted(self, process: Events) -> Events:
        self._unfinished += 1
        yield from process
        self._unfinished -= 1
        if not self._unfinished:
            self._all_ended.succeed()

    def _arrivals(self) -> Events:
        """A Poisson process."""
        plan, rng = self._plan, self._rng
        if plan.exact_count:
            yield from self._exact_arrivals()
            return
        while True:
            yield self._env.timeout(rng.expovariate(plan.rate_per_s))
            if self._env.now >= plan.seconds:
                return
            self._env.process(self._counted(self._task()))

    def _exact_arrivals(self) -> Events:
        """Those of a Poisson process, given their number: independent and uniform, as in load_client.py."""
        seconds = self._plan.seconds
        count = round(self._plan.rate_per_s * seconds)
        for arrival_s in sorted(self._rng.uniform(0, seconds) for _ in range(count)):
            yield self._env.timeout(arrival_s - self._env.now)
            self._env.process(self._counted(self._task()))

    def _closed_loop(self) -> Events:
        """One client, which sends its next task when it has the answer to the last."""
        while self._env.now < self._plan.seconds:
            yield from self._task()
            if self.tasks[-1].outcome == "undone":
                yield self._env.timeout(CONNECTION_RETRY_S)

    def _task(self) -> Events:
        """What the Edge does for one task, until its row has ended."""
        caller, env = self._plan.caller, self._env
        task = Task(env.now)
        self.tasks.append(task)
        deadline_s, deliveries = caller.deadline_s, 0
        while True:
            answer = yield from self._call(task, deadline_s)
            if task.outcome is None and task.kept is not None:
                yield task.kept
            if task.outcome is not None:
                return
            direct_delay_s = CONNECTION_RETRY_S if answer.retry_after_s is None else answer.retry_after_s
            left_s = caller.retry_for_s - (env.now - task.arrived_s) - direct_delay_s
            if left_s > 0:
                yield env.timeout(direct_delay_s)
                deadline_s = min(caller.deadline_s, left_s)
            elif caller.queue_retries is not None and deliveries <= caller.queue_retries:
                yield from self._wait_in_queue(answer, is_first=not deliveries)
                deadline_s, deliveries = caller.queue_deadline_s, deliveries + 1
            else:
                yield from self._give_up(task)
                return

    def _wait_in_queue(self, answer: Answer, *, is_first: bool) -> Events:
        """From a message's send or retry to its delivery."""
        delay_s = answer.retry_after_s
        if delay_s is None:
            delay_s = 0.0 if is_first else self._plan.caller.queue_delay_s
        yield self._env.timeout(delay_s + self._rng.uniform(0, QUEUE_BATCH_S))

    def _give_up(self, task: Task) -> Events:
        """Nobody sends the task again. A queue's dead letter ends the row, a server that of a lost one."""
        now_s = self._env.now
        if task.was_lost and not task.has_failed:
            # Any server ends it when the lease has been over for as long as a lease.
            ended_s = task.lease_until_s + self._plan.lease_s + self._rng.uniform(0, STALE_POLL_S)
            yield self._env.timeout(max(0.0, ended_s - now_s))
            self.stores.update_row()
            task.end("error", self._env.now)
        elif task.has_failed or self._plan.caller.queue_retries is not None:
            task.end("error", now_s)
        else:
            task.end("undone", now_s)

    def _call(self, task: Task, deadline_s: float) -> Generator[simpy.Event, object, Answer]:
        """One call of a host: the checks of the server in their order, then the work."""
        task.calls += 1
        if not self._called:
            return NO_CONNECTION
        host = self._choose()
        if host.is_lost:
            yield host.noticed
            return NO_CONNECTION
        refusal = host.find_refusal(deadline_s)
        if refusal is not None:
            task.refusals += refusal.status == 429
            return refusal
        lease_left_s = task.lease_until_s - self._env.now
        if lease_left_s > 0:
            self.stores.update_row()  # it matches no row
            return Answer(409, max(1.0, round(lease_left_s)))
        return (yield from host.do(task, deadline_s))

    def _choose(self) -> Host:
        if self._plan.balance == "least":
            return min(self._called, key=lambda host: host.in_flight)
        return self._rng.choice(self._called)

    def _serve(self, number: int) -> Events:
        """One place of the fleet: a host until its loss, then the next."""
        env, losses = self._env, self._plan.losses
        loading_s = 0.0
        while True:
            host, started_s = Host(env, self._plan, self.stores, self._rng), env.now
            if loading_s:
                yield from self._load(host, loading_s)
            host.is_loading = False
            if host not in self._called:
                self._called.append(host)
            self._alive[host] = started_s, env.now
            yield self._loss(number)
            host.lose()
            self.losses += env.now < self._plan.seconds
            self._account(host)
            yield env.timeout(losses.noticed_s)
            self._called.remove(host)
            host.noticed.succeed()
            yield env.timeout(self._rng.uniform(*losses.replaced_s) - losses.noticed_s)
            loading_s = losses.loading_s

    def _load(self, host: Host, loading_s: float) -> Events:
        if self._plan.losses.answers_while_loading:
            self._called.append(host)
        yield self._env.timeout(loading_s)

    def _loss(self, number: int) -> simpy.Event:
        losses, delays_s = self._plan.losses, []
        if losses.per_host_hour:
            delays_s.append(self._rng.expovariate(losses.per_host_hour / 3600))
        if losses.at_s is not None and not number and self._env.now < losses.at_s:
            delays_s.append(losses.at_s - self._env.now)
        return self._env.timeout(min(delays_s)) if delays_s else self._env.event()

    def _account(self, host: Host) -> None:
        """Add the time of a host, unless the arrivals have ended before."""
        if host in self._alive and self._env.now <= self._plan.seconds:
            started_s, ready_s = self._alive.pop(host)
            self.ready_s += self._env.now - ready_s
            self.charged_s += self._env.now - started_s
            self.busy_s += host.busy_s

    def _close_accounts(self) -> Events:
        yield self._env.timeout(self._plan.seconds)
        for host in list(self._alive):
            self._account(host)

    def _kill_runner(self, at_s: float) -> Events:
        yield self._env.timeout(at_s)
        self._called[0].kill_runner(self._plan.runner_restart_s)


def figures(fleet: Fleet, plan: Plan, usd_per_host_hour: float) -> dict[str, float]:
    """Figures of a simulated fleet; times are from a task's arrival to the end of its row, NaN without one.

    Tasks that a server did by itself, after its model's process had died, are in no time and no rate: their
    callers got no answer.

    Args:
        fleet: after its run.
        plan: that it was made of.
        usd_per_host_hour: price of a host from the start of its container.
    """
    counted = [task for task in fleet.tasks if task.arrived_s >= plan.warm_up_s]
    answered = [task for task in fleet.tasks if task.outcome == "done" and task.kept is None]
    times_s = [task.ended_s - task.arrived_s for task in answered if task.arrived_s >= plan.warm_up_s]
    p50_s, p99_s = np.percentile(times_s, (50, 99)) if times_s else (np.nan, np.nan)
    in_time = sum(plan.warm_up_s <= task.ended_s < plan.seconds for task in answered)
    calls, tasks = sum(task.calls for task in counted), max(1, len(counted))
    updates, writes = fleet.stores.row_updates, fleet.stores.object_writes
    return {
        "tasks": len(counted),
        "p50_s": float(p50_s),
        "p99_s": float(p99_s),
        "max_s": max(times_s, default=np.nan),
        "in_30_s": sum(time_s <= IN_TIME_S for time_s in times_s) / tasks,
        "done_per_s": in_time / (plan.seconds - plan.warm_up_s),
        "utilization": fleet.busy_s / max(fleet.ready_s, 1e-9),
        "usd_per_1000": fleet.charged_s / 3600 * usd_per_host_hour / max(1, len(times_s)) * 1000,
        "refused_calls": sum(task.refusals for task in counted) / max(1, calls),
        "calls_per_task": calls / tasks,
        "losses": fleet.losses,
        "tasks_on_lost_hosts": sum(task.was_lost for task in counted),
        "later_than_30_s": sum(time_s > IN_TIME_S for time_s in times_s),
        "error": sum(task.outcome == "error" for task in counted),
        "undone": sum(task.outcome == "undone" for task in counted),
        "row_updates_per_s": sum(updates.values()) / plan.seconds,
        "row_updates_per_s_max": max(updates.values(), default=0),
        "object_writes_per_s_max": max(writes.values(), default=0),
    }


def by_minute(fleet: Fleet, names: dict[str, object]) -> list[dict[str, object]]:
    """A line for each minute in which tasks arrived: the times of those that were done in the end.

    Args:
        fleet: after its run.
        names: columns that say which fleet it is.
    """
    times_s = defaultdict[int, list[float]](list)
    for task in fleet.tasks:
        if task.outcome == "done":
            times_s[int(task.arrived_s // 60)].append(task.ended_s - task.arrived_s)
    return [
        {
            **names,
            "minute": minute,
            "p50_s": shown(np.median(each)),
            "p99_s": shown(np.percentile(each, 99)),
        }
        for minute, each in sorted(times_s.items())
    ]


def shown(value: float) -> float | str:
    """A figure as the tables have it: four digits; nothing where there is none."""
    return float(f"{value:.4g}") if math.isfinite(value) else ""


def simulate(plan: Plan, runs: int, usd_per_host_hour: float = 0.0) -> dict[str, float]:
    """The median of each figure over so many runs."""
    return medians([figures(fleet, plan, usd_per_host_hour) for fleet in fleets(plan, runs)])


def fleets(plan: Plan, runs: int) -> Iterator[Fleet]:
    """So many fleets after their runs, whose seeds are 0, 1, 2..."""
    for seed in range(runs):
        fleet = Fleet(plan, seed)
        fleet.run()
        yield fleet


def medians(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over the runs that have it; NaN where none has."""
    found = {name: [each[name] for each in measured if not math.isnan(each[name])] for name in measured[0]}
    return {name: statistics.median(values) if values else math.nan for name, values in found.items()}


def row_of(scenario: str, plan: Plan, runs: int, simulated: dict[str, float]) -> dict[str, object]:
    """A line of the table: what was simulated, and the figures."""
    lost_at_s = plan.losses.at_s
    return {
        "measured": datetime.now(UTC).date().isoformat(),
        "scenario": scenario,
        "source": "simulated",
        "hosts": plan.hosts,
        "load": round(plan.rate_per_s / plan.hosts / plan.times.capacity_per_s, 3),
        "rate_per_s": round(plan.rate_per_s, 2),
        "caller": plan.caller.name,
        "queue_retries": "" if plan.caller.queue_retries is None else plan.caller.queue_retries,
        "balance": plan.balance,
        "losses_per_host_hour": round(plan.losses.per_host_hour, 3),
        "lost_at_s": "" if lost_at_s is None else lost_at_s,
        "replaced_s": " to ".join(f"{each:g}" for each in plan.losses.replaced_s),
        "calls_while_loading": plan.losses.answers_while_loading,
        "clients": plan.clients or "",
        "deadline_s": plan.caller.deadline_s,
        "hardware": "",
        **dict.fromkeys(KEPT, ""),
        "seconds": plan.seconds,
        "runs": runs,
        **{name: shown(value) for name, value in simulated.items()},
    }


SHOWN = (
    *("hosts", "load", "rate_per_s", "caller", "losses_per_host_hour", "tasks", "p50_s", "p99_s", "in_30_s"),
    *("utilization", "usd_per_1000", "calls_per_task", "losses", "tasks_on_lost_hosts", "later_than_30_s"),
    *("error", "undone", "row_updates_per_s_max"),
)
"""The columns that are printed."""


def main() -> None:
    """Simulate every combination, print, and append to the CSV file if --record is given."""
    options = _parse()
    times, caller = h100_times(), CALLERS[options.caller]
    if caller.queue_retries is not None:
        caller = replace(caller, queue_retries=options.queue_retries)
    sys.stdout.write("  ".join(SHOWN) + "\n")
    for hosts, load, losses_per_hour in itertools.product(options.hosts, options.loads, options.losses):
        low_min, high_min = options.replace_minutes
        losses = Losses(
            per_host_hour=losses_per_hour,
            at_s=options.lose_at_s,
            replaced_s=(low_min * 60, high_min * 60),
            answers_while_loading=not options.tunnel_when_ready,
        )
        plan = Plan(
            hosts=hosts,
            times=times,
            rate_per_s=load * hosts * times.capacity_per_s,
            seconds=options.seconds,
            caller=caller,
            losses=losses,
            balance=options.balance,
        )
        row = row_of(options.scenario, plan, options.runs, simulate(plan, options.runs, options.usd_per_hour))
        sys.stdout.write("  ".join(f"{row[name]!s:>{len(name)}}" for name in SHOWN) + "\n")
        sys.stdout.flush()
        if options.record:
            record(options.record, [row])
        if options.minutes:
            [fleet] = fleets(plan, 1)
            record(options.minutes, by_minute(fleet, {"hosts": hosts, "load": load}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.5, 0.7, 0.85], help="shares of the capacity of all hosts"
    )
    parser.add_argument("--losses", type=float, nargs="+", default=[0.0], help="of one host in an hour")
    parser.add_argument("--lose-at-s", type=float, help="the first host is lost at this time")
    parser.add_argument(
        "--replace-minutes",
        type=float,
        nargs=2,
        default=[10.0, 60.0],
        metavar=("LOW", "HIGH"),
        help="from a loss to the start of the next container, without the weights and the start",
    )
    parser.add_argument(
        "--tunnel-when-ready", action="store_true", help="no call reaches a container that is loading"
    )
    parser.add_argument("--caller", choices=CALLERS, default="queue")
    parser.add_argument("--queue-retries", type=int, default=60, help="`max_retries` of the queue")
    parser.add_argument("--balance", choices=["random", "least"], default="random")
    parser.add_argument("--seconds", type=float, default=600.0, help="tasks arrive for so long")
    parser.add_argument("--runs", type=int, default=3, help="with other seeds; medians are shown")
    parser.add_argument("--usd-per-hour", type=float, default=2.5, help="price of a host")
    parser.add_argument(
        "--minutes", type=Path, help="append the times of each minute of one run to a CSV file"
    )
    parser.add_argument("--scenario", default="table", help="name of the rows")
    parser.add_argument("--record", type=Path, nargs="?", const=RESULTS, help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    for name in ("hosts", "loads", "seconds", "runs"):
        if np.min(getattr(options, name)) <= 0:
            parser.error(f"--{name}: must be more than 0")
    if min(options.losses) < 0:
        parser.error("--losses: must be 0 or more")
    low_min, high_min = options.replace_minutes
    if not NOTICED_S / 60 <= low_min <= high_min:
        parser.error(f"--replace-minutes: {NOTICED_S:g} s or more, and LOW before HIGH")
    return options


if __name__ == "__main__":
    main()
