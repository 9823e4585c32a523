"""The server and its weights: served from any layout, downloaded at the start, or told why not."""

from __future__ import annotations

import hashlib
import shutil
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from local_server import local_server
from sam3_runner.checkpoint import DEMO_FOLDER
from tests.drawn import scene
from tests.edge import Edge, error_of, wait_for
from tests.processes import started_server
from tests.sam3_runner.official import as_official
from tests.services.hub import TOKEN, hub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from local_server import LocalServer
    from tests.services.hub import Hub

pytestmark = pytest.mark.server

WEIGHTS = DEMO_FOLDER / "model.safetensors"


def health(server: LocalServer) -> dict[str, Any] | None:
    """What /health says; None before the server listens."""
    try:
        answer: dict[str, Any] = httpx.get(f"{server.url}/health").json()
    except httpx.TransportError:
        return None
    return answer


def check_not_served(server: LocalServer, *parts: str) -> None:
    """The server runs and says what is wrong: to /health, to /readyz, and to every caller."""
    said = wait_for(lambda: health(server), lambda answer: answer and answer["status"] == "error")
    assert said is not None
    assert said["model_loaded"] is False
    assert [part for part in parts if part not in said["detail"]] == []
    assert httpx.get(f"{server.url}/readyz").status_code == 503
    with Edge(server) as edge:
        body = edge.body(edge.upload(b"x"), "red circle")
        for answer in (edge.send(body), httpx.get(f"{server.url}/api/v1/model/info", headers=server.headers)):
            status, code, message = error_of(answer)
            assert (status, code, message) == (503, "MODEL_NOT_LOADED", said["detail"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_told(tmp_path: Path) -> None:
    """SAM3_DEVICE=cuda without a GPU is told, not answered by a CPU in silence."""
    with started_server(tmp_path, {"SAM3_DEVICE": "cuda", "API_WORKERS": "1"}) as (server, _):
        check_not_served(server, "no CUDA GPU", "SAM3_DEVICE=cpu")


def test_official_file_is_served(tmp_path: Path) -> None:
    """A `sam3.pt` with the demo's weights: model/info tells the truth of it, and it finds what is there."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(DEMO_FOLDER / name, tmp_path)
    path = tmp_path / "sam3.pt"
    state = as_official(load_file(WEIGHTS))
    torch.save({"model": {f"detector.{name}": tensor for name, tensor in state.items()}}, path)
    with local_server(tmp_path / "data", {"SAM3_WEIGHTS_PATH": str(path)}) as server, Edge(server) as edge:
        info = httpx.get(f"{server.url}/api/v1/model/info", headers=server.headers).json()
        assert (info["checkpoint"], info["checkpoint_layout"], info["demo"]) == ("sam3.pt", "official", False)
        assert info["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert info["parameters"] == sum(tensor.numel() for tensor in load_file(WEIGHTS).values())
        assert (info["dtype"], info["device"], info["input_size"]) == ("float32", "cpu", 336)
        picture = scene(4_000_000)
        assert edge.answer(picture.image, picture.names[0])["labels"] == [picture.names[0]]
        assert "detail" not in httpx.get(f"{server.url}/health").json()


@pytest.fixture
def served() -> Iterator[Hub]:
    """A hub that holds the demo's files as if they were Meta's."""
    files = ("config.json", "tokenizer.json", "model.safetensors")
    with hub({name: (DEMO_FOLDER / name).read_bytes() for name in files}) as running:
        yield running


def downloading(target: Path, served: Hub) -> dict[str, str]:
    """Settings under which `target` comes from the hub `served`."""
    return {
        "SAM3_WEIGHTS_PATH": str(target),
        "SAM3_HF_REVISION": "main",
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": served.url,
        "API_WORKERS": "1",
    }


def test_missing_weights_are_downloaded_once(tmp_path: Path, served: Hub) -> None:
    """The first start downloads and gets ready; the second needs no hub, and serves."""
    target = tmp_path / "sam3"
    settings = downloading(target, served)
    with local_server(tmp_path / "first", settings) as server:
        assert (target / "model.safetensors").read_bytes() == WEIGHTS.read_bytes()
        assert health(server) == {"status": "ok", "model_loaded": True, "gpu_available": False}
        assert TOKEN not in server.log_path.read_text()
    served.requests.clear()
    served.granted = False
    with local_server(tmp_path / "second", settings) as server, Edge(server) as edge:
        picture = scene(4_000_000)
        assert edge.answer(picture.image, picture.names[0])["labels"] == [picture.names[0]]
    assert served.requests == []


def test_progress_of_the_download_is_told(tmp_path: Path, served: Hub) -> None:
    """While the weights come, /health says how much is there."""
    served.hold_after_bytes = 5_000_000
    with started_server(tmp_path / "data", downloading(tmp_path / "sam3", served)) as (server, _):
        said = wait_for(
            lambda: health(server), lambda answer: answer and "of 0.01 GB" in answer.get("detail", "")
        )
        assert said is not None
        assert said["status"] == "loading"
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        served.closing.set()


def test_gated_weights_are_told(tmp_path: Path, served: Hub) -> None:
    """Without access the server says whom to ask, and shows no token."""
    served.granted = False
    with started_server(tmp_path / "data", downloading(tmp_path / "sam3", served)) as (server, _):
        check_not_served(server, "is gated", "facebook/sam3", "ask for it there")
        assert TOKEN not in server.log_path.read_text()
