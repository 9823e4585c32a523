"""Bad requests: the caller gets an error, the row is settled, no mask is stored, the server survives."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from PIL import Image

from benchmarks.process_tree import call_each, process_tree
from tests import new_connection
from tests.drawn import scene
from tests.edge import PREDICT, USER, Edge, error_of, image_bytes, png_bytes
from tests.image_files import png_chunk, png_of, with_chunks, with_scans, with_segments
from tests.server_processes import API_WORKER, RUNNER, children_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psutil

    from commands.local_server import LocalServer

pytestmark = pytest.mark.server


MAX_GROWTH_BYTES = 400 * 2**20
"""Limit for all API workers together; decoding one of the images completely would take more."""


@pytest.fixture(scope="module")
def good_key(edge: Edge) -> str:
    return edge.upload(png_bytes(scene(100).image))


@pytest.fixture(scope="module", autouse=True)
def _predicts_at_the_end(edge: Edge, good_key: str) -> Iterator[None]:
    """After all tests of this file a valid request works."""
    yield
    assert edge.ask(good_key, "circle").status_code == httpx.codes.OK


@pytest.fixture(autouse=True)
def _processes_survive(server: LocalServer) -> Iterator[None]:
    """No test ends an API worker or the runner, and the server stays ready."""
    before = service_pids(server)
    yield
    assert service_pids(server) == before
    assert new_connection.get(f"{server.url}/readyz").status_code == httpx.codes.OK


def service_pids(server: LocalServer) -> set[int]:
    return {child.pid for name in (API_WORKER, RUNNER) for child in children_of(server, name)}


def check_untouched(edge: Edge, task_id: str) -> None:
    """The row of a request that was refused before the claim is still as the Edge inserted it."""
    row = edge.row(task_id)
    assert row is None or (row.status, row.metadata) == ("pending", {})
    assert edge.masks(task_id) == []


def check_refused(edge: Edge, task_id: str, message: str) -> None:
    """The row of a task that failed after its claim has the caller's error message, and no mask."""
    row = edge.row(task_id)
    assert row is not None
    assert (row.status, row.metadata.get("error_message")) == ("error", message)
    assert (row.mask_url, row.labels) == (None, [])
    assert edge.masks(task_id) == []


def test_similar_keys_are_refused(edge: Edge) -> None:
    """A prefix of the key, the key with one more character, in upper case or twice is refused."""
    key = edge.server.api_key
    for wrong in (key[:-1], key + "0", key.upper(), f"{key},{key}"):
        response = new_connection.get(f"{edge.server.url}/api/v1/model/info", headers={"X-API-Key": wrong})
        assert error_of(response)[:2] == (401, "AUTH_INVALID")


@pytest.mark.parametrize(
    "prompt", ["rød sirkel", "赤い丸", "🔴", "<b>circle</b>", "'; DROP TABLE x;--", "%s%n"]
)
def test_prompts_in_any_script_are_accepted(edge: Edge, good_key: str, prompt: str) -> None:
    """Prompts may contain any script, emoji, markup and quotes."""
    assert edge.ask(good_key, prompt).status_code == httpx.codes.OK


def test_unknown_route_is_not_found(edge: Edge) -> None:
    """An unknown path below /api gives 404 with our error body, and needs the key too."""
    assert error_of(edge.http.get("/api/v1/anything"))[:2] == (404, "NOT_FOUND")
    assert error_of(new_connection.get(f"{edge.server.url}/api/v1/anything"))[:2] == (401, "AUTH_REQUIRED")


def head(edge: Edge, *lines: str) -> bytes:
    """The head of a POST to predict, as bytes."""
    fixed = (f"POST {PREDICT} HTTP/1.1", "Host: test", f"X-API-Key: {edge.server.api_key}")
    return "\r\n".join([*fixed, "Content-Type: application/json", *lines, "", ""]).encode()


def raw_connection(edge: Edge) -> socket.socket:
    address = urlsplit(edge.server.url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


@pytest.mark.parametrize("with_length", [True, False])
def test_body_over_the_limit_is_not_awaited(edge: Edge, *, with_length: bool) -> None:
    """An endless body is refused when it exceeds the limit, or immediately if Content-Length does."""
    with raw_connection(edge) as connection:
        if with_length:
            connection.sendall(head(edge, "Content-Length: 1000000000") + b'{"a": "')
        else:
            chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
            connection.sendall(head(edge, "Transfer-Encoding: chunked") + chunk * 17)
        answer = b""
        while b"FILE_TOO_LARGE" not in answer:  # the socket's timeout bounds it
            piece = connection.recv(65536)
            assert piece, answer
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_disconnect_during_the_body_keeps_the_row_pending(edge: Edge, good_key: str) -> None:
    """A caller that disconnects before the end of its body has sent no request."""
    body = edge.body(good_key, "circle")
    edge.insert_row(body)
    text = json.dumps(body).encode()
    with raw_connection(edge) as connection:
        connection.sendall(head(edge, f"Content-Length: {len(text)}") + text[:-1])
    check_untouched(edge, body["task_id"])


def test_symbolic_link_is_not_followed(edge: Edge) -> None:
    """A symbolic link among the uploads gives no access to another file."""
    folder = edge.server.data_dir / "storage" / "uploads" / USER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "link").symlink_to(edge.server.log_path)
    assert error_of(edge.ask(f"uploads/{USER}/link", "cat"))[:2] == (403, "FORBIDDEN")


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header has this size, with almost no pixels."""
    return png_of(width, height, bytes(1000))


def jpeg_header(width: int, height: int) -> bytes:
    """A small JPEG whose header has this size."""
    data = bytearray(image_bytes(Image.new("RGB", (16, 16)), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_header(width: int, height: int) -> bytes:
    """A small lossless WEBP whose header has this size."""
    data = bytearray(image_bytes(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
    start = data.index(b"VP8L") + 9
    data[start : start + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


def progressive_header(width: int, height: int) -> bytes:
    """A small progressive JPEG without subsampling whose header has this size."""
    data = bytearray(image_bytes(Image.new("RGB", (16, 16)), "JPEG", progressive=True, subsampling=0))
    start = data.index(b"\xff\xc2") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def cat() -> Image.Image:
    return scene(100).image


BAD_IMAGES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "HTML": lambda: b"<!doctype html><img src=x>",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
    "GIF": lambda: image_bytes(cat(), "GIF"),
    "TIFF": lambda: image_bytes(cat(), "TIFF"),
    "BMP": lambda: image_bytes(cat(), "BMP"),
    "PDF": lambda: image_bytes(cat(), "PDF"),
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "JPEG 2000": lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 100,
    "PNG signature alone": lambda: b"\x89PNG\r\n\x1a\n",
    "PNG with a text before it": lambda: b"x" + png_bytes(cat()),
    "PNG cut in half": lambda: png_bytes(cat())[: len(png_bytes(cat())) // 2],
    "PNG with a wrong checksum": lambda: png_bytes(cat()).replace(b"IHDR", b"IHDX", 1),
    "PNG without pixels": lambda: png_header(100, 100),
    "PNG of no width": lambda: png_header(0, 100),
    "JPEG cut in half": lambda: image_bytes(cat(), "JPEG")[:3000],
    "JPEG without an end": lambda: image_bytes(cat(), "JPEG")[:-200],
    "JPEG of no height": lambda: jpeg_header(100, 0),
    "WEBP cut in half": lambda: image_bytes(cat(), "WEBP")[:900],
    "WEBP signature alone": lambda: b"RIFF\x04\0\0\0WEBP",
    "PNG of 900 megapixels": lambda: image_bytes(Image.new("1", (30_000, 30_000)), "PNG"),
    "PNG of 67 megapixels and a row": lambda: png_header(8192, 8193),
    "PNG of 65,536 columns": lambda: png_header(65_536, 1),
    "JPEG of 1,000 scans": lambda: with_scans(image_bytes(cat(), "JPEG", progressive=True), 1000),
    "JPEG of 5,000 segments": lambda: with_segments(image_bytes(cat(), "JPEG"), *[(0xE1, b"")] * 5000),
    "PNG of 100,000 chunks": lambda: with_chunks(png_bytes(cat()), png_chunk(b"prVt", b"") * 100_000),
    "progressive JPEG of 67 megapixels": lambda: progressive_header(8192, 8192),
    "PNG of four billion columns": lambda: png_header(2**31 - 1, 2**31 - 1),
    "JPEG of 65500 x 65500": lambda: jpeg_header(65_500, 65_500),
    "WEBP of 16000 x 16000": lambda: webp_header(16_000, 16_000),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_is_refused(edge: Edge, case: str) -> None:
    """Anything but a complete PNG, JPEG or WEBP within the limits gives 415, whatever its file name."""
    key = edge.upload(BAD_IMAGES[case](), f"{uuid4()}.png")
    body = edge.body(key, "cat")
    edge.insert_row(body)
    status, code, message = error_of(edge.send(body))
    assert (status, code) == (415, "UNSUPPORTED_IMAGE")
    assert "image" in message
    check_refused(edge, body["task_id"], message)


def test_missing_image_is_not_found(edge: Edge) -> None:
    """A missing upload gives 404, in a batch too."""
    for prompt in ("cat", ["cat", "dog"]):
        body = edge.body(f"uploads/{USER}/{uuid4()}", prompt)
        edge.insert_row(body)
        status, code, message = error_of(edge.send(body))
        assert (status, code) == (404, "IMAGE_NOT_FOUND")
        check_refused(edge, body["task_id"], message)


def test_image_over_ten_megabytes_is_refused(edge: Edge) -> None:
    """An image of 10 MB is accepted; one more byte gives 413."""
    png = png_bytes(cat())
    assert edge.ask(png.ljust(10 * 2**20, b"\0"), "circle").status_code == httpx.codes.OK
    body = edge.body(edge.upload(png.ljust(10 * 2**20 + 1, b"\0")), "circle")
    status, code, message = error_of(edge.send(body))
    assert (status, code) == (413, "FILE_TOO_LARGE")
    check_refused(edge, body["task_id"], message)


def test_other_users_row_is_not_found(edge: Edge, good_key: str) -> None:
    """A task of another user gives 404, like a missing one, and its row does not change."""
    body = edge.body(good_key, "circle")
    edge.insert_row(body)
    with Edge(edge.server, "user-2") as other:
        theirs = other.body(other.upload(png_bytes(cat())), "circle", body["task_id"])
        assert error_of(other.send(theirs))[:2] == (404, "TASK_NOT_FOUND")
        assert other.masks(body["task_id"]) == []
    check_untouched(edge, body["task_id"])


def resident_bytes(processes: list[psutil.Process]) -> int:
    """Resident memory of the processes that still run."""
    return sum(call_each(processes, lambda each: each.memory_info().rss))


def test_huge_image_headers_take_no_memory(edge: Edge) -> None:
    """Many concurrent images with huge sizes in their headers are refused without decoding them."""
    names = [name for name in BAD_IMAGES if "megapixels" in name or " x " in name or "text" in name]
    keys = [edge.upload(BAD_IMAGES[name]()) for name in names] * 4
    workers = children_of(edge.server, API_WORKER)
    processes = [member for worker in workers for member in process_tree(worker.pid)]
    before, peak = resident_bytes(processes), 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident_bytes(processes))

    async def send_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            base_url=edge.server.url, headers=edge.server.headers, timeout=60
        ) as client:
            return await asyncio.gather(*(client.post(PREDICT, json=edge.body(key, "cat")) for key in keys))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        answers = asyncio.run(send_all())
    finally:
        done.set()
        watcher.join()
    assert {answer.status_code for answer in answers} == {415}
    assert peak - before < MAX_GROWTH_BYTES


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}


def test_cors_is_off_by_default(edge: Edge) -> None:
    """Without ALLOWED_ORIGINS no web page can read the server's answers."""
    origin = {"Origin": "https://app.example.com"}
    for response in (
        edge.http.get("/health", headers=origin),
        edge.http.options(PREDICT, headers=origin | PREFLIGHT),
    ):
        assert not [name for name in response.headers if name.startswith("access-control-")]
