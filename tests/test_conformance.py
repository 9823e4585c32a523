"""A corpus of valid and invalid images: the result of each file is recorded, and changes only on purpose."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.conformance import decode_folder, read_table, report
from tests.tiers import need

pytestmark = pytest.mark.slow

RECORDED = Path(__file__).parent / "conformance" / "pillow.csv"
PILLOW = "13.0.0"
"""The version whose source distribution has the images of the table."""
DOWNLOAD_TIMEOUT_S = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of Pillow's tests: 1,060 files, about 80 of them malicious by their names."""
    folder = tmp_path_factory.mktemp("corpus")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "pillow"]
    downloaded = subprocess.run(
        [*command, f"pillow=={PILLOW}", "--dest", str(folder)],
        capture_output=True,
        check=False,
        text=True,
        timeout=DOWNLOAD_TIMEOUT_S,
    )
    need(f"Pillow's source: {downloaded.stderr[-200:]}" if downloaded.returncode else None)
    [archive] = folder.glob("*.tar.gz")
    images = f"pillow-{PILLOW}/Tests/images/"
    with tarfile.open(archive) as source:
        for member in source:
            if member.isfile() and member.name.startswith(images) and ".." not in member.name:
                source.extract(member, folder)
    return folder / images


def test_every_file_has_its_recorded_result(corpus: Path) -> None:
    """Each file is decoded to its size, or refused with a message, as in the table that a person checked.

    After an intended change, write the table with `python -m benchmarks.conformance FOLDER --record ...`.
    """
    results = list(decode_folder(corpus))
    sys.stdout.write(report(results))
    assert {result.path: result.answer for result in results} == read_table(RECORDED)


def test_corpus_has_the_version_of_the_installed_pillow() -> None:
    """A new Pillow has new images: check their results, and write the table again."""
    assert version("pillow") == PILLOW
