"""The process that decodes: `python -m sam3_runner.images.decoder SIDE_PX`, started by decoders.py.

It reads image files from standard input and writes squares to standard output, until the input ends. It holds
no secret and no connection, and the kernel ends it when an image takes more than an honest one.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import signal
import sys
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from sam3_runner.errors import UnsupportedImage
from sam3_runner.images.decode import decode_square
from sam3_runner.images.image_file import LENGTH, MAX_DECODE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sam3_runner.images.image_file import ImageFile

PIPE_BYTES = 2**20
"""The most that Linux gives to everybody."""

MAX_CPU_S = 5.0
"""For one image, of all threads. An honest one of 50 megapixels takes 0.8 to 2 s of a server's core."""
MAX_DATA_BYTES = MAX_DECODE_BYTES + 300_000_000
"""Of private memory as the kernel counts it: libraries and threads reserve more than they use."""


def main() -> None:
    """Decode file after file, until standard input ends."""
    side_px = int(sys.argv[1])
    # Ours was checked by the file's header, and may be higher.
    Image.MAX_IMAGE_PIXELS = None
    _limit_memory()
    _widen_pipes()
    while _decode_next(sys.stdin.buffer, sys.stdout.buffer, side_px):
        pass


def _decode_next(files: BinaryIO, answers: BinaryIO, side_px: int) -> bool:
    """Decode one file; False when there will be no more. Nothing of it is left when this returns."""
    file = _receive(files)
    if file is None:
        return False
    try:
        with _limited_time():
            square = decode_square(file, side_px)
    except UnsupportedImage as refusal:
        _send(answers, json.dumps({"refusal": str(refusal)}).encode())
    except MemoryError:
        _send(answers, json.dumps({"refusal": "the image takes too much memory to decode"}).encode())
    else:
        _send(answers, json.dumps({"width": square.width, "height": square.height}).encode())
        _send(answers, square.pixels.data)
    return True


def _receive(stream: BinaryIO) -> ImageFile | None:
    """The next file; None when there will be none."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    file: ImageFile = pickle.loads(stream.read(*LENGTH.unpack(head)))  # noqa: S301 - from our own worker
    return file


def _send(stream: BinaryIO, message: bytes | memoryview) -> None:
    stream.write(LENGTH.pack(memoryview(message).nbytes))
    stream.write(message)
    stream.flush()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource  # noqa: PLC0415

        resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))


def _widen_pipes() -> None:
    """Let a square cross in a few pieces: by default 64 KiB wait in a pipe, and both sides wake for each."""
    with contextlib.suppress(ImportError, AttributeError, OSError):  # Linux alone has it
        import fcntl  # noqa: PLC0415

        for pipe in (sys.stdin, sys.stdout):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """SIGPROF, which nobody here handles, ends the process after `MAX_CPU_S` of its time."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
