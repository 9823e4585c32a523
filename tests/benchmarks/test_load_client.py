"""The load client against a small real HTTP server."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from benchmarks.load_client import COMMENT_BYTES, Kind, Plan, arrivals_s, run_plan
from benchmarks.load_figures import figures
from benchmarks.pictures import Scene, encode_jpeg
from commands.local_server import reserved_ports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

STALL_S = 0.6
DELAY_S = 0.05


@dataclass
class Server:
    """Answers as the real one, after a delay, and keeps what it got.

    Attributes:
        folder: of the uploads.
        delay_s: before each answer.
        stall_at: number of the request during which the whole server does nothing for STALL_S.
        refused_from: number of the first request that gets 429.
    """

    folder: Path
    delay_s: float = DELAY_S
    stall_at: int | None = None
    refused_from: int | None = None
    url: str = ""
    images: list[str] = field(default_factory=list)
    bodies: list[dict[str, object]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def answer(self, request: web.Request) -> web.Response:
        number = len(self.bodies)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        body = await request.json()
        self.bodies.append(body)
        self.paths.append(request.path)
        self.images.append(hashlib.sha256((self.folder / str(body["image_url"])).read_bytes()).hexdigest())
        if self.stall_at is None:
            await asyncio.sleep(self.delay_s)
        else:
            async with self._turn:
                await asyncio.sleep(STALL_S if number == self.stall_at else 0)
        self.in_flight -= 1
        if self.refused_from is not None and number >= self.refused_from:
            return web.json_response({"error": {}}, status=429)
        return web.json_response({"instances": [{}, {}], "inference_time_ms": 7.5})

    async def serve(self, port: int, started: threading.Event, stopped: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_post("/{path:.*}", self.answer)
        app.router.add_get("/health", self.health)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        started.set()
        await stopped.wait()
        await runner.cleanup()

    @staticmethod
    async def health(_: web.Request) -> web.Response:
        return web.json_response({})


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Serve in a thread until the end of the block."""
    loop, started = asyncio.new_event_loop(), threading.Event()
    stopped = asyncio.Event()
    with reserved_ports(1) as [port]:
        serving = threading.Thread(
            target=lambda: loop.run_until_complete(server.serve(port, started, stopped)), daemon=True
        )
        serving.start()
        assert started.wait(30)
        server.url = f"http://127.0.0.1:{port}"
        yield server
        loop.call_soon_threadsafe(stopped.set)
        serving.join(30)
        loop.close()


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    """A picture with the comment that the client rewrites."""
    return encode_jpeg(Scene(1, 64, 64).image, 90, b"0" * COMMENT_BYTES)


ONE = Kind("one", [[["red circle"], ["blue ring"]]])


def plan(server: Server, jpeg: bytes, *kinds: Kind, **load: float) -> Plan:
    """A load on `server` with four pictures."""
    keys = [f"picture-{number}" for number in range(4)]
    for key in keys:
        (server.folder / key).write_bytes(jpeg)
    paths = [str(server.folder / key) for key in keys]
    return Plan(server.url, {}, paths, keys, list(kinds), **load)  # type: ignore[arg-type]


def test_closed_loop_keeps_one_request_a_client(tmp_path: Path, jpeg: bytes) -> None:
    """Six clients have six requests in flight. Every request is reported, with the server's delay."""
    with running(Server(tmp_path)) as server:
        measured = run_plan(plan(server, jpeg, ONE, seconds=0.5, ramp_s=0.2, clients=6))
    assert server.most_in_flight == 6
    assert len(measured.outcomes) == len(server.bodies) > 6
    assert min(each.latency_ms for each in measured.outcomes) >= DELAY_S * 1000
    assert {each.status for each in measured.outcomes} == {"200"}
    assert {(each.masks, each.inference_ms) for each in measured.outcomes} == {(2, 7.5)}
    assert min(each.due_s for each in measured.outcomes) < 0
    assert measured.cpu_share > 0
    row = figures([measured.outcomes], 0.5)
    assert row["n"] == sum(0 <= each.due_s < 0.5 for each in measured.outcomes)
    assert row["throughput_per_s"] == 2 * sum(0 <= each.ended_s < 0.5 for each in measured.outcomes)


def test_every_request_has_another_file_unless_asked_otherwise(tmp_path: Path, jpeg: bytes) -> None:
    """Files differ in every request, although four are stored; `same_picture` sends one again."""
    same = Kind("same", [[["red circle"], ["blue ring"]]], same_picture=True)
    with running(Server(tmp_path, delay_s=0.01)) as server:
        run_plan(plan(server, jpeg, ONE, seconds=0.4, clients=2))
        distinct, server.images = server.images, []
        server.bodies.clear()
        run_plan(plan(server, jpeg, same, seconds=0.2, clients=1))
    assert len(set(distinct)) == len(distinct) > 4
    assert len(set(server.images)) == 1 < len(server.images)
    assert {body["text_prompt"] for body in server.bodies} == {"red circle", "blue ring"}
    assert len({body["task_id"] for body in server.bodies}) == len(server.bodies)


def test_open_loop_counts_from_the_scheduled_arrival(tmp_path: Path, jpeg: bytes) -> None:
    """A server that stalls once delays every request that was due meanwhile, and none of them is left out."""
    with running(Server(tmp_path, stall_at=20)) as server:
        load = plan(server, jpeg, ONE, seconds=1.5, rate_per_s=100.0)
        measured = run_plan(load)
    outcomes = sorted(measured.outcomes, key=lambda each: each.due_s)
    assert [each.due_s for each in outcomes] == arrivals_s(load)
    assert len(outcomes) == 150
    longest = max(outcomes, key=lambda each: each.latency_ms)
    assert longest.latency_ms >= STALL_S * 1000
    later = [each for each in outcomes if longest.due_s < each.due_s < longest.due_s + STALL_S / 2]
    assert len(later) > 10
    assert all(each.latency_ms >= STALL_S / 2 * 1000 for each in later)
    p99_ms = figures([outcomes], load.seconds)["p99_ms"]
    assert isinstance(p99_ms, float)
    assert p99_ms >= STALL_S / 2 * 1000


def test_mixed_load_uses_both_routes_by_their_shares(tmp_path: Path, jpeg: bytes) -> None:
    """One prompt goes to the route for one, several to the batch route, in the proportion of the shares."""
    ten = Kind("ten", [[["red circle", "blue ring"]]], share=1.0)
    one = Kind("one", ONE.prompts, share=3.0)
    with running(Server(tmp_path, delay_s=0)) as server:
        measured = run_plan(plan(server, jpeg, one, ten, seconds=1.0, rate_per_s=200.0))
    kinds = [each.kind for each in measured.outcomes]
    assert 0.6 < kinds.count("one") / len(kinds) < 0.9
    batches = [body for body in server.bodies if "prompts" in body]
    assert len(batches) == kinds.count("ten") == server.paths.count("/api/v1/predict/batch")
    assert server.paths.count("/api/v1/predict") == kinds.count("one")


def test_refusals_and_probes_are_reported(tmp_path: Path, jpeg: bytes) -> None:
    """A refusal has its status, and the probe's path is read meanwhile."""
    with running(Server(tmp_path, refused_from=10)) as server:
        load = plan(server, jpeg, ONE, seconds=0.5, rate_per_s=100.0)
        measured = run_plan(replace(load, probes=["/health"]))
    statuses = [each.status for each in measured.outcomes if each.kind == "one"]
    assert statuses.count("200") == 10
    assert statuses.count("429") == len(statuses) - 10 > 0
    assert any(each.kind == "/health" for each in measured.outcomes)


def test_server_that_is_absent_is_an_error_not_an_exception(tmp_path: Path, jpeg: bytes) -> None:
    """Requests without an answer are outcomes with the name of the error."""
    with reserved_ports(1) as [port]:
        absent = Server(tmp_path, url=f"http://127.0.0.1:{port}")
        measured = run_plan(plan(absent, jpeg, ONE, seconds=0.2, rate_per_s=50.0))
    assert {each.status for each in measured.outcomes} == {"ClientConnectorError"}
