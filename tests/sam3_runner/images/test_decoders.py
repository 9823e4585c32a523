"""The decoder processes: their results, their limits, and what happens when one is killed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
import uvloop
from PIL import Image
from prometheus_client import REGISTRY

from sam3_runner import UnsupportedImage
from sam3_runner.images import decoders as decoders_module
from sam3_runner.images.decode import decode_image, decode_square
from sam3_runner.images.decoder import MAX_DATA_BYTES
from sam3_runner.images.decoders import ImageDecoders
from sam3_runner.images.image_file import ImageFile
from sam3_runner.images.pixel_file import SHARES_MEMORY
from sam3_runner.images.read import read_image_file
from tests.image_files import FORMATS, encoded, exif_of, noise, png_of, primaries_of, with_scans
from tests.server_processes import is_decoder
from tests.shared_pixels import all_pids, held_files

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sam3_runner.images.decoded import DecodedImage

pytestmark = pytest.mark.slow

SIDE_PX = 56
WIDTH, HEIGHT = 60, 40
POLL_S = 0.02
TIMEOUT_S = 60.0


def with_decoders(work: Callable[[ImageDecoders], Awaitable[Any]], *, count: int = 2) -> Any:
    """The result of `work` with decoders that are closed afterwards."""

    async def run() -> Any:
        decoders = ImageDecoders(side_px=SIDE_PX, count=count)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await work(decoders)
        finally:
            await decoders.close()

    # The event loop of the API workers.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def decoded(file: ImageFile) -> DecodedImage:
    square: DecodedImage = with_decoders(lambda decoders: decoders.decode(file, 0))
    return square


def file_of(kind: str) -> ImageFile:
    return read_image_file(encoded(noise(200, 150), kind), max_pixels=10**6)


@cache
def slow(scans: int) -> ImageFile:
    """A JPEG with so many scans that the parser would refuse it; each takes about 20 ms."""
    image = Image.new("RGB", (4200, 4200))
    return ImageFile(
        "JPEG", with_scans(encoded(image, "JPEG", progressive=True), scans), *image.size, decode_bytes=0
    )


def processes() -> list[psutil.Process]:
    """The decoder processes of this process."""
    return [child for child in psutil.Process().children() if is_decoder(child)]


def wait_for(condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`."""
    until_s = time.monotonic() + TIMEOUT_S
    while not (value := condition()):
        assert time.monotonic() < until_s
        time.sleep(POLL_S)
    return value


@pytest.mark.parametrize("kind", FORMATS)
def test_result_equals_decoding_in_this_process(kind: str) -> None:
    """A file decoded in another process gives the same square and size as in this one."""
    expected, square = decode_square(file_of(kind), SIDE_PX), decoded(file_of(kind))
    assert np.array_equal(expected.pixels, square.array())
    assert (square.width, square.height) == (200, 150)


def oriented(kind: str, mode: str, orientation: int) -> ImageFile:
    data = encoded(noise(WIDTH, HEIGHT).convert(mode), kind, exif=exif_of(orientation))
    return read_image_file(data, max_pixels=10**6)


@pytest.mark.parametrize("shares_memory", [True, False])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_pixels_as_stored(
    monkeypatch: pytest.MonkeyPatch, kind: str, mode: str, channels: int, *, shares_memory: bool
) -> None:
    """For a model that resizes, pixels come as stored, with their orientation; also through a pipe."""
    if shares_memory and not SHARES_MEMORY:
        pytest.skip("this system has no memfd")
    monkeypatch.setattr(decoders_module, "SHARES_MEMORY", shares_memory)

    async def work(decoders: ImageDecoders) -> None:
        for orientation in range(1, 9):
            file = oriented(kind, mode, orientation)
            image = await decoders.decode(file, WIDTH * HEIGHT)
            assert image.shape == (HEIGHT, WIDTH, channels)
            assert np.array_equal(image.array(), decode_image(file, SIDE_PX, WIDTH * HEIGHT).pixels)
            if kind == "PNG":
                stored = np.asarray(noise(WIDTH, HEIGHT).convert(mode)).reshape(image.shape)
                assert np.array_equal(image.array(), stored)
            assert image.orientation == orientation
            viewed = (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT)
            assert (image.width, image.height) == viewed
            image.close(is_read=True)

    with_decoders(work)


def wide_png(**options: object) -> bytes:
    return encoded(noise(WIDTH, HEIGHT), "PNG", exif=exif_of(6), **options)


def sixteen_bits() -> bytes:
    levels = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH)).astype(">u2")
    return png_of(WIDTH, HEIGHT, b"".join(b"\0" + row.tobytes() for row in levels), depth=16, colour=0)


@pytest.mark.parametrize(
    ("data", "max_stored_px"),
    [
        (encoded(noise(WIDTH, HEIGHT).convert("RGBA"), "PNG", exif=exif_of(6)), WIDTH * HEIGHT),
        (encoded(noise(WIDTH, HEIGHT).convert("LA"), "PNG", exif=exif_of(6)), WIDTH * HEIGHT),
        (wide_png(transparency=(0, 0, 0)), WIDTH * HEIGHT),
        (encoded(noise(WIDTH, HEIGHT).convert("P"), "PNG", exif=exif_of(6)), WIDTH * HEIGHT),
        (encoded(noise(WIDTH, HEIGHT).convert("CMYK"), "JPEG", exif=exif_of(6)), WIDTH * HEIGHT),
        (wide_png(icc_profile=primaries_of("ProPhoto")), WIDTH * HEIGHT),
        (sixteen_bits(), WIDTH * HEIGHT),
        (encoded(noise(WIDTH, HEIGHT), "WEBP"), WIDTH * HEIGHT),
        (wide_png(), WIDTH * HEIGHT - 1),
    ],
    ids=["alpha", "grey-alpha", "colour-key", "palette", "cmyk", "wide-gamut", "16-bit", "webp", "large"],
)
def test_square_where_the_model_cannot_resize(data: bytes, max_stored_px: int) -> None:
    """Transparency, other colours and large images become the square in the decoder, as in this process."""
    file = read_image_file(data, max_pixels=10**6)
    image: DecodedImage = with_decoders(lambda decoders: decoders.decode(file, max_stored_px))
    expected = decode_square(file, SIDE_PX)
    assert image.shape == (SIDE_PX, SIDE_PX, 3)
    assert np.array_equal(image.array(), expected.pixels)
    assert (image.width, image.height, image.orientation) == (expected.width, expected.height, 1)


def test_profile_near_srgb_is_stored() -> None:
    """A profile that changes no colour leaves the pixels as stored."""
    file = read_image_file(wide_png(icc_profile=primaries_of("sRGB")), max_pixels=10**6)
    image: DecodedImage = with_decoders(lambda decoders: decoders.decode(file, WIDTH * HEIGHT))
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(image.array(), np.asarray(noise(WIDTH, HEIGHT)))


async def kill_the_decoder_of(decoding: asyncio.Task[Any]) -> None:
    """Kill each process that decodes, until the decoding has ended."""
    while not decoding.done():
        for process in processes():
            process.kill()
        await asyncio.sleep(POLL_S)


@pytest.mark.skipif(not SHARES_MEMORY, reason="this system has no memfd")
def test_failures_leave_no_shared_memory() -> None:
    """After refused, killed and cancelled decodings and a dropped image, only idle files are left."""
    whole = file_of("WEBP")
    broken = ImageFile("WEBP", whole.data[:-400], whole.width, whole.height, decode_bytes=0)
    before = held_files()

    async def work(decoders: ImageDecoders) -> None:
        for _ in range(3):
            with pytest.raises(UnsupportedImage, match="damaged"):
                await decoders.decode(broken, 0)
        assert len(held_files() - before) == 1, "a refused image's file is used again"
        killed = asyncio.create_task(decoders.decode(slow(60), 0))
        await kill_the_decoder_of(killed)
        with pytest.raises(UnsupportedImage, match="ends the decoder"):
            killed.result()
        assert len(held_files() - before) <= 1
        cancelled = asyncio.create_task(decoders.decode(slow(5000), 0))
        [busy] = await asyncio.to_thread(
            wait_for, lambda: [p for p in processes() if p.cpu_times().user > 0.4]
        )
        cancelled.cancel()
        await asyncio.wait({cancelled})
        assert not busy.is_running()
        assert len(held_files() - before) <= 1
        image = await decoders.decode(whole, 0)
        assert len(held_files() - before) == 1
        image.close(is_read=False)
        assert held_files() == before

    with_decoders(work)


@pytest.mark.skipif(not SHARES_MEMORY, reason="this system has no memfd")
def test_decoder_keeps_no_shared_memory() -> None:
    """A decoder lets go of a file once the image is written, so that its API worker alone frees it."""
    before = held_files()

    async def work(decoders: ImageDecoders) -> None:
        image = await decoders.decode(file_of("PNG"), 0)
        [name] = held_files() - before
        assert not held_files(process.pid for process in processes()) & {name}
        image.close(is_read=False)
        assert not held_files(all_pids()) & {name}

    with_decoders(work)


def test_damaged_file() -> None:
    """A damaged file is refused, and the same process decodes the next file."""
    whole = file_of("WEBP")
    broken = ImageFile("WEBP", whole.data[:-400], whole.width, whole.height, decode_bytes=0)

    async def work(decoders: ImageDecoders) -> None:
        await decoders.start()
        before = processes()
        with pytest.raises(UnsupportedImage, match="damaged: its pixels cannot be decoded"):
            await decoders.decode(broken, 0)
        assert (await decoders.decode(whole, 0)).width == whole.width
        assert processes() == before

    with_decoders(work)


def test_too_much_time() -> None:
    """An image that would take minutes is refused after seconds, and its process is ended."""
    with pytest.raises(UnsupportedImage, match="too much time"):
        decoded(slow(5000))
    assert processes() == []


def test_too_much_memory() -> None:
    """An image that needs gigabytes is refused by the process' memory limit."""
    rows = bytes(2 * 200_000_000)
    bomb = ImageFile("PNG", png_of(1, 200_000_000, rows), 1, 200_000_000, decode_bytes=0)
    with pytest.raises(UnsupportedImage, match="too much memory"):
        decoded(bomb)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the limits of another process")
def test_limits_and_environment() -> None:
    """A decoder has a memory limit, and none of the server's secrets in its environment."""

    async def work(decoders: ImageDecoders) -> None:
        await decoders.decode(file_of("PNG"), 0)
        [process] = processes()
        assert process.rlimit(psutil.RLIMIT_DATA) == (MAX_DATA_BYTES, MAX_DATA_BYTES)
        assert set(process.environ()) <= {
            "PYTHONPATH",
            "MALLOC_MMAP_THRESHOLD_",
            "MALLOC_TRIM_THRESHOLD_",
            "OPENBLAS_NUM_THREADS",
            "LC_CTYPE",
        }

    with_decoders(work)


def test_killed_decoder() -> None:
    """After a decoder is killed, idle or busy, the file is decoded by another."""

    async def work(decoders: ImageDecoders) -> None:
        await decoders.start()
        [idle] = processes()
        idle.kill()
        assert (await decoders.decode(file_of("PNG"), 0)).width == 200
        [idle] = processes()
        idle.kill()
        await asyncio.to_thread(wait_for, lambda: not processes())
        assert (await decoders.decode(file_of("PNG"), 0)).width == 200
        decoding = asyncio.create_task(decoders.decode(slow(60), 0))
        [busy] = await asyncio.to_thread(
            wait_for, lambda: [p for p in processes() if p.cpu_times().user > 0.4]
        )
        busy.kill()
        assert (await decoding).width == 4200

    with_decoders(work)


def test_file_that_kills() -> None:
    """A file whose decoder is killed twice is refused, and both kills are counted."""
    done = threading.Event()
    before = REGISTRY.get_sample_value("sam3_decoder_kills_total") or 0

    def kill_all() -> None:
        while not done.wait(POLL_S):
            for process in processes():
                process.kill()

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(UnsupportedImage, match="it ends the decoder"):
            decoded(file_of("JPEG"))
    finally:
        done.set()
        killer.join()
    assert REGISTRY.get_sample_value("sam3_decoder_kills_total") == before + 2


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_ends_no_decoding(how: signal.Signals) -> None:
    """A stop signal to all processes of the server, decoders too, blames no image: systemd sends it so."""
    before = REGISTRY.get_sample_value("sam3_decoder_kills_total") or 0

    async def work(decoders: ImageDecoders) -> None:
        decoding = asyncio.create_task(decoders.decode(slow(60), 0))
        [process] = await asyncio.to_thread(
            wait_for, lambda: [p for p in processes() if p.cpu_times().user > 0.4]
        )
        process.send_signal(how)
        assert (await decoding).width == 4200

    with_decoders(work)
    assert (REGISTRY.get_sample_value("sam3_decoder_kills_total") or 0) == before


def test_cancelled_decoding_ends() -> None:
    """Cancelling a request ends its decoder process."""

    async def work(decoders: ImageDecoders) -> None:
        decoding = asyncio.create_task(decoders.decode(slow(5000), 0))
        [process] = await asyncio.to_thread(
            wait_for, lambda: [p for p in processes() if p.cpu_times().user > 0.4]
        )
        decoding.cancel()
        await asyncio.wait({decoding})
        assert not process.is_running()
        assert (await decoders.decode(file_of("PNG"), 0)).width == 200

    with_decoders(work)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_decoders_end_with_their_worker(how: signal.Signals) -> None:
    """The decoders of a killed worker end too."""
    code = (
        "import asyncio\n"
        "from sam3_runner.images.decoders import ImageDecoders\n"
        "async def main():\n"
        "    await ImageDecoders(side_px=56, count=2).start()\n"
        "    print('started', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"started\n"
        [decoder] = psutil.Process(worker.pid).children()
        worker.send_signal(how)
        worker.wait()
    psutil.wait_procs([decoder], timeout=TIMEOUT_S)
    assert not decoder.is_running()
