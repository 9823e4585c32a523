"""Builds the server's image and runs containers of it, without Docker and without a registry.

The base comes from debootstrap, and podman builds in chroot isolation. bubblewrap runs the container with the
image's root (read-only), user, environment and entrypoint, a process namespace, an empty /tmp, and the
folders /data and /weights. It uses the host's network.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from commands.local_server import ROOT, LocalServer, reserved_ports, wait_until_ready
from deploy.image.build import context_of, download_wheels
from deploy.image.variants import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

API_KEY = "0123456789abcdef0123456789abcdef"
USER_ID = 1034
PYTHON = "3.11"
"""The version of Debian 12, which is the base."""
BUILD_TIMEOUT_S = 1200.0
STOP_TIMEOUT_S = 60.0
_TOOLS = ("podman", "debootstrap", "bwrap", "setpriv")


def missing_tools() -> str | None:
    """What is missing on this machine to build and run the image; None if nothing is."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} (apt-get install podman buildah debootstrap bubblewrap)"
    return None if os.geteuid() == 0 else "not root: the image is built without a container engine"


def missing_wheels() -> str | None:
    """Download the image's packages; returns why they are not available, or None."""
    variant = VARIANTS["cpu"]
    try:
        download_wheels(variant, PYTHON, context_of(variant, PYTHON))
    except subprocess.CalledProcessError:
        return f"wheels of {variant.lock.name} are not available: PyTorch's are at {variant.torch_index}"
    return None


@dataclass(frozen=True, slots=True)
class Image:
    """A built image.

    Attributes:
        tag: its name.
        root: its mounted file system.
        config: its configuration: Env, User, Entrypoint, Labels.
        size_bytes: of its unpacked files.
        environment: variables with which podman uses the image's store.
    """

    tag: str
    root: Path
    config: dict[str, Any]
    size_bytes: int
    environment: Mapping[str, str]


@contextmanager
def built_image(folder: Path) -> Iterator[Image]:
    """Build the CPU variant of this tree with `make image`, in a new store below `folder`."""
    environment = os.environ | {
        "CONTAINERS_STORAGE_CONF": str(_write_store(folder)),
        # chroot works on every machine, without user namespaces and cgroups.
        "BUILDAH_ISOLATION": "chroot",
        "CONTAINER_TOOL": "podman",
    }
    base, tag = f"localhost/base:{PYTHON}", "localhost/sam3:test"
    make = f"make image VARIANT=cpu PYTHON_VERSION={PYTHON} BASE_IMAGE={base} TAG={tag}"
    try:
        _run(["deploy/image/local_base.sh", base], environment)
        _run([*make.split(), f"PYTHON={sys.executable}"], environment)
        yield _mounted(tag, environment)
    finally:
        _run(["podman", "image", "umount", "--all", "--force"], environment)
        # podman leaves this bind mount.
        subprocess.run(["umount", str(folder / "store" / "overlay")], stderr=subprocess.DEVNULL, check=False)


def image_for_vast(image: Image, folder: Path) -> Image:
    """Build deploy/vast/Dockerfile on `image`, in its store; a script replaces cloudflared.

    Args:
        image: the base; it is not changed.
        folder: for the build's files.
    """
    program = folder / "cloudflared"
    program.write_text('#!/bin/sh\necho "cloudflared $* with $TUNNEL_TOKEN"\nexec sleep 300\n')
    program.chmod(0o755)
    with tarfile.open(folder / "cloudflared.tar", "w") as files:
        files.add(program, "usr/local/bin/cloudflared")
    cloudflared, tag = "localhost/cloudflared:stand-in", "localhost/sam3-vast:test"
    _run(["podman", "import", str(folder / "cloudflared.tar"), cloudflared], image.environment)
    arguments = [f"--build-arg=SAM3_IMAGE={image.tag}", f"--build-arg=CLOUDFLARED_IMAGE={cloudflared}"]
    _run(["podman", "build", "deploy/vast", "--tag", tag, *arguments], image.environment)
    return _mounted(tag, image.environment)


def _mounted(tag: str, environment: Mapping[str, str]) -> Image:
    [inspected] = json.loads(_run(["podman", "image", "inspect", tag], environment))
    root = Path(_run(["podman", "image", "mount", tag], environment).strip())
    return Image(tag, root, inspected["Config"], inspected["Size"], environment)


def _write_store(folder: Path) -> Path:
    config = folder / "storage.conf"
    config.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n'
    )
    return config


def _run(command: list[str], environment: Mapping[str, str]) -> str:
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-3000:]}\n{ended.stderr[-6000:]}"
    return ended.stdout


@dataclass(frozen=True, slots=True)
class Container:
    """A started container.

    Attributes:
        server: its server; `server.pid` is the host's pid of the container's process 1.
        monitor: the process that waits for the container, and ends with its exit status.
    """

    server: LocalServer
    monitor: subprocess.Popen[bytes]

    def log(self) -> str:
        """Its output so far."""
        return self.server.log_path.read_text(errors="replace")

    def stop(self) -> int:
        """Send SIGTERM like `docker stop`, and wait; returns the exit status."""
        if self.monitor.poll() is None:
            os.kill(self.server.pid, signal.SIGTERM)
        return self.monitor.wait(STOP_TIMEOUT_S)


@contextmanager
def container(
    image: Image, folder: Path, changes: Mapping[str, str | None], *, ready: bool = True
) -> Iterator[Container]:
    """Run the image until the end of the block: the demo checkpoint, embedded stores in `folder`/data.

    Args:
        image: the image to run.
        folder: for data/, weights/ and the log; missing folders are created for the image's user.
        changes: to the container's environment; None removes a variable.
        ready: True: wait until the server is ready. False: only until the first process runs.
    """
    for name in ("data", "weights"):
        if not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            os.chown(folder / name, USER_ID, USER_ID)
    log_path, started_s = folder / "container.log", time.monotonic()
    with reserved_ports(1) as [port], log_path.open("ab") as log:
        given = {
            "SAM3_WEIGHTS_PATH": "demo",
            "EMBEDDED_PARTS": "storage,results",
            "API_SECRET_KEY": API_KEY,
            "BENTOML_HOST": "127.0.0.1",
            "PORT": str(port),
            **changes,
        }
        url = f"http://127.0.0.1:{port}"
        monitor = subprocess.Popen(
            run_command(image, folder, {name: value for name, value in given.items() if value is not None}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            if ready:
                wait_until_ready(monitor, url, log_path)
            ready_s = time.monotonic() - started_s
            pid = _first_process(monitor)
            yield Container(LocalServer(url, API_KEY, folder / "data", log_path, pid, ready_s), monitor)
        finally:
            _end(monitor)


def run_command(image: Image, folder: Path, given: Mapping[str, str]) -> list[str]:
    """The command line of bubblewrap, from the image's configuration."""
    environment = dict(entry.split("=", 1) for entry in image.config["Env"]) | dict(given)
    return [
        *("bwrap", "--ro-bind", str(image.root), "/", "--proc", "/proc", "--dev", "/dev"),
        *("--perms", "1777", "--tmpfs", "/tmp", "--perms", "1777", "--tmpfs", "/dev/shm"),  # noqa: S108
        *("--bind", str(folder / "data"), "/data", "--bind", str(folder / "weights"), "/weights"),
        *("--ro-bind", "/etc/hosts", "/etc/hosts", "--ro-bind", "/etc/resolv.conf", "/etc/resolv.conf"),
        *("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1", "--die-with-parent"),
        *("--new-session", "--clearenv", "--chdir", image.config["WorkingDir"]),
        *(word for item in environment.items() for word in ("--setenv", *item)),
        # bubblewrap cannot change the user without a user namespace; changing it clears the death signal.
        *("setpriv", "--reuid", str(USER_ID), "--regid", str(USER_ID), "--clear-groups"),
        *("--pdeathsig", "KILL"),
        *("--no-new-privs", "--bounding-set=-all", *image.config["Entrypoint"]),
    ]


def _end(monitor: subprocess.Popen[bytes]) -> None:
    """Kill process 1, which ends all of the container's processes, and then the monitor."""
    for child in _children(monitor):
        child.kill()
    monitor.kill()
    monitor.wait()


def _first_process(monitor: subprocess.Popen[bytes]) -> int:
    """The pid of the container's process 1; the monitor's own pid if that has ended."""
    children = _children(monitor)
    return children[0].pid if children else monitor.pid


def _children(monitor: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(monitor.pid).children()
    except psutil.NoSuchProcess:
        return []
