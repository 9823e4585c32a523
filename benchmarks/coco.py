"""A folder of images with annotations in COCO format. Each fault raises a `DatasetError` of one sentence."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from PIL import Image, ImageOps
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError

if TYPE_CHECKING:
    from pathlib import Path

Polygon = Annotated[list[float], Field(min_length=6)]


class DatasetError(Exception):
    """The folder or its annotations cannot be used; the message says why."""


class CocoImage(BaseModel):
    """One image: `file_name` below the folder, `width` and `height` in px."""

    id: int
    file_name: str
    width: int = Field(ge=1)
    height: int = Field(ge=1)


class CocoCategory(BaseModel):
    """A concept; `name` is the prompt."""

    id: int
    name: str = Field(min_length=1)


class Rle(BaseModel):
    """A mask as run lengths, compressed (text) or not; `size` is height, width."""

    size: tuple[int, int]
    counts: str | list[int]


Segmentation = Annotated[
    Annotated[list[Polygon], Field(min_length=1), Tag("polygons")] | Annotated[Rle, Tag("rle")],
    Discriminator(lambda value: "polygons" if isinstance(value, list) else "rle"),
]


class CocoAnnotation(BaseModel):
    """One object; `bbox` is x, y, width, height in px. A missing box or area is computed from the mask."""

    image_id: int
    category_id: int
    segmentation: Segmentation
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)] | None = None
    area: float | None = None
    iscrowd: int = 0


class CocoFile(BaseModel):
    """The parts of a COCO instances file that we read."""

    images: list[CocoImage] = Field(min_length=1)
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A COCO-format folder: its index, with every mask as compressed RLE, and the chosen images."""

    coco: Any
    folder: Path
    image_ids: list[int]

    @property
    def prompts(self) -> dict[int, str]:
        """The name of each category, by its id."""
        return {number: category["name"] for number, category in sorted(self.coco.cats.items())}

    def image(self, image_id: int) -> Image.Image:
        """Read the image in RGB, rotated by its EXIF orientation.

        Raises:
            DatasetError: the image cannot be read, or its size differs from the annotations.
        """
        annotated = self.coco.imgs[image_id]
        path = self.folder / annotated["file_name"]
        try:
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DatasetError(f"{path} cannot be read: {error}") from error
        size = annotated["width"], annotated["height"]
        if image.size != size:
            raise DatasetError(f"{path} is {image.size}, but annotated as {size}")
        return image


def read_dataset(images: Path, annotations: Path, limit: int | None = None) -> Dataset:
    """Index a COCO-format folder; `limit` chooses its first images, by id. Raises `DatasetError`."""
    try:
        content = CocoFile.model_validate_json(annotations.read_bytes())
    except OSError as error:
        raise DatasetError(f"{annotations} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DatasetError(
            f"{annotations} is not a COCO file: {place or 'the whole file'}: {first['msg']}"
        ) from error
    try:
        index = _index(content)
    except DatasetError as error:
        raise DatasetError(f"{annotations}: {error}") from error
    dataset = Dataset(index, images, sorted(index.imgs)[:limit])
    names = [index.imgs[image_id]["file_name"] for image_id in dataset.image_ids]
    # Checked first, because prediction may take hours.
    if missing := [name for name in names if not (images / name).is_file()]:
        raise DatasetError(
            f"{len(missing)} of {len(names)} images are not in {images}: {missing[0]} is missing"
        )
    return dataset


def _index(content: CocoFile) -> Any:
    index = COCO()
    index.dataset = content.model_dump()
    # COCOeval uses the id 0 for "unmatched", and needs unique ids.
    for number, annotation in enumerate(index.dataset["annotations"], 1):
        annotation["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    for annotation in index.dataset["annotations"]:
        _complete(annotation, index)
    return index


def _complete(annotation: dict[str, Any], index: Any) -> None:
    """Convert the mask to compressed RLE; add box and area."""
    place = f"annotations.{annotation['id'] - 1}"
    image = index.imgs.get(annotation["image_id"])
    if image is None or annotation["category_id"] not in index.cats:
        raise DatasetError(f"{place} names an image or a category that is not listed")
    mask = annotation["segmentation"] = index.annToRLE(annotation)
    if tuple(mask["size"]) != (image["height"], image["width"]):
        raise DatasetError(f"{place} has a mask of {tuple(mask['size'])}, which is not its image's size")
    if annotation["bbox"] is None:
        annotation["bbox"] = rle.toBbox(mask).tolist()
    if annotation["area"] is None:
        annotation["area"] = int(rle.area(mask))
