"""Starts the backend: `python -m adapters.label_studio --port 9090`."""

from __future__ import annotations

import argparse
import logging
import os
import sys

import waitress

from adapters.label_studio.app import MAX_BODY_BYTES, create_app
from adapters.label_studio.images import ImageSource
from adapters.label_studio.predictor import Options, Predictor
from sam3_client import Client

THREADS = 4
"""An annotator's request is answered while a batch is predicted."""
ANSWER_TIMEOUT_S = 30.0
MAX_WAIT_S = 10.0
"""While the SAM 3 server is overloaded or loading."""
INFO_TIMEOUT_S = 2.0
"""Label Studio waits three seconds for the answer that needs it."""

logger = logging.getLogger("adapters.label_studio")


def main() -> None:
    """Serve until the process is stopped."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # It logs the addresses of images.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    images = ImageSource(
        _needed("LABEL_STUDIO_URL"),
        _needed("LABEL_STUDIO_API_KEY"),
        max_bytes=arguments.max_image_mb * 1_000_000,
        other_hosts=arguments.image_host,
    )
    options = Options(arguments.score_threshold, arguments.tolerance_px, arguments.time_limit_s)
    with (
        Client(timeout_s=ANSWER_TIMEOUT_S, max_wait_s=MAX_WAIT_S) as client,
        Client(timeout_s=INFO_TIMEOUT_S, max_wait_s=0) as info_client,
    ):
        app = create_app(
            Predictor(client, info_client, images, options),
            os.environ.get("BASIC_AUTH_USER", ""),
            os.environ.get("BASIC_AUTH_PASS", ""),
        )
        logger.info("SAM 3 for Label Studio on http://%s:%d", arguments.host, arguments.port)
        waitress.serve(
            app,
            host=arguments.host,
            port=arguments.port,
            threads=THREADS,
            max_request_body_size=MAX_BODY_BYTES,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adapters.label_studio",
        description="A backend for Label Studio. Reads LABEL_STUDIO_URL, LABEL_STUDIO_API_KEY, SAM3_URL and "
        "SAM3_API_KEY; BASIC_AUTH_USER and BASIC_AUTH_PASS, if set, are what Label Studio must send.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=9090, help="(%(default)s)")
    parser.add_argument(
        "--score-threshold", type=float, help="instances with a higher score are returned (the server's)"
    )
    parser.add_argument(
        "--tolerance-px", type=float, default=1.0, help="of polygons; 0 follows the px (%(default)s)"
    )
    parser.add_argument("--max-image-mb", type=int, default=10, help="of an image file (%(default)s)")
    parser.add_argument(
        "--image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="from which images are fetched too; may be repeated (Label Studio alone)",
    )
    parser.add_argument(
        "--time-limit-s",
        type=float,
        default=60.0,
        help="after which no further task of a request is begun; below ML_TIMEOUT_PREDICT (%(default)s)",
    )
    return parser


def _needed(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        sys.exit(f"Set {name}: the address of Label Studio and an access token are needed to fetch images.")
    return value


if __name__ == "__main__":
    main()
