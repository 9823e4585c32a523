"""Pixels in memory that processes share: found by other processes, and freed whatever happens."""

from __future__ import annotations

import pickle
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sam3_runner.images.pixel_file import (
    MAX_IDLE_BYTES,
    MAX_IDLE_FILES,
    SHARES_MEMORY,
    HeldFile,
    HeldPixels,
    PixelFile,
    PixelFiles,
)
from tests.shared_pixels import all_pids, held_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

pytestmark = pytest.mark.skipif(not SHARES_MEMORY, reason="this system has no memfd")

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 60.0
SHAPE = (30, 40, 3)

WRITER = """
import pickle, sys
file, pixels = pickle.load(sys.stdin.buffer)
file.write(pixels)
"""
READER = """
import pickle, sys
import numpy as np
file, shape = pickle.load(sys.stdin.buffer)
pixels = np.empty(shape, np.uint8)
file.read_into(pixels)
pickle.dump(pixels, sys.stdout.buffer)
"""
HOLDER = """
import pickle, sys
import numpy as np
from sam3_runner.images.pixel_file import HeldFile
held = [HeldFile(), HeldFile()]
for each in held:
    each.file.write(np.full((30, 40, 3), 7, np.uint8))
pickle.dump([each.file for each in held], sys.stdout.buffer)
sys.stdout.buffer.flush()
sys.stdin.read()
"""


def run(code: str, message: object) -> bytes:
    """Run code in another process; returns its output."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, input=pickle.dumps(message), stdout=subprocess.PIPE, cwd=ROOT, timeout=TIMEOUT_S, check=True
    ).stdout


@contextmanager
def holder() -> Iterator[tuple[subprocess.Popen[bytes], list[PixelFile]]]:
    """Another process that holds two files of `SHAPE`, until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        files: list[PixelFile] = pickle.load(process.stdout)  # noqa: S301 - from our own process
        yield process, files


def random_pixels(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read(file: PixelFile, shape: tuple[int, int, int] = SHAPE) -> npt.NDArray[np.uint8]:
    pixels = np.empty(shape, np.uint8)
    file.read_into(pixels)
    return pixels


def test_pixels_that_one_process_writes_another_reads() -> None:
    """A process writes to a file of this one, and a third reads the same pixels."""
    held, pixels = HeldFile(), random_pixels()
    run(WRITER, (held.file, pixels))
    assert np.array_equal(pickle.loads(run(READER, (held.file, SHAPE))), pixels)  # noqa: S301 - our own
    assert held.size_bytes == pixels.nbytes


def test_pixels_of_a_later_image_replace_the_earlier() -> None:
    """A smaller image in a file that was used before is read whole, and nothing of the one before."""
    held = HeldFile()
    held.file.write(random_pixels(1, (60, 40, 3)))
    later = random_pixels(2)
    held.file.write(later)
    assert np.array_equal(read(held.file), later)


def test_file_that_ends_early() -> None:
    """Reading more than was written is an error, not pixels of nothing."""
    held = HeldFile()
    held.file.write(random_pixels())
    with pytest.raises(OSError, match=r"end after 3600 of 7200 bytes"):
        read(held.file, (60, 40, 3))


def test_reused_descriptor_is_not_taken_for_the_file() -> None:
    """A descriptor that belongs to another file by now is neither read nor written."""
    first = HeldFile()
    first.file.write(random_pixels())
    gone = first.file
    first.close()
    other = HeldFile()
    assert other.file.descriptor == gone.descriptor
    other.file.write(random_pixels(1))
    with pytest.raises(OSError, match="no longer holds"):
        read(gone)
    with pytest.raises(OSError, match="no longer holds"):
        gone.write(random_pixels(2))
    assert np.array_equal(read(other.file), random_pixels(1))


def test_files_are_freed_when_closed_or_dropped() -> None:
    """A file takes memory until it is closed, or until its object is deleted."""
    before = held_files()
    closed, dropped = HeldFile(), HeldFile()
    assert held_files() - before == {closed.file.name, dropped.file.name}
    closed.close()
    closed.close()
    assert held_files() - before == {dropped.file.name}
    del dropped
    assert held_files() == before


def test_files_of_a_killed_process_are_freed() -> None:
    """No process holds a file whose process was killed, and a reader gets an error."""
    with holder() as (process, files):
        names = {file.name for file in files}
        assert held_files([process.pid]) == names
        assert (read(files[0]) == 7).all()
        process.kill()
        process.wait()
        assert not held_files(all_pids()) & names
        for file in files:
            with pytest.raises(OSError, match=r"No such file"):
                read(file)


def test_file_is_used_again_once_it_is_read() -> None:
    """A file is used for another image only after its reader is done; otherwise it is freed."""
    files = PixelFiles()
    first = HeldPixels(files.take(), files, SHAPE)
    name = first.file.name
    first.close(is_read=True)
    first.close(is_read=False)  # changes nothing any more
    again = files.take()
    assert again.file.name == name
    second = HeldPixels(again, files, SHAPE)
    del again
    second.close(is_read=False)
    assert name not in held_files()
    assert files.take().file.name != name


def test_idle_files_are_bounded_in_number() -> None:
    """However many images were decoded at once, few files are kept."""
    files, before = PixelFiles(), held_files()
    taken = [files.take() for _ in range(2 * MAX_IDLE_FILES)]
    for held in taken:
        held.file.write(random_pixels())
        files.give_back(held)
    del taken, held
    assert len(held_files() - before) == MAX_IDLE_FILES


@pytest.mark.parametrize(("more_bytes", "kept"), [(0, 1), (1, 0)])
def test_idle_files_are_bounded_in_bytes(more_bytes: int, kept: int) -> None:
    """The file of a large image is freed after it."""
    files, before = PixelFiles(), held_files()
    held = files.take()
    held.file.write(np.zeros(MAX_IDLE_BYTES + more_bytes, np.uint8))
    files.give_back(held)
    del held
    assert len(held_files() - before) == kept
