"""Pixels in memory that processes share: files without a name, which Linux frees with their last descriptor.

An API worker makes the files. A decoder process writes to one and the model's process reads it, both by way
of the API worker's descriptor in /proc: nothing is copied through a pipe or a socket, and whichever process
dies, nothing is left behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt

SHARES_MEMORY = hasattr(os, "memfd_create")
"""On Linux. Elsewhere pixels are sent through pipes and sockets."""
NAME_PREFIX = "sam3-pixels-"
MAX_IDLE_FILES = 8
"""Files that an API worker keeps for later images: writing to memory that is mapped already takes a fifth of
the time."""
MAX_IDLE_BYTES = 2**23
"""Of each; larger files are freed after their image. 1920 x 1080 px take 6.2 MB."""


@dataclass(frozen=True, slots=True)
class PixelFile:
    """A file of pixels, as other processes of the same user on this host find it.

    Attributes:
        pid, descriptor: of the process that holds the file, and its file descriptor.
        name: random, so that another file under the same descriptor is not taken for this one.
    """

    pid: int
    descriptor: int
    name: str

    def write(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Write all of `pixels` to the file. Raises OSError: it is gone, or the memory is full."""
        with self._opened(os.O_RDWR) as descriptor:
            buffer, done = pixels.data.cast("B"), 0
            while done < len(buffer):
                done += os.pwrite(descriptor, buffer[done:], done)

    def read_into(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Copy the file's first bytes to all of `pixels`. Releases the GIL.

        Raises:
            OSError: the process no longer holds the file, or is another user's.
        """
        with self._opened(os.O_RDONLY) as descriptor:
            buffer, done = pixels.data.cast("B"), 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], done)
                if not count:
                    raise OSError(f"the shared pixels end after {done} of {len(buffer)} bytes")
                done += count

    @contextlib.contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        descriptor = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", flags | os.O_CLOEXEC)
        try:
            if self.name not in Path(f"/proc/self/fd/{descriptor}").readlink().name:
                raise OSError("the process no longer holds the shared pixels")
            yield descriptor
        finally:
            os.close(descriptor)


class HeldFile:
    """A file of this process, until `close`, or until this object is deleted."""

    def __init__(self) -> None:
        name = NAME_PREFIX + secrets.token_hex(8)
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        self.file = PixelFile(os.getpid(), descriptor, name)
        self._close = weakref.finalize(self, os.close, descriptor)

    def close(self) -> None:
        """Free the file; a second call does nothing."""
        self._close()

    @property
    def size_bytes(self) -> int:
        """Memory that the file takes."""
        return os.fstat(self.file.descriptor).st_size


class PixelFiles:
    """The files of an API worker: those that are not in use are kept for later images."""

    def __init__(self) -> None:
        self._idle: list[HeldFile] = []

    def take(self) -> HeldFile:
        """A file to write to."""
        return self._idle.pop() if self._idle else HeldFile()

    def give_back(self, held: HeldFile) -> None:
        """Take a file back that nobody writes or reads any more."""
        if len(self._idle) < MAX_IDLE_FILES and held.size_bytes <= MAX_IDLE_BYTES:
            self._idle.append(held)
        else:
            held.close()


class HeldPixels:
    """The pixels of one image in a file of this process.

    Args:
        held: the file.
        files: where it is from.
        shape: (rows, columns, channels) of uint8.
    """

    def __init__(self, held: HeldFile, files: PixelFiles, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self._held: HeldFile | None = held
        self._files = files

    @property
    def file(self) -> PixelFile:
        """Where other processes find the pixels. Not after `close`."""
        assert self._held is not None
        return self._held.file

    def close(self, *, is_read: bool) -> None:
        """Let go of the pixels; a second call does nothing.

        Args:
            is_read: nobody reads them any more. Otherwise the file is not used for another image.
        """
        if self._held is not None:
            if is_read:
                self._files.give_back(self._held)
            else:
                self._held.close()
        self._held = None
