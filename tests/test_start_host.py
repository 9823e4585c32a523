"""The start's checks of its host or container: the user, the volumes, the GPU, the share of the CPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from commands.local_server import local_server, reserved_ports
from sam3_runner.serving.cpu_share import cpu_share
from tests.cgroups import cpu_quota
from tests.drawn import scene
from tests.driver import MISMATCH, NO_DEVICE, NVML_MISMATCH, fake_driver, fake_nvml, torch_built_for
from tests.edge import Edge, png_bytes
from tests.server_processes import refused_start, sentence_of
from tests.test_traces import SOON

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from commands.local_server import LocalServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="containers need Linux"),
]

IMAGE_UID, OTHER_UID = 1034, 65534
AS_IMAGE = ("unshare", "--user", f"--map-user={IMAGE_UID}", f"--map-group={IMAGE_UID}")
"""Runs a command as the user of BentoML's image, mapped to root without further rights."""


class Volumes:
    """Folders with different owners and rights.

    Attributes:
        own: owned by the server's user.
        foreign: owned by another user, readable.
        closed: owned by another user, not accessible.
        uid: of the server's user: the image's if root runs the tests, otherwise the current one.
    """

    def __init__(self, folder: Path) -> None:
        self._is_root = os.geteuid() == 0
        self.uid = IMAGE_UID if self._is_root else os.geteuid()
        self.own, self.foreign, self.closed = (folder / name for name in ("own", "foreign", "closed"))
        for each in (self.own, self.foreign, self.closed):
            each.mkdir()
        self.take_away(self.foreign, 0o555)
        self.take_away(self.closed, 0o000)

    def take_away(self, path: Path, mode: int) -> None:
        """Give it to another user."""
        path.chmod(mode)
        if self._is_root:
            os.chown(path, OTHER_UID, OTHER_UID)

    def refusal(self, **settings: str) -> str:
        """Start the server as the user, in its own folder unless `settings` differ; returns the error."""
        environment = {"DATA_DIR": str(self.own), "BENTOML_HOME": str(self.own / "bentoml"), **settings}
        ended = refused_start(self.own, environment, under=AS_IMAGE if self._is_root else ())
        return sentence_of(ended, "cannot start: ")


def can_run(*under: str) -> bool:
    """Whether this command can run another command here."""
    return bool(shutil.which(under[0])) and subprocess.run([*under, "true"], check=False).returncode == 0


@pytest.fixture
def volumes(tmp_path: Path) -> Iterator[Volumes]:
    """The folders, below the test's folder."""
    if os.geteuid() == 0 and not can_run(*AS_IMAGE):
        pytest.skip("no user namespaces here: root can write everywhere")
    made = Volumes(tmp_path)
    yield made
    for each in (made.foreign, made.closed):
        each.chmod(0o700)


def test_volume_of_another_user_is_refused(volumes: Volumes) -> None:
    """If the image's user cannot write DATA_DIR, the error has the folder, the user id and the command."""
    assert volumes.refusal(DATA_DIR=str(volumes.foreign)) == (
        f"DATA_DIR: {volumes.foreign} cannot be written (Permission denied): this server runs as uid "
        f"{volumes.uid}, so run `chown {volumes.uid} {volumes.foreign}` as root, or name another folder"
    )
    assert list(volumes.foreign.iterdir()) == []


def test_volume_that_cannot_be_created_is_refused(volumes: Volumes) -> None:
    """A missing DATA_DIR in another user's folder is refused."""
    data = volumes.foreign / "data"
    message = volumes.refusal(DATA_DIR=str(data))
    assert message.startswith(f"DATA_DIR: {data} cannot be written (Permission denied): ")
    assert f"`mkdir -p {data} && chown {volumes.uid} {data}`" in message


def test_folder_for_the_weights_is_refused(volumes: Volumes) -> None:
    """A folder that this user cannot write is refused before the weights are downloaded to it."""
    target = volumes.foreign / "sam3.pt"
    assert volumes.refusal(SAM3_WEIGHTS_PATH=str(target), HF_TOKEN="hf_0123456789abcdef") == (
        f"SAM3_WEIGHTS_PATH: {volumes.foreign} cannot be written (Permission denied): this server runs as "
        f"uid {volumes.uid}, so run `chown {volumes.uid} {volumes.foreign}` as root, or name another folder"
    )


@pytest.mark.parametrize("variable", ["SAM3_WEIGHTS_PATH", "ENV_FILE"])
def test_closed_folder_is_refused(volumes: Volumes, variable: str) -> None:
    """A file in a folder that this user cannot enter is reported as unreadable, not as missing."""
    message = volumes.refusal(**{variable: str(volumes.closed / "file")})
    assert message.startswith(variable)
    assert f"{volumes.closed / 'file'} cannot be read (Permission denied)" in message


def test_files_of_another_user_are_refused(volumes: Volumes) -> None:
    """For a volume with another user's files the error has one command that changes their owner."""
    lock = volumes.own / "server.lock"
    lock.touch()
    volumes.take_away(lock, 0o444)
    message = volumes.refusal()
    assert message.startswith(f"DATA_DIR: {lock} cannot be written (Permission denied): ")
    assert f"`chown -R {volumes.uid} {volumes.own}`" in message


@pytest.mark.parametrize(
    ("mount", "reason", "mend"),
    [
        (
            'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"',
            "Read-only file system",
            "mount it writable",
        ),
        (
            'mount -t tmpfs -o size=64k tmpfs "$0" && (cat /dev/zero >"$0"/filler; true) 2>/dev/null',
            "No space left on device",
            "free some space there",
        ),
    ],
    ids=["read-only", "full"],
)
def test_volume_without_room_is_refused(tmp_path: Path, mount: str, reason: str, mend: str) -> None:
    """The error for a read-only mount, or a full disk, proposes no change of owner."""
    mount += ' && exec "$@"'
    under = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path))
    if not can_run(*under):
        pytest.skip("nothing can be mounted here")
    with tempfile.TemporaryDirectory() as home:
        refusal = refused_start(tmp_path, {"BENTOML_HOME": home}, under=under)
    sentence = sentence_of(refusal, "cannot start: ")
    assert sentence.startswith(f"DATA_DIR: {tmp_path}")
    assert sentence.endswith(f" cannot be written ({reason}): {mend}, or name another folder")


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="there is an NVIDIA driver")
def test_missing_driver_is_refused(tmp_path: Path) -> None:
    """The CUDA image in a container without a GPU is refused."""
    refusal = refused_start(tmp_path, {"SAM3_DEVICE": "cuda", **torch_built_for(tmp_path, "13.0")})
    message = sentence_of(refusal, "cannot start: SAM3_DEVICE=cuda: ")
    assert message.startswith("there is no NVIDIA driver here (libcuda.so.1): ")
    assert message.endswith("--gpus all), or set SAM3_DEVICE=cpu")


def test_old_driver_is_refused(tmp_path: Path) -> None:
    """The CUDA 13 image on a host with an older driver is refused before any process is started."""
    changes = fake_driver(tmp_path, 12040) | torch_built_for(tmp_path, "13.0")
    refusal = refused_start(tmp_path, {"SAM3_DEVICE": "cuda", **changes})
    message = sentence_of(refusal, "cannot start: SAM3_DEVICE=cuda: ")
    assert "needs NVIDIA driver 580 or newer; this host's driver supports CUDA 12.4: " in message
    assert "initialized" not in refusal.output


def test_driver_without_a_gpu_is_refused(tmp_path: Path) -> None:
    """A container with the driver's files but without a device is refused."""
    changes = fake_driver(tmp_path, 13000, NO_DEVICE) | torch_built_for(tmp_path, "13.0")
    refusal = refused_start(tmp_path, {"SAM3_DEVICE": "cuda", **changes})
    message = sentence_of(refusal, "cannot start: SAM3_DEVICE=cuda: ")
    assert message.startswith("NVIDIA's driver shows no GPU here (cuInit: CUDA_ERROR_NO_DEVICE): ")


def test_driver_of_another_version_is_refused(tmp_path: Path) -> None:
    """After an upgrade of the host's driver the start is refused, and BentoML's use of NVML does not fail."""
    changes = fake_driver(tmp_path, 13000, MISMATCH) | fake_nvml(tmp_path, NVML_MISMATCH)
    changes |= torch_built_for(tmp_path, "13.0")
    refusal = refused_start(tmp_path, {"SAM3_DEVICE": "cuda", **changes})
    message = sentence_of(refusal, "cannot start: SAM3_DEVICE=cuda: ")
    assert message.startswith("NVIDIA's driver shows no GPU here (cuInit: error 803): look at nvidia-smi")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_cpu_build_of_torch_is_refused(tmp_path: Path) -> None:
    """SAM3_DEVICE=cuda is refused by PyTorch's CPU build, instead of using the CPU."""
    message = sentence_of(
        refused_start(tmp_path, {"SAM3_DEVICE": "cuda"}), "cannot start: SAM3_DEVICE=cuda: "
    )
    assert message.startswith("PyTorch here is built without CUDA: ")


def log_of_a_start(data_dir: Path, changes: dict[str, str]) -> str:
    """The log of a start that ends because its port is in use."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        refusal = refused_start(data_dir, changes, "--port", str(other.getsockname()[1]))
    assert "cannot start: port" in refusal.output
    return refusal.output


def test_fallback_to_the_cpu_is_logged(tmp_path: Path) -> None:
    """Without SAM3_DEVICE an unusable GPU is not an error; the log has the reason."""
    log = log_of_a_start(tmp_path, fake_driver(tmp_path, 12040) | torch_built_for(tmp_path, "13.0"))
    assert "the model runs on the CPU: PyTorch here is built for CUDA 13.0, which needs" in log


@pytest.mark.parametrize(("device", "gpus"), [({"SAM3_DEVICE": "cuda"}, 2), ({}, 2), ({}, 1)])
def test_more_runners_than_gpus_are_refused(tmp_path: Path, device: dict[str, str], gpus: int) -> None:
    """Each runner needs a GPU of its own; the error has the number of GPUs, whatever the host has."""
    driver = fake_driver(tmp_path, 13000, gpus=gpus) | torch_built_for(tmp_path, "13.0")
    refusal = refused_start(tmp_path, driver | device | {"GPUS": "3"})
    assert sentence_of(refusal, "cannot start: ") == (
        f"GPUS=3, but the number of GPUs that this server may use is {gpus}: set GPUS=auto, or give it more "
        "(--gpus all, CUDA_VISIBLE_DEVICES)"
    )
    assert "initialized" not in refusal.output


@pytest.mark.parametrize(
    ("settings", "runners"),
    [({}, 2), ({"GPUS": "1"}, 1), ({"SAM3_DEVICE": "cpu"}, 1), ({"SAM3_DEVICE": "cpu", "GPUS": "3"}, 3)],
)
def test_there_is_a_runner_for_each_gpu(tmp_path: Path, settings: dict[str, str], runners: int) -> None:
    """By default one for each GPU, and one on the CPU; on the CPU any number may be asked for."""
    driver = fake_driver(tmp_path, 13000, gpus=2) | torch_built_for(tmp_path, "13.0")
    log = log_of_a_start(tmp_path, driver | settings)
    assert f", runners: {runners}\n" in log


def test_runners_share_the_cpu(tmp_path: Path) -> None:
    """The cores are divided among the runners, each of which has a thread at least."""
    log = log_of_a_start(tmp_path, {"GPUS": "2"})
    assert f"threads of the model: {max(1, cpu_share().threads // 2)}, runners: 2" in log


def test_share_of_the_cpu_is_logged(tmp_path: Path) -> None:
    """A quota limits the model's threads, rounded up; SAM3_CPU_THREADS overrides it."""
    cores = os.cpu_count()
    with cpu_quota(0.75):
        log = log_of_a_start(tmp_path, {})
    assert f"CPU: 0.75 of {cores} cores, threads of the model: 1" in log
    log = log_of_a_start(tmp_path, {"SAM3_CPU_THREADS": "7"})
    assert f" of {cores} cores, threads of the model: 7" in log


def test_limits_of_threads_and_arenas_are_set_in_every_process(server: LocalServer) -> None:
    """Else OpenMP and numpy's BLAS start a thread a core of the host, and glibc keeps freed memory."""
    children = psutil.Process(server.pid).children()
    assert len(children) >= 3
    # One thread: the shared server's SAM3_CPU_THREADS.
    for name, value in {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}.items():
        expected = os.environ.get(name, value)
        assert {child.environ().get(name) for child in children} == {expected}


def test_server_works_without_its_kernels_and_its_collector(tmp_path: Path) -> None:
    """Without a folder of kernels, which one warning names, or a collector of traces, a task is done.

    The stop is clean too.
    """
    (tmp_path / "kernels").write_text("a file")
    settings = {"SAM3_KERNEL_CACHE": str(tmp_path / "kernels"), "API_WORKERS": "1", "SAM3_CPU_THREADS": "1"}
    with reserved_ports(1) as [closed]:
        collector = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{closed}"} | SOON
        with local_server(tmp_path / "data", settings | collector) as server, Edge(server) as edge:
            answer = edge.answer(png_bytes(scene(100).image), "circle")
            assert edge.settled_row(answer["task_id"]).status == "done"
    log = server.log_path.read_text()
    assert "Traceback" not in log
    warnings = [line for line in log.splitlines() if "SAM3_KERNEL_CACHE" in line]
    assert len(warnings) == 1
    assert f"{tmp_path / 'kernels'} cannot be used (File exists)" in warnings[0]


def test_kernels_are_kept_in_the_data_folder(server: LocalServer) -> None:
    """Without SAM3_KERNEL_CACHE, Triton's folder is in DATA_DIR, which outlives a container."""
    assert (server.data_dir / "kernels").is_dir()
