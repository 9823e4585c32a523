"""Downloads the weights before the server starts: `python -m commands.download_weights`, `make weights`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from sam3_runner.errors import WeightsError
from sam3_runner.weights.checkpoint import DEMO
from sam3_runner.weights.download import download
from settings import SettingsError, load_weights_settings


def main() -> None:
    """Fetch what SAM3_WEIGHTS_PATH lacks; a failure is one sentence, and 1 the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("stamina").setLevel(logging.ERROR)  # its line for a retry holds no reason
    try:
        read = load_weights_settings()
        if read.sam3_weights_path == DEMO:
            sys.exit("SAM3_WEIGHTS_PATH=demo is embedded: there is nothing to download")
        download(Path(read.sam3_weights_path), read.hub_source)
    except (SettingsError, WeightsError) as error:
        sys.exit(str(error))
    print(f"{read.sam3_weights_path} is complete")  # noqa: T201 - it is a command


if __name__ == "__main__":
    main()
