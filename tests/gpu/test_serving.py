"""On a GPU: nothing is compiled and no CUDA graph is captured while requests are served.

    python -m pytest -c /dev/null --rootdir . --noconftest tests/gpu

Needs torch with CUDA, Triton, a C compiler and the packages of `sam3_runner`, and not those of the server,
which the other tests' conftest.py imports.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sam3_runner.images.decoded import LocalImage
from sam3_runner.images.square import to_square
from sam3_runner.masks import nvrtc
from sam3_runner.network import operations
from sam3_runner.prompts import MAX_BOXES, ConceptPrompt
from sam3_runner.serving.engine import Engine, EngineConfig, SegmentRequest
from tests.concepts import concepts

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU that torch can use")

MAX_BATCH, MAX_PROMPTS = 8, 10
LOAD_TIMEOUT_S = 300.0
SIDE_PX = 336
"""Of the demo checkpoint."""
SAMPLE = Path(__file__).parents[2] / "examples" / "sample.jpg"
KNOWN = ["purple circle", "triangles", "star", "red shape", "ring"]
"""Prompts of which the demo finds some in the sample, so that masks are drawn."""
UNUSED_WIDTH = 16
"""No norm of the network has it: its kernel is compiled when it is first used."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The demo checkpoint, ready."""
    engine = Engine(EngineConfig("demo", "cuda", max_batch=MAX_BATCH))
    engine.start()
    limit_s = time.monotonic() + LOAD_TIMEOUT_S
    while engine.status().state == "loading":
        assert time.monotonic() < limit_s, engine.status().detail
        time.sleep(0.1)
    assert engine.ready, engine.status().detail
    return engine


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts kernels that Triton compiles or reads from disk, files that NVRTC compiles, and captures."""
    triton: Any = pytest.importorskip("triton")
    made: Counter[str] = Counter()
    begin_capture: Any = torch.cuda.CUDAGraph.capture_begin
    compile_cuda = nvrtc.compile_cuda

    def counted_capture(*args: Any, **kwargs: Any) -> None:
        made["captures"] += 1
        begin_capture(*args, **kwargs)

    def counted_compilation(source_file: Path, architecture: str) -> bytes:
        made["files of CUDA C"] += 1
        return compile_cuda(source_file, architecture)

    def count_compilation(*, fn: Any, **_: Any) -> None:
        made["compilations"] += 1
        made[f"of {fn.name}"] += 1

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", counted_capture)
    monkeypatch.setattr(nvrtc, "compile_cuda", counted_compilation)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_post_compile_hook = count_compilation
        yield made


def squares() -> list[LocalImage]:
    """Squares of the demo's side: the sample, and noise with no instance."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    return [to_square(Image.open(SAMPLE), SIDE_PX), LocalImage(noise, width=1920, height=1080)]


def test_nothing_is_made_while_serving(engine: Engine, made: Counter[str]) -> None:
    """Batches of 1 to 8 requests with 1 to 10 prompts each, old and new, compile and capture nothing."""
    pictures, new_texts, masks = squares(), (f"thing {number}" for number in count()), 0
    for batch in range(1, MAX_BATCH + 1):
        for prompts in range(1, MAX_PROMPTS + 1):
            requests = []
            for row in range(batch):
                texts = [*KNOWN[: prompts // 2], *(next(new_texts) for _ in range(prompts - prompts // 2))]
                picture = pictures[(row + prompts) % len(pictures)]
                requests.append(SegmentRequest(picture, concepts(*texts), time.monotonic() + LOAD_TIMEOUT_S))
            for outcome in engine.segment(requests):
                assert outcome.results is not None, outcome.error
                assert len(outcome.results) == prompts
                masks += sum(len(result.instances) for result in outcome.results)
            assert made == {}, f"a batch of {batch} requests with {prompts} prompts each"
    assert masks, "no mask was drawn"


def boxed(boxes: int, text: str | None) -> ConceptPrompt:
    """A prompt with so many boxes, every second one negative; it keeps every query, to draw masks."""
    corners = [(20.0 + 150 * (number % 8), 15.0 + 170 * (number // 8)) for number in range(boxes)]
    return ConceptPrompt(
        text,
        tuple((x, y, x + 90, y + 80) for x, y in corners),
        tuple(number % 2 == 0 for number in range(boxes)),
        score_threshold=0.0,
    )


@pytest.mark.parametrize("texts", [0, 1, 5])
@pytest.mark.parametrize("pairs", [1, 2, 3, 4, 5, 9])
def test_nothing_is_made_for_boxes(engine: Engine, made: Counter[str], pairs: int, texts: int) -> None:
    """Prompts with 1 to 32 boxes, with a text and without, alone and beside texts, in one request and two."""
    pictures, new_texts = squares(), (f"boxed thing {number}" for number in count())
    for boxes in (1, 4, 5, MAX_BOXES):
        of_boxes = [
            boxed(1 if pair % 3 == 2 else boxes, next(new_texts) if pair % 2 else None)
            for pair in range(min(pairs, MAX_PROMPTS - texts))
        ]
        prompts = [*of_boxes, *concepts(*KNOWN[:texts])]
        for batch, with_masks in ((1, False), (2, True)):
            requests = [
                SegmentRequest(picture, prompts, time.monotonic() + LOAD_TIMEOUT_S, with_masks=with_masks)
                for picture in pictures[:batch]
            ]
            for outcome in engine.segment(requests):
                assert outcome.results is not None, outcome.error
                assert [result.prompt for result in outcome.results] == [each.model_text for each in prompts]
                assert all(result.instances for result in outcome.results[: len(of_boxes)])
            assert made == {}, f"{boxes} boxes, {batch} requests"


def test_what_is_made_is_counted(made: Counter[str]) -> None:
    """A new kernel and a new graph are counted, so that the test above can fail."""
    if "norm" in operations.plain_steps:
        pytest.skip("the kernel does not work on this machine: the engine's log has the reason")
    x = torch.zeros(4, UNUSED_WIDTH, device="cuda", dtype=torch.float16)
    layer = nn.LayerNorm(UNUSED_WIDTH).to("cuda")
    with torch.inference_mode():
        operations.norm(x, layer)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            operations.norm(x, layer)
    source_file = Path(nvrtc.__file__).with_name("kernels.cu")
    nvrtc.Kernels(source_file, (), torch.device("cuda"))
    assert (made["compilations"], made["captures"], made["files of CUDA C"]) == (1, 1, 1), made
