"""Executes examples/quickstart.ipynb and keeps its outputs in the file, after a change of it.

python -m examples.run_quickstart
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from nbclient import NotebookClient

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"
CELL_TIMEOUT_S = 180
"""The first cell starts a server."""


def main() -> None:
    """Execute the notebook and write it."""
    nbformat.write(executed(NOTEBOOK), NOTEBOOK)  # type: ignore[no-untyped-call]


def read(path: Path) -> NotebookNode:
    """A notebook's cells and outputs."""
    notebook: NotebookNode = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    return notebook


def executed(path: Path) -> NotebookNode:
    """A notebook with the outputs of a new kernel in its folder.

    Pillow's images have two forms, PNG and JPEG; only the smaller one is kept. No times are kept.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has the cell and its traceback.
    """
    notebook = read(path)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/jpeg" in output.get("data", {}):
                output.data.pop("image/png", None)
    return notebook


if __name__ == "__main__":
    main()
