"""The same model under LitServe (Lightning AI), as a peer of the server.

    python -m venv /tmp/litserve && /tmp/litserve/bin/pip install -r requirements.lock litserve==0.2.19
    python -m benchmarks.serve --scenarios closed ten-prompts --peer-python /tmp/litserve/bin/python

LitServe is not a dependency of this project. A form holds a JPEG and its prompts; the answer is JSON with the
instances and the PNG of their masks' union. One process runs `SAM3Predictor` on batches of at most MAX_BATCH
requests; it decodes the batch's files and encodes its PNGs in threads, by the same functions as our server.

It does less than our server: nothing is claimed, fetched, stored or settled, no key is checked, and hostile
files are decoded in the process that holds the model.
"""

import argparse
import base64
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import litserve
from fastapi import Request

from outputs.mask_png import encode_png
from sam3_runner import SAM3Predictor
from sam3_runner.images.decode import decode_image
from sam3_runner.images.decoded import LocalImage
from sam3_runner.images.image_file import DEFAULT_MAX_PIXELS
from sam3_runner.images.read import read_image_file
from sam3_runner.instances import UnionResult, packed_union
from sam3_runner.prompts import ConceptPrompt
from sam3_runner.serving.cpu_share import cpu_share

MAX_BATCH = 8
BATCH_WAIT_S = 0.005
"""How long a batch waits for more requests. With 0, LitServe's loop keeps a core busy while it is idle."""
API_SERVERS = 2
TIMEOUT_S = 120.0


class SegmentAPI(litserve.LitAPI):  # type: ignore[misc] # LitServe is not installed where types are checked
    """LitServe's callbacks around the predictor."""

    def __init__(self, weights: str) -> None:
        super().__init__(api_path="/api/v1/predict", max_batch_size=MAX_BATCH, batch_timeout=BATCH_WAIT_S)
        self._weights = weights

    def setup(self, device: str) -> None:
        """Load the model in the worker's process."""
        self._threads = ThreadPoolExecutor(cpu_share().threads)
        self._predictor = SAM3Predictor(self._weights, device.partition(":")[0], max_images=MAX_BATCH)
        self._predictor.load()
        for images in (1, MAX_BATCH):
            self._predictor.warm_up(images)

    # LitServe reads the annotation, and passes the form.
    def decode_request(self, request: Request) -> tuple[bytes, list[str]]:
        """The file and the prompts; the files of a batch are decoded together, in `predict`."""
        form: Any = request
        return form["image"].file.read(), form.getlist("prompt")

    def predict(self, batch: list[tuple[bytes, list[str]]]) -> list[dict[str, Any]]:
        """One answer per request."""
        images = list(self._threads.map(self._decode, (data for data, _ in batch)))
        prompts = [[ConceptPrompt(text) for text in texts] for _, texts in batch]
        begin_s = time.perf_counter()
        found = self._predictor.segment_united(list(zip(images, prompts, strict=True)))
        elapsed_ms = (time.perf_counter() - begin_s) * 1000
        pngs = self._threads.map(_png, found)
        return [_answer(*each, elapsed_ms) for each in zip(found, pngs, strict=True)]

    def _decode(self, data: bytes) -> LocalImage:
        predictor = self._predictor
        assert predictor.checkpoint is not None
        file = read_image_file(data, max_pixels=DEFAULT_MAX_PIXELS)
        return decode_image(file, predictor.checkpoint.input_side_px, predictor.max_stored_px)


def _png(results: list[UnionResult]) -> bytes:
    return encode_png(packed_union(results), results[0].image_width)


def _answer(results: list[UnionResult], png: bytes, elapsed_ms: float) -> dict[str, Any]:
    instances = [
        {"label": result.prompt, "score": each.score, "box": each.box, "area": each.area_px}
        for result in results
        for each in result.instances
    ]
    mask = base64.b64encode(png).decode()
    return {"instances": instances, "mask_png": mask, "inference_time_ms": round(elapsed_ms, 1)}


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", default="demo")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    server = litserve.LitServer(SegmentAPI(options.weights), devices=1, timeout=TIMEOUT_S)
    server.run(
        host="127.0.0.1",
        port=options.port,
        num_api_servers=API_SERVERS,
        log_level="warning",
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
