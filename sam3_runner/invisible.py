"""Invisible characters: which they are, and how they are stripped from the ends of a text. Unicode only."""

from __future__ import annotations

from typing import Final


def trimmed(text: str) -> str:
    """`text` without spaces and invisible marks at its ends."""
    return text.strip(_TRIMMED)


def is_invisible(text: str) -> bool:
    """Whether no character of `text` is visible."""
    return _INVISIBLE.issuperset(text)


def _characters(*ranges: tuple[int, int]) -> str:
    return "".join(chr(point) for first, last in ranges for point in range(first, last + 1))


# Unicode's category Zs.
_SPACES: Final = _characters(
    *((0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
)
# Of category Cf: soft hyphen, zero-width space, joiners, direction, byte order mark; invisible when alone.
_MARKS: Final = _characters(
    *((0xAD, 0xAD), (0x61C, 0x61C), (0x180E, 0x180E), (0x200B, 0x200F)),
    *((0x202A, 0x202E), (0x2060, 0x206F), (0xFEFF, 0xFEFF)),
)
# Other invisible characters: Default_Ignorable_Code_Point, the empty Braille cell, interlinear marks. They
# may be the last character of an emoji or a syllable, so they are not stripped.
_FILLERS: Final = _characters(
    *((0x34F, 0x34F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800)),
    *((0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xFFF9, 0xFFFB)),
    *((0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
)
_TRIMMED: Final = _SPACES + _MARKS
_INVISIBLE: Final = frozenset(_TRIMMED + _FILLERS)
