"""On a GPU: a bulk run uses it. Needs requirements-bulk.lock.

python -m pytest -c /dev/null --rootdir . --noconftest tests/gpu
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU that torch can use")

ROOT = Path(__file__).parents[2]
RUN_TIMEOUT_S = 180
PICTURES = 20


def test_run_uses_the_gpus(tmp_path: Path) -> None:
    """Every picture is done, with its purple circles, on each GPU that there is."""
    images = tmp_path / "in"
    images.mkdir()
    for number in range(PICTURES):
        shutil.copy(ROOT / "examples/sample.jpg", images / f"{number}.jpg")
    command = [sys.executable, "-m", "sam3_client", "bulk", "--weights", "demo", "--shard-pictures", "3"]
    command += ["--images", str(images), "--prompts", "purple circle", "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert f"{torch.cuda.device_count()} on GPU" in ended.stderr
    [summary] = tmp_path.glob("out/*/summary.json")
    content = json.loads(summary.read_text())
    assert content["pictures"]["done"] == PICTURES
    assert content["prompts"][0]["pictures"] == PICTURES
