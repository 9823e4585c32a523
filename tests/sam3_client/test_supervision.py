"""A result as supervision's detections, read by supervision itself where it is installed."""

from __future__ import annotations

import numpy as np
import pytest

from sam3_client import Instance, Result
from sam3_client.pictures import Picture

HEIGHT, WIDTH = 3, 4


def test_detections() -> None:
    """Boxes, masks, scores, numbers and names of classes are where supervision's tools look for them."""
    sv = pytest.importorskip("supervision", reason="the tests with annotation tools have it: make test")
    first, second = (
        Instance(label, score, (1.0, 0.0, 2.0, 3.0), {"size": [HEIGHT, WIDTH], "counts": "336"})
        for label, score in (("dog", 0.9), ("cat", 0.8))
    )
    picture = Picture.of(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    result = Result(
        picture, width=WIDTH, height=HEIGHT, prompts=["cat", "dog"], presence={}, instances=[first, second]
    )
    found = result.to_supervision()
    assert isinstance(found, sv.Detections)
    assert found.xyxy.tolist() == [[1, 0, 2, 3]] * 2
    assert np.array_equal(found.mask, result.masks)
    assert found.mask[0].sum() == 3
    assert found.confidence.tolist() == pytest.approx([0.9, 0.8])
    assert found.class_id.tolist() == [1, 0]
    assert [*found["class_name"]] == ["dog", "cat"]
    assert found[found.confidence > 0.85].class_id.tolist() == [1]
    picture_with_labels = sv.LabelAnnotator().annotate(np.zeros((200, 200, 3), np.uint8), found)
    assert picture_with_labels.any()
    assert len(result.filter(labels=[]).to_supervision()) == 0
