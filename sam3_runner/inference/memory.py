"""Recognises torch's errors for a full GPU memory. Does not import torch."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sam3_runner.errors import DeviceFull

if TYPE_CHECKING:
    from collections.abc import Iterator

_OUT_OF_MEMORY = re.compile(r"CUDA (error: )?out of memory|_ALLOC_FAILED")
"""torch's messages (2.11, on an H200) where a context, a tensor or cuBLAS's workspace does not fit. Only the
second has an exception class of its own. After each of them the process worked on once memory was free."""


@contextmanager
def out_of_memory_as(message: str) -> Iterator[None]:
    """Turn torch's out-of-memory errors into `DeviceFull(message)`; other errors pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        if not _OUT_OF_MEMORY.search(str(error)):
            raise
        raise DeviceFull(message) from error
