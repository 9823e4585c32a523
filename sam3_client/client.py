"""Calls a SAM3 server: `Client`, and `AsyncClient` with the same calls to await."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any, Literal, Self

import httpx

from sam3_client.calls import (
    HEALTH_PATH,
    INFO_PATH,
    Call,
    Options,
    base_url,
    key_headers,
    read_answer,
    read_result,
    segment_calls,
    timeouts,
    unreachable,
)
from sam3_client.errors import Sam3Error
from sam3_client.pictures import Picture
from sam3_client.retries import Retries
from sam3_client.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    import numpy.typing as npt

    from sam3_client.calls import Box
    from sam3_client.pictures import ImageInput
    from sam3_client.result import Result

DEFAULT_URL = "http://127.0.0.1:3000"
MAX_CONCURRENT = 8
"""Requests that an `AsyncClient` has in flight; a server's worker holds 16 images at most."""


class _Connection:
    """What both clients share: where the server is, and how an answer or its absence is read."""

    def __init__(self, url: str | None, key: str | None, timeout_s: float, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._timeout_s = timeout_s
        self._was_answered = False
        self._settings: dict[str, Any] = {
            "base_url": base_url(url or os.environ.get("SAM3_URL") or DEFAULT_URL),
            "headers": {"User-Agent": f"sam3-client/{VERSION}"}
            | key_headers(key or os.environ.get("SAM3_API_KEY")),
            "timeout": timeouts(timeout_s),
        }

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        self._was_answered = True
        return read_answer(response)

    def _wait_s(self, retries: Retries, error: httpx.RequestError | Sam3Error) -> float:
        """The time before the next try. Raises the `Sam3Error` of the last one."""
        known = error if isinstance(error, Sam3Error) else unreachable(error, self._timeout_s)
        return retries.wait_s(known, was_answered=self._was_answered)


class Client(_Connection):
    """Calls a server, and waits for each answer. Threads may share one.

    A request that is refused because the server is overloaded or loading, or whose connection fails, is sent
    again after the time that the server asks for, else after a growing one.

    Args:
        url: of the server; None: `$SAM3_URL`, else http://127.0.0.1:3000.
        key: one of the server's keys; None: `$SAM3_API_KEY`.
        timeout_s: how long one answer may take.
        max_wait_s: how long a call goes on with new tries; 0: it has one. A server that has never answered
            this client is waited for 3 s at most.

    Raises:
        ServerUnreachable: the URL is none.
        Unauthorized: the key is none.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        max_wait_s: float = 60.0,
    ) -> None:
        super().__init__(url, key, timeout_s, max_wait_s)
        self._http = httpx.Client(**self._settings)

    def segment(
        self,
        image: ImageInput,
        prompts: str | Sequence[str] = (),
        *,
        boxes: Sequence[Box] | npt.NDArray[Any] | None = None,
        box_labels: Sequence[int] | None = None,
        score_threshold: float | None = None,
        fill_holes: int | None = None,
        remove_islands: int | None = None,
        min_area: int | None = None,
        nms_iou: float | None = None,
        max_instances: int | None = None,
        tiles: int | Literal["auto"] | None = None,
        deadline_ms: int | None = None,
    ) -> Result:
        """Find every instance of one or several concepts in an image.

        Each prompt is a request of its own on the same image; the server keeps what it has computed of it,
        so a further prompt is cheap. Of all options None leaves the choice to the server; 0 is a value.

        Args:
            image: a path, the bytes of a PNG, JPEG or WEBP, an image of Pillow's, or an array
                (height, width, 3) of uint8, RGB. Files are sent as they are, the others as PNG.
            prompts: noun phrases, as "red car"; may be left out with boxes.
            boxes: exemplars, each x0, y0, x1, y1 in px of the image as a viewer shows it. With several
                prompts they count for each.
            box_labels: one a box: 1, find more like it; 0, leave out what is like it. None: all 1.
            score_threshold: 0 to 1; instances with a higher score are kept.
            fill_holes: px; holes of at most so many are filled.
            remove_islands: px; separate parts of at most so many are removed from a mask.
            min_area: px; smaller instances are left out.
            nms_iou: 0 to 1; of two instances of one prompt whose masks have a higher IoU the better is kept.
            max_instances: of each prompt, those with the best scores.
            tiles: for small things in large images: a grid of so many tiles a side, or "auto".
            deadline_ms: how long the server may let each request wait for its turn.

        Raises:
            Sam3Error: its subclasses tell what is wrong.
        """
        options = Options(
            boxes,
            box_labels,
            score_threshold,
            fill_holes,
            remove_islands,
            min_area,
            nms_iou,
            max_instances,
            tiles,
            deadline_ms,
        )
        picture = Picture.of(image)
        calls = segment_calls(picture, prompts, options)
        return read_result(picture, {label: self._answer(call) for label, call in calls.items()})

    def health(self) -> dict[str, Any]:
        """The server's state, as GET /health answers; asked once. Raises `Sam3Error`."""
        return self._answer(Call(HEALTH_PATH), max_wait_s=0.0)

    def model_info(self) -> dict[str, Any]:
        """The model and its limits, as GET /api/v1/model/info answers. Raises `Sam3Error`."""
        return self._answer(Call(INFO_PATH))

    def _answer(self, call: Call, max_wait_s: float | None = None) -> dict[str, Any]:
        retries = Retries(self._max_wait_s if max_wait_s is None else max_wait_s)
        while True:
            try:
                return self._read(self._http.send(call.request(self._http)))
            except (httpx.RequestError, Sam3Error) as error:
                wait_s = self._wait_s(retries, error)
            time.sleep(wait_s)

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Connection):
    """`Client` with calls to await; the requests of several prompts are sent concurrently.

    It belongs to the event loop that first uses it. A call that is cancelled closes its connection.

    Args:
        url, key, timeout_s, max_wait_s: as of `Client`.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        max_wait_s: float = 60.0,
    ) -> None:
        super().__init__(url, key, timeout_s, max_wait_s)
        self._http = httpx.AsyncClient(**self._settings)
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def segment(
        self,
        image: ImageInput,
        prompts: str | Sequence[str] = (),
        *,
        boxes: Sequence[Box] | npt.NDArray[Any] | None = None,
        box_labels: Sequence[int] | None = None,
        score_threshold: float | None = None,
        fill_holes: int | None = None,
        remove_islands: int | None = None,
        min_area: int | None = None,
        nms_iou: float | None = None,
        max_instances: int | None = None,
        tiles: int | Literal["auto"] | None = None,
        deadline_ms: int | None = None,
    ) -> Result:
        """As `Client.segment`."""
        options = Options(
            boxes,
            box_labels,
            score_threshold,
            fill_holes,
            remove_islands,
            min_area,
            nms_iou,
            max_instances,
            tiles,
            deadline_ms,
        )
        picture = await asyncio.to_thread(Picture.of, image)
        calls = segment_calls(picture, prompts, options)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {label: group.create_task(self._answer(call)) for label, call in calls.items()}
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return read_result(picture, {label: task.result() for label, task in tasks.items()})

    async def health(self) -> dict[str, Any]:
        """As `Client.health`."""
        return await self._answer(Call(HEALTH_PATH), max_wait_s=0.0)

    async def model_info(self) -> dict[str, Any]:
        """As `Client.model_info`."""
        return await self._answer(Call(INFO_PATH))

    async def _answer(self, call: Call, max_wait_s: float | None = None) -> dict[str, Any]:
        retries = Retries(self._max_wait_s if max_wait_s is None else max_wait_s)
        while True:
            try:
                async with self._slots:
                    response = await self._http.send(call.request(self._http))
                return self._read(response)
            except (httpx.RequestError, Sam3Error) as error:
                wait_s = self._wait_s(retries, error)
            await asyncio.sleep(wait_s)

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
