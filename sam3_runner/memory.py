"""A GPU whose memory is full. Knows nothing of torch."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sam3_runner.errors import DeviceFull

if TYPE_CHECKING:
    from collections.abc import Iterator

_FULL = re.compile(r"CUDA (error: )?out of memory|_ALLOC_FAILED")
"""In torch's words (2.11, on an H200): without room for a context, for a tensor, and for cuBLAS's workspace.
Only the second has a class of its own; after all three the process could go on once memory was free."""


@contextmanager
def telling_full_memory(what: str) -> Iterator[None]:
    """Raise `DeviceFull` with the sentence `what` where torch finds no memory; other errors go on."""
    try:
        yield
    except RuntimeError as error:
        if not _FULL.search(str(error)):
            raise
        raise DeviceFull(what) from error
