"""A predictor whose device has too little memory, or fails; on a CPU as well."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sam3_runner import SAM3Predictor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sam3_runner.images.decoded import DecodedImage
    from sam3_runner.inference.pass_clock import PassClock
    from sam3_runner.inference.staging import StagedImage
    from sam3_runner.instances import Results
    from sam3_runner.prompts import ConceptPrompt

    Requests = Sequence[tuple[DecodedImage | StagedImage, Sequence[ConceptPrompt]]]

BREAKING_PROMPT = "break the device"
TOO_LARGE_PROMPT = "too large"
BROKEN_ONCE_FILE = "TEST_BROKEN_ONCE_FILE"
"""Environment variable: a file that says that the device was broken already, and need not be again."""
TOO_MANY_FLOATS = 10**15


def fail_assert() -> None:
    """Fail a device-side assert (cudaErrorAssert): every later call of CUDA in this process fails."""
    torch._assert_async(torch.zeros(1, device="cuda"))


class BreakingPredictor(SAM3Predictor):
    """Its device fails in a pass with `BREAKING_PROMPT`: on a GPU by `break_device`.

    The memory has room for `room` images, and none for `TOO_LARGE_PROMPT`; the error is torch's own.
    """

    room = 64
    break_device: Callable[[], None] = staticmethod(fail_assert)
    is_broken = False

    def segment_mixed(
        self,
        requests: Requests,
        with_masks: Sequence[bool],
        clock: PassClock | None = None,
        *,
        log_ids: Sequence[Mapping[str, str]] = (),
    ) -> list[Results]:
        if len(requests) > self.room or _have(requests, TOO_LARGE_PROMPT):
            torch.empty(TOO_MANY_FLOATS, device=self.device)
        if _have(requests, BREAKING_PROMPT) and self._is_first():
            self.is_broken = True
            if self.device.type == "cuda":
                self.break_device()
            else:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for it")
        return super().segment_mixed(requests, with_masks, clock, log_ids=log_ids)

    def device_works(self) -> bool:
        return super().device_works() and (self.device.type == "cuda" or not self.is_broken)

    def _is_first(self) -> bool:
        """Whether no process has broken its device before; always, without a file that says so."""
        name = os.environ.get(BROKEN_ONCE_FILE)
        if name is None:
            return True
        is_first = not Path(name).exists()
        Path(name).touch()
        return is_first


def _have(requests: Requests, text: str) -> bool:
    return any(prompt.text == text for _, prompts in requests for prompt in prompts)
