"""Brings images to the model's device, beside its passes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sam3_runner.inference.device_errors import is_out_of_memory
from sam3_runner.inference.resize import to_square

if TYPE_CHECKING:
    from torch import Tensor

    from sam3_runner.images.decoded import DecodedImage


@dataclass(frozen=True, slots=True)
class StagedImage:
    """An image that a pass can begin with.

    Attributes:
        square: (side, side, 3) uint8 on the model's device; on the host if the device was full. None: the
            features of `key` are to be used.
        width, height, key: as those of `DecodedImage`.
    """

    square: Tensor | None
    width: int
    height: int
    key: str | None = None

    @property
    def has_pixels(self) -> bool:
        """The square is known, not the key alone."""
        return self.square is not None


class Stager:
    """Stages images, in any number of threads. On a GPU each has a stream and pinned memory of its own.

    Args:
        device: of the model.
        side_px: of its square.
    """

    def __init__(self, device: torch.device, side_px: int) -> None:
        self._device, self._side_px = device, side_px
        self._of_thread = threading.local()

    @torch.inference_mode()
    def stage(self, image: DecodedImage) -> StagedImage:
        """Read an image's pixels, move them to the device and resize them; returns when that is done.

        Raises:
            OSError: the process that holds the pixels is gone.
        """
        square = None if image.pixels is None else self._square(image)
        return StagedImage(square, image.width, image.height, image.key)

    def _square(self, image: DecodedImage) -> Tensor:
        if self._device.type != "cuda":
            return to_square(torch.from_numpy(image.array()), self._side_px, image.orientation)
        pinned = self._pinned(image.shape)
        image.read_into(pinned.numpy())
        try:
            with torch.cuda.stream(self._stream()):
                square = to_square(
                    pinned.to(self._device, non_blocking=True), self._side_px, image.orientation
                )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # A copy: of a square it would be the pinned memory itself, which the next image overwrites.
            return to_square(pinned.clone(), self._side_px, image.orientation)
        self._stream().synchronize()
        return square

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._of_thread.stream
        return stream

    def _pinned(self, shape: tuple[int, int, int]) -> Tensor:
        """A tensor in pinned memory, valid until the thread's next call."""
        size = int(np.prod(shape))
        if not hasattr(self._of_thread, "pinned") or len(self._of_thread.pinned) < size:
            self._of_thread.pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        pinned: Tensor = self._of_thread.pinned
        return pinned[:size].view(shape)
