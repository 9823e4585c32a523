"""Pixels in memory that processes share: a file without a name, which Linux frees with its last descriptor.

The process that decodes writes the pixels. The others open its descriptor by way of /proc, so nothing is
copied through a pipe or a socket, and whichever process dies, nothing is left behind.
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


@dataclass(frozen=True, slots=True)
class PixelFile:
    """Where a process on this host holds pixels. It can be sent to other processes of the same user.

    Attributes:
        pid, descriptor: of the process that holds them, and its file descriptor.
        name: random, so that another file under the same descriptor is not taken for this one.
        shape: (rows, columns, channels) of uint8.
    """

    pid: int
    descriptor: int
    name: str
    shape: tuple[int, int, int]

    def read_into(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Copy the pixels to `pixels`, of the same number of bytes. Releases the GIL.

        Raises:
            OSError: the process no longer holds them, or is another user's.
        """
        with self._opened() as descriptor:
            buffer, done = pixels.data.cast("B"), 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], done)
                if not count:
                    raise OSError(f"the shared pixels end after {done} of {len(buffer)} bytes")
                done += count

    def hold(self) -> HeldPixels:
        """The same pixels, held by this process. Raises as `read_into`."""
        with self._opened() as descriptor:
            return HeldPixels(os.dup(descriptor), self.name, self.shape)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        path = f"/proc/{self.pid}/fd/{self.descriptor}"
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if self.name not in Path(f"/proc/self/fd/{descriptor}").readlink().name:
                raise OSError("the process no longer holds the shared pixels")
            yield descriptor
        finally:
            os.close(descriptor)


class HeldPixels:
    """Pixels that this process holds until `close`, or until this object is deleted."""

    def __init__(self, descriptor: int, name: str, shape: tuple[int, int, int]) -> None:
        self.file = PixelFile(os.getpid(), descriptor, name, shape)
        self._close = weakref.finalize(self, os.close, descriptor)

    def close(self) -> None:
        """Let go of the pixels; a second call does nothing."""
        self._close()


def hold_pixels(pixels: npt.NDArray[np.uint8]) -> HeldPixels:
    """A copy of `pixels` (rows, columns, channels) in shared memory. Raises OSError: the memory is full."""
    name = NAME_PREFIX + secrets.token_hex(8)
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    rows, columns, channels = pixels.shape
    held = HeldPixels(descriptor, name, (rows, columns, channels))
    buffer, done = pixels.data.cast("B"), 0
    while done < len(buffer):
        done += os.write(descriptor, buffer[done:])
    return held
