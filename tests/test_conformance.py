"""A corpus of valid and invalid images: the result of each file is recorded, and changes only on purpose."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.conformance import MAX_PIXELS, OTHER_FORMAT, decode_folder, read_table, report
from sam3_runner import UnsupportedImage
from sam3_runner.images.decode import decode_preview
from sam3_runner.images.read import read_image_file
from tests.tiers import need

pytestmark = pytest.mark.slow

RECORDED = Path(__file__).parent / "conformance" / "pillow.csv"
PILLOW = "13.0.0"
"""The version whose source distribution has the images of the table."""
DOWNLOAD_TIMEOUT_S = 300
PREVIEW_SIDE_PX = 100


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


def preview_of(path: Path) -> str:
    """As the table: `decoded` and the size of the image, or the message of the refusal."""
    try:
        preview = decode_preview(read_image_file(path.read_bytes(), max_pixels=MAX_PIXELS), PREVIEW_SIDE_PX)
    except UnsupportedImage as refusal:
        return str(refusal)
    scale = min(1.0, PREVIEW_SIDE_PX / max(preview.width, preview.height))
    sides = [max(1, round(side * scale)) for side in (preview.height, preview.width)]
    assert list(preview.pixels.shape) == [*sides, 3], path
    return f"decoded {preview.width}x{preview.height}"


def test_every_preview_has_the_recorded_result(corpus: Path) -> None:
    """The picture under an overlay has the size that a viewer shows; what the model refuses has none."""
    recorded = {path: answer for path, answer in read_table(RECORDED).items() if answer != OTHER_FORMAT}
    assert {path: preview_of(corpus / path) for path in recorded} == recorded


def test_corpus_has_the_version_of_the_installed_pillow() -> None:
    """A new Pillow has new images: check their results, and write the table again."""
    assert version("pillow") == PILLOW
