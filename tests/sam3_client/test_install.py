"""`pip install ./sam3_client` makes a package that needs nothing but what it declares."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement

from sam3_client.version import VERSION

if TYPE_CHECKING:
    from commands.local_server import LocalServer

PACKAGE = Path(__file__).parents[2] / "sam3_client"
USE = """
import sys
from sam3_client import AsyncClient, Client, __version__
result = Client(sys.argv[1], sys.argv[2]).segment(sys.argv[3], "triangles")
result.overlay()
print(__version__, len(result.instances), result.masks.shape)
assert not {"torch", "pydantic", "bentoml"} & sys.modules.keys()
try:
    result.to_supervision()
except ImportError as error:
    print(error)
"""


def declared(name: str) -> set[str]:
    """A distribution and all that it needs in turn, without extras."""
    found = {name}
    for text in distribution(name).requires or ():
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            found |= declared(need.name)
    return found


@pytest.mark.server
def test_installed_package(server: LocalServer, tmp_path: Path) -> None:
    """In an environment that holds only its dependencies it segments a picture, and knows its extras."""
    source, python = tmp_path / "source", tmp_path / "env" / "bin" / "python"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    alone = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    subprocess.run([*pip, *alone, "--prefix", str(tmp_path / "env"), str(source)], check=True)
    [folder] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for needed in ("httpx", "pillow", "numpy"):
        for name in declared(needed):
            _link(name, folder)
    sample = PACKAGE.parent / "examples" / "sample.jpg"
    command = [str(python), "-I", "-c", USE, server.url, server.api_key, str(sample)]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert printed.startswith(f"{VERSION} 4 (4, 720, 1280)")
    assert [each.name for each in folder.glob("sam3_client-*")] == [f"sam3_client-{VERSION}.dist-info"]
    assert 'pip install "sam3-client[supervision]"' in printed


def _link(name: str, folder: Path) -> None:
    """Link the files of a distribution that is installed here into another environment."""
    for file in distribution(name).files or ():
        top = file.parts[0]
        if top != ".." and not (folder / top).exists():
            (folder / top).symlink_to(Path(str(distribution(name).locate_file(top))))
