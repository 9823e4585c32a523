"""Build the server's image: the Bento, the wheels of its packages, and the image from both.

    make image                                   # CUDA 13.0, on python:3.12-slim
    make image VARIANT=cpu
    make image VARIANT=cpu BASE_IMAGE=localhost/base PYTHON_VERSION=3.11

This machine's pip downloads the wheels, with its own index and certificates, to build/image/. The build of
the image itself needs the network only for its base.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

from deploy.image.variants import PYTHON_VERSIONS, VARIANTS, Variant, entries
from version import VERSION

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "image"
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"),
)
"""Accepted platforms of wheels: glibc 2.28 (as PyTorch's) and older."""


def main() -> None:
    """Build the image that the command line names. Exits with a message and status 1 if a step fails."""
    options = _options()
    variant = VARIANTS[options.variant]
    if not variant.lock.exists():
        sys.exit(f"no image: {variant.lock.name} is missing: run python -m deploy.image.lock {variant.name}")
    tool = find_tool()
    context = context_of(variant, options.python)
    tag = options.tag or f"localhost/sam3:{VERSION}-{variant.name}"
    try:
        print(f"== 1/3 the Bento, from {revision()}", flush=True)
        copy_bento(build_bento(), context)
        print(f"== 2/3 its packages, {variant.lock.name}", flush=True)
        download_wheels(variant, options.python, context)
        print(f"== 3/3 {tag}, with {tool}", flush=True)
        build_image(tool, variant, context, tag, options.base)
        # Fails if the image does not exist, even if the build ended with status 0.
        print(describe(tool, tag))
    except subprocess.CalledProcessError as error:
        sys.exit(f"no image: {' '.join(map(str, error.cmd[:4]))} ... ended with {error.returncode}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the server's image.")
    parser.add_argument(
        "--variant", choices=VARIANTS, default="cu130", help="PyTorch's build (default: cu130)"
    )
    parser.add_argument(
        "--python", choices=PYTHON_VERSIONS, default=PYTHON_VERSIONS[0], help="the base's version of Python"
    )
    parser.add_argument("--base", help="an image with that Python, instead of the pinned python:3.12-slim")
    parser.add_argument("--tag", help="the image's name (default: localhost/sam3:VERSION-VARIANT)")
    return parser.parse_args()


def context_of(variant: Variant, python: str) -> Path:
    """The build context of the Dockerfile."""
    return WORK / f"{variant.name}-py{python}"


def find_tool() -> str:
    """Return podman or docker, whichever is installed; CONTAINER_TOOL overrides it with a compatible tool."""
    chosen = os.environ.get("CONTAINER_TOOL")
    for tool in [chosen] if chosen else ["podman", "docker"]:
        if shutil.which(tool):
            return tool
    sys.exit(f"no image: {chosen or 'podman or docker'} is not installed: install it to build one")


def revision() -> str:
    """The commit, with -dirty if the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return described.stdout.strip()


def build_bento() -> Path:
    """Build the Bento in a separate store; returns its folder."""
    home = WORK / "bentoml"
    name = f"{VERSION}-{revision()}"
    folder = home / "bentos" / "sam3" / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "bentoml", "build", "--version", name, "--output", "tag"],
        cwd=ROOT,
        env={**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"},
        check=True,
    )
    return folder


def copy_bento(bento: Path, context: Path) -> None:
    """Copy the Bento to the build context; replaces an older one."""
    shutil.rmtree(context / "bento", ignore_errors=True)
    shutil.copytree(bento, context / "bento")


def download_wheels(variant: Variant, python: str, context: Path) -> None:
    """Download missing wheels of the variant's lock to the context, and check their hashes."""
    lock, listed = variant.lock.read_text(), context / "requirements.txt"
    if listed.exists() and listed.read_text() == lock:
        return
    context.mkdir(parents=True, exist_ok=True)
    listed.unlink(missing_ok=True)
    torch = "".join(entry for entry in entries(lock) if entry.startswith("torch=="))
    # torch separately, because PyTorch's index has old versions of other packages too.
    _download(lock.replace(torch, ""), None, python, context)
    _download(torch, variant.torch_index, python, context)
    listed.write_text(lock)


def _download(lock: str, index: str | None, python: str, context: Path) -> None:
    with NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write(lock)
        listed.flush()
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
                *("--require-hashes", "--no-deps", "--only-binary", ":all:", "--python-version", python),
                *(word for platform in PLATFORMS for word in ("--platform", platform)),
                *(("--index-url", index, "--retries", "1") if index else ()),
                *("--dest", str(context / "wheels"), "--requirement", listed.name),
            ],
            # The lock fixes every version; constraints of this machine could only conflict with it.
            env=os.environ | {"PIP_CONSTRAINT": os.devnull},
            check=True,
        )


def build_image(tool: str, variant: Variant, context: Path, tag: str, base: str | None) -> None:
    """Build the image from the Dockerfile and the context."""
    labels = {
        "org.opencontainers.image.title": "sam3",
        "org.opencontainers.image.version": VERSION,
        "org.opencontainers.image.revision": revision(),
        "org.opencontainers.image.licenses": "Apache-2.0",
        "sam3.torch": torch_version(variant),
        "sam3.cuda": variant.cuda or "none",
    }
    subprocess.run(
        [
            *(tool, "build", "--file", str(HERE / "Dockerfile"), "--tag", tag),
            *("--build-arg", f"DEVICE={variant.device}"),
            *(("--build-arg", f"BASE_IMAGE={base}") if base else ()),
            *(word for label in labels.items() for word in ("--label", "=".join(label))),
            str(context),
        ],
        check=True,
    )


def torch_version(variant: Variant) -> str:
    """The version of PyTorch in the variant's lock."""
    [entry] = [entry for entry in entries(variant.lock.read_text()) if entry.startswith("torch==")]
    return entry.removeprefix("torch==").split()[0]


def describe(tool: str, tag: str) -> str:
    """The image's name and size, and where its use is described."""
    size_bytes = int(
        subprocess.run(
            [tool, "image", "inspect", "--format", "{{.Size}}", tag],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    return f"{tag}: {size_bytes / 1e9:.2f} GB; how to run it: docs/operations.md"


if __name__ == "__main__":
    main()
