"""The image: built by `make image`, run with its entrypoint and user on a read-only root."""

from __future__ import annotations

import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from PIL import Image as Pictures

from deploy.image.build import revision
from tests.deploy import containers
from tests.deploy.container_kills import KINDS, kill_and_watch
from tests.deploy.containers import (
    Container,
    Image,
    built_image,
    container,
    image_for_vast,
    missing_tools,
    missing_wheels,
)
from tests.deploy.smoke_run import smoke
from tests.drawn import scene
from tests.edge import Edge, png_bytes, wait_for
from tests.tiers import need
from version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.server

MAX_IMAGE_BYTES = 1_600_000_000
STOP_S = 10.0
RECOVERY_LIMIT_S = 90.0
"""Limit of the time from a kill to the next answer, on a busy machine."""


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    """The CPU variant, built once (about three minutes)."""
    need(missing_tools())
    need(missing_wheels())
    # Not in pytest's folder: a mount that remains after a kill would break the next run.
    with TemporaryDirectory(prefix="sam3-image-") as folder, built_image(Path(folder)) as built:
        yield built


@pytest.fixture(scope="module")
def running(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A container with documented variables only."""
    with container(image, tmp_path_factory.mktemp("container"), {}) as started:
        yield started


@pytest.fixture
def edge(running: Container) -> Iterator[Edge]:
    """A caller of `running`."""
    with Edge(running.server) as caller:
        yield caller


def test_container_does_a_task(running: Container, edge: Edge) -> None:
    """A task is done in the container; mask, row and outbox are on its volume, owned by its user."""
    drawn = scene(7)
    answer = edge.answer(png_bytes(drawn.image), drawn.names[0])
    data_dir = running.server.data_dir
    assert answer["mask_url"].startswith("file:///data/storage/masks/")
    stored = data_dir / answer["mask_url"].removeprefix("file:///data/")
    with Pictures.open(stored) as mask:
        assert mask.size == drawn.image.size
        assert np.asarray(mask).any()
    assert edge.settled_row(answer["task_id"]).status == "done"
    assert {"outbox.sqlite", "results.sqlite"} <= {path.name for path in data_dir.iterdir()}
    assert stored.stat().st_uid == containers.USER_ID


def test_smoke_script_passes(running: Container) -> None:
    """The smoke script passes against the container and its volume."""
    data_dir = str(running.server.data_dir)
    ended = smoke(running.server.url, {"API_SECRET_KEY": running.server.api_key, "DATA_DIR": data_dir})
    assert ended.status == 0, ended.output


def test_image_for_vast_runs_server_and_tunnel(image: Image, tmp_path: Path) -> None:
    """The image for Vast.ai runs the server and the tunnel, and one signal stops both cleanly."""
    tunnel = {"CLOUDFLARE_TUNNEL": "green", "CLOUDFLARE_TUNNEL_TOKEN_GREEN": "token-of-green"}
    with container(image_for_vast(image, tmp_path), tmp_path, tunnel) as started:
        variables = {"API_SECRET_KEY": started.server.api_key, "DATA_DIR": str(started.server.data_dir)}
        ended = smoke(started.server.url, variables)
        assert ended.status == 0, ended.output
        assert "cloudflared --no-autoupdate tunnel run with token-of-green" in started.log()
        assert started.stop() == 0


def test_labels_describe_the_image(image: Image) -> None:
    """The labels have the version, the commit and PyTorch's version, which equals the installed one."""
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.version"] == VERSION
    assert labels["org.opencontainers.image.revision"] == revision()
    [found] = image.root.glob("app/.venv/lib/python3.*/site-packages/torch/version.py")
    installed = found.read_text()
    assert f"'{labels['sam3.torch']}'" in installed
    assert labels["sam3.cuda"] == "none"
    assert re.search(r"^cuda.* = None$", installed, re.MULTILINE)


def test_image_is_small(image: Image) -> None:
    """The CPU variant is smaller than its limit."""
    assert image.size_bytes <= MAX_IMAGE_BYTES


def test_image_contains_nothing_unneeded(image: Image) -> None:
    """The image contains no compiler, package installer, cache, test, repository or settings file."""
    commands = {
        path.name
        for folder in ("usr/bin", "usr/sbin", "usr/local/bin", "app/.venv/bin")
        if (image.root / folder).is_dir()
        for path in (image.root / folder).iterdir()
    }
    assert "python3" in commands
    assert not commands & {"cc", "gcc", "g++", "ld", "make", "git", "uv", "gpg"}
    assert not [path for path in (image.root / "app/.venv/bin").iterdir() if path.name.startswith("pip")]
    source = image.root / "home/bentoml/bento/src"
    assert {"service.py", "sam3_runner"} <= {path.name for path in source.iterdir()}
    assert not {"tests", "training", "benchmarks", ".git", ".env", "data"} & {
        path.name for path in source.iterdir()
    }
    for cache in ("root/.cache", "var/lib/apt/lists", "var/cache/apt/archives"):
        assert not [
            path for path in (image.root / cache).glob("**/*") if path.is_file() and path.name != "lock"
        ]


def test_image_contains_no_secret(image: Image) -> None:
    """The image contains no key, its user can write no file, and no program is setuid."""
    names = {entry.split("=", 1)[0] for entry in image.config["Env"]}
    assert not [name for name in names if re.search(r"KEY|SECRET|TOKEN|PASSWORD", name)]
    private, writable, setuid = [], [], []
    for folder, _, files in os.walk(image.root):
        for name in files:
            path = Path(folder, name)
            state = path.lstat()
            if stat.S_ISREG(state.st_mode):
                if state.st_mode & (stat.S_ISUID | stat.S_ISGID):
                    setuid.append(path)
                if state.st_uid == containers.USER_ID and not str(path).startswith(
                    str(image.root / "home/bentoml/.")
                ):
                    writable.append(path)
                if state.st_size < 2**20 and b"PRIVATE KEY-----\n" in path.read_bytes():
                    private.append(path)
            assert name not in {".env", ".netrc", ".git-credentials", "pip.conf"}
    assert (setuid, writable) == ([], [])
    # Example keys in packages are public.
    assert [path for path in private if "site-packages" not in path.parts] == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"API_SECRET_KEY": None}, "API_SECRET_KEY"),
        ({"EMBEDDED_PARTS": None}, "EMBEDDED_PARTS"),
        (
            {"EMBEDDED_PARTS": "results", "R2_ENDPOINT": "https://a.r2.cloudflarestorage.com"},
            "R2_ACCESS_KEY_ID",
        ),
        ({"SAM3_DEVICE": "cuda"}, "SAM3_DEVICE"),
        ({"SAM3_WEIGHTS_PATH": None}, "SAM3_WEIGHTS_PATH"),
        ({"DATA_DIR": "/nowhere"}, "DATA_DIR"),
    ],
)
def test_container_refuses_wrong_settings(
    image: Image, tmp_path: Path, changes: dict[str, str | None], sentence: str
) -> None:
    """Wrong settings end the container with one sentence that names the variable, and status 1."""
    with container(image, tmp_path, changes, ready=False) as started:
        assert started.monitor.wait(60) == 1
        [line] = [line for line in started.log().splitlines() if '"cannot start: ' in line]
        assert sentence in line
        assert "Traceback" not in started.log()


def test_container_refuses_a_volume_of_another_user(image: Image, tmp_path: Path) -> None:
    """For a volume that root owns, like a new one, the error names variable, folder and user."""
    (tmp_path / "data").mkdir(mode=0o755)
    with container(image, tmp_path, {}, ready=False) as started:
        assert started.monitor.wait(60) == 1
        [line] = [line for line in started.log().splitlines() if '"cannot start: ' in line]
        assert "DATA_DIR" in line
        assert "/data" in line
        assert str(containers.USER_ID) in line


def test_stop_during_many_requests_is_clean(image: Image, tmp_path: Path) -> None:
    """After SIGTERM every claimed task is done, the rest is refused; the exit status is 0."""
    with (
        container(image, tmp_path, {}) as started,
        Edge(started.server) as edge,
        ThreadPoolExecutor(16) as pool,
    ):
        bodies = [edge.body(edge.upload(png_bytes(scene(n).image)), "circle") for n in range(32)]
        for body in bodies:
            edge.insert_row(body)
        answers = [pool.submit(_status_of, edge, body) for body in bodies]
        wait_for(lambda: started.log().count("/api/v1/predict 200"), lambda count: count >= 2)
        signalled_s = time.monotonic()
        assert started.stop() == 0
        took_s = time.monotonic() - signalled_s
        statuses = [answer.result() for answer in answers]
        rows = [edge.row(body["task_id"]) for body in bodies]
    assert took_s < STOP_S
    ends = [(status, row.status) for status, row in zip(statuses, rows, strict=True) if row]
    assert {row_status for _, row_status in ends} <= {"done", "pending"}
    assert {row_status for status, row_status in ends if status == httpx.codes.OK} == {"done"}
    assert statuses.count(httpx.codes.OK) > 0


def _status_of(edge: Edge, body: dict[str, object]) -> int | None:
    try:
        return edge.send(body).status_code
    except httpx.TransportError:
        return None


def test_killed_processes_are_restarted_and_no_task_is_lost(image: Image, tmp_path: Path) -> None:
    """After a kill of each kind of process during tasks, the container answers again; no task is lost."""
    report = kill_and_watch(image, tmp_path, kills=len(KINDS), seed=1)
    assert [kill.kind for kill in report.kills] == list(KINDS)
    assert max(kill.recovery_s for kill in report.kills) < RECOVERY_LIMIT_S
    assert report.tasks > 0
    assert report.lost == []
