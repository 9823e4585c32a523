"""Bad requests: the caller gets an error, the row is settled, no mask is stored, the server survives."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from commands.local_server import LocalServer, local_server
from tests.drawn import scene
from tests.edge import BATCH, PREDICT, USER, Edge, error_of, image_bytes, png_bytes
from tests.image_files import png_chunk, png_of, with_chunks, with_scans, with_segments
from tests.server_processes import API_WORKER, RUNNER, children_of, with_descendants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.server

LONG_ID = "1" * 65
TOO_MANY_TOKENS = "zq " * 60
"""180 characters, far more than 32 tokens."""

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
    assert httpx.get(f"{server.url}/readyz").status_code == httpx.codes.OK


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


@pytest.mark.parametrize("path", [PREDICT, BATCH, "/api/v1/model/info"])
@pytest.mark.parametrize(
    ("key", "code"),
    [
        (None, "AUTH_REQUIRED"),
        (b"wrong", "AUTH_INVALID"),
        (b"", "AUTH_INVALID"),
        ("schlüssel".encode(), "AUTH_INVALID"),
        (b"\xff\xfe", "AUTH_INVALID"),
        (b"a" * 5000, "AUTH_INVALID"),
    ],
)
def test_api_needs_a_valid_key(edge: Edge, path: str, key: bytes | None, code: str) -> None:
    """Without a valid key every route below /api answers 401 with the header's name."""
    headers = {} if key is None else {b"X-API-Key": key}
    with httpx.Client(base_url=edge.server.url) as client:
        for method in ("GET", "POST"):
            status, found, message = error_of(client.request(method, path, headers=headers))
            assert (status, found) == (401, code)
            assert "X-API-Key" in message


def test_similar_keys_are_refused(edge: Edge) -> None:
    """A prefix of the key, the key with one more character, in upper case or twice is refused."""
    key = edge.server.api_key
    for wrong in (key[:-1], key + "0", key.upper(), f"{key},{key}"):
        response = httpx.get(f"{edge.server.url}/api/v1/model/info", headers={"X-API-Key": wrong})
        assert error_of(response)[:2] == (401, "AUTH_INVALID")


WRONG_BODIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown field": (PREDICT, {"threshold": 0.5}, "threshold"),
    "batch's field": (PREDICT, {"prompts": ["cat"]}, "prompts"),
    "prompt missing": (PREDICT, {"text_prompt": ...}, "text_prompt"),
    "prompt null": (PREDICT, {"text_prompt": None}, "text_prompt"),
    "prompt a number": (PREDICT, {"text_prompt": 5}, "text_prompt"),
    "prompt a list": (PREDICT, {"text_prompt": ["cat"]}, "text_prompt"),
    "prompt empty": (PREDICT, {"text_prompt": ""}, "text_prompt"),
    "prompt white": (PREDICT, {"text_prompt": " \u3000 "}, "text_prompt"),
    "prompt of 201 characters": (PREDICT, {"text_prompt": "a" * 201}, "text_prompt"),
    "prompt of too many tokens": (PREDICT, {"text_prompt": TOO_MANY_TOKENS}, "text_prompt"),
    "prompt with NUL": (PREDICT, {"text_prompt": "a\0b"}, "text_prompt"),
    "prompt with a line end": (PREDICT, {"text_prompt": "a\nb"}, "text_prompt"),
    "prompt with a lone surrogate": (PREDICT, {"text_prompt": "\ud800"}, "text_prompt"),
    "url missing": (PREDICT, {"image_url": ...}, "image_url"),
    "url empty": (PREDICT, {"image_url": ""}, "image_url"),
    "url too long": (PREDICT, {"image_url": "u" * 2049}, "image_url"),
    "url a number": (PREDICT, {"image_url": 1}, "image_url"),
    "user missing": (PREDICT, {"user_id": ...}, "user_id"),
    "user empty": (PREDICT, {"user_id": ""}, "user_id"),
    "user too long": (PREDICT, {"user_id": LONG_ID}, "user_id"),
    "user a path": (PREDICT, {"user_id": "../user-1"}, "user_id"),
    "user with a line end": (PREDICT, {"user_id": "user-1\n"}, "user_id"),
    "user not ASCII": (PREDICT, {"user_id": "usér"}, "user_id"),
    "user with NUL": (PREDICT, {"user_id": "user\0"}, "user_id"),
    "task missing": (PREDICT, {"task_id": ...}, "task_id"),
    "task empty": (PREDICT, {"task_id": ""}, "task_id"),
    "task no UUID": (PREDICT, {"task_id": "1234"}, "task_id"),
    "task a path": (PREDICT, {"task_id": "../../etc/passwd"}, "task_id"),
    "task a number": (PREDICT, {"task_id": 7}, "task_id"),
    "task null": (PREDICT, {"task_id": None}, "task_id"),
    "no prompts": (BATCH, {"prompts": []}, "prompts"),
    "eleven prompts": (BATCH, {"prompts": ["cat"] * 11}, "prompts"),
    "prompts a text": (BATCH, {"prompts": "cat"}, "prompts"),
    "prompts missing": (BATCH, {"prompts": ...}, "prompts"),
    "one prompt empty": (BATCH, {"prompts": ["cat", ""]}, "prompts.1"),
    "one prompt null": (BATCH, {"prompts": ["cat", None]}, "prompts.1"),
    "one prompt too long": (BATCH, {"prompts": ["cat", "dog", "a" * 201]}, "prompts.2"),
    "one prompt of too many tokens": (BATCH, {"prompts": ["cat", TOO_MANY_TOKENS]}, "prompts.1"),
    "predict's field": (BATCH, {"text_prompt": "cat"}, "text_prompt"),
}


@pytest.mark.parametrize("case", WRONG_BODIES)
def test_wrong_field_is_named(edge: Edge, good_key: str, case: str) -> None:
    """A missing, unknown or wrong field gives 400 with its name; the row stays pending."""
    path, wrong, field = WRONG_BODIES[case]
    body = edge.body(good_key, "cat" if path == PREDICT else ["cat"])
    task_id = body["task_id"]
    edge.insert_row(body)
    changed = {name: value for name, value in (body | wrong).items() if value is not ...}
    response = edge.http.post(path, content=json.dumps(changed), headers={"Content-Type": "application/json"})
    status, code, message = error_of(response)
    assert (status, code) == (400, "INVALID_REQUEST")
    assert message.startswith(f"{field}: ")
    assert LONG_ID not in message
    check_untouched(edge, task_id)


def test_error_for_too_many_tokens_has_count_and_limit(edge: Edge, good_key: str) -> None:
    """The error of a prompt with more than 32 tokens names both numbers."""
    message = error_of(edge.ask(good_key, TOO_MANY_TOKENS))[2]
    assert "122" in message
    assert "32" in message


def test_longest_prompts_are_accepted(edge: Edge, good_key: str) -> None:
    """A prompt of 200 characters, one of exactly 32 tokens, and ten prompts are accepted."""
    assert edge.ask(good_key, "a" * 199 + "z").status_code in {200, 400}
    assert edge.ask(good_key, " ".join(["cat"] * 30)).status_code == httpx.codes.OK
    assert error_of(edge.ask(good_key, " ".join(["cat"] * 31)))[0] == httpx.codes.BAD_REQUEST
    assert edge.ask(good_key, ["circle"] * 10).status_code == httpx.codes.OK
    assert edge.ask(good_key, "red" + " " * 190 + "circle").status_code == httpx.codes.OK


@pytest.mark.parametrize(
    "prompt", ["rød sirkel", "赤い丸", "🔴", "<b>circle</b>", "'; DROP TABLE x;--", "%s%n"]
)
def test_prompts_in_any_script_are_accepted(edge: Edge, good_key: str, prompt: str) -> None:
    """Prompts may contain any script, emoji, markup and quotes."""
    assert edge.ask(good_key, prompt).status_code == httpx.codes.OK


RAW_BODIES: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", "application/json"),
    "not JSON": (b"{", "application/json"),
    "half a string": (b'{"image_url": "', "application/json"),
    "a list": (b"[]", "application/json"),
    "a text": (b'"text"', "application/json"),
    "null": (b"null", "application/json"),
    "NaN": (b"NaN", "application/json"),
    "a huge number": (b'{"task_id": ' + b"9" * 60_000 + b"}", "application/json"),
    "not UTF-8": (b'{"image_url": "\xff\xfe"}', "application/json"),
    "UTF-16": ('{"image_url": "a"}'.encode("utf-16"), "application/json"),
    "deep lists": (b"[" * 60_000, "application/json"),
    "deep objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "application/json"),
    "deep within a field": (b'{"text_prompt":' + b"[" * 900 + b"]" * 900 + b"}", "application/json"),
    "a form": (b"image_url=a&text_prompt=b", "application/x-www-form-urlencoded"),
    "multipart": (b"--x--", "multipart/form-data; boundary=x"),
    "no content type": (b'{"a": 1}', None),
    "plain text": (b'{"a": 1}', "text/plain"),
    "a broken content type": (b'{"a": 1}', "application/json; charset=\xff"),
}


@pytest.mark.parametrize("path", [PREDICT, BATCH])
@pytest.mark.parametrize("case", RAW_BODIES)
def test_unreadable_body_is_refused(edge: Edge, case: str, path: str) -> None:
    """A body that is not a JSON object with the right content type gives 400 with a short message."""
    content, kind = RAW_BODIES[case]
    headers = {} if kind is None else {b"Content-Type": kind.encode("latin-1")}
    status, code, message = error_of(edge.http.post(path, content=content, headers=headers))
    assert (status, code) == (400, "INVALID_REQUEST")
    assert len(message) < 300


def test_last_of_two_values_for_a_field_counts(edge: Edge, good_key: str) -> None:
    """If a field occurs twice, both the check and the work use the last value."""
    body = edge.body(good_key, "circle")
    text = json.dumps(body)[:-1] + ', "image_url": "uploads/other/x"}'
    response = edge.http.post(PREDICT, content=text, headers={"Content-Type": "application/json"})
    assert error_of(response)[:2] == (403, "FORBIDDEN")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", PREDICT),
        ("PUT", PREDICT),
        ("DELETE", BATCH),
        ("POST", "/health"),
        ("POST", "/api/v1/model/info"),
    ],
)
def test_wrong_method_is_refused(edge: Edge, method: str, path: str) -> None:
    """A wrong method gives 405 with our error body."""
    assert error_of(edge.http.request(method, path))[:2] == (405, "METHOD_NOT_ALLOWED")


def test_error_for_truncated_json_has_the_position(edge: Edge) -> None:
    """The error names the fault and its position, and has no number in place of a field."""
    headers = {"Content-Type": "application/json"}
    _, _, message = error_of(edge.http.post(PREDICT, content=b'{"text_prompt": "a', headers=headers))
    assert message == "the body: is not JSON: Unterminated string starting at (character 16)"


def test_unknown_route_is_not_found(edge: Edge) -> None:
    """An unknown path below /api gives 404 with our error body, and needs the key too."""
    assert error_of(edge.http.get("/api/v1/anything"))[:2] == (404, "NOT_FOUND")
    assert error_of(httpx.get(f"{edge.server.url}/api/v1/anything"))[:2] == (401, "AUTH_REQUIRED")


def test_body_over_the_limit_is_refused(edge: Edge, good_key: str) -> None:
    """A body of 64 KiB is accepted; one more byte gives 413."""
    text = json.dumps(edge.body(good_key, "circle"))
    headers = {"Content-Type": "application/json"}
    assert edge.http.post(PREDICT, content=text.ljust(65536), headers=headers).status_code == httpx.codes.OK
    task_id = str(uuid4())
    text = json.dumps(edge.body(good_key, "circle", task_id))
    response = edge.http.post(PREDICT, content=text.ljust(65537), headers=headers)
    assert error_of(response)[:2] == (413, "FILE_TOO_LARGE")
    check_untouched(edge, task_id)


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


def test_incomplete_body_times_out(edge: Edge, good_key: str) -> None:
    """A body that does not arrive completely gives 400 after a timeout; the row stays pending."""
    body = edge.body(good_key, "circle")
    edge.insert_row(body)
    with raw_connection(edge) as connection:
        connection.sendall(head(edge, "Content-Length: 100") + b'{"text_prompt": ')
        answer = b""
        while b"did not arrive" not in answer:  # the socket's timeout bounds it
            piece = connection.recv(65536)
            assert piece, answer
            answer += piece
    assert answer.startswith(b"HTTP/1.1 400 ")
    check_untouched(edge, body["task_id"])


def test_disconnect_during_the_body_keeps_the_row_pending(edge: Edge, good_key: str) -> None:
    """A caller that disconnects before the end of its body has sent no request."""
    body = edge.body(good_key, "circle")
    edge.insert_row(body)
    text = json.dumps(body).encode()
    with raw_connection(edge) as connection:
        connection.sendall(head(edge, f"Content-Length: {len(text)}") + text[:-1])
    check_untouched(edge, body["task_id"])


FOREIGN_URLS: dict[str, tuple[str, set[int]]] = {
    "another user's": ("uploads/user-2/cat", {403}),
    "a longer user's": ("uploads/user-11/cat", {403}),
    "climbing": (f"uploads/{USER}/../user-2/cat", {400, 403}),
    "climbing out": (f"uploads/{USER}/../../../../../../etc/passwd", {400, 403}),
    "escaped climbing": (f"uploads/{USER}/%2e%2e/user-2/cat", {404, 400, 403}),
    "absolute": ("/etc/passwd", {400, 403}),
    "doubled slash": (f"uploads//{USER}/cat", {400, 403}),
    "dot": (f"uploads/./{USER}/cat", {400, 403}),
    "backslash": (f"uploads\\{USER}\\cat", {400, 403}),
    "a mask": (f"masks/{USER}/x.png", {403}),
    "file URL": ("file:///etc/passwd", {403}),
    "file URL with a host": ("file://evil/etc/passwd", {403}),
    "web": ("https://example.com/cat.png", {403}),
    "metadata service": ("http://169.254.169.254/latest/meta-data/", {403}),
    "our own server": ("http://127.0.0.1/health", {403}),
    "data URL": ("data:image/png;base64,AAAA", {400, 403}),
    "NUL": (f"uploads/{USER}/cat\0.png", {400}),
    "line end": (f"uploads/{USER}/cat\n", {400}),
    "tab": (f"uploads/{USER}/c\tat", {400}),
    "lone surrogate": (f"uploads/{USER}/\ud800", {400}),
    "the folder": (f"uploads/{USER}/", {400, 403}),
    "an option": ("--help", {403}),
}


@pytest.mark.parametrize("case", FOREIGN_URLS)
def test_image_url_stays_in_the_users_uploads(edge: Edge, case: str) -> None:
    """An image_url outside the user's uploads gives 400 or 403."""
    url, allowed = FOREIGN_URLS[case]
    body = edge.body(url, "cat")
    response = edge.http.post(PREDICT, content=json.dumps(body), headers={"Content-Type": "application/json"})
    status, code, message = error_of(response)
    assert status in allowed
    assert code == {400: "INVALID_REQUEST", 403: "FORBIDDEN", 404: "IMAGE_NOT_FOUND"}[status]
    assert "image" in message
    assert "passwd" not in message
    if edge.row(body["task_id"]) is not None:
        check_refused(edge, body["task_id"], message)


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
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # a decoder that has ended
            total += process.memory_info().rss
    return total


def test_huge_image_headers_take_no_memory(edge: Edge) -> None:
    """Many concurrent images with huge sizes in their headers are refused without decoding them."""
    names = [name for name in BAD_IMAGES if "megapixels" in name or " x " in name or "text" in name]
    keys = [edge.upload(BAD_IMAGES[name]()) for name in names] * 4
    processes = with_descendants(children_of(edge.server, API_WORKER))
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


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["image_url", "text_prompt", "prompts", "user_id", "task_id"])
LIKELY = {
    "image_url": st.just(f"uploads/{USER}/none") | st.text(max_size=40),
    "text_prompt": st.text(max_size=220),
    "prompts": st.lists(st.text(max_size=20), max_size=12),
    "user_id": st.just(USER) | st.text(max_size=70),
    "task_id": st.uuids().map(str) | st.text(max_size=40),
}


@given(
    path=st.sampled_from([PREDICT, BATCH]),
    likely=st.fixed_dictionaries({}, optional=LIKELY),
    wild=st.dictionaries(FIELDS | st.text(max_size=8), JSON_VALUES, max_size=2),
)
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_json_gets_a_proper_answer(
    edge: Edge, path: str, likely: dict[str, Any], wild: dict[str, Any]
) -> None:
    """Any JSON body is answered with an error of the contract, never with a 5xx."""
    content = json.dumps(likely | wild)
    response = edge.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert error_of(response)[0] in {400, 403, 404, 413}


@given(content=st.binary(max_size=200))
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_bytes_get_a_proper_answer(edge: Edge, content: bytes) -> None:
    """Any bytes as a body are answered with 400."""
    response = edge.http.post(PREDICT, content=content, headers={"Content-Type": "application/json"})
    assert error_of(response)[:2] == (400, "INVALID_REQUEST")


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}


def test_cors_is_off_by_default(edge: Edge) -> None:
    """Without ALLOWED_ORIGINS no web page can read the server's answers."""
    origin = {"Origin": "https://app.example.com"}
    for response in (
        edge.http.get("/health", headers=origin),
        edge.http.options(PREDICT, headers=origin | PREFLIGHT),
    ):
        assert not [name for name in response.headers if name.startswith("access-control-")]


def test_cors_allows_only_the_configured_origins(tmp_path: Path) -> None:
    """Only pages of ALLOWED_ORIGINS may send requests and read the answers, errors included."""
    allowed_origin, other_origin = "https://app.example.com", "https://evil.example.com"
    environment = {"ALLOWED_ORIGINS": f"{allowed_origin}, http://localhost:5173", "API_WORKERS": "1"}
    with local_server(tmp_path, environment) as server, httpx.Client(base_url=server.url) as page:
        for origin, allowed in (
            (allowed_origin, allowed_origin),
            ("http://localhost:5173", "http://localhost:5173"),
            (other_origin, None),
        ):
            preflight = page.options(PREDICT, headers={"Origin": origin} | PREFLIGHT)
            assert (preflight.status_code == httpx.codes.OK) == (allowed is not None)
            assert preflight.headers.get("Access-Control-Allow-Origin") == allowed
            refused = page.post(PREDICT, headers={"Origin": origin})
            assert error_of(refused)[:2] == (401, "AUTH_REQUIRED")
            assert refused.headers.get("Access-Control-Allow-Origin") == allowed
            assert "Access-Control-Allow-Credentials" not in refused.headers
