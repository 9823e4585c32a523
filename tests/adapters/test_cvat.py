"""CVAT's functions, run by cvat-cli 2.80 with the SAM 3 server behind them.

CVAT's own server is no Python package. A stand-in answers the routes that cvat-cli calls.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.adapters.cvat_stand_in import LABELS, cvat_stand_in
from tests.adapters.label_studio_files import CIRCLES, RADIUS_PX, SAMPLE, circles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sam3_client import Instance
    from sam3_runner.instances import Mask
    from tests.adapters.cvat_stand_in import CvatStandIn

pytest.importorskip("cvat_cli", reason="needs .venv/annotation (make test)")
if "SAM3_URL" not in os.environ:
    pytest.skip("needs a server: python -m tests.adapters.with_server", allow_module_level=True)

import cvat_cli._internal.agent_driver as agent
import cvat_cli._internal.agent_driver_interaction as interaction_agent
import cvat_sdk.auto_annotation as cvataa
from cvat_cli.__main__ import main as cvat_cli
from cvat_cli._internal.common import FunctionLoader
from cvat_sdk.masks import decode_mask

from sam3_client import Client

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cvat() -> Iterator[CvatStandIn]:
    """A server with the sample picture as a task."""
    with cvat_stand_in(SAMPLE.read_bytes(), LABELS) as server:
        yield server


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", "token")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def found(prompt: str, threshold: float | None = None) -> list[Instance]:
    """What the server finds without an adapter, in the PNG that cvat-cli's picture becomes."""
    with Image.open(SAMPLE) as image, Client() as client:
        return client.segment(image.convert("RGB"), prompt, score_threshold=threshold).instances


def decoded(shape: dict[str, Any]) -> Mask:
    """By CVAT's SDK, or for a polygon by pycocotools."""
    if shape["type"] == "mask":
        return np.asarray(decode_mask(shape["points"], image_width=1280, image_height=720))
    [rle] = coco_mask.frPyObjects([shape["points"]], 720, 1280)
    return np.asarray(coco_mask.decode(rle)).astype(bool)


def test_a_task_gets_masks(cvat: CvatStandIn) -> None:
    """The uploaded shapes are the server's masks and scores, under the ids that the task's labels have."""
    command = [str(Path(sys.executable).parent / "cvat-cli"), *cvat.arguments()]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, check=True, timeout=120)
    [uploaded] = cvat.uploaded
    expected = [(31, each) for each in found("purple circle")] + [(32, each) for each in found("triangles")]
    assert len(uploaded["shapes"]) == len(expected) > 2
    for shape, (label_id, instance) in zip(uploaded["shapes"], expected, strict=True):
        assert (shape["label_id"], shape["type"], shape["source"]) == (label_id, "mask", "auto")
        assert shape["score"] == instance.score
        assert np.array_equal(decoded(shape), instance.mask)


def test_a_task_gets_polygons_above_a_threshold(cvat: CvatStandIn) -> None:
    """`--conv-mask-to-poly` and `--conf-threshold`: the better instances, as polygons of the same px."""
    triangles = found("triangles")
    threshold = (triangles[-1].score + triangles[-2].score) / 2
    assert cvat_cli(cvat.arguments("--conv-mask-to-poly", "--conf-threshold", str(threshold))) == 0
    shapes = [shape for shape in cvat.uploaded[0]["shapes"] if shape["label_id"] == LABELS["triangles"]]
    assert len(shapes) == len(triangles) - 1
    for shape, instance in zip(shapes, triangles, strict=False):
        assert shape["type"] == "polygon"
        mask = decoded(shape)
        assert (mask & instance.mask).sum() / (mask | instance.mask).sum() > 0.97


def test_a_server_that_is_away_uploads_nothing(cvat: CvatStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends with a sentence, in the kind of error that CVAT's page shows."""
    monkeypatch.setenv("SAM3_URL", "http://127.0.0.1:9")
    with pytest.raises(cvataa.BadFunctionError, match=r"nothing answers at http://127\.0\.0\.1:9; start"):
        cvat_cli(cvat.arguments())
    assert cvat.uploaded == []


def interact(similar: bool, **prompts: Any) -> list[tuple[int, int]]:  # noqa: FBT001 - of a test
    """Centres of what the function finds, as an agent of cvat-cli calls it."""
    loader = FunctionLoader(None, ROOT / "adapters" / "cvat" / "interaction.py", {"similar": similar})
    function = loader.load()
    driver = interaction_agent.AgentInteractionFunctionDriver
    assert driver.get_remote_function_fields(function.spec) == {
        "min_pos_points": 0,
        "min_neg_points": 0,
        "startswith_box": True,
    }
    driver.init_worker(None)
    agent.set_worker_current_function(function)
    given = interaction_agent._InteractionPromptsImpl(
        **{"pos_points": (), "neg_points": (), "bounding_box": None} | prompts
    )
    with Image.open(io.BytesIO(circles())) as image:
        shapes = interaction_agent._worker_job_interact(("task", 0), image, given)
    centres: list[tuple[int, int]] = []
    for shape in shapes:
        assert shape.type == "mask"
        [confidence] = shape.attributes
        assert 0.5 < float(confidence.value) <= 1
        y, x = np.nonzero(decode_mask(shape.points, image_width=600, image_height=400))
        centres.append((round(x.mean() / 10) * 10, round(y.mean() / 10) * 10))
    return sorted(centres)


def test_a_box_gives_its_object_or_all_that_are_like_it() -> None:
    """With `similar` all red circles; a negative point leaves one out, positive points choose."""
    first, second, third = CIRCLES["red"]
    box = tuple((value - RADIUS_PX, value + RADIUS_PX) for value in second)
    corners = ((box[0][0], box[1][0]), (box[0][1], box[1][1]))
    assert interact(similar=False, bounding_box=corners) == [second]
    assert interact(similar=True, bounding_box=corners) == sorted([first, second, third])
    assert interact(similar=True, bounding_box=corners, neg_points=(first,)) == sorted([second, third])
    assert interact(similar=True, bounding_box=corners, pos_points=(third,)) == [third]
    with pytest.raises(cvataa.BadFunctionError, match="draw one"):
        interact(similar=False)
