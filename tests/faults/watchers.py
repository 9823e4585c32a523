"""Threads that observe the servers: one kills processes for poison tasks, one requests the probes."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
import psutil

from tests import new_connection
from tests.faults.system import read_only

if TYPE_CHECKING:
    from tests.faults.servers import Server
    from tests.faults.system import System
    from tests.faults.tasks import Task

POISON_POLL_S = 0.002
POLL_S = 0.05
RUNNER_BUSY_S = 0.03
"""CPU time after which the runner is working; an image takes at least three times as much."""
PROBES = ("/health", "/livez", "/readyz")
PROBE_PAUSE_S = 0.5
PROBE_TIMEOUT_S = 15.0
SLOW_S = 3.0
_BEGUN = "SELECT task_id FROM attempts WHERE begun IN (1, 3)"


class PoisonKiller(threading.Thread):
    """Kills a process of one server each time the work on one of its poison tasks starts."""

    def __init__(self, system: System, server: Server) -> None:
        super().__init__(name=f"poison killer of {server.name}", daemon=True)
        self._system = system
        self._server = server
        self._ended = threading.Event()
        self._db: sqlite3.Connection | None = None
        self._killed: set[str] = set()

    def end(self) -> None:
        """Stop the thread."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Poll the outbox file until the thread is stopped."""
        next_list_s = 0.0
        while not self._ended.is_set():
            armed = {each.task_id: each for each in self._system.poisons if each.server == self._server.name}
            try:
                self._look(armed)
                if time.monotonic() > next_list_s:
                    self._note_seen()
                    next_list_s = time.monotonic() + POLL_S
            except (sqlite3.Error, OSError):
                self._close()  # no file yet
                time.sleep(POLL_S)
            time.sleep(POISON_POLL_S if armed else POLL_S)
        self._close()

    def _look(self, armed: dict[str, Task]) -> None:
        begun = {task_id for (task_id,) in self._query(_BEGUN)} if armed else set()
        self._killed &= begun
        for task_id in begun - self._killed:
            if task_id in armed:
                self._kill(armed[task_id])

    def _kill(self, task: Task) -> None:
        if self._is_done(task):
            return  # an earlier kill came too late; the server now returns its stored answer
        runner = self._server.runner()
        if task.kind == "runner poison":
            claimed = self._claimed(task)
            if runner is None or not claimed or not self._wait_until_busy(runner, task):
                return
            self._server.kill(runner)
            task.last_kill = claimed
        elif not self._server.kill_all(lambda: (task.task_id,) in self._query(_BEGUN)):
            return  # its work has ended meanwhile
        self._killed.add(task.task_id)
        task.kills += 1
        self._system.fault_log.fault(f"{task.kind} kills", f"{self._server.name}, {task.task_id}")

    def _wait_until_busy(self, runner: psutil.Process, task: Task) -> bool:
        """Wait until the runner works, after the image was decoded; False if the task ends before."""
        before_s = _cpu_s(runner)
        while (task.task_id,) in self._query(_BEGUN):
            if _cpu_s(runner) > before_s + RUNNER_BUSY_S:
                return True
            time.sleep(POISON_POLL_S)
        return False

    def _is_done(self, task: Task) -> bool:
        with contextlib.suppress(Exception):  # pg8000 raises many types while the database is unavailable
            query = "select 1 from segmentation_results where id = %s and status = 'done'"
            return bool(self._system.database.execute(query, task.task_id))
        return False

    def _claimed(self, task: Task) -> int:
        """The number of the row's claim since the last kill; 0 if none, and the runner has no task then."""
        query = "select coalesce(max(number), 0) from history where id = %s and status = 'processing'"
        with contextlib.suppress(Exception):  # pg8000 raises many types while the database is unavailable
            [[number]] = self._system.database.execute(
                f"{query} and number > %s", task.task_id, task.last_kill
            )
            return int(number)
        return 0

    def _note_seen(self) -> None:
        seen = {task_id for (task_id,) in self._query("SELECT task_id FROM attempts")}
        for task in self._system.tasks[-500:]:
            task.seen_on_file = task.seen_on_file or task.task_id in seen

    def _query(self, query: str) -> list[tuple[str]]:
        if self._db is None:
            self._db = read_only(self._server.outbox)
        return self._db.execute(query).fetchall()

    def _close(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        self._db = None


def _cpu_s(process: psutil.Process) -> float:
    try:
        return float(process.cpu_times().user)
    except psutil.Error:  # the process has ended
        return 0.0


@dataclass
class Prober(threading.Thread):
    """Requests one server's probes, and records their times while its API workers are up."""

    system: System
    server: Server
    times_s: list[float] = field(default_factory=list)
    excused: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(name=f"prober of {self.server.name}", daemon=True)

    __hash__ = threading.Thread.__hash__

    def end(self) -> None:
        """Stop the thread."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Request the probes until the thread is stopped."""
        while not self._ended.wait(PROBE_PAUSE_S):
            if self.server.is_wanted:
                for path in PROBES:
                    self._probe(path)

    def _probe(self, path: str) -> None:
        server = self.server
        generation, was_serving, began_s = server.generation, server.serving, time.monotonic()
        try:
            new_connection.get(server.url + path, timeout=PROBE_TIMEOUT_S)
            answered, how = True, ""
        except httpx.TransportError as error:
            answered, how = False, type(error).__name__
        ended_s = time.monotonic()
        same = generation == server.generation
        if not (same and was_serving and began_s > server.unresponsive_until_s):
            self.excused += 1
            server.serving = server.serving or (same and answered and not server.is_killed)
        elif answered or ended_s - began_s > SLOW_S:
            self.times_s.append(ended_s - began_s)
            if ended_s - began_s > SLOW_S:
                text = f"{server.name}{path} took {ended_s - began_s:.1f} s"
                self.system.fault_log.violated("probes answer soon", text)
        elif began_s > server.unstable_until_s and server.is_wanted:
            self.system.fault_log.violated("probes answer soon", f"{server.name}{path} failed with {how}")
