"""Several rings as one closed path, for formats whose polygons have neither holes nor parts."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outputs.polygons import Point, PolygonRing


def single_path(rings: Sequence[PolygonRing]) -> list[Point]:
    """The rings joined by lines of no width: from the first ring's first point to each other ring and back.

    A fill by the even-odd rule or by the non-zero rule gives the same px as the rings, holes left out. The
    path is not closed by its first point, but each of the rings in it is, where there is more than one.
    """
    first, *others = rings
    if not others:
        return list(first)
    start = first[0]
    return [*first, start, *chain.from_iterable((*ring, ring[0], start) for ring in others)]
