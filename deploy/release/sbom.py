"""The bill of materials (CycloneDX) of Python packages, from the metadata of their wheels.

cyclonedx-py describes an environment. It reads only the packages' .dist-info folders. So we copy these
folders to an empty environment: those of an image's wheels, or those of the installed packages that a lock
names. CUDA need not be installed, and installed packages that the lock does not name are left out.
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
    """Write the bill of materials of the wheels that a lock names.

    Args:
        wheels: the folder of the wheels; it may contain others.
        lock: requirements, each with its version.
        root: the project's folder; its pyproject.toml describes the main component.
        version: the project's version.
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
    """Write the bill of materials of a lock's packages, as installed in this environment.

    It is used to read the licences, and not validated against the schema, which is slow.

    Args:
        lock: requirements, each with its version.
        root: the project's folder, as in `of_wheels`.
        version: the project's version.
        out: the JSON file to write.

    Raises:
        NoRelease: a package is missing, or installed in another version.
    """
    with tempfile.TemporaryDirectory() as folder:
        packages = _empty_environment(Path(folder))
        for name, wanted in _packages_of(lock):
            about = _about(name, wanted, lock)
            shutil.copytree(about, packages / about.name)
        _describe(Path(folder), root, version, out, validate=False)


def _packages_of(lock: Path) -> Iterator[tuple[str, SpecifierSet]]:
    """Names and versions of a lock's packages for this platform."""
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
    """Make an environment without packages; returns its folder for packages."""
    venv.create(folder / "environment", with_pip=False)
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "environment")}))


def _describe(folder: Path, root: Path, version: str, out: Path, *, validate: bool) -> None:
    """Write the bill of materials with cyclonedx-py; validates it against CycloneDX's schema if asked."""
    project = folder / "pyproject.toml"
    project.write_text(_with_version((root / project.name).read_text("utf-8"), version), "utf-8")
    subprocess.run(
        [
            *(sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"),
            "--validate" if validate else "--no-validate",
            *("--pyproject", str(project), "--output-file", str(out), str(folder / "environment")),
        ],
        # PYTHONPATH would add its folders to the environment.
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=True,
    )


def _with_version(pyproject: str, version: str) -> str:
    """Replace the dynamic version, which cyclonedx-py cannot read."""
    fixed = pyproject.replace('dynamic = ["version"]', f'version = "{version}"')
    assert fixed != pyproject
    return fixed
