"""What the pipeline calls of the model's process and of the processes that decode images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.images.square import SquareImage
    from sam3_runner.instances import PredictResult
    from sam3_runner.serving.engine import EngineStatus


class Runner(Protocol):
    """The model, in a process of its own; one serves all requests of a worker at once."""

    async def segment(
        self,
        image: SquareImage,
        prompts: list[str],
        deadline_s: float,
        *,
        log_ids: dict[str, str] | None = None,
    ) -> tuple[list[PredictResult], float]:
        """One result a prompt, and the time in ms of the model's pass that they shared.

        Args:
            image: the model's square.
            prompts: of at most 32 tokens each.
            deadline_s: on the clock of `time.monotonic`.
            log_ids: fields of what the model's process logs of the request.

        Raises:
            ModelNotLoaded: there is no model now.
            RunnerStopped: its process died while it had the request.
            DeadlineExceeded: the deadline passed before the work began.
            InferenceFailed, PromptTooLong: the model refused or failed on this request.
        """
        ...

    async def status(self) -> EngineStatus:
        """The model's state, at most a second old."""
        ...


class Decoders(Protocol):
    """The processes that decode images for one worker."""

    async def start(self) -> None:
        """Start the first process."""
        ...

    async def decode(self, file: ImageFile) -> SquareImage:
        """The model's square of a file. Raises UnsupportedImage, DecoderFailed."""
        ...

    async def close(self) -> None:
        """End the processes."""
        ...
