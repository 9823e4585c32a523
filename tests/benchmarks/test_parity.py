"""The parity command: compares our model with transformers on the demo checkpoint; reports differences."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from benchmarks.parity import Parity, Question, compare, widest_gap
from benchmarks.references import Kept, Ours, Transformers
from commands.local_server import ROOT
from sam3_runner.weights.checkpoint import DEMO_FOLDER
from tests.concepts import concepts
from tests.drawn import scene

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def parity(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.parity", "--device", "cpu", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_demo_checkpoint_equals_transformers() -> None:
    """On drawn scenes kept queries, masks, boxes and scores equal those of transformers."""
    ended = parity("--reference", "transformers", "--scenes", "3")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        f"ours {dtype} / transformers float32" for dtype in ("float32", "float16", "bfloat16")
    ]
    exact = lines[0]
    kept = int(exact.split(": ")[1].split()[0])
    assert kept > 3
    assert "0 + 0 by one" in exact


def test_difference_is_reported(tmp_path: Path) -> None:
    """Weights that differ in two tensors miss the targets, and the report names the targets."""
    shutil.copytree(DEMO_FOLDER, tmp_path / "other")
    state = load_file(DEMO_FOLDER / "model.safetensors")
    state["mask_decoder.instance_projection.bias"] += 2.0
    state["detr_decoder.presence_head.layer3.bias"] -= 2.0
    save_file(state, tmp_path / "other" / "model.safetensors")
    picture = scene(9_000_000, 1280, 720)
    sums, _ = compare(
        Transformers(DEMO_FOLDER, "cpu", "float32"),
        Ours(str(tmp_path / "other"), "cpu", "float32"),
        [Question(picture.image, concepts(*picture.names))],
        threshold=0.5,
    )
    missed = " ".join(sums.missed(exact=True))
    assert "mask IoU" in missed
    assert "score error" in missed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--reference", "official"], "--weights random"),
        (["--reference", "transformers", "--weights", "nowhere/sam3.pt"], "no weights at nowhere/sam3.pt"),
        (["--reference", "transformers", "--images", "nowhere.jpg"], "nowhere.jpg"),
    ],
)
def test_unreadable_inputs_are_refused(arguments: list[str], sentence: str) -> None:
    """Weights that the reference cannot read and missing files are refused in one sentence."""
    ended = parity(*arguments)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("cannot compare: ")
    assert sentence in ended.stderr


def kept(score: float, *, left: int = 0) -> Kept:
    mask = np.zeros((10, 10), dtype=bool)
    mask[:, left : left + 5] = True
    return Kept(score, (left, 0.0, left + 5.0, 10.0), mask)


def test_comparison_matches_queries_by_number() -> None:
    """Queries are matched by their number; queries that one side kept are only counted."""
    sums = Parity()
    sums.add({1: kept(0.9), 2: kept(0.8), 3: kept(0.6)}, {1: kept(0.9), 2: kept(0.75, left=1), 4: kept(0.6)})
    figures = sums.figures()
    assert (figures["kept_by_both"], figures["only_reference"], figures["only_ours"]) == (2, 1, 1)
    assert figures["mask_iou_min"] == pytest.approx(40 / 60, abs=1e-5)
    assert figures["score_error_max"] == pytest.approx(0.05)
    assert figures["box_error_max_px"] == pytest.approx(1.0)
    assert len(sums.missed(exact=True)) == 3
    assert len(sums.missed(exact=False)) == 2


def test_comparison_without_kept_queries_fails() -> None:
    """A comparison without kept queries misses the targets."""
    sums = Parity()
    sums.add({}, {})
    assert sums.missed(exact=True)


def test_threshold_of_random_weights_is_in_the_widest_gap() -> None:
    """The threshold is in the widest gap of the middle half, so that some queries are kept."""
    scores = [0.9, 0.1, 0.2, 0.21, 0.42, 0.22, 0.4, 0.41]
    assert widest_gap(scores) == pytest.approx(0.31)
