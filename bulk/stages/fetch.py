"""The first stage: reads a shard's files. Knows neither pixels nor torch."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from bulk.errors import PictureError, StoreRefused, StoreUnavailable
from bulk.manifests import is_manifest
from bulk.objects import open_objects, read_uri
from bulk.plan import PlanReader
from bulk.stages.background import yield_to_others
from bulk.stages.blocks import PictureState, block_of, shard_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bulk.plan import Plan
    from bulk.settings import Run
    from bulk.stages.blocks import Block

FILES_AT_ONCE = 16
"""Being read in one process: a store answers in tens of ms."""
MAX_BLOCK_BYTES = 2**25
"""Of the files that a block holds: 64 files of 1920 x 1080 px have 30 MB. The others are read where they are
decoded. In its store on two cores Ray lets three such blocks wait, and of 65 MB none."""


class Fetch:
    """Shards in, blocks of files out.

    Args:
        run: what to do.
        plan: of the run.
    """

    def __init__(self, run: Run, plan: Plan) -> None:
        if run.background:
            yield_to_others()
        self._run = run
        self._plan = PlanReader(open_objects(run.folder, max_wait_s=run.max_wait_s), plan)
        self._source = open_objects(run.images, run.max_wait_s)
        self._is_listed = not is_manifest(run.images)
        self._threads = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="fetch")

    def __call__(self, block: Block) -> Block:
        """The files of a shard. Raises RunError: the source fails."""
        shard = shard_of(block)
        states = [PictureState(picture) for picture in self._plan.pictures(shard)]
        room = _Room(MAX_BLOCK_BYTES)

        def fetch(state: PictureState) -> bytes | None:
            listed_bytes = state.picture.size_bytes
            if not room.take(listed_bytes or 0):
                return None
            try:
                data = fetch_file(self._run, state)
            except PictureError as error:
                state.error = error
                return None
            if listed_bytes is None and not room.take(len(data)):
                room.close()  # a manifest tells no sizes: no further file is read in vain
                return None
            return data

        files = list(self._threads.map(fetch, states))
        self._check_source(states)
        return block_of(shard, states, files)

    def _check_source(self, states: Sequence[PictureState]) -> None:
        """End the run where no picture of a shard can be read by a fault of the source.

        Error rows would stay, and the rights of credentials or a folder that is not mounted come back.
        """
        codes = {None if state.error is None else state.error.code for state in states}
        if len(states) == 1 or not codes <= {"FORBIDDEN", "NOT_FOUND"}:
            return
        first = states[0]
        if "FORBIDDEN" in codes and first.picture.image.startswith("s3://"):  # files have rights of their own
            raise StoreRefused(
                f"none of {len(states)} pictures in turn can be read, such as {first.picture.image} "
                f"({first.error}); allow it, and start the same command again"
            )
        if self._is_listed and next(self._source.list(), None) is None:
            raise StoreUnavailable(
                f"{self._run.images} is empty on this machine, though pictures were listed there: is it "
                "mounted? The same command goes on from here"
            )


def fetch_file(run: Run, state: PictureState) -> bytes:
    """The file of a picture, whose size, checksum and time are noted.

    Raises:
        PictureError: it cannot be read, or is too large.
        RunError: the store fails.
    """
    started_s = time.perf_counter()
    data = read_uri(state.picture.image, run.settings.max_image_bytes, run.max_wait_s)
    state.size_bytes = len(data)
    state.sha256 = hashlib.sha256(data).hexdigest()
    state.timings_ms["fetch"] = (time.perf_counter() - started_s) * 1000
    return data


class _Room:
    """Bytes that are left, for threads."""

    def __init__(self, left_bytes: int) -> None:
        self._left_bytes = left_bytes
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> bool:
        """Whether there is room, which is taken then."""
        with self._lock:
            fits = size_bytes <= self._left_bytes
            self._left_bytes -= size_bytes if fits else 0
            return fits

    def close(self) -> None:
        """From now on there is no room, for nothing at all either."""
        with self._lock:
            self._left_bytes = -1
