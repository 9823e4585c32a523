"""Which licences may be passed on, and that those of our packages may."""

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
"""One that still states nothing, as when it was reviewed, and one that states something else by now."""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The sentence about each wheel that is refused, of a folder with one wheel for each of the above."""
    wheels = tmp_path_factory.mktemp("wheels")
    for index, metadata in enumerate(ALLOWED):
        write_wheel(wheels, f"polite_{index}", metadata)
    for index, metadata in enumerate(REFUSED):
        write_wheel(wheels, f"viral_{index}", metadata)
    for name, metadata in REVIEWED.items():
        write_wheel(wheels, name, metadata)
    bill, lock = wheels / "sbom.cdx.json", wheels / "requirements.txt"
    lock.write_text("".join(f"{wheel.name.partition('-')[0]}==1.0\n" for wheel in wheels.glob("*.whl")))
    sbom.of_wheels(wheels, lock, ROOT, "1.2.3", bill)
    packages = licences.packages_of(bill)
    assert len(packages) == len(ALLOWED) + len(REFUSED) + len(REVIEWED)
    return {sentence.partition(" 1.0 states ")[0]: sentence for sentence in licences.refusals(packages)}


@pytest.mark.parametrize(("index", "metadata"), [*enumerate(ALLOWED)])
def test_allowed(refusals: dict[str, str], index: int, metadata: str) -> None:
    """Permissive licences, in each way that wheels state them."""
    assert f"polite-{index}" not in refusals, metadata


@pytest.mark.parametrize(("index", "metadata"), [*enumerate(REFUSED)])
def test_refused(refusals: dict[str, str], index: int, metadata: str) -> None:
    """Copyleft, unknown words, and none."""
    assert f"viral-{index}" in refusals, metadata


def test_review_counts_for_the_words_it_saw(refusals: dict[str, str]) -> None:
    """A reviewed package that states nothing is allowed; once it states another licence, that one counts."""
    assert "transformers" not in refusals
    assert "states GPL-3.0-only" in refusals["simple-di"]


def test_our_packages_are_allowed() -> None:
    """Each package that the server runs on, as it is installed here."""
    judged = subprocess.run(
        [sys.executable, "-m", "deploy.release.licences", "requirements.lock"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.returncode == 0, judged.stderr
    locked = RequirementsFile.from_file(str(ROOT / "requirements.lock")).requirements
    assert judged.stdout == f"requirements.lock: the licences of {len(locked)} packages are allowed\n"


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
def test_lock_that_is_not_installed(tmp_path: Path, line: str, sentence: str) -> None:
    """Other packages than the locked ones say nothing of them."""
    lock = tmp_path / "lock.txt"
    lock.write_text(f"{line}\n")
    with pytest.raises(NoRelease, match=sentence):
        sbom.of_installed(lock, ROOT, "1.2.3", tmp_path / "sbom.cdx.json")


def test_bill_holds_the_lock_alone(tmp_path: Path) -> None:
    """Packages that are installed beside the lock, as these tests' own are, are not in it."""
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
