"""Which steps run as kernels on this machine: those that compile and run here."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from sam3_runner.inference.device_errors import is_out_of_memory
from sam3_runner.network import operations

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

MAX_REASON_CHARACTERS = 300
STEPS_BY_FILE = {
    "products": {"gelu", "rotary"},
    "norms": {"norm"},
    "attention": {"attention"},
    "grid_attention": {"grid_attention"},
    "boxes": {"boxes", "box_bias"},
    "group_norm": {"group_norm"},
    "patches": {"patches"},
}
"""The steps of each file in network/kernels/. The other steps of `operations` use PyTorch's own kernels."""


def find_supported_steps(run: Callable[[], object]) -> None:
    """Run a pass until it succeeds, with the definition of each step whose kernel fails.

    Kernels are compiled for the GPU at hand, which may be older than those that they were written for, or
    have less shared memory; and Triton needs a C compiler for the first launch of each.

    Args:
        run: a pass with all steps, not recorded.

    Raises:
        RuntimeError: the pass fails without the kernel of a step; or the memory or the device is the reason.
    """
    while True:
        try:
            run()
        # Triton raises any kind: a compiler's exit status, a missing file, too little shared memory.
        except Exception as error:
            steps = _steps_of(error) - operations.plain_steps
            if not steps or is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_REASON_CHARACTERS]}"
        else:
            return
        operations.plain_steps.update(steps)
        logger.warning(
            "the kernels for %s do not work here, and PyTorch computes these steps instead, more slowly: %s",
            ", ".join(sorted(steps)),
            reason,
        )


def _steps_of(error: Exception) -> set[str]:
    """The steps whose kernel raised `error`; all of them where no kernel can be compiled."""
    if "C compiler" in str(error):
        return set().union(*STEPS_BY_FILE.values())
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    kernels = [file.stem for file in files if file.parent.name == "kernels"]
    return STEPS_BY_FILE.get(kernels[-1], set()) if kernels else set()
