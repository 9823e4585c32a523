"""`make release` on a small project, with real git, make, BentoML and podman."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.deploy.release.conftest import CHANGELOG, VERSION, commit, git, write_wheel
from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent.parent
MAKEFILE = f"""
check test audit:
\ttest "$@" != "$(BROKEN)"
image:
\ttest image != "$(BROKEN)"
\tmkdir -p build/image
\tcp -r context build/image/$(VARIANT)-py3.12
\tpodman build --quiet --tag $(TAG) --file Dockerfile .
\tBENTOML_HOME=$(CURDIR)/build/image/bentoml {sys.executable} -m bentoml build
"""


def release(project: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Make a release of `project`, with our code and the project's Makefile."""
    return subprocess.run(
        [sys.executable, "-m", "deploy.release", *(options or (VERSION,))],
        cwd=project,
        env=os.environ | _environment(project.parent) | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _environment(folder: Path) -> dict[str, str]:
    """Variables for our code, and for podman with a temporary store of images."""
    storage = folder / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n')
    return {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CONTAINER_TOOL": "podman",
        "CONTAINERS_STORAGE_CONF": str(storage),
        "BUILDAH_ISOLATION": "chroot",
    }


def check(project: Path, version: str = VERSION) -> subprocess.CompletedProcess[str]:
    """Check whether a version can be released."""
    return release(project, version, "--check-only")


def test_clean_commit_can_be_released(project: Path) -> None:
    """A clean tree with a version and its changelog can be released; --check-only builds nothing."""
    checked = check(project)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith(f"{VERSION} can be released from ")
    assert not (project / "dist").exists()


def _add_a_file(project: Path) -> None:
    (project / "notes.txt").touch()


def _change_a_file(project: Path) -> None:
    (project / "version.py").write_text(f'VERSION = "{VERSION}"  # changed\n')


def _increase_the_version(project: Path) -> None:
    (project / "version.py").write_text('VERSION = "10.0.0"\n')
    commit(project)


def _omit_the_changelog(project: Path) -> None:
    (project / "CHANGELOG.md").write_text(
        CHANGELOG.replace(f"[{VERSION}] - 2026-11-26", "[9.9.8] - 2026-11-25")
    )
    commit(project)


def _empty_the_section(project: Path) -> None:
    (project / "CHANGELOG.md").write_text(CHANGELOG.partition("### Added")[0])
    commit(project)


def _leave_lines_unreleased(project: Path) -> None:
    (project / "CHANGELOG.md").write_text(
        CHANGELOG.replace("[Unreleased]\n", "[Unreleased]\n### Fixed\n- More.\n")
    )
    commit(project)


def _tag_the_commit_before(project: Path) -> None:
    git(project, "tag", f"v{VERSION}")
    commit(project)


@pytest.mark.parametrize(
    ("cause_fault", "sentence"),
    [
        (_add_a_file, "the tree differs from its commit in notes.txt: commit or remove it"),
        (_change_a_file, "the tree differs from its commit in version.py: commit or remove it"),
        (_increase_the_version, f"VERSION={VERSION}, but version.py has 10.0.0"),
        (_omit_the_changelog, f"CHANGELOG.md has no lines under '## [{VERSION}] - YYYY-MM-DD'"),
        (_empty_the_section, f"CHANGELOG.md has no lines under '## [{VERSION}] - YYYY-MM-DD'"),
        (_leave_lines_unreleased, "CHANGELOG.md still has lines under Unreleased"),
        (_tag_the_commit_before, f"the tag v{VERSION} is on another commit"),
    ],
)
def test_release_is_refused(project: Path, cause_fault: Callable[[Path], None], sentence: str) -> None:
    """Each fault is reported in one sentence, before anything is built."""
    cause_fault(project)
    for ended in (check(project), release(project)):
        assert ended.returncode == 1
        assert ended.stderr.splitlines() == [ended.stderr.strip()]
        assert f"no release: {sentence}" in ended.stderr
    assert not (project / "dist").exists()


def test_tag_on_this_commit_is_accepted(project: Path) -> None:
    """The workflow makes the release from its tag."""
    git(project, "tag", "--annotate", "--message", "Release", f"v{VERSION}")
    assert check(project).returncode == 0


@pytest.mark.parametrize("version", ["1.2", "v1.2.3", "1.2.3-rc1", "1.2.3; id"])
def test_other_formats_of_a_version_are_refused(project: Path, version: str) -> None:
    """A version must be three numbers, which Python, git and registries treat alike."""
    assert f"VERSION={version} is not a version" in check(project, version).stderr


@pytest.fixture
def buildable(project: Path) -> Path:
    """The project with a Bento, an image of one layer and a wheel."""
    need("no podman (apt-get install podman)" if shutil.which("podman") is None else None)
    (project / "Makefile").write_text(MAKEFILE)
    (project / "service.py").write_text(
        "import bentoml\n\n\n@bentoml.service(name='sam3')\nclass Service:\n"
        "    @bentoml.api\n    def ask(self) -> str:\n        return ''\n"
    )
    # Like ours, its build needs no package index.
    (project / "bentofile.yaml").write_text(
        "service: service:Service\nname: sam3\ninclude: [service.py]\npython: {lock_packages: false}\n"
    )
    (project / "Dockerfile").write_text("FROM scratch\nCOPY version.py /version.py\n")
    (project / "context" / "wheels").mkdir(parents=True)
    (project / "context" / "requirements.txt").write_text("permissive==1.0\n")
    write_wheel(project / "context" / "wheels", "permissive", "License-Expression: MIT")
    # A wheel that a build of an older lock has left.
    write_wheel(project / "context" / "wheels", "old", "License-Expression: MIT")
    commit(project)
    return project


def test_release_has_all_files(buildable: Path) -> None:
    """Bento, image, bill of materials, licences and checksums are in dist/; the next commands are printed."""
    made = release(buildable, VERSION, "--variants", "cpu", "--image", "registry.example/sam3")
    assert made.returncode == 0, made.stdout + made.stderr
    folder = buildable / "dist" / VERSION
    name = f"sam3-{VERSION}-cpu"
    files = {f"sam3-{VERSION}.bento", f"{name}.tar", f"{name}.cdx.json", f"{name}-licences.csv"}
    assert {path.name for path in folder.iterdir()} == files | {"SHA256SUMS"}
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    assert set(checked.stdout.splitlines()) == {f"{file}: OK" for file in files}
    with tarfile.open(folder / f"sam3-{VERSION}.bento") as bento:
        assert "./src/service.py" in bento.getnames()
    with tarfile.open(folder / f"{name}.tar") as image:
        assert "manifest.json" in image.getnames()
    bill = json.loads((folder / f"{name}.cdx.json").read_text())
    assert bill["metadata"]["component"]["version"] == VERSION
    assert [(package["name"], package["version"]) for package in bill["components"]] == [
        ("permissive", "1.0")
    ]
    assert (folder / f"{name}-licences.csv").read_text() == "package,version,licence\npermissive,1.0,MIT\n"
    assert (
        f"docker-archive:dist/{VERSION}/{name}.tar docker://registry.example/sam3:{VERSION}-cpu"
        in made.stdout
    )
    assert f"git push origin v{VERSION}" in made.stdout


def test_rehearsal_is_not_for_publishing(buildable: Path) -> None:
    """A release without the tests is marked as a rehearsal, and no push is proposed."""
    made = release(buildable, VERSION, "--variants", "cpu", "--skip", "tests", "audit", BROKEN="test")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "is a rehearsal, not for publishing: tests and audit were skipped" in made.stdout
    assert "git push" not in made.stdout


@pytest.mark.parametrize("target", ["check", "test", "audit", "image"])
def test_failed_target_ends_the_release(buildable: Path, target: str) -> None:
    """If a make target fails, the release fails: no checksums, no next commands."""
    made = release(buildable, VERSION, "--variants", "cpu", BROKEN=target)
    assert made.returncode == 1
    assert "no release: make " in made.stderr
    assert "ended with status 2" in made.stderr
    assert not (buildable / "dist" / VERSION / "SHA256SUMS").exists()
    assert "git push" not in made.stdout


def test_missing_wheel_ends_the_release(buildable: Path) -> None:
    """Without a wheel for each package of the lock there is no release."""
    (buildable / "context" / "requirements.txt").write_text("permissive==2.0\n")
    commit(buildable)
    made = release(buildable, VERSION, "--variants", "cpu", "--skip", "tests", "audit")
    assert made.returncode == 1
    assert "no release: there is no wheel of permissive==2.0 in " in made.stderr


def test_forbidden_licence_ends_the_release(buildable: Path) -> None:
    """A package under the AGPL among the image's wheels ends the release."""
    write_wheel(buildable / "context" / "wheels", "copyleft", "License-Expression: AGPL-3.0-only")
    (buildable / "context" / "requirements.txt").write_text("permissive==1.0\ncopyleft==1.0\n")
    commit(buildable)
    made = release(buildable, VERSION, "--variants", "cpu", "--skip", "tests", "audit")
    assert made.returncode == 1
    assert "no release: copyleft 1.0 states AGPL-3.0-only, which is not allowed" in made.stderr
    assert not (buildable / "dist" / VERSION / "SHA256SUMS").exists()
