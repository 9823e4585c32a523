"""A decoder process: `python -m sam3_runner.images.decoder SIDE_PX`, started by decoders.py.

It reads image files from standard input and answers on standard output, until the input ends. It writes the
pixels to memory that it shares with the API worker. It has no secret and no connection. The kernel ends it
when an image takes more time or memory than any valid one.
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
from sam3_runner.images.decode import decode_image, decode_preview, decode_windows
from sam3_runner.images.image_file import LENGTH, MAX_DECODE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sam3_runner.images.decoded import DecodeTask, LocalImage
    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.images.pixel_file import PixelFile

    _Message = tuple[ImageFile, DecodeTask, list[PixelFile | None]]

PIPE_BYTES = 2**20
"""The largest pipe that Linux grants to an unprivileged process."""

MAX_CPU_S = 5.0
"""For one image, over all threads. A photo of 50 megapixels takes 0.8 to 2 s of a server's core, and with 16
tiles 70 % more."""
MAX_DATA_BYTES = MAX_DECODE_BYTES + 300_000_000
"""Private memory as the kernel counts it: libraries and threads reserve more than they use."""


def main() -> None:
    """Decode files until standard input ends."""
    # systemd stops all processes of a service at once; the API worker needs this one to finish its tasks.
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop_signal, signal.SIG_IGN)
    side_px = int(sys.argv[1])
    # Our own limit may be higher; the API worker has checked it on the file's header.
    Image.MAX_IMAGE_PIXELS = None
    _limit_memory()
    _widen_pipes()
    while _decode_next(sys.stdin.buffer, sys.stdout.buffer, side_px):
        pass


def _decode_next(input_stream: BinaryIO, output: BinaryIO, side_px: int) -> bool:
    """Decode one file; False at the end of the input. Keeps nothing of the file after the return."""
    message = _receive(input_stream)
    if message is None:
        return False
    file, task, shared = message
    facts: list[dict[str, object]] = []
    unshared: list[LocalImage] = []
    try:
        with _limited_time():
            # Each is written before the next one is made: one at a time is in this memory.
            for image, target in zip(_decode(file, task, side_px), shared, strict=True):
                is_shared = target is not None and _write(target, image)
                facts.append(_facts_of(image, is_shared=is_shared))
                unshared += [] if is_shared else [image]
    except UnsupportedImage as refusal:
        _send_head(output, refusal=str(refusal))
    except MemoryError:
        _send_head(output, refusal="the image takes too much memory to decode")
    else:
        _send_head(output, images=facts)
        for image in unshared:
            _send(output, image.pixels.data)
    return True


def _decode(file: ImageFile, task: DecodeTask, side_px: int) -> Iterator[LocalImage]:
    if task.windows:
        yield from decode_windows(file, side_px, task.windows)
    elif task.purpose == "preview":
        yield decode_preview(file, task.limit_px)
    else:
        yield decode_image(file, side_px, task.limit_px)


def _facts_of(image: LocalImage, *, is_shared: bool) -> dict[str, object]:
    return {
        "width": image.width,
        "height": image.height,
        "orientation": image.orientation,
        "shape": image.shape,
        "is_shared": is_shared,
    }


def _write(shared: PixelFile, image: LocalImage) -> bool:
    """Write an image's pixels to the file; False where it cannot be opened, or the memory is full."""
    try:
        shared.write(image.pixels)
    except OSError:
        return False
    return True


def _receive(stream: BinaryIO) -> _Message | None:
    """The next file, what to do with it, and where the pixels go; None at the end of the input."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    message: _Message = pickle.loads(  # noqa: S301 - from our own API worker
        stream.read(*LENGTH.unpack(head))
    )
    return message


def _send_head(stream: BinaryIO, **facts: object) -> None:
    _send(stream, json.dumps(facts).encode())


def _send(stream: BinaryIO, message: bytes | memoryview) -> None:
    stream.write(LENGTH.pack(memoryview(message).nbytes))
    stream.write(message)
    stream.flush()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError):  # not on Windows
        import resource  # noqa: PLC0415

        resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))


def _widen_pipes() -> None:
    """Enlarge the pipes' buffers from 64 KiB, so that a square is sent with few context switches."""
    with contextlib.suppress(ImportError, AttributeError, OSError):  # Linux only
        import fcntl  # noqa: PLC0415

        for pipe in (sys.stdin, sys.stdout):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """End the process by SIGPROF, which has no handler here, after `MAX_CPU_S` of CPU time."""
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
