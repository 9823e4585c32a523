"""On a GPU: a second start reads its kernels from disk, and a start without a C compiler serves too.

    python -m pytest -c /dev/null --rootdir . --noconftest tests/gpu

Each start is a process of its own, with the demo checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sam3_runner.inference.kernel_support import STEPS_BY_FILE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU that torch can use")

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 300.0
START = """
import json, logging, sys, time
from pathlib import Path
from PIL import Image
from sam3_runner.images.square import to_square
from sam3_runner.network import operations
from sam3_runner.prompts import ConceptPrompt
from sam3_runner.serving.engine import Engine, EngineConfig, SegmentRequest
logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(message)s", stream=sys.stderr)
engine = Engine(EngineConfig("demo", "cuda", kernel_cache=Path(sys.argv[1])))
engine.start()
while engine.status().state == "loading":
    time.sleep(0.05)
picture = to_square(Image.open("examples/sample.jpg"), 336)
[outcome] = engine.segment([SegmentRequest(picture, [ConceptPrompt("purple circle")], time.monotonic() + 60)])
found = [instance.area_px for result in outcome.results or [] for instance in result.instances]
print(json.dumps({"state": engine.status().state, "found": found, "plain": sorted(operations.plain_steps)}))
"""


@dataclass(frozen=True, slots=True)
class Start:
    """What one start served.

    Attributes:
        state: of the engine, once it was not loading.
        found: areas of the purple circles in the sample.
        plain: steps whose definition runs in place of a kernel.
        log: its lines.
    """

    state: str
    found: list[int]
    plain: list[str]
    log: str


def start(kernels: Path, **variables: str) -> Start:
    """Start an engine in a new process, with environment variables besides those of this one."""
    environment = {**{name: value for name, value in os.environ.items() if name != "CC"}, **variables}
    ended = subprocess.run(
        [sys.executable, "-c", START, str(kernels)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    sys.stderr.write(ended.stderr)  # pytest shows it with -rA: the time of each step
    return Start(**json.loads(ended.stdout.splitlines()[-1]), log=ended.stderr)


def files_in(folder: Path) -> set[tuple[str, int]]:
    """Every file below the folder, and when it was written."""
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_second_start_compiles_nothing(tmp_path: Path) -> None:
    """It needs no compiler, runs every kernel, writes no file, and finds the same."""
    kernels = tmp_path / "kernels"
    first = start(kernels)
    assert (first.state, first.plain) == ("ok", [])
    written = files_in(kernels)
    assert written
    # Not by PATH: Triton asks `file` about this machine, and the answer is a part of its keys.
    second = start(kernels, CC=str(tmp_path / "no compiler"))
    assert (second.state, second.plain, second.found) == ("ok", [], first.found)
    assert files_in(kernels) == written


def test_start_without_a_compiler(tmp_path: Path) -> None:
    """With no kernel on disk and no compiler, PyTorch computes the steps, and the log says so."""
    served = start(tmp_path / "kernels", PATH=str(tmp_path / "no programs"))
    assert served.state == "ok"
    assert len(served.found) == 1
    assert set(served.plain) == set().union(*STEPS_BY_FILE.values())
    [warning] = [line for line in served.log.splitlines() if "do not work here" in line]
    assert "Failed to find C compiler" in warning
