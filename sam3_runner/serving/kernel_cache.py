"""Where Triton keeps the kernels that it compiles, and the launchers that a C compiler builds for them."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

TRITON_VARIABLE = "TRITON_CACHE_DIR"

_temporary: list[tempfile.TemporaryDirectory[str]] = []
"""Kept for the life of the process, at whose end they are removed."""


def keep_kernels_in(folder: Path) -> None:
    """Let Triton read and write its kernels in `folder`, which is created where it is missing.

    Triton's own key of a kernel covers its source, its options, the GPU's architecture and Triton's version,
    so what is read from the folder is never out of date. Where it cannot be used, one warning is logged, and
    the kernels of this process lie in a temporary folder. To be called before Triton is imported.
    """
    fault = _fault_of(folder)
    if fault is not None:
        logger.warning(
            "SAM3_KERNEL_CACHE: %s cannot be used (%s), so each start compiles the kernels anew: let this "
            "server's user write there, or name another folder",
            *(folder, fault),
        )
        _temporary.append(tempfile.TemporaryDirectory(prefix="sam3-kernels-"))
        folder = Path(_temporary[-1].name)
    os.environ[TRITON_VARIABLE] = str(folder)


def _fault_of(folder: Path) -> str | None:
    """Why files cannot be written to the folder, or libraries not be loaded from it; None if they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return error.strerror or type(error).__name__
    if hasattr(os, "ST_NOEXEC") and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return "it is mounted noexec"
    return None
