"""Draw a contact sheet of scenes: `python -m training.preview sheet.png [--checkpoint FOLDER]`.

The outlines are the ground truth, or with a checkpoint its predictions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw

from training.architecture import SIDE_PX
from training.batches import BatchMaker
from training.concepts import PromptTokens
from training.exemplars import TASKS_PER_SCENE
from training.score import kept_masks
from training.weights import load_weights

if TYPE_CHECKING:
    from torch import Tensor

_LINE_RGB = (255, 0, 255)
_BOX_RGB = ((255, 0, 0), (0, 255, 0))
"""Of negative and of positive exemplars."""


def main() -> None:
    """Draw training scenes, six tasks each, one row per scene."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--seed", type=int, default=900_000_000)
    arguments = parser.parse_args()
    batch = BatchMaker(scenes=arguments.scenes, seed=arguments.seed, device="cpu", compiled=False).make(0)
    titles = PromptTokens("cpu").decode(batch.ids)
    if arguments.checkpoint is None:
        masks, prompts = _true_masks(batch.owner, batch.counted)
    else:
        model = load_weights(arguments.checkpoint)
        exemplars = (batch.exemplars, batch.labels, batch.exemplars_valid)
        with torch.inference_mode():
            masks, prompts = kept_masks(model, batch.pixels, batch.ids, batch.ids_valid, exemplars)
    sheet = Image.new("RGB", (TASKS_PER_SCENE * SIDE_PX, arguments.scenes * SIDE_PX))
    for prompt, title in enumerate(titles):
        scene, column = divmod(prompt, TASKS_PER_SCENE)
        picture = batch.pixels[scene].permute(1, 2, 0).numpy().copy()
        for mask in masks[prompts == prompt].numpy():
            picture[_outline(mask)] = _LINE_RGB
        tile = Image.fromarray(picture)
        drawing = ImageDraw.Draw(tile)
        drawing.text((6, 4), title, fill=_LINE_RGB)
        valid = batch.exemplars_valid[prompt]
        for box, label in zip(batch.exemplars[prompt][valid], batch.labels[prompt][valid], strict=True):
            corners = torch.cat([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2]) * SIDE_PX
            drawing.rectangle(corners.tolist(), outline=_BOX_RGB[int(label)])
        sheet.paste(tile, (column * SIDE_PX, scene * SIDE_PX))
    sheet.save(arguments.sheet)


def _true_masks(owner: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    prompts, index = counted.nonzero(as_tuple=True)
    return owner[prompts // TASKS_PER_SCENE] == (index + 1)[:, None, None], prompts


def _outline(mask: np.ndarray) -> np.ndarray:
    inner = mask.copy()
    for axis in (0, 1):
        inner &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    edge: np.ndarray = mask & ~inner
    return edge


if __name__ == "__main__":
    main()
