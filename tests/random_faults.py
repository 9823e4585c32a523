"""Draws faults at random from a seed, and holds what must always be true: `--help` says how to run it."""

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
from tests.faults.checks import CLEAN_WITHIN_S, SETTLE_WITHIN_S, Checks
from tests.faults.diary import Violation, drawn
from tests.faults.harms import Harms
from tests.faults.report import story, summary
from tests.faults.stage import prepare, stage
from tests.faults.watchers import Prober, Watcher
from tests.services import database as databases
from tests.services import objects
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.stage import Stage
    from tests.faults.tasks import Task

PROGRESS_S = 30.0
LOOK_S = 0.5
ROUND_S = (60.0, 180.0)
SETTLING_S = 45.0
"""About how long a round takes beside its faults."""
LEAST_ROUND_S = 40.0
REPLAYS = 10


@dataclass
class Outcome:
    """How a run went."""

    seed: int
    violations: list[Violation] = field(default_factory=list)
    summary: str = ""
    story: str = ""


@dataclass
class Run:
    """One run; `say` gets each line of its progress."""

    seed: int
    minutes: float
    stage: Stage
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.checks = Checks(self.stage)
        self.probers = [Prober(self.stage, server) for server in self.stage.servers.values()]
        self._started_s = self._told_s = time.monotonic()

    def run(self) -> Outcome:
        """Round after round, until the time is over or an invariant does not hold."""
        outcome = Outcome(self.seed)
        first, bit = self.stage.servers["A"], drawn(self.seed, "servers").randrange(2)
        first.begin()
        first.wait_until_ready()
        prepare(self.stage, first)
        with self._watched():
            number = 0
            while not outcome.violations and (number == 0 or self._left_s > LEAST_ROUND_S):
                self._set_second_server(wanted=(number + bit) % 2 == 0)
                outcome.violations = self._round(number)
                number += 1
        outcome.summary = summary(self.stage, self.checks, self.probers, left_out(self.stage))
        if outcome.violations:
            again = f"python -m tests.random_faults --minutes {self.minutes:g} --seed {self.seed}"
            outcome.story = story(
                self.stage, outcome.violations, seed=self.seed, number=number - 1, again=again
            )
        return outcome

    @property
    def _left_s(self) -> float:
        return self._started_s + self.minutes * 60 - time.monotonic()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        threads: list[Watcher | Prober] = [
            *(Watcher(self.stage, server) for server in self.stage.servers.values()),
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
        second = self.stage.servers["B"]
        if wanted:
            second.begin()
            second.wait_until_ready()
        elif second.is_wanted:
            second.stop()

    def _round(self, number: int) -> list[Violation]:
        stage = self.stage
        longest_s = max(LEAST_ROUND_S, self.minutes * 30 - SETTLING_S)
        length_s = min(drawn(self.seed, number).uniform(*ROUND_S), longest_s)
        stage.diary.begin_round()
        stage.poisons.clear()
        callers, harms = Callers(stage, self.seed, number), Harms(stage, self.seed, number)
        names = "+".join(server.name for server in stage.active)
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(job) for job in (harms.harm_processes, harms.harm_stores)]
            calling = pool.submit(callers.run)
            try:
                until_s = time.monotonic() + length_s
                while time.monotonic() < until_s and not any(job.done() for job in (*jobs, calling)):
                    self._tell(
                        f"round {number} ({names}), faults for {until_s - time.monotonic():.0f} s more"
                    )
                    time.sleep(LOOK_S)
                callers.stop()
                harms.stop()
                for job in jobs:
                    job.result()
                stage.diary.fault("(all is healed)")
                stage.heal()
                unsettled = self._wait_until_settled(callers)
            finally:  # or the pool would wait for ever
                callers.stop()
                callers.give_up()
                harms.stop()
            calling.result()
        again = self._send_again(callers.tasks, number)
        self._wait_until_clean()
        found = self.checks.after_round(callers.tasks)
        return [*stage.diary.violations, *unsettled, *again, *found]

    def _wait_until_settled(self, callers: Callers) -> list[Violation]:
        """Every task ends, and every patient caller is told, within the time after the last fault."""
        while time.monotonic() < self.stage.diary.last_fault_s + SETTLE_WITHIN_S:
            open_tasks = self._open(callers.tasks)
            if not open_tasks and callers.wait_until_told(LOOK_S):
                return []
            self._tell(f"settling: {len(open_tasks)} tasks are open")
            time.sleep(LOOK_S)
        found = [
            Violation("tasks end in time", "not within the time", task_id)
            for task_id in self._open(callers.tasks)
        ]
        return found or [Violation("tasks end in time", "a patient caller still has no final answer")]

    def _open(self, tasks: list[Task]) -> list[str]:
        on_files = set(self.stage.left_on_files()["attempts"])
        rows = self.stage.rows()
        ours = [task for task in tasks if not task.is_forged and task.task_id in rows]
        processing = {task.task_id for task in ours if rows[task.task_id]["status"] == "processing"}
        return sorted(on_files | processing)

    def _send_again(self, tasks: list[Task], number: int) -> list[Violation]:
        """What was never taken is sent until it ends; what has ended stays as it is."""
        stage, rng = self.stage, drawn(self.seed, number, "again")
        found, rows = [], stage.rows()
        pending = [task for task in tasks if rows.get(task.task_id, {}).get("status") == "pending"]
        for task in pending:
            if taken := [answer for answer in task.answers if answer.says_taken]:
                text = f"{taken[0].server} said {taken[0].code} {taken[0].message}, and the row is pending"
                found.append(Violation("what was taken ends", text, task.task_id))
            elif task.seen_on_file:
                found.append(
                    Violation("what was taken ends", "a file held it, the row is pending", task.task_id)
                )
            self._send_until_ended(task)
        self.checks.exceptions["(never taken, sent again at the end)"] += len(pending)
        done = [task for task in tasks if rows.get(task.task_id, {}).get("status") == "done"]
        for task in rng.sample(done, min(REPLAYS, len(done))):
            for server in stage.active:
                stage.send(server, task)
        return found + [wrong for task in tasks if task.is_poison for wrong in self._poison_again(task)]

    def _send_until_ended(self, task: Task) -> None:
        server = self.stage.servers[task.server] if task.server else self.stage.active[0]

        def has_ended() -> bool:
            self.stage.send(server, task)
            [[status]] = self.stage.execute(
                "select status from segmentation_results where id = %s", task.task_id
            )
            time.sleep(LOOK_S)
            return status in {"done", "error"}

        with contextlib.suppress(TimeoutError):  # the checks will tell
            wait_until(has_ended, SETTLE_WITHIN_S)
        server.wait_until_ready()

    def _poison_again(self, task: Task) -> list[Violation]:
        """A task that was given up is refused when it is sent again, and kills nobody."""
        assert task.server is not None
        kills = task.kills
        query = "select status from segmentation_results where id = %s"
        if self.stage.execute(query, task.task_id) != [("error",)]:
            return []
        answer = self.stage.send(self.stage.servers[task.server], task)
        if answer.code == "INFERENCE_FAILED" and task.kills == kills:
            return []
        text = f"sent again it met {answer.code} {answer.message}, and killed {task.kills - kills} times"
        return [Violation("poison is not tried again", text, task.task_id)]

    def _wait_until_clean(self) -> None:
        """Unneeded masks are deleted after a while; the checks say what is left."""
        self._tell("waiting until unneeded masks are deleted", now=True)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(self.stage.left_on_files().values()), CLEAN_WITHIN_S)

    def _tell(self, text: str, *, now: bool = False) -> None:
        if now or time.monotonic() > self._told_s + PROGRESS_S:
            self._told_s = time.monotonic()
            stage = self.stage
            said = sum(any(answer.code == "done" for answer in task.answers) for task in stage.tasks)
            faults = stage.diary.counts().total()
            minutes = (time.monotonic() - self._started_s) / 60
            self.say(
                f"{minutes:5.1f} min: {text}; {len(stage.tasks)} tasks, {said} told done, {faults} faults"
            )


def run(minutes: float, seed: int, folder: Path, say: Callable[[str], None]) -> Outcome:
    """Do faults for so long; all that the stores and servers write lies in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with stage(folder) as everything:
        return Run(seed, minutes, everything, say).run()


def missing() -> str | None:
    """Why this cannot run here; None when it can."""
    return databases.missing() or objects.missing_seaweedfs()


def left_out(stage: Stage) -> list[str]:
    """The faults that this machine cannot have."""
    no_clock = clock.missing()
    disks = all(server.has_own_disk for server in stage.servers.values())
    return [
        *([f"wrong clocks: {no_clock}"] if no_clock else []),
        *([] if disks else ["full disks: only root may mount one"]),
    ]


def main() -> int:
    """The command line; 1 when an invariant does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="about how long (60)")
    parser.add_argument("--seed", type=int, help="draws the tasks and faults of an earlier run again")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for logs and data; kept afterwards")
    given = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    seed = int(time.time()) if given.seed is None else given.seed

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    say(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        outcome = run(given.minutes, seed, given.keep or Path(temporary), say)
    say(outcome.summary)
    say(outcome.story or "every invariant held")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
