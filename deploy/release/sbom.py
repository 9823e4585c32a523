"""The bill of materials (CycloneDX): Python packages, by what their wheels say of themselves.

cyclonedx-py describes an environment. It reads no more of it than the packages' .dist-info folders, so these
alone are laid into an empty one: those of the wheels that an image is built from, or those of the packages
here that a lock names. So CUDA need not be installed, and what is installed beside the lock is left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile

from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version
from pip_requirements_parser import RequirementsFile

from deploy.release.refusals import NoRelease

if TYPE_CHECKING:
    from collections.abc import Iterator

    from packaging.specifiers import SpecifierSet


def of_wheels(wheels: Path, lock: Path, root: Path, version: str, out: Path) -> None:
    """Write the bill of the wheels that a lock names.

    Args:
        wheels: the folder where they lie, maybe beside others.
        lock: requirements, each with its version.
        root: of the project; its pyproject.toml describes what the packages are for.
        version: of the project.
        out: the JSON file to write.

    Raises:
        NoRelease: a wheel is missing.
    """
    found = {parse_wheel_filename(wheel.name)[:2]: wheel for wheel in wheels.glob("*.whl")}
    with tempfile.TemporaryDirectory() as folder:
        packages = _empty_environment(Path(folder))
        for name, wanted in _packages_of(lock):
            [exact] = wanted
            wheel = found.get((canonicalize_name(name), Version(exact.version)))
            if wheel is None:
                raise NoRelease(f"there is no wheel of {name}{wanted} in {wheels}: run make image again")
            with ZipFile(wheel) as archive:
                about = [file for file in archive.namelist() if file.partition("/")[0].endswith(".dist-info")]
                archive.extractall(packages, about)
        _describe(Path(folder), root, version, out, validate=True)


def of_installed(lock: Path, root: Path, version: str, out: Path) -> None:
    """Write the bill of a lock's packages, as they are installed in the environment that runs this.

    It is not held to the schema, which takes long; for reading its licences.

    Args:
        lock: requirements, each with its version.
        root: of the project, as in `of_wheels`.
        version: of the project.
        out: the JSON file to write.

    Raises:
        NoRelease: a package is missing, or there in another version.
    """
    with tempfile.TemporaryDirectory() as folder:
        packages = _empty_environment(Path(folder))
        for name, wanted in _packages_of(lock):
            about = _about(name, wanted, lock)
            shutil.copytree(about, packages / about.name)
        _describe(Path(folder), root, version, out, validate=False)


def _packages_of(lock: Path) -> Iterator[tuple[str, SpecifierSet]]:
    """Names and versions of what a lock asks for on this platform."""
    if not lock.is_file():
        raise NoRelease(f"{lock} is missing: make image writes it")
    for requirement in RequirementsFile.from_file(str(lock)).requirements:
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement.name, requirement.specifier


def _about(name: str, wanted: SpecifierSet, lock: Path) -> Path:
    """The .dist-info folder of an installed package."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        raise NoRelease(f"{lock.name} names {name}, which is not installed: install the lock") from None
    if not wanted.contains(package.version, prereleases=True):
        raise NoRelease(
            f"{lock.name} names {name}{wanted}, but {package.version} is installed: install the lock"
        )
    [metadata] = [file for file in package.files or [] if file.match("*.dist-info/METADATA")]
    return Path(str(metadata.locate())).parent


def _empty_environment(folder: Path) -> Path:
    """Make an environment without packages. Returns the folder for them."""
    venv.create(folder / "environment", with_pip=False)
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "environment")}))


def _describe(folder: Path, root: Path, version: str, out: Path, *, validate: bool) -> None:
    """Let cyclonedx-py write the bill, and hold it to CycloneDX's own schema if asked to."""
    project = folder / "pyproject.toml"
    project.write_text(_with_version((root / project.name).read_text("utf-8"), version), "utf-8")
    subprocess.run(
        [
            *(sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"),
            "--validate" if validate else "--no-validate",
            *("--pyproject", str(project), "--output-file", str(out), str(folder / "environment")),
        ],
        # It would add its folders to the environment's.
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=True,
    )


def _with_version(pyproject: str, version: str) -> str:
    """cyclonedx-py reads no version that is dynamic."""
    fixed = pyproject.replace('dynamic = ["version"]', f'version = "{version}"')
    assert fixed != pyproject
    return fixed
