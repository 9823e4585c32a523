"""The server's image, really built, and containers of it, where neither Docker nor a registry can be reached.

The base comes from debootstrap, podman builds in chroot isolation, and bubblewrap runs: the image's own root
(read-only), user, environment and entrypoint, own process ids, an empty /tmp, the folders /data and /weights.
The network is the host's, on loopback.
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
"""Of Debian 12, and so of the base."""
BUILD_TIMEOUT_S = 1200.0
STOP_TIMEOUT_S = 60.0
_TOOLS = ("podman", "debootstrap", "bwrap", "setpriv")


def missing_tools() -> str | None:
    """What this machine lacks to build and run the image."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} (apt-get install podman buildah debootstrap bubblewrap)"
    return None if os.geteuid() == 0 else "not root: the image is built without a container engine"


def missing_wheels() -> str | None:
    """Download what the image installs; what cannot be had."""
    variant = VARIANTS["cpu"]
    try:
        download_wheels(variant, PYTHON, context_of(variant, PYTHON))
    except subprocess.CalledProcessError:
        return (
            f"not every wheel of {variant.lock.name} can be had here: PyTorch's are at {variant.torch_index}"
        )
    return None


@dataclass(frozen=True, slots=True)
class Image:
    """An image that was built.

    Attributes:
        tag: its name.
        root: its file system, mounted.
        config: what it says of itself: Env, User, Entrypoint, Labels.
        size_bytes: unpacked.
        environment: podman's, for the store that holds it.
    """

    tag: str
    root: Path
    config: dict[str, Any]
    size_bytes: int
    environment: Mapping[str, str]


@contextmanager
def built_image(folder: Path) -> Iterator[Image]:
    """The CPU variant of this tree, built by `make image` into a store of its own below `folder`."""
    environment = os.environ | {
        "CONTAINERS_STORAGE_CONF": str(_write_store(folder)),
        # No user namespaces, no cgroups: a chroot is what every machine has.
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
        # podman binds its folder onto itself, which would stay mounted.
        subprocess.run(["umount", str(folder / "store" / "overlay")], stderr=subprocess.DEVNULL, check=False)


def image_for_vast(image: Image, folder: Path) -> Image:
    """deploy/vast/Dockerfile over `image`, in its store; a script in the place of cloudflared's image.

    Args:
        image: is left as it is.
        folder: for what the build needs.
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
    """A container that was started.

    Attributes:
        server: how to reach it; `server.pid` is its process 1, seen from outside.
        monitor: the process that waits for it, and ends with its exit status.
    """

    server: LocalServer
    monitor: subprocess.Popen[bytes]

    def log(self) -> str:
        """What it has written."""
        return self.server.log_path.read_text(errors="replace")

    def stop(self) -> int:
        """Ask it to end, as `docker stop` does. Returns its exit status."""
        if self.monitor.poll() is None:
            os.kill(self.server.pid, signal.SIGTERM)
        return self.monitor.wait(STOP_TIMEOUT_S)


@contextmanager
def container(
    image: Image, folder: Path, changes: Mapping[str, str | None], *, ready: bool = True
) -> Iterator[Container]:
    """Run the image until the end of the block, on the demo checkpoint and embedded stores in `folder`/data.

    Args:
        image: to be run.
        folder: gets data/, weights/ and the log; data/ and weights/ are made, the image's user's, if missing.
        changes: to the environment that it is given; None removes.
        ready: wait until it is; else only until its first process runs.
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
    """The command line of bubblewrap for the image, as its configuration says."""
    environment = dict(entry.split("=", 1) for entry in image.config["Env"]) | dict(given)
    return [
        *("bwrap", "--ro-bind", str(image.root), "/", "--proc", "/proc", "--dev", "/dev"),
        *("--perms", "1777", "--tmpfs", "/tmp", "--perms", "1777", "--tmpfs", "/dev/shm"),  # noqa: S108
        *("--bind", str(folder / "data"), "/data", "--bind", str(folder / "weights"), "/weights"),
        *("--ro-bind", "/etc/hosts", "/etc/hosts", "--ro-bind", "/etc/resolv.conf", "/etc/resolv.conf"),
        *("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1", "--die-with-parent"),
        *("--new-session", "--clearenv", "--chdir", image.config["WorkingDir"]),
        *(word for item in environment.items() for word in ("--setenv", *item)),
        # bubblewrap cannot change the user without a namespace of users; the change clears its signal.
        *("setpriv", "--reuid", str(USER_ID), "--regid", str(USER_ID), "--clear-groups"),
        *("--pdeathsig", "KILL"),
        *("--no-new-privs", "--bounding-set=-all", *image.config["Entrypoint"]),
    ]


def _end(monitor: subprocess.Popen[bytes]) -> None:
    """Kill what still runs: with a container's process 1 all its processes end, and then its monitor."""
    for child in _children(monitor):
        child.kill()
    monitor.kill()
    monitor.wait()


def _first_process(monitor: subprocess.Popen[bytes]) -> int:
    """The container's process 1; the monitor's own id when it has ended already."""
    children = _children(monitor)
    return children[0].pid if children else monitor.pid


def _children(monitor: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(monitor.pid).children()
    except psutil.NoSuchProcess:
        return []
