"""Which process a note on disk speaks of: told apart from every other, later ones with its pid too."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import psutil


def current() -> str:
    """The identity of this process, `PID:START`: a text to keep and to compare."""
    return _identity(psutil.Process(os.getpid()))


def is_alive(identity: str) -> bool:
    """Does this process still run on this machine?

    False for a zombie, for another process that has its pid by now, and for a text that is no identity.
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
    """Does this process still run, and has it started this one?"""
    # Where parents pass away without a trace (Windows), it is enough that it runs.
    return is_alive(identity) and (os.name != "posix" or os.getppid() == int(identity.partition(":")[0]))


def _identity(process: psutil.Process) -> str:
    started_s = process.create_time()
    if psutil.LINUX:
        # There the time is counted from the boot; the date of the boot moves when the clock is set.
        started_s -= psutil.boot_time()
    return f"{process.pid}:{_boot()}{started_s:.2f}"


@cache
def _boot() -> str:
    """Tells a process from one that has its pid and its time after the next boot; empty where unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "") + "-"
    except OSError:
        return ""
