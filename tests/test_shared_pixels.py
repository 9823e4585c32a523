"""A server's shared pixels and kept features: right answers, and nothing left after a process is killed."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from commands.local_server import local_server
from sam3_runner.images.pixel_file import MAX_IDLE_FILES, SHARES_MEMORY
from tests.drawn import iou, scene
from tests.edge import Edge, image_bytes, png_bytes, wait_for
from tests.image_files import with_scans
from tests.server_processes import (
    API_WORKER,
    RUNNER,
    children_of,
    is_decoder,
    kill,
    runner_of,
    wait_until_all_workers_are_ready,
)
from tests.shared_pixels import all_pids, held_files
from tests.test_metrics import total

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from commands.local_server import LocalServer

pytestmark = pytest.mark.server

FORGETFUL = "tests.forgetful_service:SegmentationService"
REQUESTS = 5
SLOW_SCANS = 60
"""Of a JPEG that takes a second to decode."""
BUSY_S = 0.6
"""CPU time of a decoder that decodes such a file: twice what one takes to start."""
RESTARTS_TIMEOUT_S = 240.0
"""For restarts on a busy machine."""


@pytest.fixture(scope="module")
def shared_edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """The caller of a server with one API worker, which gets every request; at its end nothing is left."""
    folder = tmp_path_factory.mktemp("pixels")
    with local_server(folder, {"API_WORKERS": "1"}) as server, Edge(server) as edge:
        yield edge
        names = held_by(processes_of(server))
    assert not held_files(all_pids()) & names


@pytest.fixture
def edge(shared_edge: Edge) -> Edge:
    """The caller, once the server is ready."""
    wait_until_all_workers_are_ready(shared_edge.server, RESTARTS_TIMEOUT_S)
    return shared_edge


def processes_of(server: LocalServer) -> list[psutil.Process]:
    return psutil.Process(server.pid).children(recursive=True)


def decoders_of(server: LocalServer) -> list[psutil.Process]:
    return [process for process in processes_of(server) if is_decoder(process)]


def held_by(processes: list[psutil.Process]) -> set[str]:
    return held_files(process.pid for process in processes)


def features(server: LocalServer, cache: str) -> float:
    return total(server, "sam3_features_total", cache=cache)


def runner_calls(server: LocalServer) -> float:
    return total(server, "bentoml_service_request_total", endpoint="/segment")


def decodings(server: LocalServer) -> float:
    return total(server, "sam3_stage_seconds_count", stage="decode")


def mask_of(edge: Edge, image: str | bytes, prompt: str) -> npt.NDArray[np.bool_]:
    return edge.mask(edge.answer(image, prompt)["mask_url"])


def same_picture_in_another_file(seed: int) -> bytes:
    """A file with the same pixels and other bytes, so that none of its features are held."""
    return png_bytes(scene(seed).image, compress_level=1)


def check_mask(edge: Edge, mask: npt.NDArray[np.bool_], seed: int, prompt: str) -> None:
    """Check a mask against the drawn objects, and against that of the same pixels in another file."""
    truth = np.any([thing.mask for thing in scene(seed).named(prompt)], axis=0)
    assert iou(mask, truth) >= 0.5
    assert iou(mask, mask_of(edge, same_picture_in_another_file(seed), prompt)) >= 0.99


def test_another_prompt_on_the_same_picture(edge: Edge) -> None:
    """The next prompt on a picture has its own right mask, and needs neither a decoding nor an encoding."""
    seed, server = 107, edge.server
    first, second, *_ = scene(seed).names
    image = png_bytes(scene(seed).image)
    mask_of(edge, image, first)
    hits, misses, decoded = features(server, "hit"), features(server, "miss"), decodings(server)
    mask = mask_of(edge, image, second)  # another upload of the same bytes
    assert (features(server, "hit"), features(server, "miss")) == (hits + 1, misses)
    assert decodings(server) == decoded
    check_mask(edge, mask, seed, second)
    assert features(server, "miss") == misses + 1, "other bytes are another picture"


def test_picture_whose_features_made_room(tmp_path: Path) -> None:
    """A picture that the runner no longer holds, as the API worker assumes, is decoded and answered."""
    environment = {"API_WORKERS": "1"}
    with local_server(tmp_path, environment, service=FORGETFUL) as server, Edge(server) as edge:
        seed, prompt = 101, scene(101).names[0]
        key = edge.upload(png_bytes(scene(seed).image))
        expected = mask_of(edge, key, prompt)
        for other in (102, 103):
            edge.answer(png_bytes(scene(other).image), "circle")
        assert total(server, "sam3_feature_evictions_total") == 1
        calls, decoded = runner_calls(server), decodings(server)
        assert np.array_equal(mask_of(edge, key, prompt), expected)
        assert decodings(server) == decoded + 1
        assert runner_calls(server) == calls + 2, "one with the key alone, and one with the pixels"
        check_mask(edge, expected, seed, prompt)


def begin(edge: Edge, bodies: list[dict[str, Any]], callers: ThreadPoolExecutor) -> None:
    """Send requests, whose connections may be cut."""

    def send(body: dict[str, Any]) -> None:
        with contextlib.suppress(httpx.TransportError):
            edge.send(body)

    for body in bodies:
        edge.insert_row(body)
        callers.submit(send, body)


@pytest.mark.skipif(not SHARES_MEMORY, reason="this system has no memfd")
@pytest.mark.parametrize("victim", [RUNNER, API_WORKER])
def test_killed_process_leaves_no_pixels(edge: Edge, victim: str) -> None:
    """A runner or API worker dies with a queue of shared pixels: all tasks are done, and no file is left."""
    server, seeds = edge.server, [900 + 10 * (victim == RUNNER) + number for number in range(REQUESTS)]
    bodies = [edge.body(edge.upload(png_bytes(scene(seed).image)), scene(seed).names[0]) for seed in seeds]
    decoded, before, runner = decodings(server), held_by(processes_of(server)), runner_of(server)
    runner.suspend()  # so that it does not answer
    with ThreadPoolExecutor(REQUESTS) as callers:
        begin(edge, bodies, callers)
        wait_for(lambda: decodings(server), lambda count: count == decoded + REQUESTS)
        [worker] = children_of(server, API_WORKER)
        names = held_by(processes_of(server))
        assert len(names) >= REQUESTS
        kill(runner if victim == RUNNER else worker)
        if victim == API_WORKER:
            runner.resume()
        for seed, body in zip(seeds, bodies, strict=True):
            row = edge.settled_row(body["task_id"], RESTARTS_TIMEOUT_S)
            assert (row.status, row.labels) == ("done", [scene(seed).names[0]])
    wait_until_all_workers_are_ready(server, RESTARTS_TIMEOUT_S)
    check_idle(server)
    if victim == API_WORKER:
        assert not held_files(all_pids()) & (names | before)


@pytest.mark.skipif(not SHARES_MEMORY, reason="this system has no memfd")
def test_killed_decoder_leaves_no_pixels(edge: Edge) -> None:
    """A decoder that dies with an image is replaced: the caller notices nothing, and no file is left."""
    server = edge.server
    slow = with_scans(image_bytes(Image.new("RGB", (4200, 4200)), "JPEG", progressive=True), SLOW_SCANS)
    kills = total(server, "sam3_decoder_kills_total")
    with ThreadPoolExecutor(1) as callers:
        call = callers.submit(edge.ask, slow, "circle")
        [busy, *_] = wait_for(lambda: [each for each in decoders_of(server) if cpu_s(each) > BUSY_S], bool)
        kill(busy)
        assert call.result().status_code == httpx.codes.OK
    assert total(server, "sam3_decoder_kills_total") == kills + 1
    check_idle(server)


def cpu_s(process: psutil.Process) -> float:
    """CPU time of a process; 0 if it has ended."""
    try:
        return process.cpu_times().user
    except psutil.NoSuchProcess:
        return 0.0


def in_use(server: LocalServer) -> int:
    """Files of pixels that an API worker has."""
    return len(held_by(children_of(server, API_WORKER)))


def check_idle(server: LocalServer) -> None:
    """Without requests no other process than an API worker has a file of pixels, and that one has few."""
    workers = children_of(server, API_WORKER)
    others = [process for process in processes_of(server) if process not in workers]
    wait_for(lambda: held_by(others), lambda names: not names)
    wait_for(lambda: in_use(server), lambda count: count <= MAX_IDLE_FILES)
