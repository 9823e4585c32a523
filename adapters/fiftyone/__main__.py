"""An example: find objects in a folder of images, and look at them in FiftyOne's App.

python -m adapters.fiftyone FOLDER --prompts car person
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import fiftyone

from adapters.fiftyone.model import MAX_CONCURRENT, Sam3Model
from sam3_client import Client, Sam3Error

FIELD = "sam3"


def main() -> None:
    """Make the dataset, apply the model, open the App."""
    arguments = _parser().parse_args()
    if not arguments.folder.is_dir():
        sys.exit(f"{arguments.folder} is no folder")
    try:
        with Client() as client:
            client.model_info()  # a wrong URL or key is one error, not one for each image
            dataset = fiftyone.Dataset.from_images_dir(
                str(arguments.folder), name=arguments.name, overwrite=True, persistent=True
            )
            model = Sam3Model(client, arguments.prompts, score_threshold=arguments.score_threshold)
            dataset.apply_model(model, label_field=FIELD, batch_size=MAX_CONCURRENT)
    except Sam3Error as error:
        sys.exit(str(error))
    counts = dataset.count_values(f"{FIELD}.detections.label")
    for prompt in arguments.prompts:
        sys.stdout.write(f"{prompt}: {counts.get(prompt, 0)}\n")
    if arguments.app:
        dataset.app_config.color_scheme = fiftyone.ColorScheme(color_by="value")  # each label its own
        dataset.save()
        fiftyone.launch_app(dataset).wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adapters.fiftyone",
        description="Make a FiftyOne dataset of a folder of images; its field sam3 gets what SAM 3 finds. "
        "Reads SAM3_URL and SAM3_API_KEY.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", nargs="+", required=True, metavar="TEXT", help="what to find")
    parser.add_argument("--score-threshold", type=float, help="0 to 1 (the server's default)")
    parser.add_argument("--name", default="sam3", help="of the dataset; one of this name is replaced")
    parser.add_argument("--no-app", dest="app", action="store_false", help="do not open FiftyOne's App")
    return parser


if __name__ == "__main__":
    main()
