"""What the pipeline calls of the model's process and of the processes that decode images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from sam3_runner.images.decoded import DecodedImage
    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.instances import Results, Window
    from sam3_runner.prompts import ConceptPrompt
    from sam3_runner.serving.engine import EngineStatus


class Runner(Protocol):
    """The model, in a process of its own; one serves all requests of a worker at once."""

    async def segment(
        self,
        image: DecodedImage,
        prompts: Sequence[ConceptPrompt],
        deadline_s: float,
        *,
        with_masks: bool = False,
        log_ids: dict[str, str] | None = None,
    ) -> tuple[Results, float]:
        """One result a prompt, and the time in ms of the model's pass that they shared.

        Args:
            image: its pixels are read until this returns.
            prompts: whose texts have at most 32 tokens each.
            deadline_s: on the clock of `time.monotonic`.
            with_masks: the results hold each instance's mask, in place of their union.
            log_ids: fields of what the model's process logs of the request.

        Raises:
            ModelNotLoaded: there is no model now.
            RunnerStopped: its process died while it had the request.
            DeadlineExceeded: the deadline passed before the work began.
            InferenceFailed, PromptTooLong, BoxOutsideImage: the model refused or failed on this request.
            FeaturesNotHeld: the image has no pixels, and its features are not held.
        """
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a model is loaded, by the last status and without asking for a new one."""
        ...

    @property
    def max_stored_px(self) -> int:
        """Images of so many px are resized by the model's process, by its last status; 0: none."""
        ...

    def may_hold(self, key: str) -> bool:
        """Whether it seems to hold the features of the image with this key, so that it needs no pixels."""
        ...

    @property
    def known_status(self) -> EngineStatus:
        """The model's state by its last answer, without asking it."""
        ...

    async def status(self) -> EngineStatus:
        """The model's state, at most a second old."""
        ...


class Decoders(Protocol):
    """The processes that decode images for one worker."""

    async def start(self) -> None:
        """Start the first process."""
        ...

    async def decode(self, file: ImageFile, max_stored_px: int) -> DecodedImage:
        """The pixels of a file: as stored if there are at most `max_stored_px`, or the model's square.

        Raises UnsupportedImage, DecoderFailed.
        """
        ...

    async def decode_windows(self, file: ImageFile, windows: Sequence[Window]) -> list[DecodedImage]:
        """The model's square of each window of a file, which is decoded once.

        Raises UnsupportedImage, DecoderFailed.
        """
        ...

    async def preview(self, file: ImageFile, max_side_px: int) -> npt.NDArray[np.uint8]:
        """A file as a viewer shows it, (rows, columns, 3) uint8 sRGB, no side longer than `max_side_px`.

        Raises UnsupportedImage, DecoderFailed.
        """
        ...

    async def close(self) -> None:
        """End the processes."""
        ...
