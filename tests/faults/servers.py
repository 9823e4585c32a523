"""One server of the fault test, which is killed in several ways, and restarted like a container."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import psutil

from commands import local_server
from commands.local_server import clean_environment, server_command
from tests.faults.clock import Clock
from tests.server_processes import API_WORKER, is_decoder, service_of
from tests.services.processes import http_status, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.faults.fault_log import FaultLog

API_KEY = "faults-0123456789abcdef"
READY_TIMEOUT_S = 120.0
EXIT_LIMIT_S = 5.0
"""Time within which the children of a killed supervisor must end."""
RESTART_PAUSE_S = 0.2
DISK = "24m"
_GONE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class Server:
    """The real server on one port and one DATA_DIR; it is restarted whenever it ends.

    Attributes:
        name: in the fault log.
        generation: number of starts and deaths.
        serving: it has answered since its start; set by the prober.
        unresponsive_until_s: until then an API worker is stopped (SIGSTOP), or was just continued.
        unstable_until_s: until then connections may be closed.
        starts: number of starts.
        clock: its wall clock.
        has_separate_disk: DATA_DIR is a separate file system, which can be filled.
    """

    def __init__(
        self, name: str, folder: Path, port: int, settings: dict[str, str], fault_log: FaultLog
    ) -> None:
        self.name = name
        self.data_dir = folder / f"data-{name}"
        self.data_dir.mkdir()
        self.log_path = folder / f"server-{name}.log"
        self.url = f"http://127.0.0.1:{port}"
        self.generation = self.starts = 0
        self.serving = False
        self.unresponsive_until_s = self.unstable_until_s = 0.0
        self.clock = Clock(folder, name)
        self.has_separate_disk = _mount(self.data_dir)
        self._port = port
        self._fault_log = fault_log
        home = {"BENTOML_HOME": str(folder / f"bentoml-{name}")}
        self._environment = clean_environment(self.data_dir, API_KEY) | settings | home
        self._environment |= self.clock.environment()
        self._process: subprocess.Popen[bytes] | None = None
        self._orphans: list[psutil.Process] = []
        self._killed = False
        self._started_s = self._disk_full_until_s = -math.inf
        self._wanted = threading.Event()
        self._lock = threading.RLock()
        self._restarter: threading.Thread | None = None

    @property
    def outbox(self) -> Path:
        """Its outbox file."""
        return self.data_dir / "outbox.sqlite"

    @property
    def is_killed(self) -> bool:
        """Whether it was killed and is not restarted yet; remaining processes may still answer."""
        return self._killed

    @property
    def is_wanted(self) -> bool:
        """Whether it is restarted when it ends."""
        return self._wanted.is_set()

    def begin(self) -> None:
        """Start it, and restart it whenever it ends."""
        if self._wanted.is_set():
            return
        self._wanted.set()
        self._restarter = threading.Thread(
            target=self._restart_while_wanted, name=f"restarter of {self.name}", daemon=True
        )
        self._restarter.start()

    def end(self) -> None:
        """Kill it without a restart."""
        self._stop_restarting()
        self.kill_all()

    def stop(self) -> None:
        """Stop it cleanly without a restart."""
        self._stop_restarting()
        if self._process is not None:
            children = self.processes()
            local_server.stop(self._process)
            wait_until(lambda: all(map(_has_ended, children)), 20.0)
        self.serving, self._killed = False, True

    def release_disk(self) -> None:
        """Unmount DATA_DIR's separate disk; keeps a copy of the outbox file beside it."""
        if self.has_separate_disk:
            for file in self.data_dir.glob("outbox.sqlite*"):
                shutil.copy(file, self.data_dir.with_name(f"{self.name}-{file.name}"))
            subprocess.run(["/bin/umount", "-l", self.data_dir], check=False, capture_output=True)

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded. Raises TimeoutError."""
        wait_until(lambda: http_status(f"{self.url}/readyz") == 200, READY_TIMEOUT_S)

    def processes(self) -> list[psutil.Process]:
        """All running processes, the supervisor first."""
        if self._process is None or self._process.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(self._process.pid)
            return [supervisor, *supervisor.children(recursive=True)]
        return []

    def runner(self) -> psutil.Process | None:
        """The runner, found by its note runner_0.pid in DATA_DIR; None if there is none."""
        with contextlib.suppress(OSError):
            pid = (self.data_dir / "runner_0.pid").read_text().partition(":")[0]
            return next((each for each in self.processes()[1:] if str(each.pid) == pid), None)
        return None

    def workers(self) -> list[psutil.Process]:
        """The API workers."""
        return [each for each in self.processes() if service_of(each) == API_WORKER]

    def decoders(self) -> list[psutil.Process]:
        """The decoders of all API workers."""
        return [each for each in self.processes() if is_decoder(each)]

    def kill_all(self, if_still: Callable[[], bool] = lambda: True) -> bool:
        """Kill all processes as if at the same time: none can observe another's death.

        After they are stopped, `if_still` decides whether they are killed or continued; returns its result.
        """
        with self._lock:
            processes = [*self.processes(), *self._orphans]
            _send(signal.SIGSTOP, processes)
            if not if_still():
                _send(signal.SIGCONT, processes)
                return False
            self._killed, self.serving = True, False
            self.generation += 1
            _send(signal.SIGKILL, processes)
            if self._process is not None:
                self._process.wait()
            wait_until(lambda: all(map(_has_ended, processes)), 20.0)
        return True

    def kill_supervisor(self) -> None:
        """Kill only the supervisor; its children must end by themselves."""
        with self._lock:
            processes = self.processes()
            if not processes:
                return
            supervisor, *children = processes
            self._orphans = [*self._orphans, *children]
            self._killed, self.serving = True, False
            self.generation += 1
            with contextlib.suppress(psutil.NoSuchProcess):
                supervisor.kill()

    def kill(self, process: psutil.Process) -> None:
        """Kill one of its processes."""
        self.unstable_until_s = time.monotonic() + 3.0
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()

    @contextlib.contextmanager
    def stopped(self, process: psutil.Process, *, is_worker: bool) -> Iterator[None]:
        """Stop a process with SIGSTOP, and continue it at the end of the block."""
        if is_worker:
            self.unresponsive_until_s = float("inf")
        try:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
            yield
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
            self.unresponsive_until_s = time.monotonic() + 1.0 if is_worker else self.unresponsive_until_s

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Fill DATA_DIR's disk completely until the end of the block."""
        filler = self.data_dir / "filler"
        self._disk_full_until_s = math.inf
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                for size in (1 << 16, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(b"\0" * size)
            yield
        finally:
            filler.unlink(missing_ok=True)
            self._disk_full_until_s = time.monotonic()

    def _stop_restarting(self) -> None:
        self._wanted.clear()
        if self._restarter is not None:
            self._restarter.join()

    def _restart_while_wanted(self) -> None:
        while self._wanted.is_set():
            with self._lock:
                ended = self._process is None or self._process.poll() is not None
            if ended:
                self._record_end()
                self._wait_for_orphans()
                with self._lock:
                    self._start()
            time.sleep(RESTART_PAUSE_S)

    def _record_end(self) -> None:
        if self._process is None or self._killed:
            return
        last = self.log_path.read_text(errors="replace").splitlines()[-1:]
        text = f"server {self.name} ended by itself with status {self._process.returncode}: {last}"
        self._fault_log.fault("(refused start)", text)
        # A fault during the start may have ended before the server reports it.
        if self._started_s > max(self._disk_full_until_s, self.clock.wrong_until_s):
            self._fault_log.violated("the server runs", text)
        time.sleep(1.0)

    def _wait_for_orphans(self) -> None:
        """Wait until the children of a killed supervisor have ended; kills those that do not end in time."""
        orphans, since_s = self._orphans, time.monotonic()
        try:
            wait_until(lambda: all(map(_has_ended, orphans)), 3 * EXIT_LIMIT_S)
        except TimeoutError:
            for process in orphans:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        if (took_s := time.monotonic() - since_s) > EXIT_LIMIT_S:
            self._fault_log.violated(
                "children end with their supervisor", f"{self.name}: {took_s:.1f} s after its death"
            )
        with self._lock:
            self._orphans = []

    def _start(self) -> None:
        if not self._wanted.is_set():
            return
        self.generation += 1
        self.starts += 1
        self.serving = self._killed = False
        self._started_s = time.monotonic()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                server_command(self._port),
                cwd=local_server.ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def _mount(folder: Path) -> bool:
    """Mount a small separate disk at the folder; returns False if that is not allowed."""
    if os.name != "posix" or os.geteuid() != 0:
        return False
    command = ["/bin/mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() in _GONE
    except psutil.NoSuchProcess:
        return True
