"""The Bento: built without secrets, complete, and without unneeded files."""

from __future__ import annotations

import filecmp
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from commands.local_server import LocalServer, clean_environment, reserved_ports, stop, wait_until_ready
from settings import OWN_PREFIXES, Settings
from tests.drawn import scene
from tests.edge import Edge, png_bytes

pytestmark = pytest.mark.server

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new Bento."""
    return build_bento(tmp_path_factory.mktemp("bentoml"))


def build_bento(home: Path) -> Path:
    """Build a Bento in a new store, without our settings in the environment; returns its folder."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.lower() not in Settings.model_fields and not name.startswith(OWN_PREFIXES)
    }
    built = subprocess.run(
        [sys.executable, "-m", "bentoml", "build", "--version", "1", "--output", "tag"],
        cwd=ROOT,
        env=environment | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    [folder] = (home / "bentos" / "sam3").glob("*/")
    return folder


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_bento_is_complete(bento: Path) -> None:
    """The Bento contains every module of the server, and the repository's demo checkpoint."""
    held = files_below(bento / "src")
    folders = (
        "bentoml_patches",
        "commands",
        "contract",
        "observability",
        "outputs",
        "playground",
        "processes",
        "sam3_runner",
        "storage",
        "results",
    )
    served = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert {path.relative_to(ROOT).as_posix() for path in served} - {"commands/local_server.py"} <= held
    assert {"LICENSE", "NOTICE"} <= held
    names = ("config.json", "model.safetensors", "tokenizer.json")
    folder = "sam3_runner/demo_checkpoint"
    _, different, missing = filecmp.cmpfiles(ROOT / folder, bento / "src" / folder, names, shallow=False)
    assert (different, missing) == ([], [])


def test_bento_contains_nothing_else(bento: Path) -> None:
    """The Bento contains no tests, training, data, caches or settings of the build machine."""
    for name in files_below(bento / "src"):
        parts = Path(name).parts
        assert parts[0] not in {"tests", "training", "benchmarks", "docs", "data", "weights", ".git", ".venv"}
        assert "__pycache__" not in parts
        assert parts[-1] != ".env"
    assert "commands/local_server.py" not in files_below(bento / "src")


def test_build_is_reproducible(bento: Path, tmp_path: Path) -> None:
    """Two builds of one tree have the same files, except for the time in bento.yaml."""
    again = build_bento(tmp_path)
    names = sorted(files_below(bento))
    assert sorted(files_below(again)) == names
    _, different, missing = filecmp.cmpfiles(bento, again, names, shallow=False)
    assert (different, missing) == (["bento.yaml"], [])
    timeless = [
        re.sub(r"(?m)^creation_time: .*$", "", (one / "bento.yaml").read_text()) for one in (bento, again)
    ]
    assert timeless[0] == timeless[1]


def test_bento_sets_production(bento: Path) -> None:
    """The Bento sets APP_ENV=production, so its image refuses embedded parts."""
    description = (bento / "bento.yaml").read_text()
    assert "APP_ENV" in description
    assert "production" in description
    assert "python_version: '3.12'" in description
    # Its versions are those of the image's CUDA variant.
    locked = (bento / "env" / "python" / "requirements.txt").read_text()
    lock = (ROOT / "deploy" / "image" / "requirements-cu130.lock").read_text()
    assert set(re.findall(r"(?m)^[a-z0-9-]+==\S+", lock)) <= set(re.findall(r"(?m)^[a-z0-9-]+==\S+", locked))


def test_relative_paths_are_below_the_working_directory(bento: Path, tmp_path: Path) -> None:
    """All processes of a Bento resolve relative paths against the folder where it was started."""
    api_key = "0123456789abcdef"
    environment = clean_environment(tmp_path / "data", api_key) | {
        "APP_ENV": "production",
        "EMBEDDED_PARTS": "storage,results",
        "DATA_DIR": "data",
        "API_WORKERS": "1",
        "GPUS": "2",  # more runners than bento.yaml lists, as on a host with more GPUs than the builder has
    }
    (tmp_path / "data").mkdir()
    log_path = tmp_path / "server.log"
    with reserved_ports(1) as [port], log_path.open("wb") as log:
        url = f"http://127.0.0.1:{port}"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bentoml", "serve", str(bento)),
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_ready(process, url, log_path)
            server = LocalServer(url, api_key, tmp_path / "data", log_path, process.pid, ready_s=0.0)
            with Edge(server) as edge:
                assert edge.ask(png_bytes(scene(100).image), "circle").status_code == httpx.codes.OK
                assert len(edge.http.get("/health").json()["runners"]) == 2
        finally:
            stop(process)
    assert {"outbox.sqlite", "results.sqlite", "storage"} <= {
        path.name for path in (tmp_path / "data").iterdir()
    }
    assert not [name for name in files_below(bento / "src") if name.endswith(".sqlite")]
