"""Who segments the pictures of a run: a server, or the model in this process."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol, Self

from sam3_client import AsyncClient, BadImage, Instance, InvalidRequest, Result, Sam3Error, UnsupportedImage
from sam3_client.calls import VISUAL
from sam3_client.command_line.errors import SERVER, CommandError
from sam3_client.command_line.server_code import server_code
from sam3_client.pictures import Picture

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from sam3_client.calls import Options
    from sam3_runner.instances import PredictResult
    from sam3_runner.predictor import SAM3Predictor


class Segmenter(Protocol):
    """Segments pictures inside its `async with`."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    async def model(self) -> dict[str, Any]:
        """Checkpoint and identity of the weights. Raises `Sam3Error`, `CommandError`."""

    async def segment(self, path: Path) -> Result:
        """What is in one picture. Raises `Sam3Error`."""


class ServerSegmenter:
    """A server.

    Args:
        url, key: as of `AsyncClient`.
        max_wait_s: for a server that is overloaded, loading or away.
        prompts, options: for each picture.
    """

    def __init__(
        self, url: str | None, key: str | None, max_wait_s: float, prompts: Sequence[str], options: Options
    ) -> None:
        self._client = AsyncClient(url, key, max_wait_s=max_wait_s)
        self._prompts = prompts
        self._options = options.given()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def model(self) -> dict[str, Any]:
        """See Segmenter."""
        info = await self._client.model_info()
        return {"checkpoint": info.get("checkpoint"), "sha256": info.get("weights_sha256")}

    async def segment(self, path: Path) -> Result:
        """See Segmenter."""
        return await self._client.segment(path, self._prompts, **self._options)


class LocalSegmenter:
    """The model in this process, one picture at a time.

    Args:
        weights: as SAM3_WEIGHTS_PATH; None: weights/sam3.pt if it exists, else the demo checkpoint.
        prompts, options: for each picture.

    Raises:
        CommandError: the server's code is not here, or an option needs a server.
    """

    def __init__(self, weights: str | None, prompts: Sequence[str], options: Options) -> None:
        for name in ("tiles", "deadline_ms"):
            if getattr(options, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} needs a server: leave out --local")
        with server_code("sam3 predict --local"):
            from sam3_runner import SAM3Predictor  # noqa: PLC0415 - loads torch
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        self._predictor: SAM3Predictor = SAM3Predictor(weights)
        self._prompts = list(dict.fromkeys(prompts))
        self._options = options
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    async def model(self) -> dict[str, Any]:
        """Load it; see Segmenter."""
        from sam3_runner import SAM3Error  # noqa: PLC0415 - only with --local

        try:
            await asyncio.to_thread(self._predictor.load)
        except SAM3Error as error:
            raise CommandError(f"the model cannot be loaded: {error}", SERVER) from error
        checkpoint = self._predictor.checkpoint
        assert checkpoint is not None
        return {"checkpoint": checkpoint.name, "bytes": checkpoint.weights_file.stat().st_size}

    async def segment(self, path: Path) -> Result:
        """See Segmenter."""
        picture = await asyncio.to_thread(Picture.of, path)
        async with self._turn:
            return await asyncio.to_thread(self._segment, picture)

    def _segment(self, picture: Picture) -> Result:
        from sam3_runner import BoxOutsideImage, PromptTooLong, SAM3Error  # noqa: PLC0415
        from sam3_runner import UnsupportedImage as RefusedImage  # noqa: PLC0415

        try:
            results = self._refined(self._predictor.predict_batch(picture.file, self._concepts()))
        except RefusedImage as error:
            raise UnsupportedImage(str(error), code="UNSUPPORTED_IMAGE") from error
        except BoxOutsideImage as error:
            raise BadImage(str(error), code="INVALID_REQUEST") from error
        except (PromptTooLong, ValueError) as error:
            raise InvalidRequest(str(error), code="INVALID_REQUEST") from error
        except SAM3Error as error:
            raise Sam3Error(str(error), code="INFERENCE_FAILED") from error
        labels = self._prompts or [VISUAL]
        return Result(
            picture,
            width=results[0].image_width,
            height=results[0].image_height,
            prompts=labels,
            presence={
                label: round(result.presence, 4) for label, result in zip(labels, results, strict=True)
            },
            instances=list(_instances(labels, results)),
        )

    def _concepts(self) -> list[Any]:
        from sam3_runner.prompts import ConceptPrompt  # noqa: PLC0415

        boxes = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in self._options.boxes or ())
        labels = tuple(bool(label) for label in self._options.box_labels or [1] * len(boxes))
        texts: list[str | None] = [*self._prompts] or [None]
        return [ConceptPrompt(text, boxes, labels, self._options.score_threshold) for text in texts]

    def _refined(self, results: list[PredictResult]) -> list[PredictResult]:
        """As the server: each prompt is a request of its own."""
        from outputs.refinement import Refinement, refine  # noqa: PLC0415

        options = self._options
        refinement = Refinement(
            nms_iou=options.nms_iou,
            max_instances=options.max_instances,
            min_area_px=options.min_area or 0,
            fill_holes_px=options.fill_holes or 0,
            remove_islands_px=options.remove_islands or 0,
        )
        return [refine([result], refinement)[0] for result in results]


def _instances(labels: Sequence[str], results: Sequence[PredictResult]) -> Iterator[Instance]:
    """Rounded as the server's answers are."""
    from outputs.coco_rle import coco_rle  # noqa: PLC0415

    for label, result in zip(labels, results, strict=True):
        for each in result.instances:
            x0, y0, x1, y1 = (round(side, 2) for side in each.box)
            mask = coco_rle(each.mask, result.image_width, result.image_height)
            yield Instance(label, round(each.score, 4), (x0, y0, x1, y1), mask)
