"""Every change of the inner parts of BentoML, circus and uvicorn: one module a change, each with a `patch`.

They use private names, so the versions are pinned, and `check_versions` refuses others. tests/bentoml_patches
has a test for each patch that fails when an upgrade makes the patch wrong or needless.
"""

from __future__ import annotations

from importlib.metadata import version

VERSIONS = {"bentoml": "1.4.40", "kantoku": "0.18.3", "uvicorn": "0.54.0"}
"""What the patches were tested with. kantoku is the distribution that holds the package circus."""


def check_versions() -> None:
    """Raise RuntimeError for a version that the patches were not tested with."""
    for package, tested in VERSIONS.items():
        if (installed := version(package)) != tested:
            raise RuntimeError(
                f"{package} {installed} is installed, but bentoml_patches was tested with {tested}: install "
                f"{package}=={tested}, or run the tests of tests/bentoml_patches and raise VERSIONS"
            )
