"""The labelling interface of a project: which tags SAM 3 fills, and which text it searches for each label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from label_studio_sdk.label_interface import LabelInterface

from adapters.label_studio.errors import UnsupportedInterface

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Form = Literal["polygon", "brush"]

FORMS: dict[str, Form] = {"polygonlabels": "polygon", "brushlabels": "brush"}
"""Tags that take a mask, by the form in which they take it."""


@dataclass(frozen=True, slots=True)
class Label:
    """One label of a tag.

    Attributes:
        name: as Label Studio stores it: the `alias`, or else the `value`.
        prompt: the text to search for: the attribute `prompt`, or else `name`. "" is none: the label is
            found by rectangles alone.
    """

    name: str
    prompt: str


@dataclass(frozen=True, slots=True)
class MaskTag:
    """A `PolygonLabels` or `BrushLabels` tag.

    Attributes:
        name: of the tag.
        to_name: of the `Image` tag that it labels.
        form: in which it takes a mask.
        labels: in their order.
        image_key: of the image in a task's data.
    """

    name: str
    to_name: str
    form: Form
    labels: tuple[Label, ...]
    image_key: str


@dataclass(frozen=True, slots=True)
class Interface:
    """What matters of a labelling interface.

    Attributes:
        tags: those that SAM 3 fills, at least one, all of one image. A label that several tags have
            belongs to the first of them, so that no object is returned twice.
    """

    tags: tuple[MaskTag, ...]

    @property
    def image_key(self) -> str:
        """Of the image in a task's data."""
        return self.tags[0].image_key

    def find(self, label: str) -> tuple[MaskTag, Label] | None:
        """The tag and the label of this name."""
        return next(
            ((tag, each) for tag in self.tags for each in tag.labels if each.name == label),
            None,
        )


def read_interface(config: str) -> Interface:
    """Read a label config.

    Args:
        config: its XML.

    Raises:
        UnsupportedInterface: it is no label config, or has no tag that SAM 3 can fill.
    """
    try:
        parsed = LabelInterface(config)
    except Exception as error:  # the SDK raises its own, lxml's, and bare Exception
        raise UnsupportedInterface(
            "The label config could not be read; save it again in Label Studio."
        ) from error
    tags = list(_mask_tags(parsed.controls or ()))
    if not tags:
        raise UnsupportedInterface(
            "The label config has no PolygonLabels or BrushLabels tag for an Image; add one to get masks."
        )
    return Interface(tuple(tag for tag in tags if tag.to_name == tags[0].to_name))


def _mask_tags(controls: Iterable[Any]) -> Iterator[MaskTag]:
    seen: set[str] = set()
    for control in controls:
        form = FORMS.get(str(control.tag).lower())
        image = next((each for each in control.objects if str(each.tag).lower() == "image"), None)
        if form is None or image is None:
            continue
        if "valueList" in image.attr or not str(image.value).startswith("$"):
            raise UnsupportedInterface(
                f'The Image tag "{image.name}" needs a value like "$image"; several pages are not supported.'
            )
        labels = tuple(label for label in _labels(control) if label.name not in seen)
        seen |= {label.name for label in labels}
        if labels:
            yield MaskTag(control.name, image.name, form, labels, image.value_name)


def _labels(control: Any) -> Iterator[Label]:
    for name, tag in control.labels_attrs.items():
        yield Label(name, str(tag.attr.get("prompt", name)).strip())
