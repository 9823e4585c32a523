"""What the start makes of its host or container: the user, the volumes, the GPU, the share of the CPU."""

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

from tests.cgroups import cpu_quota
from tests.driver import MISMATCH, NO_DEVICE, NVML_MISMATCH, fake_driver, fake_nvml, torch_built_for
from tests.server_processes import refused_start, sentence_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from commands.local_server import LocalServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="containers are Linux's"),
]

IMAGE_UID, OTHER_UID = 1034, 65534
AS_IMAGE = ("unshare", "--user", f"--map-user={IMAGE_UID}", f"--map-group={IMAGE_UID}")
"""Runs a command as the user of an image that BentoML makes, who owns what root owns, and no more."""


class Volumes:
    """Folders as the server's user meets them.

    Attributes:
        own: the user's.
        foreign: another user's, to be read.
        closed: another user's, not to be entered.
        uid: of the server's user: the image's where root runs the tests, else the one who does.
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
        """How the user's start is refused; it has a folder of its own but for `settings`."""
        environment = {"DATA_DIR": str(self.own), "BENTOML_HOME": str(self.own / "bentoml"), **settings}
        ended = refused_start(self.own, environment, under=AS_IMAGE if self._is_root else ())
        return sentence_of(ended, "cannot start: ")


def can_run(*under: str) -> bool:
    """Whether such a command can run another here."""
    return bool(shutil.which(under[0])) and subprocess.run([*under, "true"], check=False).returncode == 0


@pytest.fixture
def volumes(tmp_path: Path) -> Iterator[Volumes]:
    """Below the test's folder."""
    if os.geteuid() == 0 and not can_run(*AS_IMAGE):
        pytest.skip("no user namespaces here: root may write everywhere")
    made = Volumes(tmp_path)
    yield made
    for each in (made.foreign, made.closed):
        each.chmod(0o700)


def test_volume_of_another_user_is_refused(volumes: Volumes) -> None:
    """A DATA_DIR that the image's user cannot write: the folder, the user's number and the command."""
    assert volumes.refusal(DATA_DIR=str(volumes.foreign)) == (
        f"DATA_DIR: {volumes.foreign} cannot be written (Permission denied): this server runs as uid "
        f"{volumes.uid}, so run `chown {volumes.uid} {volumes.foreign}` as root, or name another folder"
    )
    assert list(volumes.foreign.iterdir()) == []


def test_volume_that_cannot_be_made_is_refused(volumes: Volumes) -> None:
    """A missing DATA_DIR in a folder of root's."""
    data = volumes.foreign / "data"
    said = volumes.refusal(DATA_DIR=str(data))
    assert said.startswith(f"DATA_DIR: {data} cannot be written (Permission denied): ")
    assert f"`mkdir -p {data} && chown {volumes.uid} {data}`" in said


def test_folder_for_the_weights_is_refused(volumes: Volumes) -> None:
    """Weights to be downloaded to where this user cannot write are refused before the hub is asked."""
    target = volumes.foreign / "sam3.pt"
    assert volumes.refusal(SAM3_WEIGHTS_PATH=str(target), HF_TOKEN="hf_0123456789abcdef") == (
        f"SAM3_WEIGHTS_PATH: {volumes.foreign} cannot be written (Permission denied): this server runs as "
        f"uid {volumes.uid}, so run `chown {volumes.uid} {volumes.foreign}` as root, or name another folder"
    )


@pytest.mark.parametrize("variable", ["SAM3_WEIGHTS_PATH", "ENV_FILE"])
def test_closed_folder_is_refused(volumes: Volumes, variable: str) -> None:
    """A file in a folder that this user may not enter is not taken for a missing one."""
    said = volumes.refusal(**{variable: str(volumes.closed / "file")})
    assert said.startswith(variable)
    assert f"{volumes.closed / 'file'} cannot be read (Permission denied)" in said


def test_files_of_another_user_are_refused(volumes: Volumes) -> None:
    """A volume from which another user has served before: one command gives all of it to this one."""
    lock = volumes.own / "server.lock"
    lock.touch()
    volumes.take_away(lock, 0o444)
    said = volumes.refusal()
    assert said.startswith(f"DATA_DIR: {lock} cannot be written (Permission denied): ")
    assert f"`chown -R {volumes.uid} {volumes.own}`" in said


def test_read_only_volume_is_refused(tmp_path: Path) -> None:
    """A volume that is mounted for reading is not mended by an owner."""
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    under = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path))
    if not can_run(*under):
        pytest.skip("nothing can be mounted here")
    with tempfile.TemporaryDirectory() as home:
        refusal = refused_start(tmp_path, {"BENTOML_HOME": home}, under=under)
    assert sentence_of(refusal, "cannot start: ") == (
        f"DATA_DIR: {tmp_path} cannot be written (Read-only file system): mount it writable, or name another "
        "folder"
    )


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="there is an NVIDIA driver")
def test_missing_driver_is_refused(tmp_path: Path) -> None:
    """The image's CUDA variant in a container without a GPU."""
    refusal = refused_start(tmp_path, {"SAM3_DEVICE": "cuda", **torch_built_for(tmp_path, "13.0")})
    said = sentence_of(refusal, "cannot start: SAM3_DEVICE=cuda: ")
    assert said.startswith("there is no NVIDIA driver here (libcuda.so.1): ")
    assert said.endswith("--gpus all), or set SAM3_DEVICE=cpu")


def test_old_driver_is_refused(tmp_path: Path) -> None:
    """The image of CUDA 13 on a host whose driver is too old for it, before any process is started."""
    changes = fake_driver(tmp_path, 12040) | torch_built_for(tmp_path, "13.0")
    refusal = refused_start(tmp_path, {"SAM3_DEVICE": "cuda", **changes})
    said = sentence_of(refusal, "cannot start: SAM3_DEVICE=cuda: ")
    assert "needs NVIDIA driver 580 or newer; this host's driver supports CUDA 12.4: " in said
    assert "initialized" not in refusal.output


def test_driver_without_a_gpu_is_refused(tmp_path: Path) -> None:
    """A container with the driver's files and no device."""
    changes = fake_driver(tmp_path, 13000, NO_DEVICE) | torch_built_for(tmp_path, "13.0")
    refusal = refused_start(tmp_path, {"SAM3_DEVICE": "cuda", **changes})
    said = sentence_of(refusal, "cannot start: SAM3_DEVICE=cuda: ")
    assert said.startswith("NVIDIA's driver shows no GPU here (cuInit: CUDA_ERROR_NO_DEVICE): ")


def test_driver_of_another_version_is_refused(tmp_path: Path) -> None:
    """The host's driver was upgraded under the container: BentoML asks NVML before us, and may not fail."""
    changes = fake_driver(tmp_path, 13000, MISMATCH) | fake_nvml(tmp_path, NVML_MISMATCH)
    changes |= torch_built_for(tmp_path, "13.0")
    refusal = refused_start(tmp_path, {"SAM3_DEVICE": "cuda", **changes})
    said = sentence_of(refusal, "cannot start: SAM3_DEVICE=cuda: ")
    assert said.startswith("NVIDIA's driver shows no GPU here (cuInit: error 803): look at nvidia-smi")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_cpu_build_of_torch_is_refused(tmp_path: Path) -> None:
    """SAM3_DEVICE=cuda is not answered by a CPU in silence."""
    said = sentence_of(refused_start(tmp_path, {"SAM3_DEVICE": "cuda"}), "cannot start: SAM3_DEVICE=cuda: ")
    assert said.startswith("PyTorch here is built without CUDA: ")


def log_of_a_start(data_dir: Path, changes: dict[str, str]) -> str:
    """What a start says before it finds its port in use."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        refusal = refused_start(data_dir, changes, "--port", str(other.getsockname()[1]))
    assert "cannot start: port" in refusal.output
    return refusal.output


def test_cpu_in_the_place_of_a_gpu_is_logged(tmp_path: Path) -> None:
    """Where no device is asked for, a GPU that cannot be used is no fault; the log says why it is not."""
    log = log_of_a_start(tmp_path, fake_driver(tmp_path, 12040) | torch_built_for(tmp_path, "13.0"))
    assert "the model runs on the CPU: PyTorch here is built for CUDA 13.0, which needs" in log


def test_share_of_the_cpu_is_logged(tmp_path: Path) -> None:
    """A quota bounds the model's threads, rounded up; SAM3_CPU_THREADS has the last word."""
    cores = os.cpu_count()
    with cpu_quota(0.75):
        log = log_of_a_start(tmp_path, {})
    assert f"CPU: 0.75 of {cores} cores, threads of the model: 1" in log
    log = log_of_a_start(tmp_path, {"SAM3_CPU_THREADS": "7"})
    assert f" of {cores} cores, threads of the model: 7" in log


def test_processes_are_bound_to_the_share(server: LocalServer) -> None:
    """OpenMP and numpy's BLAS would start a thread for each core of the host in every process."""
    children = psutil.Process(server.pid).children()
    assert len(children) >= 3
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        # The shared server's SAM3_CPU_THREADS.
        expected = os.environ.get(name, "1")
        assert {child.environ().get(name) for child in children} == {expected}
