"""One server a DATA_DIR: a second one would take over the tasks that the first is working on."""

from __future__ import annotations

from pathlib import Path

import filelock

from processes import identity
from processes.volumes import check_writable, unwritable
from settings import SettingsError

LOCK = "server.lock"
HOLDER = "server.pid"

_held: list[filelock.BaseFileLock] = []
"""Kept for the life of the process: the lock ends with it, however it ends."""


def hold(data_dir: Path) -> None:
    """Lock the folder for this process, and create it where it is missing.

    Raises:
        SettingsError: another process holds it, or this one cannot write there.
    """
    check_writable("DATA_DIR", data_dir)
    try:
        # A soft lock would remain after a killed server.
        lock = filelock.FileLock(data_dir / LOCK, blocking=False, fallback_to_soft=False)
        lock.acquire()
        (data_dir / HOLDER).write_text(identity.current())
    except filelock.Timeout:
        pid = holder(data_dir).partition(":")[0] or "unknown"
        raise SettingsError(
            f"DATA_DIR {data_dir} is in use by another server (pid {pid}); "
            "stop that one, or give this one a folder of its own"
        ) from None
    except OSError as error:
        raise unwritable("DATA_DIR", Path(error.filename or data_dir), error) from None
    _held.append(lock)


def holder(data_dir: Path) -> str:
    """The identity of the process that locked the folder last; empty when none did."""
    try:
        return (data_dir / HOLDER).read_text()
    except (OSError, UnicodeDecodeError):
        return ""
