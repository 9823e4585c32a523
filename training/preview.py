"""A contact sheet to look at: `python -m training.preview sheet.png [--checkpoint FOLDER]`.

Without a checkpoint the outlines are the truth; with one they are what it finds.
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
from training.concepts import PROMPTS_PER_SCENE, PromptTokens
from training.score import predict_masks
from training.weights import load_weights

if TYPE_CHECKING:
    from torch import Tensor

_COLUMNS = 4
_LINE = (255, 0, 255)


def main() -> None:
    """Draw training scenes, four prompts each, one row a scene."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--seed", type=int, default=900_000_000)
    arguments = parser.parse_args()
    batch = BatchMaker(scenes=arguments.scenes, seed=arguments.seed, device="cpu", compiled=False).make(0)
    titles = PromptTokens("cpu").read(batch.ids)
    if arguments.checkpoint is None:
        masks, prompt = _truth(batch.owner, batch.counted)
    else:
        model = load_weights(arguments.checkpoint)
        with torch.inference_mode():
            masks, prompt = predict_masks(model, batch.pixels, batch.ids, batch.ids_valid)
    sheet = Image.new("RGB", (_COLUMNS * SIDE_PX, arguments.scenes * SIDE_PX))
    for number, title in enumerate(titles):
        scene, column = divmod(number, PROMPTS_PER_SCENE)
        picture = batch.pixels[scene].permute(1, 2, 0).numpy().copy()
        for mask in masks[prompt == number].numpy():
            picture[_outline(mask)] = _LINE
        tile = Image.fromarray(picture)
        ImageDraw.Draw(tile).text((6, 4), title, fill=_LINE)
        sheet.paste(tile, (column * SIDE_PX, scene * SIDE_PX))
    sheet.save(arguments.sheet)


def _truth(owner: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    prompt, index = counted.nonzero(as_tuple=True)
    return owner[prompt // PROMPTS_PER_SCENE] == (index + 1)[:, None, None], prompt


def _outline(mask: np.ndarray) -> np.ndarray:
    inner = mask.copy()
    for axis in (0, 1):
        inner &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    edge: np.ndarray = mask & ~inner
    return edge


if __name__ == "__main__":
    main()
