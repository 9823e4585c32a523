"""The server and its weights: served from any layout, downloaded at the start, or refused with a reason."""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

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


def wrong_file(kind: str, folder: Path) -> Path:
    """A file that is recognisably not SAM 3 weights."""
    path = folder / "weights.pt"
    if kind == "SAM 2":
        save_file({"memory_attention.x": torch.zeros(1)}, path)
    elif kind == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "<xml/>")
    else:
        whole = WEIGHTS.read_bytes()
        torn_zip = io.BytesIO()
        torch.save({"x": torch.zeros(9)}, torn_zip)
        contents = {
            "empty": b"",
            "web page": b"<!DOCTYPE html><title>Sign in</title>",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3450062241\n",
            "torn safetensors": whole[: len(whole) // 2],
            "torn zip": torn_zip.getvalue()[:-100],
        }
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("empty", "is empty"),
        ("web page", "is neither a torch nor a safetensors file"),
        ("pointer", "is a Git LFS pointer, not the weights: `git lfs pull` fetches them"),
        ("torn safetensors", "cannot be read, it may be cut short: "),
        ("torn zip", "cannot be read, it may be cut short: "),
        ("another zip", "is a zip file without weights in it"),
        ("SAM 2", "cannot be served: it is a SAM 2 checkpoint: this server serves SAM 3"),
    ],
)
def test_other_files_than_weights_are_refused(tmp_path: Path, kind: str, fault: str) -> None:
    """Faults in the first bytes or the index are reported before any process is started."""
    path = wrong_file(kind, tmp_path)
    refusal = refused_start(tmp_path / "data", {"SAM3_WEIGHTS_PATH": str(path)})
    sentence = sentence_of(refusal, "cannot start: SAM3_WEIGHTS_PATH: ")
    assert sentence.startswith(f"{path} {fault}")
    assert "initialized" not in refusal.output


def test_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    """An invalid tokenizer is reported at the start; it would end every process."""
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "sam3"))
    (folder / "tokenizer.json").write_text("{}")
    refusal = refused_start(tmp_path / "data", {"SAM3_WEIGHTS_PATH": str(folder)})
    sentence = sentence_of(refusal, "cannot start: SAM3_WEIGHTS_PATH: ")
    assert sentence.startswith(f"{folder / 'tokenizer.json'} is not a tokenizer: ")


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
    with local_server(tmp_path / "data", {"SAM3_WEIGHTS_PATH": str(path)}) as server, Edge(server) as edge:
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


def test_missing_weights_are_downloaded_once(tmp_path: Path, served: Hub) -> None:
    """The first start downloads the weights and becomes ready; the second needs no hub."""
    target = tmp_path / "sam3"
    settings = downloading(target, served)
    with local_server(tmp_path / "first", settings) as server:
        assert (target / "model.safetensors").read_bytes() == WEIGHTS.read_bytes()
        assert health(server) == READY
        assert TOKEN not in server.log_path.read_text()
    served.requests.clear()
    served.granted = False
    with local_server(tmp_path / "second", settings) as server, Edge(server) as edge:
        picture = scene(4_000_000)
        assert edge.answer(picture.image, picture.names[0])["labels"] == [picture.names[0]]
    assert served.requests == []


def test_health_reports_the_download_progress(tmp_path: Path, served: Hub) -> None:
    """During the download /health reports how much is done."""
    served.hold_after_bytes = 5_000_000
    with started_server(tmp_path / "data", downloading(tmp_path / "sam3", served)) as (server, _):
        reported = wait_for(
            lambda: health(server), lambda answer: answer and "of 0.01 GB" in answer.get("detail", "")
        )
        assert reported is not None
        assert reported["status"] == "loading"
        assert new_connection.get(f"{server.url}/readyz").status_code == 503
        served.closing.set()


def test_gated_weights_end_the_server(tmp_path: Path, served: Hub) -> None:
    """Without access the server logs where to request it, without the token, and ends."""
    served.granted = False
    refusal = refused_start(tmp_path / "data", downloading(tmp_path / "sam3", served))
    sentence = sentence_of(refusal, "the model cannot be loaded: ")
    assert [part for part in ("is gated", "facebook/sam3", "ask for it there") if part not in sentence] == []
    assert TOKEN not in refusal.output


def test_server_waits_for_an_unavailable_hub(tmp_path: Path, served: Hub) -> None:
    """The server keeps running, reports the reason, and becomes ready once the hub is available."""
    served.failures = [503] * 1000
    settings = downloading(tmp_path / "sam3", served)
    with started_server(tmp_path / "data", settings) as (server, process), Edge(server) as edge:
        reported = wait_for(
            lambda: health(server), lambda answer: answer and "answers 503" in answer.get("detail", "")
        )
        assert reported is not None
        assert (reported["status"], reported["model_loaded"]) == ("loading", False)
        assert new_connection.get(f"{server.url}/readyz").status_code == 503
        status, code, message = error_of(edge.send(edge.body(edge.upload(b"x"), "red circle")))
        assert (status, code) == (503, "MODEL_NOT_LOADED")
        assert "answers 503" in message
        assert process.poll() is None
        served.failures.clear()
        wait_for(lambda: health(server), lambda answer: answer and answer["status"] == "ok")
