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
    from collections.abc import Sequence

    import numpy.typing as npt

    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.images.pixel_file import HeldFile, PixelFile
    from sam3_runner.instances import Window

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
        [(facts, pixels)] = await self._run(file, DecodeTask("model", max_stored_px))
        return DecodedImage(pixels, facts["width"], facts["height"], facts["orientation"])

    async def decode_windows(self, file: ImageFile, windows: Sequence[Window]) -> list[DecodedImage]:
        """The model's square of each window of a file, which is decoded once. Raises as `decode`."""
        made = await self._run(file, DecodeTask("model", 0, tuple(windows)))
        return [DecodedImage(pixels, facts["width"], facts["height"]) for facts, pixels in made]

    async def preview(self, file: ImageFile, max_side_px: int) -> npt.NDArray[np.uint8]:
        """A file as a viewer shows it, (rows, columns, 3) uint8 sRGB, no side longer than `max_side_px`.

        Raises as `decode`.
        """
        [(_, pixels)] = await self._run(file, DecodeTask("preview", max_side_px))
        if not isinstance(pixels, HeldPixels):
            return pixels
        copy = np.empty(pixels.shape, np.uint8)
        try:
            await asyncio.to_thread(pixels.file.read_into, copy)
        finally:
            pixels.close(is_read=True)
        return copy

    async def _run(self, file: ImageFile, task: DecodeTask) -> list[tuple[dict[str, Any], _Pixels]]:
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

    async def _run_once(self, file: ImageFile, task: DecodeTask) -> list[tuple[dict[str, Any], _Pixels]]:
        # A heavy image has its own process: memory of earlier images does not add to its own, and all of it
        # is returned to the host.
        process = (None if file.is_heavy else self._idle_process()) or await self._new_process()
        held: list[HeldFile | None] = []
        try:
            held += (self._files.take() if SHARES_MEMORY else None for _ in range(task.images))
            head, sent = await _exchange(process, file, task, [each.file if each else None for each in held])
        except BaseException as error:  # cancellation above all: the decoding must not continue
            _close(held)  # the error's traceback would keep them
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
        if "refusal" in head:
            for each in held:
                if each is not None:
                    self._files.give_back(each)
            raise UnsupportedImage(head["refusal"])
        try:
            return [
                (facts, self._pixels_of(facts, each, pixels))
                for facts, each, pixels in zip(head["images"], held, sent, strict=True)
            ]
        except BaseException:
            _close(held)
            raise

    def _pixels_of(self, facts: dict[str, Any], held: HeldFile | None, sent: bytes) -> _Pixels:
        rows, columns, channels = facts["shape"]
        shape = rows, columns, channels
        if held is None or not facts["is_shared"]:  # sent through the pipe
            if held is not None:
                self._files.give_back(held)
            return np.frombuffer(sent, np.uint8).reshape(shape)
        if rows * columns * channels > held.size_bytes:
            raise DecoderFailed("a decoder process has written fewer pixels than it says")
        return HeldPixels(held, self._files, shape)

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
    process: Process, file: ImageFile, task: DecodeTask, shared: list[PixelFile | None]
) -> tuple[dict[str, Any], list[bytes]]:
    """The process' answer for a file, and each image's pixels, empty where they are shared."""
    packed = pickle.dumps((file, task, shared))
    await _send(process, LENGTH.pack(len(packed)), packed)
    head: dict[str, Any] = json.loads(await _receive(process))
    images = head.get("images", [])  # none of a file that is refused
    return head, [b"" if each["is_shared"] else await _receive(process) for each in images]


def _close(held: Sequence[HeldFile | None]) -> None:
    for each in held:
        if each is not None:
            each.close()


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
