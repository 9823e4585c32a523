"""Shared by all tests: one thread for torch, a clean environment, the real server, services, a tiny model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from commands.local_server import LocalServer, local_server
from sam3_runner.weights.checkpoint import DEMO_FOLDER, find_checkpoint
from settings import OWN_PREFIXES, Settings
from tests.edge import SERVER_TIMEOUT_S, Edge
from tests.scheduling import FileScheduling, machine_lock, ordered
from tests.services import database as databases
from tests.services import objects
from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from playwright.sync_api import Browser
    from xdist.remote import Producer

    from sam3_runner.weights.checkpoint import Checkpoint
    from tests.services.database import Database
    from tests.services.objects import S3Service

torch.set_num_threads(1)

SERVICES = {"seaweedfs", "r2_emulator", "database", "image"}
"""Fixtures that start a service or build the server's image."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need a service, before pytest selects by marks, and sort all tests."""
    for item in items:
        if SERVICES & set(getattr(item, "fixturenames", ())):
            item.add_marker("services")
    items[:] = ordered(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FileScheduling:
    """Choose how tests are distributed to workers."""
    return FileScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Run a test while it holds the machine's lock."""
    with machine_lock(item):
        return (yield)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower() in Settings.model_fields or name.startswith(OWN_PREFIXES):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The real server with the demo checkpoint, embedded stores and two API workers."""
    settings = {
        "API_WORKERS": "2",
        # On a slow machine many concurrent requests may take longer than the default.
        "REQUEST_TIMEOUT_S": str(SERVER_TIMEOUT_S),
        "DEFAULT_DEADLINE_S": str(SERVER_TIMEOUT_S),
        # On shared cores two threads spin while they wait for each other, which takes a third more CPU time.
        "SAM3_CPU_THREADS": "1",
    }
    with local_server(tmp_path_factory.mktemp("server"), settings) as running:
        yield running


@pytest.fixture(scope="session")
def edge(server: LocalServer) -> Iterator[Edge]:
    """A caller of `server`."""
    with Edge(server) as caller:
        yield caller


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the system's Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    need("no Chromium on PATH (apt-get install chromium)" if path is None else None)
    return str(path)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """A headless Chromium, shared by a module's tests."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - few tests need it

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield running
        running.close()


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Service]:
    """A real S3 server, shared by the tests; a test that stops one starts its own."""
    need(objects.missing_seaweedfs())
    with objects.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as service:
        yield service


@pytest.fixture(scope="session")
def r2_emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Service]:
    """Cloudflare's local R2, shared by the tests; a test that stops one starts its own."""
    need(objects.missing_r2_emulator())
    with objects.r2_emulator(tmp_path_factory.mktemp("r2")) as service:
        yield service


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """PostgreSQL, PostgREST and a gateway, shared by the tests; a test that stops one starts its own."""
    need(databases.missing())
    with databases.database(tmp_path_factory.mktemp("database")) as project:
        yield project


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """An untrained `Sam3Model` of 4 million weights for 112 px images, written as a checkpoint in fp16."""
    from safetensors.torch import save_file  # noqa: PLC0415 - slow; few tests need it
    from transformers import Sam3Config, Sam3Model  # noqa: PLC0415

    narrow = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = Sam3Config(
        vision_config={
            "fpn_hidden_size": 64,
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 112,
                "pretrain_image_size": 112,
                "patch_size": 14,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
        },
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 32,
        },
        geometry_encoder_config=narrow | {"num_layers": 1, "roi_size": 1},
        detr_encoder_config=narrow,
        detr_decoder_config=narrow | {"num_queries": 12},
        mask_decoder_config={"hidden_size": 64, "num_attention_heads": 4},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Sam3Model(config)
    folder = tmp_path_factory.mktemp("tiny")
    written = json.loads(config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(written))
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    shutil.copy(DEMO_FOLDER / "tokenizer.json", folder)
    return find_checkpoint(str(folder))


@pytest.fixture
def broken_checkpoint(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint's folder, which tests can damage."""
    return Path(shutil.copytree(tiny_checkpoint.weights_file.parent, tmp_path / "checkpoint"))
