"""make release, on a small project of its own: real git, make, BentoML and podman."""

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
    """Make a release of `project`, with our own code and its make."""
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
    """Our code, podman, and a store of images that goes away with the test."""
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
    """Ask whether a version can be released."""
    return release(project, version, "--check-only")


def test_clean_commit_can_be_released(project: Path) -> None:
    """A clean tree with its version and its changelog; nothing is built when it is only asked."""
    asked = check(project)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith(f"{VERSION} can be released from ")
    assert not (project / "dist").exists()


def _leave_a_file(project: Path) -> None:
    (project / "notes.txt").touch()


def _change_a_file(project: Path) -> None:
    (project / "version.py").write_text(f'VERSION = "{VERSION}"  # changed\n')


def _raise_the_version(project: Path) -> None:
    (project / "version.py").write_text('VERSION = "10.0.0"\n')
    commit(project)


def _forget_the_changelog(project: Path) -> None:
    (project / "CHANGELOG.md").write_text(
        CHANGELOG.replace(f"[{VERSION}] - 2026-11-26", "[9.9.8] - 2026-11-25")
    )
    commit(project)


def _say_nothing(project: Path) -> None:
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
    ("spoil", "sentence"),
    [
        (_leave_a_file, "the tree differs from its commit in notes.txt: commit or remove it"),
        (_change_a_file, "the tree differs from its commit in version.py: commit or remove it"),
        (_raise_the_version, f"VERSION={VERSION}, but version.py says 10.0.0"),
        (_forget_the_changelog, f"CHANGELOG.md has no lines under '## [{VERSION}] - YYYY-MM-DD'"),
        (_say_nothing, f"CHANGELOG.md has no lines under '## [{VERSION}] - YYYY-MM-DD'"),
        (_leave_lines_unreleased, "CHANGELOG.md still has lines under Unreleased"),
        (_tag_the_commit_before, f"the tag v{VERSION} names another commit"),
    ],
)
def test_release_is_refused(project: Path, spoil: Callable[[Path], None], sentence: str) -> None:
    """One sentence a fault, before anything is built."""
    spoil(project)
    for asked in (check(project), release(project)):
        assert asked.returncode == 1
        assert asked.stderr.splitlines() == [asked.stderr.strip()]
        assert f"no release: {sentence}" in asked.stderr
    assert not (project / "dist").exists()


def test_tag_of_this_commit_is_no_fault(project: Path) -> None:
    """The workflow makes the release from its tag."""
    git(project, "tag", "--annotate", "--message", "Release", f"v{VERSION}")
    assert check(project).returncode == 0


@pytest.mark.parametrize("version", ["1.2", "v1.2.3", "1.2.3-rc1", "1.2.3; id"])
def test_other_versions_are_refused(project: Path, version: str) -> None:
    """Three numbers, which Python, git and registries read the same way."""
    assert f"VERSION={version} is no version" in check(project, version).stderr


@pytest.fixture
def buildable(project: Path) -> Path:
    """The project with a Bento, an image of one layer and a wheel."""
    need("no podman (apt-get install podman)" if shutil.which("podman") is None else None)
    (project / "Makefile").write_text(MAKEFILE)
    (project / "service.py").write_text(
        "import bentoml\n\n\n@bentoml.service(name='sam3')\nclass Service:\n"
        "    @bentoml.api\n    def ask(self) -> str:\n        return ''\n"
    )
    # As ours, it asks no index when it is built.
    (project / "bentofile.yaml").write_text(
        "service: service:Service\nname: sam3\ninclude: [service.py]\npython: {lock_packages: false}\n"
    )
    (project / "Dockerfile").write_text("FROM scratch\nCOPY version.py /version.py\n")
    (project / "context" / "wheels").mkdir(parents=True)
    (project / "context" / "requirements.txt").write_text("polite==1.0\n")
    write_wheel(project / "context" / "wheels", "polite", "License-Expression: MIT")
    # Left there by a build of an older lock.
    write_wheel(project / "context" / "wheels", "old", "License-Expression: MIT")
    commit(project)
    return project


def test_release_is_whole(buildable: Path) -> None:
    """Bento, image, bill of materials, licences and checksums lie in dist/; the next commands are named."""
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
    assert [(package["name"], package["version"]) for package in bill["components"]] == [("polite", "1.0")]
    assert (folder / f"{name}-licences.csv").read_text() == "package,version,licence\npolite,1.0,MIT\n"
    assert (
        f"docker-archive:dist/{VERSION}/{name}.tar docker://registry.example/sam3:{VERSION}-cpu"
        in made.stdout
    )
    assert f"git push origin v{VERSION}" in made.stdout


def test_rehearsal_says_so(buildable: Path) -> None:
    """What was made without the tests is not for publishing."""
    made = release(buildable, VERSION, "--variants", "cpu", "--skip", "tests", "audit", BROKEN="test")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "is a rehearsal, not for publishing: tests and audit were left out" in made.stdout
    assert "git push" not in made.stdout


@pytest.mark.parametrize("target", ["check", "test", "audit", "image"])
def test_failed_target_ends_the_release(buildable: Path, target: str) -> None:
    """Make's failure is the release's: no checksums, no next command."""
    made = release(buildable, VERSION, "--variants", "cpu", BROKEN=target)
    assert made.returncode == 1
    assert "no release: make " in made.stderr
    assert "ended with status 2" in made.stderr
    assert not (buildable / "dist" / VERSION / "SHA256SUMS").exists()
    assert "git push" not in made.stdout


def test_missing_wheel_ends_the_release(buildable: Path) -> None:
    """The bill of materials names all that the image's lock does, or there is none."""
    (buildable / "context" / "requirements.txt").write_text("polite==2.0\n")
    commit(buildable)
    made = release(buildable, VERSION, "--variants", "cpu", "--skip", "tests", "audit")
    assert made.returncode == 1
    assert "no release: there is no wheel of polite==2.0 in " in made.stderr


def test_licence_that_is_not_allowed_ends_the_release(buildable: Path) -> None:
    """A package under the AGPL among the image's wheels."""
    write_wheel(buildable / "context" / "wheels", "viral", "License-Expression: AGPL-3.0-only")
    (buildable / "context" / "requirements.txt").write_text("polite==1.0\nviral==1.0\n")
    commit(buildable)
    made = release(buildable, VERSION, "--variants", "cpu", "--skip", "tests", "audit")
    assert made.returncode == 1
    assert "no release: viral 1.0 states AGPL-3.0-only, which is not allowed" in made.stderr
    assert not (buildable / "dist" / VERSION / "SHA256SUMS").exists()
