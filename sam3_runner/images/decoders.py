"""The API worker's side of the decoder processes.

The API worker itself never decodes an untrusted file. A file that takes too much time or memory, or crashes
the decoder, ends one small process, and the API worker starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3_runner.errors import DecoderFailed, UnsupportedImage
from sam3_runner.images.decoded import DecodedImage, DecodeTask
from sam3_runner.images.image_file import LENGTH
from sam3_runner.images.pixel_file import SHARES_MEMORY, HeldPixels, PixelFiles
from sam3_runner.metrics import DECODER_KILLS
from sam3_runner.serving.cpu_share import cpu_share

if TYPE_CHECKING:
    from asyncio.subprocess import Process

    import numpy.typing as npt

    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.images.pixel_file import PixelFile

    _Pixels = npt.NDArray[np.uint8] | HeldPixels

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
DECODERS = max(2, min(4, cpu_share().threads))
"""Decoder processes of a worker: one may be busy with a heavy image for seconds."""
STREAM_LIMIT_BYTES = 2**22
"""More than a square of SAM 3, for where memory is not shared."""

ENVIRONMENT = {
    # Everything that this process can import.
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    # By default glibc maps new memory for each band, page by page: 58 ms per image instead of 22.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
    "OPENBLAS_NUM_THREADS": "1",
}
"""The whole environment of a decoder: none of the server's secrets."""


class ImageDecoders:
    """Decodes images in separate processes.

    Args:
        side_px: of the model's square.
        count: most processes.
    """

    def __init__(self, *, side_px: int, count: int = DECODERS) -> None:
        self._side_px = side_px
        self._slots = asyncio.Semaphore(count)
        self._idle: list[Process] = []
        self._files = PixelFiles()

    async def start(self) -> None:
        """Start the first process, so that no image waits for it; the others start on demand."""
        self._idle.append(await self._new_process())

    async def decode(self, file: ImageFile, max_stored_px: int) -> DecodedImage:
        """Decode a file. When cancelled, it ends the decoder before it frees the slot.

        Args:
            file: of the image.
            max_stored_px: the model resizes images of so many px itself; others become its square.

        Raises:
            UnsupportedImage: the pixels are damaged, take too much time or memory, or crash a decoder.
            DecoderFailed: the decoder cannot work, whatever the file.
        """
        head, pixels = await self._run(file, DecodeTask("model", max_stored_px))
        return DecodedImage(pixels, head["width"], head["height"], head["orientation"])

    async def preview(self, file: ImageFile, max_side_px: int) -> npt.NDArray[np.uint8]:
        """A file as a viewer shows it, (rows, columns, 3) uint8 sRGB, no side longer than `max_side_px`.

        Raises as `decode`.
        """
        _, pixels = await self._run(file, DecodeTask("preview", max_side_px))
        if not isinstance(pixels, HeldPixels):
            return pixels
        copy = np.empty(pixels.shape, np.uint8)
        try:
            await asyncio.to_thread(pixels.file.read_into, copy)
        finally:
            pixels.close(is_read=True)
        return copy

    async def _run(self, file: ImageFile, task: DecodeTask) -> tuple[dict[str, Any], _Pixels]:
        async with self._slots:
            try:
                return await self._run_once(file, task)
            except _DecoderKilled as killed:
                DECODER_KILLS.inc()
                if killed.signal_number == signal.SIGPROF:
                    raise UnsupportedImage("the image takes too much time to decode") from killed
                logger.warning(
                    "a decoder process was killed by signal %d; decoding the file once more",
                    killed.signal_number,
                )
            try:
                return await self._run_once(file, task)
            except _DecoderKilled as killed:
                DECODER_KILLS.inc()
                raise UnsupportedImage("the image cannot be decoded: it ends the decoder") from killed

    async def close(self) -> None:
        """End the processes. Call it when no file is being decoded."""
        while self._idle:
            await _end(self._idle.pop())

    async def _run_once(self, file: ImageFile, task: DecodeTask) -> tuple[dict[str, Any], _Pixels]:
        # A heavy image has its own process: memory of earlier images does not add to its own, and all of it
        # is returned to the host.
        process = (None if file.is_heavy else self._idle_process()) or await self._new_process()
        held = self._files.take() if SHARES_MEMORY else None
        try:
            head, pixels = await _exchange(process, file, task, held.file if held else None)
        except BaseException as error:  # cancellation above all: the decoding must not continue
            if held is not None:
                held.close()  # the error's traceback would keep it
            if not isinstance(error, asyncio.IncompleteReadError | ConnectionError):
                await _end(process)
                raise
            code = await process.wait()
            if code < 0:
                raise _DecoderKilled(-code) from error
            raise DecoderFailed(f"a decoder process ended with exit code {code}") from error
        if file.is_heavy:
            await _end(process)
        else:
            self._idle.append(process)
        if held is not None and not head.get("is_shared"):  # refused, or sent through the pipe
            self._files.give_back(held)
            held = None
        if "refusal" in head:
            raise UnsupportedImage(head["refusal"])
        rows, columns, channels = head["shape"]
        shape = rows, columns, channels
        if held is not None and rows * columns * channels > held.size_bytes:
            held.close()
            raise DecoderFailed("a decoder process has written fewer pixels than it says")
        if held is None:
            return head, np.frombuffer(pixels, np.uint8).reshape(shape)
        return head, HeldPixels(held, self._files, shape)

    def _idle_process(self) -> Process | None:
        """An idle process that is still alive."""
        while self._idle:
            process = self._idle.pop()
            assert process.stdin is not None
            # Writing to a process that died while idle would raise uvloop's RuntimeError.
            if process.returncode is None and not process.stdin.is_closing():
                return process
        return None

    async def _new_process(self) -> Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "sam3_runner.images.decoder", str(self._side_px)),
            stdin=PIPE,
            stdout=PIPE,
            limit=STREAM_LIMIT_BYTES,
            env=ENVIRONMENT,
            # A terminal's Ctrl-C must reach only the server, which finishes its tasks first.
            start_new_session=True,
        )


class _DecoderKilled(Exception):
    """A process was killed by a signal while it decoded."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"killed by signal {signal_number}")
        self.signal_number = signal_number


async def _exchange(
    process: Process, file: ImageFile, task: DecodeTask, shared: PixelFile | None
) -> tuple[dict[str, Any], bytes]:
    """The process' answer for a file, and the pixels unless it refuses the file or they are shared."""
    packed = pickle.dumps((file, task, shared))
    await _send(process, LENGTH.pack(len(packed)), packed)
    head: dict[str, Any] = json.loads(await _receive(process))
    return head, b"" if head.get("is_shared") or "refusal" in head else await _receive(process)


async def _send(process: Process, *parts: bytes) -> None:
    assert process.stdin is not None
    # Writing to a process that has died would raise uvloop's RuntimeError.
    if process.stdin.is_closing():
        raise ConnectionResetError
    process.stdin.writelines(parts)
    await process.stdin.drain()


async def _receive(process: Process) -> bytes:
    assert process.stdout is not None
    [length] = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    return await process.stdout.readexactly(length)


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
