"""Injects random faults: each is a method that causes and ends one."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING

import psutil

from tests.faults import clock
from tests.faults.fault_log import rng_for

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from tests.faults.servers import Server
    from tests.faults.system import System
    from tests.services.faults import FaultProxy, Seen
    from tests.services.processes import ServerProcess

ALWAYS = 1_000_000
CLOCKS_S = (600, -600, -3600)
KILLED_MEANWHILE = 0.4
"""Probability that the server is killed while its clock is wrong."""
PROCESS_PAUSE_S = (6.0, 20.0)
STORE_PAUSE_S = (4.0, 15.0)


class FaultInjector:
    """Injects faults until it is stopped; each fault is ended, except for processes that restart themselves.

    Args:
        system: everything.
        seed: of the run.
        number: of the round.
    """

    def __init__(self, system: System, seed: int, number: int) -> None:
        self._system = system
        self._fault_log = system.fault_log
        self._process_rng = rng_for(seed, number, "processes")
        self._store_rng = rng_for(seed, number, "stores")
        self._request_rng = rng_for(seed, number, "requests")
        self._stopping = threading.Event()

    def inject_process_faults(self) -> None:
        """Kill and stop the servers' processes until `stop`."""
        weights: list[tuple[int, Callable[[Server, random.Random], None]]] = [
            (3, self._kill_runner),
            (3, self._kill_worker),
            (2, self._kill_decoder),
            (1, self._kill_supervisor),
            (2, self._kill_all),
            (2, self._stop_runner),
            (2, self._stop_worker),
            (0 if clock.missing() else 1, self._set_clock),
            (1, self._fill_disk),
        ]
        rng = self._process_rng
        while not self._stopping.wait(rng.uniform(*PROCESS_PAUSE_S)):
            server = rng.choice(self._system.active)
            [fault] = rng.choices([each for _, each in weights], [weight for weight, _ in weights])
            fault(server, rng)

    def inject_store_faults(self) -> None:
        """Stop, slow, cut and hang the stores until `stop`."""
        system, rng = self._system, self._store_rng
        whole: list[Callable[[float], None]] = [
            lambda length_s: self._away("SeaweedFS", system.objects.stop, system.objects.start, length_s),
            lambda length_s: self._away("PostgreSQL", system.database.stop, system.database.start, length_s),
            lambda length_s: self._frozen("gateway", system.database._gateway, length_s),
            lambda length_s: self._frozen("PostgREST", system.database._postgrest, length_s),
        ]
        while not self._stopping.wait(rng.uniform(*STORE_PAUSE_S)):
            length_s, what = rng.uniform(1.0, 12.0), rng.random()
            if what < 0.4:
                self._fail("R2", system.r2, rng, length_s)
            elif what < 0.8:
                self._fail("database", system.rest, rng, length_s)
            else:
                rng.choice(whole)(length_s)

    def stop(self) -> None:
        """Inject no more faults after the current one."""
        self._stopping.set()

    def _kill_runner(self, server: Server, _: random.Random) -> None:
        if runner := server.runner():
            self._fault_log.fault("runner killed", server.name)
            server.kill(runner)

    def _kill_worker(self, server: Server, rng: random.Random) -> None:
        if workers := server.workers():
            self._fault_log.fault("API worker killed", server.name)
            server.kill(rng.choice(workers))

    def _kill_decoder(self, server: Server, rng: random.Random) -> None:
        if decoders := server.decoders():
            self._fault_log.fault("decoder killed", server.name)
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(decoders).kill()

    def _kill_supervisor(self, server: Server, _: random.Random) -> None:
        self._fault_log.fault("supervisor killed", server.name)
        server.kill_supervisor()

    def _kill_all(self, server: Server, _: random.Random) -> None:
        self._fault_log.fault("all processes killed", server.name)
        server.kill_all()

    def _stop_runner(self, server: Server, rng: random.Random) -> None:
        self._stop_process(server, server.runner(), rng, "runner")

    def _stop_worker(self, server: Server, rng: random.Random) -> None:
        workers = server.workers()
        self._stop_process(server, rng.choice(workers) if workers else None, rng, "API worker")

    def _stop_process(
        self, server: Server, process: psutil.Process | None, rng: random.Random, what: str
    ) -> None:
        length_s = rng.uniform(0.5, 6.0)
        if process is not None:
            self._fault_log.fault(f"{what} stopped", f"{server.name}, {length_s:.1f} s")
            with server.stopped(process, is_worker=what != "runner"):
                self._stopping.wait(length_s)

    def _set_clock(self, server: Server, rng: random.Random) -> None:
        offset_s, length_s = rng.choice(CLOCKS_S), rng.uniform(2.0, 15.0)
        self._fault_log.fault("clock set", f"{server.name}, {offset_s:+d} s for {length_s:.1f} s")
        with server.clock.wrong_by(offset_s):
            if rng.random() < KILLED_MEANWHILE:
                server.kill_all()
            self._stopping.wait(length_s)
        self._fault_log.fault("(clock reset)", server.name)

    def _fill_disk(self, server: Server, rng: random.Random) -> None:
        length_s = rng.uniform(1.0, 8.0)
        if server.has_separate_disk:
            self._fault_log.fault("disk full", f"{server.name}, {length_s:.1f} s")
            with server.full_disk():
                self._stopping.wait(length_s)
            self._fault_log.fault("(disk freed)", server.name)

    def _away(self, what: str, stop: Callable[[], None], start: Callable[[], None], length_s: float) -> None:
        self._fault_log.fault(f"{what} stopped", f"{length_s:.1f} s")
        stop()
        try:
            self._stopping.wait(length_s)
        finally:
            start()
        self._fault_log.fault(f"({what} started)")

    def _frozen(self, what: str, process: ServerProcess, length_s: float) -> None:
        self._fault_log.fault(f"{what} frozen", f"{length_s:.1f} s")
        with _suspended(process):
            self._stopping.wait(length_s)
        self._fault_log.fault(f"({what} continued)")

    def _fail(self, what: str, proxy: FaultProxy, rng: random.Random, length_s: float) -> None:
        """Inject one kind of fault for all or some requests at this proxy."""
        part = rng.choice((1.0, 1.0, 0.5, 0.2))
        after_bytes, pace, late_s = rng.choice((0, 20, 300)), rng.choice((300, 3000)), rng.uniform(0.5, 4.0)

        def when(_: Seen) -> bool:
            return self._request_rng.random() < part

        kinds: dict[str, Callable[[], None]] = {
            "503": lambda: proxy.fail_next(ALWAYS, status=503, when=when),
            "429": lambda: proxy.fail_next(ALWAYS, status=429, when=when),
            "hangs": lambda: proxy.hang_next(ALWAYS, when=when),
            "cuts": lambda: proxy.cut_next(ALWAYS, when=when),
            "cuts answers": lambda: proxy.cut_next(ALWAYS, after_bytes=after_bytes, when=when),
            "slow": lambda: proxy.slow_next(ALWAYS, bytes_per_s=pace, when=when),
            "late": lambda: proxy.delay_next(ALWAYS, seconds=late_s, when=when),
            "loses answers": lambda: proxy.lose_answer_next(ALWAYS, when=when),
        }
        kind = rng.choice(list(kinds))
        self._fault_log.fault(f"{what} {kind}", f"{part:.0%} of requests, {length_s:.1f} s")
        kinds[kind]()
        try:
            self._stopping.wait(length_s)
        finally:
            proxy.heal()
        self._fault_log.fault(f"({what} healed)")


@contextlib.contextmanager
def _suspended(process: ServerProcess) -> Iterator[None]:
    child = process._process
    assert child is not None
    child.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        child.send_signal(signal.SIGCONT)
