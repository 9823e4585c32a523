"""All instances of a run as one JSON file in COCO's annotation format, written picture by picture.

The conventions are those of `outputs.coco`. Memory does not grow with the run: images go to the file at once,
annotations to a second file, which is appended at the end.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any, Self

from pycocotools import mask as coco_mask

from outputs.coco import INFO, coco_annotation, coco_categories

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from bulk.rows import PictureRow


class CocoFile:
    """A COCO file that grows by one picture after another. Use it as a context manager.

    Images and annotations are numbered from 1, in the order in which rows are added, so that the same rows
    give the same bytes. Pictures with an error are left out. The file is there when the block has ended
    without an exception; otherwise `path` is unchanged.

    Args:
        path: of the file. Its folder needs room for the file and for its annotations a second time.
        prompts: of the run: the categories.
        source: of the run, which file names are relative to.
    """

    def __init__(self, path: Path, *, prompts: Sequence[str], source: str) -> None:
        self._path = path
        self._unfinished = path.with_name(f"{path.name}.unfinished")
        self._source = source
        self._categories = coco_categories(prompts)
        self._category_ids = {category["name"]: category["id"] for category in self._categories}
        self._open_files = ExitStack()
        self._images = 0
        self._annotations = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._file = stack.enter_context(self._unfinished.open("w", encoding="ascii", newline="\n"))
            self._annotation_file: IO[str] = stack.enter_context(
                tempfile.TemporaryFile("w+", encoding="ascii", newline="\n", dir=self._path.parent)
            )
            self._open_files = stack.pop_all()
        self._file.write(f'{{"info":{_json(INFO)},\n"images":[')
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with self._open_files:
                if error is None:
                    self._join()
            if error is None:
                self._unfinished.replace(self._path)
        finally:
            self._unfinished.unlink(missing_ok=True)

    def add(self, row: PictureRow) -> None:
        """Write a picture and its instances; nothing for an error.

        Raises:
            KeyError: an instance has a prompt that is not of the run.
        """
        if row.status != "done":
            return
        self._images += 1
        image = {
            "id": self._images,
            "file_name": file_name(row.image, self._source),
            "width": row.width,
            "height": row.height,
        }
        _write_item(self._file, image, self._images)
        boxes = coco_mask.toBbox([each.coco_rle for each in row.instances]).astype(int).tolist()
        for instance, box in zip(row.instances, boxes, strict=True):
            self._annotations += 1
            annotation = coco_annotation(
                self._annotations,
                image_id=self._images,
                category_id=self._category_ids[instance.prompt],
                box=box,
                area_px=instance.area_px,
                rle=instance.coco_rle,
                score=instance.score,
            )
            _write_item(self._annotation_file, annotation, self._annotations)

    def _join(self) -> None:
        self._file.write(f'],\n"categories":{_json(self._categories)},\n"annotations":[')
        self._annotation_file.seek(0)
        shutil.copyfileobj(self._annotation_file, self._file)
        self._file.write("]}\n")


def file_name(image: str, source: str) -> str:
    """How a COCO file names a picture: its path below `source`, or its whole URI if it is elsewhere."""
    name = image.removeprefix(f"{source.rstrip('/')}/")
    # A key with two slashes would become the path of another file.
    return image if name.startswith("/") else name


def _write_item(file: IO[str], item: dict[str, Any], number: int) -> None:
    """Append an item to a JSON array, on a line of its own."""
    file.write("\n" if number == 1 else ",\n")
    file.write(_json(item))


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
