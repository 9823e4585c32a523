"""The notebook for new users, executed as a reader executes it: it starts the real server itself."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nbformat import NotebookNode

pytestmark = pytest.mark.server

MAX_FILE_BYTES = 100_000


@pytest.fixture(scope="module")
def quickstart() -> Any:
    """The module that executes the notebook. Its libraries take 2 s of a core, which no other test needs."""
    return importlib.import_module("examples.run_quickstart")


def test_notebook_runs_and_shows_what_it_gives(quickstart: Any) -> None:
    """No cell fails, assertions included; the outputs in the file are those of today, but for numbers."""
    kept = quickstart.read(quickstart.NOTEBOOK)
    assert [cell.source for cell in kept.cells[:4] if "overlay" in cell.source], "a picture in three cells"
    assert texts_of(quickstart.executed(quickstart.NOTEBOOK)) == texts_of(kept), (
        "run python -m examples.run_quickstart"
    )


def test_file_is_small_and_has_one_picture(quickstart: Any) -> None:
    """The notebook reads well where it is not executed, and its outputs do not fill the repository."""
    kept = quickstart.read(quickstart.NOTEBOOK)
    outputs = [output for cell in kept.cells for output in cell.get("outputs", [])]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 1
    assert all("image/png" not in output.get("data", {}) for output in outputs)
    assert quickstart.NOTEBOOK.stat().st_size < MAX_FILE_BYTES


def texts_of(notebook: NotebookNode) -> list[list[str]]:
    """The text outputs of each code cell, without the numbers: scores differ a little between processors."""
    return [
        [re.sub(r"\d+(\.\d+)?", "0", text_of(output)) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def text_of(output: NotebookNode) -> str:
    """What a cell printed or answered."""
    return str(output["text"] if output.output_type == "stream" else output["data"]["text/plain"])
