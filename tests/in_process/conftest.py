"""Fixtures of the in-process tests: none of these tests starts a process or a server."""

from __future__ import annotations

import subprocess
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn

import httpx
import pytest
from _bentoml_sdk.service import set_current_service

import service
from direct import DirectPath
from direct_form import PATH as DIRECT_PATH
from gate import Gate
from overload import OverloadCheck
from sam3_runner.prompts import PromptTokenizer
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE
from tests.in_process.bench import opened_bench

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.in_process.bench import Bench

KEY = "0123456789abcdef"
MAX_BODY_BYTES = 65_536


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recovery.POLL_S", 0.02)


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts a process: tests here take milliseconds."""

    def refuse(*arguments: object, **_: object) -> NoReturn:
        raise AssertionError(f"an in-process test starts a process: {arguments[1:]}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.fixture(scope="session")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(CLIP_TOKENIZER_FILE)


@pytest.fixture
async def bench(tmp_path: Path, tokenizer: PromptTokenizer) -> AsyncIterator[Bench]:
    async with opened_bench(tmp_path, tokenizer) as opened:
        yield opened


@asynccontextmanager
async def client_of(bench: Bench, *, with_direct: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the routes, which run on the bench's pipeline behind the gate."""
    direct = DirectPath(bench.pipeline, bench.outbox, "1")
    set_current_service(SimpleNamespace(_pipeline=bench.pipeline, _runner=bench.model, _direct=direct))
    overload = OverloadCheck()
    overload.pipeline, overload.direct = bench.pipeline, direct
    gate = Gate(
        service.app,
        api_keys=(KEY,),
        access="open",
        max_body_bytes=MAX_BODY_BYTES,
        large_bodies={DIRECT_PATH: 100_000},
        absent=() if with_direct else (DIRECT_PATH,),
        find_refusal=overload.find_refusal,
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(gate), base_url="http://server", headers={"X-API-Key": KEY}
    ) as client:
        yield client
    set_current_service(None)


@pytest.fixture
async def http(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the routes, the direct one included."""
    async with client_of(bench) as client:
        yield client
