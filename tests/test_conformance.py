"""A corpus of images, good and bad: what becomes of each file is known, and changes only on purpose."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.conformance import fates_of, read_answers, report
from tests.tiers import need

pytestmark = pytest.mark.slow

KNOWN = Path(__file__).parent / "conformance" / "pillow.csv"
PILLOW = "13.0.0"
"""Whose source distribution has the images; the table is of these."""
DOWNLOAD_TIMEOUT_S = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images that Pillow is tested with: 1,060 files, of which about 80 are hostile by name."""
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


def test_every_file_has_its_answer(corpus: Path) -> None:
    """Each file is decoded to its size, or refused by a sentence, as it was when somebody looked at it.

    After a change on purpose, `python -m benchmarks.conformance FOLDER --record ...` makes the table anew.
    """
    fates = list(fates_of(corpus))
    sys.stdout.write(report(fates))
    assert {fate.path: fate.answer for fate in fates} == read_answers(KNOWN)


def test_corpus_is_of_the_pillow_that_decodes() -> None:
    """With a new Pillow come new images: look at them, and make the table anew."""
    assert version("pillow") == PILLOW
