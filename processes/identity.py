"""Names a process in a file so that no other has the name, not even a later one with its pid."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import psutil


def current() -> str:
    """The identity of this process, `PID:START`: a text to keep and to compare."""
    return _identity(psutil.Process(os.getpid()))


def is_alive(identity: str) -> bool:
    """Whether this process still runs on this machine.

    False for a zombie, for another process that has its pid now, and for a text that is no identity.
    """
    pid = identity.partition(":")[0]
    if not (pid.isascii() and pid.isdecimal() and len(pid) < 12):
        return False
    try:
        process = psutil.Process(int(pid))
        return process.status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD} and (
            _identity(process) == identity
        )
    except psutil.Error:
        return False


def is_parent(identity: str) -> bool:
    """Whether this process still runs, and started this one."""
    # Windows does not report that a parent has ended: there it is enough that it runs.
    return is_alive(identity) and (os.name != "posix" or os.getppid() == int(identity.partition(":")[0]))


def _identity(process: psutil.Process) -> str:
    started_s = process.create_time()
    if psutil.LINUX:
        # Linux counts from the boot; the date of the boot changes when the clock is set.
        started_s -= psutil.boot_time()
    return f"{process.pid}:{_boot()}{started_s:.2f}"


@cache
def _boot() -> str:
    """Distinguishes processes with the same pid and time of different boots; empty where unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "") + "-"
    except OSError:
        return ""
