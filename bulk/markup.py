"""Builds HTML and SVG as a tree, so that all text is escaped where the tree is written."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

Element = ET.Element
Child = Element | str | None

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls, and what changes the direction of the text around it: names could pretend to be others."""


def element(tag: str, *children: Child, **attributes: str) -> Element:
    """An element with its children in their order; None is left out.

    In the names of attributes a `_` stands for a hyphen, and one at the end is left out: `class_`.
    """
    made = Element(
        tag, {name.rstrip("_").replace("_", "-"): visible(text) for name, text in attributes.items()}
    )
    for child in children:
        if isinstance(child, str):
            _append_text(made, visible(child))
        elif child is not None:
            made.append(child)
    return made


def visible(text: str) -> str:
    """The text with a replacement character for each character that could hide or reverse others."""
    return _INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", text)


def document(root: Element) -> str:
    """The HTML document of an `html` element. The text of `style` and `script` is not escaped."""
    return f"<!doctype html>\n{ET.tostring(root, encoding='unicode', method='html')}\n"


def _append_text(parent: Element, text: str) -> None:
    if len(parent):
        last = parent[-1]
        last.tail = (last.tail or "") + text
    else:
        parent.text = (parent.text or "") + text
