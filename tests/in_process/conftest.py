"""Fixtures of the in-process tests: none of these tests starts a process or a server."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, NoReturn

import pytest

from sam3_runner.prompts import PromptTokenizer
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE
from tests.in_process.bench import opened_bench

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.in_process.bench import Bench


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
