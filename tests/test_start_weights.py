"""The server and its weights: served from any layout, downloaded at the start, or refused with a reason."""

from __future__ import annotations

import hashlib
import shutil
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from commands.local_server import local_server
from sam3_runner.weights.checkpoint import DEMO_FOLDER
from tests import new_connection
from tests.drawn import scene
from tests.edge import Edge, error_of, wait_for
from tests.sam3_runner.official import as_official
from tests.server_processes import refused_start, sentence_of, started_server
from tests.services.hub import TOKEN, hub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from commands.local_server import LocalServer
    from tests.services.hub import Hub

pytestmark = pytest.mark.server

WEIGHTS = DEMO_FOLDER / "model.safetensors"


def health(server: LocalServer) -> dict[str, Any] | None:
    """The answer of /health; None before the server listens."""
    try:
        answer: dict[str, Any] = new_connection.get(f"{server.url}/health").json()
    except httpx.TransportError:
        return None
    return answer


def test_torn_weights_are_refused(tmp_path: Path) -> None:
    """Faults that the file's index shows are reported before any process is started.

    tests/in_process/test_start.py has the others.
    """
    path = tmp_path / "weights.pt"
    whole = WEIGHTS.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refusal = refused_start(tmp_path / "data", {"SAM3_WEIGHTS_PATH": str(path)})
    sentence = sentence_of(refusal, "cannot start: SAM3_WEIGHTS_PATH: ")
    assert sentence.startswith(f"{path} cannot be read, it may be cut short: ")
    assert "initialized" not in refusal.output


def test_weights_that_do_not_fit_end_the_server(tmp_path: Path) -> None:
    """Faults that only loading detects end the server, instead of leaving it running without a model."""
    path = tmp_path / "sam3.pt"
    torch.save(as_official(load_file(WEIGHTS)), path)  # the demo's weights, without its config.json
    refusal = refused_start(tmp_path / "data", {"SAM3_WEIGHTS_PATH": str(path), "API_WORKERS": "1"})
    assert f"{path} does not fit the model: " in sentence_of(refusal, "the model cannot be loaded: ")
    assert refusal.output.splitlines()[-1].startswith("cannot serve: process ")


def test_official_file_is_served(tmp_path: Path) -> None:
    """A `sam3.pt` with the demo's weights is described by model/info, and finds objects."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(DEMO_FOLDER / name, tmp_path)
    path = tmp_path / "sam3.pt"
    state = as_official(load_file(WEIGHTS))
    torch.save({"model": {f"detector.{name}": tensor for name, tensor in state.items()}}, path)
    settings = {"SAM3_WEIGHTS_PATH": str(path), "API_WORKERS": "1"}
    with local_server(tmp_path / "data", settings) as server, Edge(server) as edge:
        info = new_connection.get(f"{server.url}/api/v1/model/info", headers=server.headers).json()
        assert (info["checkpoint"], info["checkpoint_layout"], info["demo"]) == ("sam3.pt", "official", False)
        assert info["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert info["parameters"] == sum(tensor.numel() for tensor in load_file(WEIGHTS).values())
        assert (info["dtype"], info["device"], info["input_size"]) == ("float32", "cpu", 336)
        picture = scene(4_000_000)
        assert edge.answer(picture.image, picture.names[0])["labels"] == [picture.names[0]]
        assert "detail" not in new_connection.get(f"{server.url}/health").json()


@pytest.fixture
def served() -> Iterator[Hub]:
    """A hub with the demo's files under the name of Meta's repository."""
    files = ("config.json", "tokenizer.json", "model.safetensors")
    with hub({name: (DEMO_FOLDER / name).read_bytes() for name in files}) as running:
        yield running


def downloading(target: Path, served: Hub) -> dict[str, str]:
    """Settings that download `target` from the hub `served`."""
    return {
        "SAM3_WEIGHTS_PATH": str(target),
        "SAM3_HF_REVISION": "main",
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": served.url,
        "API_WORKERS": "1",
    }


READY = {
    "status": "ok",
    "model_loaded": True,
    "gpu_available": False,
    "runners": [{"state": "ok"}],
}


def test_gated_weights_end_the_server(tmp_path: Path, served: Hub) -> None:
    """Without access the server logs where to request it, without the token, and ends."""
    served.granted = False
    refusal = refused_start(tmp_path / "data", downloading(tmp_path / "sam3", served))
    sentence = sentence_of(refusal, "the model cannot be loaded: ")
    assert [part for part in ("is gated", "facebook/sam3", "ask for it there") if part not in sentence] == []
    assert TOKEN not in refusal.output


def test_missing_weights_are_downloaded_once(tmp_path: Path, served: Hub) -> None:
    """The first start downloads the weights, from a hub that fails meanwhile; the second needs no hub."""
    target = tmp_path / "sam3"
    settings = downloading(target, served)
    served.hold_after_bytes = 5_000_000
    with started_server(tmp_path / "first", settings) as (server, process), Edge(server) as edge:
        check_loading(server, "of 0.01 GB")
        served.failures, served.hold_after_bytes = [503] * 1000, None
        served.closing.set()
        check_unavailable_hub(edge)
        assert process.poll() is None
        served.failures.clear()
        wait_for(lambda: health(server), lambda answer: answer == READY)
        assert (target / "model.safetensors").read_bytes() == WEIGHTS.read_bytes()
        assert TOKEN not in server.log_path.read_text()
    served.requests.clear()
    served.granted = False
    with local_server(tmp_path / "second", settings) as server, Edge(server) as edge:
        picture = scene(4_000_000)
        assert edge.answer(picture.image, picture.names[0])["labels"] == [picture.names[0]]
    assert served.requests == []


def check_unavailable_hub(edge: Edge) -> None:
    """While the hub fails, /health and callers get the reason."""
    check_loading(edge.server, "answers 503")
    status, code, message = error_of(edge.send(edge.body(edge.upload(b"x"), "red circle")))
    assert (status, code) == (503, "MODEL_NOT_LOADED")
    assert "answers 503" in message


def check_loading(server: LocalServer, detail: str) -> None:
    """Wait until /health says this; the server is not ready then."""
    reported = wait_for(lambda: health(server), lambda answer: answer and detail in answer.get("detail", ""))
    assert reported is not None
    assert (reported["status"], reported["model_loaded"]) == ("loading", False)
    assert new_connection.get(f"{server.url}/readyz").status_code == 503
