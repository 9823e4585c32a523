"""Applies the model to real datasets of FiftyOne, and compares what is stored with the client's own answers.

It is run by hand, where FiftyOne is installed: that takes 1 GB and minutes. SAM3_URL and SAM3_API_KEY name a
running server with the demo checkpoint.

    python -m tests.adapters.fiftyone_run
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fiftyone
import numpy as np
from PIL import Image

from adapters.fiftyone.model import Sam3Model
from sam3_client import Client, Unauthorized

if TYPE_CHECKING:
    import numpy.typing as npt

SAMPLE = Path(__file__).parent.parent.parent / "examples" / "sample.jpg"
PROMPTS = ["triangle", "purple circle", "blue star"]
EXIF_ORIENTATION = 0x0112


def main() -> None:
    """Run every check; an assertion says which one failed."""
    with tempfile.TemporaryDirectory() as folder, Client() as client:
        files = write_images(Path(folder))
        dataset = fiftyone.Dataset()
        dataset.add_samples([fiftyone.Sample(str(file)) for file in files])
        model = Sam3Model(client, PROMPTS)

        dataset.apply_model(model, label_field="single")
        *good, refused = dataset
        for sample in good:
            compare(sample, sample["single"], client)
        assert refused["single"] is None, "a BMP, which the server refuses, has no labels"
        assert dataset.count_values("single.detections.label") == {"triangle": 12, "purple circle": 3}

        dataset.apply_model(model, label_field="batch", batch_size=3)
        for sample in dataset.limit(3):
            assert [as_values(each) for each in sample["batch"].detections] == [
                as_values(each) for each in sample["single"].detections
            ]

        dataset.limit(1).apply_model(model, label_field="strict", confidence_thresh=0.955)
        kept = dataset.first()["strict"].detections
        assert 0 < len(kept) < 5
        assert min(each.confidence for each in kept) > 0.955
        assert model.config.confidence_thresh is None

        array = np.asarray(Image.open(SAMPLE))
        assert len(model.predict(array).detections) == 5
        refuse_wrong_key(dataset.limit(1))
    sys.stdout.write("FiftyOne: every check passed\n")


def write_images(folder: Path) -> list[Path]:
    """The sample as JPEG, PNG, JPEG that EXIF turns, and BMP."""
    image = Image.open(SAMPLE)
    files = [folder / name for name in ("plain.jpg", "plain.png", "turned.jpg", "refused.bmp")]
    files[0].write_bytes(SAMPLE.read_bytes())
    image.save(files[1])
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(files[2], exif=exif, quality=95)
    image.save(files[3])
    return files


def compare(sample: Any, found: fiftyone.Detections, client: Client) -> None:
    """Check labels, scores and every px of the masks against the client's answer for the same file."""
    result = client.segment(sample.filepath, PROMPTS)
    assert [each.label for each in found.detections] == result.labels
    assert np.allclose([each.confidence for each in found.detections], result.scores)
    for each, mask in zip(found.detections, result.masks, strict=True):
        assert np.array_equal(whole_mask(each, result.width, result.height), mask)


def whole_mask(detection: fiftyone.Detection, width: int, height: int) -> npt.NDArray[np.bool_]:
    """(height, width): the mask of a detection in its image."""
    whole = np.zeros((height, width), np.bool_)
    left, top, box_width, box_height = np.multiply(detection.bounding_box, [width, height, width, height])
    assert detection.mask.shape == (round(box_height), round(box_width))
    x, y = round(left), round(top)
    whole[y : y + detection.mask.shape[0], x : x + detection.mask.shape[1]] = detection.mask
    return whole


def as_values(detection: fiftyone.Detection) -> tuple[Any, ...]:
    """What can be compared."""
    return detection.label, detection.confidence, detection.bounding_box, detection.mask.tobytes()


def refuse_wrong_key(samples: Any) -> None:
    """Check that a wrong key is raised where failures are not skipped."""
    with Client(key="a-wrong-key") as client:
        try:
            samples.apply_model(Sam3Model(client, PROMPTS), label_field="refused", skip_failures=False)
        except Unauthorized:
            return
    raise AssertionError("a wrong key was not refused")


if __name__ == "__main__":
    main()
