"""Which licences allow redistribution, and that those of our packages do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pip_requirements_parser import RequirementsFile

from deploy.release import licences, sbom
from deploy.release.refusals import NoRelease
from tests.deploy.release.conftest import write_wheel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent.parent


ALLOWED = (
    "License-Expression: Apache-2.0 AND (GPL-2.0-only OR MIT)",
    "License-Expression: Apache-2.0 WITH LLVM-exception",
    "License-Expression: LicenseRef-NVIDIA-Proprietary",
    "License: MIT\nClassifier: License :: OSI Approved :: Apache Software License",
    "Classifier: License :: OSI Approved :: BSD License",
)
REFUSED = (
    "License-Expression: AGPL-3.0-only",
    "License-Expression: MIT AND GPL-3.0-or-later",
    "License-Expression: LGPL-2.1-only",
    "License-Expression: GPL-3.0-or-later WITH GCC-exception-3.1",
    "License-Expression: LicenseRef-Ours",
    "License: GPLv3\nClassifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)",
    "License: MIT\nClassifier: License :: OSI Approved :: GNU Affero General Public License v3",
    "Classifier: License :: Other/Proprietary License",
    "License: as you like",
    "",
)
REVIEWED = {"transformers": "", "simple_di": "License-Expression: GPL-3.0-only"}
"""One without a licence in its metadata, as when it was reviewed, and one whose metadata has changed."""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The message for each refused wheel, from a folder with one wheel for each of the above."""
    wheels = tmp_path_factory.mktemp("wheels")
    for index, metadata in enumerate(ALLOWED):
        write_wheel(wheels, f"allowed_{index}", metadata)
    for index, metadata in enumerate(REFUSED):
        write_wheel(wheels, f"refused_{index}", metadata)
    for name, metadata in REVIEWED.items():
        write_wheel(wheels, name, metadata)
    bill, lock = wheels / "sbom.cdx.json", wheels / "requirements.txt"
    lock.write_text("".join(f"{wheel.name.partition('-')[0]}==1.0\n" for wheel in wheels.glob("*.whl")))
    sbom.of_wheels(wheels, lock, ROOT, "1.2.3", bill)
    packages = licences.packages_of(bill)
    assert len(packages) == len(ALLOWED) + len(REFUSED) + len(REVIEWED)
    return {sentence.partition(" 1.0 states ")[0]: sentence for sentence in licences.refusals(packages)}


@pytest.mark.parametrize(("index", "metadata"), [*enumerate(ALLOWED)])
def test_permissive_licence_is_allowed(refusals: dict[str, str], index: int, metadata: str) -> None:
    """Permissive licences are allowed, in each form of metadata."""
    assert f"allowed-{index}" not in refusals, metadata


@pytest.mark.parametrize(("index", "metadata"), [*enumerate(REFUSED)])
def test_copyleft_or_unknown_licence_is_refused(refusals: dict[str, str], index: int, metadata: str) -> None:
    """Copyleft, unknown and missing licences are refused."""
    assert f"refused-{index}" in refusals, metadata


def test_review_is_void_if_the_metadata_changes(refusals: dict[str, str]) -> None:
    """A review allows a package with unchanged metadata; a changed licence counts instead of the review."""
    assert "transformers" not in refusals
    assert "states GPL-3.0-only" in refusals["simple-di"]


def test_our_packages_are_allowed() -> None:
    """The licence of each installed package of the server is allowed."""
    checked = subprocess.run(
        [sys.executable, "-m", "deploy.release.licences", "requirements.lock"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    locked = RequirementsFile.from_file(str(ROOT / "requirements.lock")).requirements
    assert checked.stdout == f"requirements.lock: the licences of {len(locked)} packages are allowed\n"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("six==0.0.1", r"lock\.txt names six==0\.0\.1, but .* is installed: install the lock"),
        (
            "never-published==1.0",
            r"lock\.txt names never-published, which is not installed: install the lock",
        ),
    ],
)
def test_lock_must_be_installed(tmp_path: Path, line: str, sentence: str) -> None:
    """A missing package or another version than the locked one is refused."""
    lock = tmp_path / "lock.txt"
    lock.write_text(f"{line}\n")
    with pytest.raises(NoRelease, match=sentence):
        sbom.of_installed(lock, ROOT, "1.2.3", tmp_path / "sbom.cdx.json")


def test_bill_contains_only_the_lock(tmp_path: Path) -> None:
    """Installed packages that the lock does not name, such as the tests' own, are not in the bill."""
    lock = tmp_path / "lock.txt"
    lock.write_text(
        'six==1.17.0 \\\n    --hash=sha256:0\nhttpx==0.28.1\ncolorama==0.4.6 ; sys_platform == "win32"\n'
    )
    sbom.of_installed(lock, ROOT, "1.2.3", tmp_path / "sbom.cdx.json")
    bill = json.loads((tmp_path / "sbom.cdx.json").read_text())
    assert {component["purl"] for component in bill["components"]} == {
        "pkg:pypi/httpx@0.28.1",
        "pkg:pypi/six@1.17.0",
    }
    assert bill["metadata"]["component"]["version"] == "1.2.3"
