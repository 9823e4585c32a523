"""One task, and one GPU host of the simulation (fleet.py)."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import simpy

from admission import HEADROOM, MAX_RETRY_S
from contract.errors import RETRY_AFTER_S
from recovery import POLL_S, TASKS_AT_ONCE
from sam3_runner.serving.scheduler import MAX_SLACK_S

if TYPE_CHECKING:
    import random
    from collections.abc import Generator

    from benchmarks.fleet_plan import Plan

    Events = Generator[simpy.Event, object, None]

API_WORKERS = 2
"""Of a host with 16 cores."""

Outcome = Literal["done", "error", "undone"]
"""Of a task: its row is done, or was ended as error, or is still pending and nobody tries again."""


@dataclass(eq=False, slots=True)
class Task:
    """One task, from its arrival to the end of its row.

    Attributes:
        arrived_s, ended_s: times; NaN before.
        outcome: how it ended.
        lease_until_s: of its claim.
        has_failed: its row was ended as error, and may be claimed again.
        calls: that the Edge made for it.
        refusals: of these, answered 429.
        was_lost: a host was lost while it worked on it.
        is_suspect: it was at the model when that was killed.
        kept: ends when the server has done it after its model's process died; None: that has not happened.
    """

    arrived_s: float
    ended_s: float = math.nan
    outcome: Outcome | None = None
    lease_until_s: float = -math.inf
    has_failed: bool = False
    calls: int = 0
    refusals: int = 0
    was_lost: bool = False
    is_suspect: bool = False
    kept: simpy.Process | None = None

    def end(self, outcome: Outcome, now_s: float) -> None:
        """End it. Raises ValueError if it has ended before."""
        if self.outcome is not None:
            raise ValueError(f"a task that is {self.outcome} ended again, as {outcome}")
        self.outcome, self.ended_s = outcome, now_s


class Answer(NamedTuple):
    """Of one call: its HTTP status, 0 without a connection, and `Retry-After`."""

    status: int
    retry_after_s: float | None = None


NO_CONNECTION = Answer(0)
LOADING = Answer(503, RETRY_AFTER_S)


def _overloaded(retry_s: float) -> Answer:
    return Answer(429, min(MAX_RETRY_S, max(1.0, math.ceil(retry_s))))


class StoreCalls:
    """What the stores were asked for, in each second: UPDATEs of rows, and objects that were written."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self.row_updates = Counter[int]()
        self.object_writes = Counter[int]()

    def update_row(self) -> None:
        """Count one UPDATE now."""
        self.row_updates[int(self._env.now)] += 1

    def write_object(self) -> None:
        """Count one PUT now."""
        self.object_writes[int(self._env.now)] += 1


@dataclass(eq=False, slots=True)
class _Job:
    """A task on a host: it waits for a slot, is fetched and decoded, is at the model, or has its answer."""

    task: Task
    process: simpy.Process
    stage: Literal["waits", "prepared", "at model", "answered"] = "waits"


class _Exclusion:
    """Work that is shared, and work that must be alone."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._shared = 0
        self._is_alone = False
        self._idle = env.event()
        self._opened = env.event()
        self._turn = simpy.Resource(env, 1)

    def begin(self) -> Events:
        """Wait until no other work is alone."""
        while self._is_alone:
            yield self._opened
        self._shared += 1

    def end(self) -> None:
        """Shared work is over."""
        self._shared -= 1
        if self._is_alone and not self._shared:
            self._idle.succeed()

    def alone(self, work_s: float) -> Events:
        """Do work of `work_s` alone: nothing begins from now on, and it waits for what has begun."""
        with self._turn.request() as turn:
            yield turn
            self._is_alone, self._idle = True, self._env.event()
            if self._shared:
                yield self._idle
            yield self._env.timeout(work_s)
            self._is_alone, opened = False, self._opened
            self._opened = self._env.event()
            opened.succeed()


class Host:
    """One GPU host with its server, from its container's start to its loss.

    Attributes:
        noticed: happens when nobody calls the host any more after its loss.
        in_flight: tasks that it works on.
        busy_s: time of the model's passes.
    """

    def __init__(self, env: simpy.Environment, plan: Plan, stores: StoreCalls, rng: random.Random) -> None:
        self.env = env
        self.is_loading = True
        self.is_lost = False
        self.noticed = env.event()
        self.in_flight = 0
        self.busy_s = 0.0
        self._times = plan.times
        self._lease_s = plan.lease_s
        self._stores = stores
        self._rng = rng
        self._before_model = 0
        self._jobs: dict[simpy.Process, _Job] = {}
        self._slots = simpy.Resource(env, plan.times.slots)
        self._work = _Exclusion(env)
        self._staged: list[tuple[float, int, simpy.Event]] = []
        self._numbers = itertools.count()
        self._something_staged = env.event()
        self._runner = env.process(self._run_passes())
        self._restarted: simpy.Event | None = None
        self._kept_turns = simpy.Resource(env, API_WORKERS * TASKS_AT_ONCE)

    def find_refusal(self, deadline_s: float) -> Answer | None:
        """The refusal of a call whose caller waits for `deadline_s`; None where it is admitted."""
        if self.is_loading or self._restarted is not None:
            return LOADING
        if self.in_flight >= self._times.max_in_flight:
            return _overloaded(self._before_model / self._times.capacity_per_s)
        expected_s = (self._before_model + 1) / self._times.capacity_per_s if self._before_model else 0.0
        late_s = expected_s - HEADROOM * deadline_s
        return _overloaded(late_s) if late_s > 0 else None

    def do(self, task: Task, deadline_s: float) -> Generator[simpy.Event, object, Answer]:
        """Claim an admitted task and do it, unless the host or its model's process is lost meanwhile."""
        task.lease_until_s = self.env.now + self._lease_s
        self._stores.update_row()
        process = self.env.active_process
        assert process is not None
        job = self._jobs[process] = _Job(task, process)
        self.in_flight += 1
        self._before_model += 1
        try:
            return (yield from self._run(job, self.env.now + deadline_s))
        except simpy.Interrupt as interrupt:
            if interrupt.cause == "host":
                task.was_lost = True
                yield self.noticed
                return NO_CONNECTION
            task.is_suspect = job.stage == "at model"
            task.kept = self.env.process(self._do_kept(task))
            return LOADING
        finally:
            self.in_flight -= 1
            self._jobs.pop(process, None)

    def lose(self) -> None:
        """The host is gone with its disk: the rows that it had claimed stay as they are."""
        self.is_lost = True
        self._runner.interrupt()
        for process in self._jobs:
            process.interrupt("host")

    def kill_runner(self, restart_s: float) -> None:
        """The model's process dies, and is ready again after `restart_s`.

        Tasks that were at the model are suspects, and are retried alone; those on their way there are kept
        too.
        """
        self._runner.interrupt()
        self._staged.clear()
        self._restarted = self.env.event()
        for job in self._jobs.values():
            if job.stage != "answered":
                job.process.interrupt("runner")
                self._before_model -= 1
        self.env.process(self._restart(restart_s))

    def _run(self, job: _Job, deadline_at_s: float) -> Generator[simpy.Event, object, Answer]:
        """From the claim to the settled row."""
        with self._slots.request() as slot:
            yield slot
            if self.env.now > deadline_at_s:
                self._before_model -= 1
                self._stores.update_row()
                job.task.has_failed, job.task.lease_until_s = True, -math.inf
                return Answer(504)
            yield from self._work.begin()
            try:
                job.stage = "prepared"
                yield self.env.timeout(self._times.before_s)
                job.stage = "at model"
                yield self._stage(deadline_at_s)
                self._before_model -= 1
                job.stage = "answered"
            finally:
                self._work.end()
        yield self.env.timeout(self._times.after_s)
        self._settle(job.task)
        return Answer(200)

    def _settle(self, task: Task) -> None:
        self._stores.write_object()
        self._stores.update_row()
        task.end("done", self.env.now)

    def _stage(self, deadline_at_s: float) -> simpy.Event:
        """Hand an image to the model; the event is its answer."""
        answered = self.env.event()
        order_s = min(deadline_at_s, self.env.now + MAX_SLACK_S)
        heapq.heappush(self._staged, (order_s, next(self._numbers), answered))
        if not self._something_staged.triggered:
            self._something_staged.succeed()
        return answered

    def _run_passes(self) -> Events:
        try:
            while True:
                if not self._staged:
                    self._something_staged = self.env.event()
                    yield self._something_staged
                images = min(len(self._staged), self._times.max_batch)
                batch = [heapq.heappop(self._staged)[-1] for _ in range(images)]
                pass_s = self._times.of_pass(images)
                yield self.env.timeout(pass_s)
                self.busy_s += pass_s
                for answered in batch:
                    answered.succeed()
        except simpy.Interrupt:
            return

    def _restart(self, restart_s: float) -> Events:
        yield self.env.timeout(restart_s)
        restarted, self._restarted = self._restarted, None
        assert restarted is not None
        self._runner = self.env.process(self._run_passes())
        restarted.succeed()

    def _do_kept(self, task: Task) -> Events:
        """The server's own retry of a task whose model's process died."""
        assert self._restarted is not None
        yield self._restarted
        yield self.env.timeout(self._rng.uniform(0, POLL_S))
        if task.is_suspect:
            alone_s = self._times.before_s + self._times.of_pass(1)
            yield from self._work.alone(alone_s)
            yield self.env.timeout(self._times.after_s)
            self._settle(task)
            return
        with self._kept_turns.request() as turn:
            yield turn
            self._before_model += 1
            process = self.env.active_process
            assert process is not None
            yield from self._run(_Job(task, process), math.inf)
