"""How rows are split over CUDA graphs; the graphs themselves are tested on a GPU."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3_runner.inference.graphs import MAX_SPARE_ROWS, split_rows
from sam3_runner.inference.passes import _sizes


def graph_of(part: int, sizes: list[int]) -> int:
    """The size of the graph that runs so many rows."""
    return min(size for size in sizes if size >= part)


@pytest.mark.parametrize(
    ("rows", "parts"), [(1, [1]), (2, [2]), (3, [2, 1]), (5, [4, 1]), (6, [4, 2]), (7, [7]), (8, [8])]
)
def test_parts_of_up_to_eight_rows(rows: int, parts: list[int]) -> None:
    """Seven rows run as a graph of eight; three, five and six are split, with no spare row."""
    assert split_rows(rows, [1, 2, 4, 8]) == parts


@given(st.data())
@settings(max_examples=500, deadline=None, derandomize=True)
def test_no_graph_runs_twice(data: st.DataObject) -> None:
    """All rows are covered, and each part has a graph of its own: none overwrites the results of another.

    Also where a size was left out, since the GPU's memory was too full for it.
    """
    largest = data.draw(st.integers(1, 64))
    possible = _sizes(largest)
    sizes = sorted({1, *data.draw(st.sets(st.sampled_from(possible)))})
    rows = data.draw(st.integers(1, max(sizes)))
    parts = split_rows(rows, sizes)
    graphs = [graph_of(part, sizes) for part in parts]
    assert sum(parts) == rows
    assert len(set(graphs)) == len(graphs)
    if sizes == possible:
        assert all(graph - part <= graph * MAX_SPARE_ROWS for part, graph in zip(parts, graphs, strict=True))
