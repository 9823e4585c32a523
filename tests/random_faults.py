"""Injects random faults from a seed, and checks invariants; `--help` describes the options."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults import clock
from tests.faults.callers import Callers
from tests.faults.checks import CLEAN_LIMIT_S, SETTLE_LIMIT_S, Checks
from tests.faults.fault_log import Violation, rng_for
from tests.faults.injector import FaultInjector
from tests.faults.report import details, summary
from tests.faults.system import prepare, system
from tests.faults.watchers import PoisonKiller, Prober
from tests.services import database as databases
from tests.services import objects
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.system import System
    from tests.faults.tasks import Task

PROGRESS_S = 30.0
LOOK_S = 0.5
ROUND_S = (60.0, 180.0)
SETTLING_S = 45.0
"""Approximate time of a round without its faults."""
MIN_ROUND_S = 40.0
REPLAYS = 10


@dataclass
class Outcome:
    """The result of a run."""

    seed: int
    violations: list[Violation] = field(default_factory=list)
    summary: str = ""
    details: str = ""


@dataclass
class Run:
    """One run; `report` is called with each line of its progress."""

    seed: int
    minutes: float
    system: System
    report: Callable[[str], None]

    def __post_init__(self) -> None:
        self.checks = Checks(self.system)
        self.probers = [Prober(self.system, server) for server in self.system.servers.values()]
        self._started_s = self._reported_s = time.monotonic()

    def run(self) -> Outcome:
        """Run rounds until the time is over or an invariant is violated."""
        outcome = Outcome(self.seed)
        first, bit = self.system.servers["A"], rng_for(self.seed, "servers").randrange(2)
        first.begin()
        first.wait_until_ready()
        prepare(self.system, first)
        with self._watched():
            number = 0
            while not outcome.violations and (number == 0 or self._left_s > MIN_ROUND_S):
                self._set_second_server(wanted=(number + bit) % 2 == 0)
                outcome.violations = self._round(number)
                number += 1
        outcome.summary = summary(self.system, self.checks, self.probers, impossible_faults(self.system))
        if outcome.violations:
            again = f"python -m tests.random_faults --minutes {self.minutes:g} --seed {self.seed}"
            outcome.details = details(
                self.system, outcome.violations, seed=self.seed, number=number - 1, again=again
            )
        return outcome

    @property
    def _left_s(self) -> float:
        return self._started_s + self.minutes * 60 - time.monotonic()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        threads: list[PoisonKiller | Prober] = [
            *(PoisonKiller(self.system, server) for server in self.system.servers.values()),
            *self.probers,
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for thread in threads:
                thread.end()

    def _set_second_server(self, *, wanted: bool) -> None:
        second = self.system.servers["B"]
        if wanted:
            second.begin()
            second.wait_until_ready()
        elif second.is_wanted:
            second.stop()

    def _round(self, number: int) -> list[Violation]:
        system = self.system
        longest_s = max(MIN_ROUND_S, self.minutes * 30 - SETTLING_S)
        length_s = min(rng_for(self.seed, number).uniform(*ROUND_S), longest_s)
        system.fault_log.begin_round()
        system.poisons.clear()
        callers, injector = Callers(system, self.seed, number), FaultInjector(system, self.seed, number)
        names = "+".join(server.name for server in system.active)
        with ThreadPoolExecutor(3) as pool:
            jobs = [
                pool.submit(job) for job in (injector.inject_process_faults, injector.inject_store_faults)
            ]
            calling = pool.submit(callers.run)
            try:
                until_s = time.monotonic() + length_s
                while time.monotonic() < until_s and not any(job.done() for job in (*jobs, calling)):
                    self._report_progress(
                        f"round {number} ({names}), faults for {until_s - time.monotonic():.0f} s more"
                    )
                    time.sleep(LOOK_S)
                callers.stop()
                injector.stop()
                for job in jobs:
                    job.result()
                system.fault_log.fault("(all is healed)")
                system.heal()
                unsettled = self._wait_until_settled(callers)
            finally:  # otherwise the pool would wait forever
                callers.stop()
                callers.give_up()
                injector.stop()
            calling.result()
        again = self._send_pending_again(callers.tasks, number)
        self._wait_until_clean()
        found = self.checks.after_round(callers.tasks)
        return [*system.fault_log.violations, *unsettled, *again, *found]

    def _wait_until_settled(self, callers: Callers) -> list[Violation]:
        """Wait until every task has ended and every retrying caller has its answer; returns violations."""
        while time.monotonic() < self.system.fault_log.last_fault_s + SETTLE_LIMIT_S:
            open_tasks = self._open(callers.tasks)
            if not open_tasks and callers.wait_until_answered(LOOK_S):
                return []
            self._report_progress(f"settling: {len(open_tasks)} tasks are open")
            time.sleep(LOOK_S)
        found = [
            Violation("tasks end in time", "it has not ended within the limit", task_id)
            for task_id in self._open(callers.tasks)
        ]
        return found or [Violation("tasks end in time", "a retrying caller has no final answer")]

    def _open(self, tasks: list[Task]) -> list[str]:
        on_files = set(self.system.left_on_files()["attempts"])
        rows = self.system.rows()
        ours = [task for task in tasks if not task.is_forged and task.task_id in rows]
        processing = {task.task_id for task in ours if rows[task.task_id]["status"] == "processing"}
        return sorted(on_files | processing)

    def _send_pending_again(self, tasks: list[Task], number: int) -> list[Violation]:
        """Send unaccepted tasks until they end, and some done tasks again; returns violations."""
        system, rng = self.system, rng_for(self.seed, number, "again")
        found, rows = [], system.rows()
        pending = [task for task in tasks if rows.get(task.task_id, {}).get("status") == "pending"]
        for task in pending:
            if taken := [answer for answer in task.answers if answer.says_accepted]:
                text = (
                    f"{taken[0].server} answered {taken[0].code} {taken[0].message}, and the row is pending"
                )
                found.append(Violation("an accepted task ends", text, task.task_id))
            elif task.seen_on_file:
                found.append(
                    Violation(
                        "an accepted task ends", "an outbox file had it, the row is pending", task.task_id
                    )
                )
            self._send_until_ended(task)
        self.checks.exceptions["(never accepted, sent again at the end)"] += len(pending)
        done = [task for task in tasks if rows.get(task.task_id, {}).get("status") == "done"]
        for task in rng.sample(done, min(REPLAYS, len(done))):
            for server in system.active:
                system.send(server, task)
        return found + [wrong for task in tasks if task.is_poison for wrong in self._send_poison_again(task)]

    def _send_until_ended(self, task: Task) -> None:
        server = self.system.servers[task.server] if task.server else self.system.active[0]

        def has_ended() -> bool:
            self.system.send(server, task)
            [[status]] = self.system.execute(
                "select status from segmentation_results where id = %s", task.task_id
            )
            time.sleep(LOOK_S)
            return status in {"done", "error"}

        with contextlib.suppress(TimeoutError):  # the checks report it
            wait_until(has_ended, SETTLE_LIMIT_S)
        server.wait_until_ready()

    def _send_poison_again(self, task: Task) -> list[Violation]:
        """Check that a given-up task is refused when it is sent again, and kills no process."""
        assert task.server is not None
        kills = task.kills
        query = "select status from segmentation_results where id = %s"
        if self.system.execute(query, task.task_id) != [("error",)]:
            return []
        answer = self.system.send(self.system.servers[task.server], task)
        if answer.code == "INFERENCE_FAILED" and task.kills == kills:
            return []
        text = f"sent again: {answer.code} {answer.message}, and {task.kills - kills} more kills"
        return [Violation("poison is not retried", text, task.task_id)]

    def _wait_until_clean(self) -> None:
        """Wait until unneeded masks are deleted; the checks report those that are left."""
        self._report_progress("waiting until unneeded masks are deleted", now=True)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(self.system.left_on_files().values()), CLEAN_LIMIT_S)

    def _report_progress(self, text: str, *, now: bool = False) -> None:
        if now or time.monotonic() > self._reported_s + PROGRESS_S:
            self._reported_s = time.monotonic()
            system = self.system
            done = sum(any(answer.code == "done" for answer in task.answers) for task in system.tasks)
            faults = system.fault_log.counts().total()
            minutes = (time.monotonic() - self._started_s) / 60
            self.report(
                f"{minutes:5.1f} min: {text}; {len(system.tasks)} tasks, {done} done, {faults} faults"
            )


def run(minutes: float, seed: int, folder: Path, report: Callable[[str], None]) -> Outcome:
    """Run for so many minutes; all files of the stores and servers are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with system(folder) as everything:
        return Run(seed, minutes, everything, report).run()


def missing() -> str | None:
    """Why this cannot run here; None if it can."""
    return databases.missing() or objects.missing_seaweedfs()


def impossible_faults(system: System) -> list[str]:
    """The faults that cannot be injected on this machine."""
    no_clock = clock.missing()
    disks = all(server.has_separate_disk for server in system.servers.values())
    return [
        *([f"wrong clocks: {no_clock}"] if no_clock else []),
        *([] if disks else ["full disks: only root can mount one"]),
    ]


def main() -> int:
    """Run from the command line; exit status 1 if an invariant is violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="approximate duration; default: 60")
    parser.add_argument("--seed", type=int, help="seed of an earlier run, to repeat its tasks and faults")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="folder for logs and data, which is not deleted"
    )
    given = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    seed = int(time.time()) if given.seed is None else given.seed

    def report(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    report(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        outcome = run(given.minutes, seed, given.keep or Path(temporary), report)
    report(outcome.summary)
    report(outcome.details or "every invariant held")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
