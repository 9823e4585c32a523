"""A decoded image on its way to the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from sam3_runner.images.pixel_file import HeldPixels, PixelFile

if TYPE_CHECKING:
    import numpy.typing as npt

    from sam3_runner.instances import Window

MAX_STORED_PX = 2**23
"""Images of at most so many px are resized on a GPU; larger ones, over 25 MB, where they are decoded."""


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """What a decoder process makes of a file.

    Attributes:
        purpose: pixels for the model, or a preview for people.
        limit_px: for the model, images of so many px stay as stored; of a preview, its longest side.
        windows: for the model, squares of these in place of the whole image; empty: the whole image.
    """

    purpose: Literal["model", "preview"]
    limit_px: int
    windows: tuple[Window, ...] = ()

    @property
    def images(self) -> int:
        """How many images it makes of a file."""
        return len(self.windows) or 1


@dataclass(frozen=True, slots=True)
class SentPixels:
    """Where another process finds pixels, and their (rows, columns, channels)."""

    file: PixelFile
    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The pixels of an image, and the size of the masks in the result.

    Attributes:
        pixels: (rows, columns, 1 or 3) uint8 sRGB, in this process, or in a file that processes share.
            Either the model's square (side, side, 3), or the image as stored, which is resized to the square
            on the model's device. None: only `key` is known, for a runner that may still hold the features.
        width, height: px of the image as a viewer shows it (EXIF orientation applied).
        orientation: EXIF's, 1 to 8, of `pixels`.
        key: equal keys mean equal files; None where that is not known.
    """

    pixels: npt.NDArray[np.uint8] | HeldPixels | SentPixels | None
    width: int
    height: int
    orientation: int = 1
    key: str | None = None

    @property
    def has_pixels(self) -> bool:
        """The pixels are known, not the key alone."""
        return self.pixels is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, columns, channels) of `pixels`."""
        if self.pixels is None:
            raise ValueError("the image has no pixels")
        rows, columns, channels = self.pixels.shape
        return rows, columns, channels

    def read_into(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Copy the pixels to `pixels`, of the same shape. Raises OSError: their process is gone."""
        if isinstance(self.pixels, HeldPixels | SentPixels):
            self.pixels.file.read_into(pixels)
        elif self.pixels is not None:
            pixels[...] = self.pixels

    def array(self) -> npt.NDArray[np.uint8]:
        """A copy of the pixels. Raises OSError: their process is gone."""
        pixels = np.empty(self.shape, np.uint8)
        self.read_into(pixels)
        return pixels

    def sendable(self) -> DecodedImage:
        """The same image for another process: with the place of its pixels, where these are shared."""
        if not isinstance(self.pixels, HeldPixels):
            return self
        return replace(self, pixels=SentPixels(self.pixels.file, self.pixels.shape))

    def close(self, *, is_read: bool) -> None:
        """Let go of pixels that this process shares; see `HeldPixels.close`."""
        if isinstance(self.pixels, HeldPixels):
            self.pixels.close(is_read=is_read)


@dataclass(frozen=True, slots=True)
class LocalImage(DecodedImage):
    """A decoded image whose pixels are in this process."""

    pixels: npt.NDArray[np.uint8]
