"""One server a DATA_DIR: a second one would take the tasks that the first is working on for left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import filelock

import process_identity
from settings import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

LOCK = "server.lock"
HOLDER = "server.pid"

_held: list[filelock.BaseFileLock] = []
"""Kept for the life of the process, with which the lock goes, however it ends."""


def hold(data_dir: Path) -> None:
    """Take the folder for this process. Raises `SettingsError` when another one has it."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # A soft lock would outlive a killed server.
        lock = filelock.FileLock(data_dir / LOCK, blocking=False, fallback_to_soft=False)
        lock.acquire()
        (data_dir / HOLDER).write_text(process_identity.current())
    except filelock.Timeout:
        pid = holder(data_dir).partition(":")[0] or "unknown"
        raise SettingsError(
            f"DATA_DIR {data_dir} is in use by another server (pid {pid}); "
            "stop that one, or give this one a folder of its own"
        ) from None
    except FileExistsError:
        raise SettingsError(
            f"DATA_DIR {data_dir} is not a folder: name one, or what may become one"
        ) from None
    except OSError as error:
        raise SettingsError(
            f"DATA_DIR {data_dir} cannot be used ({error.strerror or error}): "
            "let this server's user write there, or name another folder"
        ) from None
    _held.append(lock)


def holder(data_dir: Path) -> str:
    """The identity of the process that took the folder last; empty when none did."""
    try:
        return (data_dir / HOLDER).read_text()
    except (OSError, UnicodeDecodeError):
        return ""
