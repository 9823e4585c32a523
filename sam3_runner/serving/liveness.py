"""Whether a runner's process lives: each runner writes its identity to a file, and the API workers read it.

The socket cannot show it: the supervisor holds it open, so calls to a dead runner connect and wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

logger = logging.getLogger(__name__)

FAILED = "failed"
"""In place of an identity: the process has ended, and is not started again."""
ROOM_BYTES = 128
"""The size of the file; an identity has about 44."""
CACHE_TIME_S = 0.1
"""A process that was seen alive counts as alive for so long."""
DYING_TIME_S = 3.0
"""A process that broke off a call counts as dead for so long: with a GPU's memory it takes seconds to end."""


def reserve(path: Path) -> None:
    """Make the file for `write_identity`, or the one of an earlier server blank: it names no process.

    Raises:
        OSError: it cannot be written; a file that exists can be even on a full disk.
    """
    _overwrite(path, "", os.O_CREAT)


def write_identity(path: Path, identity: str) -> None:
    """Write which process the runner is to a file of `reserve`, in place: this also works on a full disk.

    A reader may see a part of the old text and a part of the new one, for a moment. This names no process: an
    identity has the time of the process's start.
    """
    _overwrite(path, identity)


def _overwrite(path: Path, text: str, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        os.write(descriptor, text.ljust(ROOM_BYTES).encode())
    finally:
        os.close(descriptor)


def pids_in(paths: Iterable[Path]) -> set[int]:
    """The pids in files of `write_identity`; a file that is missing or unreadable has none."""
    pids = set()
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            pids.add(int(path.read_text().partition(":")[0]))
    return pids


class RunnerLiveness:
    """Whether the runner's process lives, seen from another process.

    Args:
        path: the file of `write_identity`.
        is_alive: whether the process of an identity runs.
    """

    def __init__(self, path: Path, is_alive: Callable[[str], bool]) -> None:
        self._path = path
        self._is_alive = is_alive
        self._identity: str | None = None
        self._cached_until_s = 0.0
        self._has_died = False
        self._has_failed = False
        self._dying: str | None = None
        self._dying_until_s = 0.0

    def find(self) -> str | None:
        """The identity of the process that lives now, or None. Cheap enough for every call."""
        if self._identity is not None and time.monotonic() < self._cached_until_s:
            return self._identity
        if self._identity is not None and not self._is_alive(self._identity):
            self._record_death()
        if self._identity is None:
            self._identity = self._read_living()
        self._cached_until_s = time.monotonic() + CACHE_TIME_S
        return self._identity

    def mark_dying(self, identity: str) -> None:
        """Count this process as dead from now on: it broke off a call, but may not have ended yet."""
        if identity == self._identity:
            self._dying, self._dying_until_s = identity, time.monotonic() + DYING_TIME_S
            self._record_death()

    @property
    def has_failed(self) -> bool:
        """There is no process, and there will be none."""
        return self._has_failed

    @property
    def reason_absent(self) -> str:
        """The sentence that says why there is no process."""
        if self._has_failed:
            return "the model's process has ended for good; the server's log says why"
        if self._has_died:
            return "the model's process has stopped and is being restarted"
        return "the model's process is starting"

    def _read_living(self) -> str | None:
        try:
            identity = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        self._has_failed = identity == FAILED
        dying = identity == self._dying and time.monotonic() < self._dying_until_s
        return identity if not dying and self._is_alive(identity) else None

    def _record_death(self) -> None:
        logger.warning("the model's process has stopped (%s)", self._identity)
        self._identity, self._has_died = None, True
